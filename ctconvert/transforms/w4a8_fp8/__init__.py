"""INT4 weights for CUTLASS' W4A8 GEMM with FP8 activations on SM90.

Before (N output features, K input features, groups of 128 along K)::

    words         i32 [N, K/8]    K-packed codes q + 8, the code of k in nibble k % 8
    scale         [N, K/128]      float

After::

    words         i32 [N, K/8]    the kernel takes it as its transpose, a stride
    chan_scale    f32 [N, 1]
    scale         e4m3 [K/128 * N * 8]

The nibble of (n, k), counted from the start with the low one of a byte first, is::

    512*(n//16 + (N/16)*(k//32)) + 16*((k//4)%4 + 4*(n%8)) + k%4 + 4*((n//8)%2) + 8*((k//16)%2)

and holds q mod 16, but 8 - q where q is 1 to 7. These are ``cutlass_encode_and_reorder_int4b`` and
``cutlass_pack_scale_fp8`` of vLLM's csrc, with the scales that its ``CutlassW4A8LinearKernel``
hands to the latter.

CPU tensors take torch code, CUDA and XPU tensors Triton kernels, of
:mod:`ctconvert.transforms.reorder` and :mod:`ctconvert.transforms.recode`; the results are equal
bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ctconvert.transforms import reorder
from ctconvert.transforms.reorder import Order

if TYPE_CHECKING:
    import torch

#: What N and K must be multiples of; K's is the group as well.
BLOCK_N, BLOCK_K = 128, 128

_FP8_MAX = 448.0


def check_shape(n: int, k: int) -> None:
    """Raises ValueError unless N and K are multiples of 128."""
    reorder.check_multiples("W4A8-FP8", n, k, BLOCK_N, BLOCK_K)


def w4a8_fp8_pack(words: torch.Tensor) -> torch.Tensor:
    """K-packed codes i32 [N, K/8] to the kernel's i32 [N, K/8].

    Safe to call from several threads. Raises ValueError for another dtype or rank, or unless
    N % 128 == K % 128 == 0.
    """
    from ctconvert.transforms.recode import negate_nibbles

    reorder.check_words(words, None, "words")
    n, k = words.shape[0], words.shape[1] * 8
    check_shape(n, k)
    packed = reorder.reorder(words, _order(n, k)).view(n, k // 8)
    negate_nibbles(packed)
    return packed


def w4a8_fp8_unpack(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Exact inverse of :func:`w4a8_fp8_pack`: i32 [N, K/8] to words i32 [N, K/8].

    Raises ValueError for another dtype, or a shape that is not that of ``n`` x ``k``.
    """
    from ctconvert.transforms.recode import restore_nibbles

    check_shape(n, k)
    reorder.check_words(packed, (n, k // 8), "the packed weight")
    words = reorder.restore(packed, _order(n, k))
    restore_nibbles(words)
    return words


def _order(n: int, k: int) -> Order:
    row = k // 8
    return Order(
        4,
        n,
        k,
        outer=((k // 32, 4), (n // 16, 16 * row), (8, row)),
        inner=((2, 1), (2, 8 * row)),  # k3, and n3 that takes k2
        tail=(2, 2),  # k4
        exchanges=((1, 16),),
        block=(64, 16),
    )


def w4a8_fp8_scales(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [N, K/128] to (e4m3 [K/128 * N * 8], f32 [N, 1]): the kernel's, and its channels'.

    With c = max(max of the row's ``|scale|`` / 448, 1 / (448*512)) in f32 and
    t = e4m3(e4m3(scale / c) / 8), the channel's scale is 8 * c, and for group g and channel n the
    eight bytes from 8 * (g*N + n) are e4m3(-8*t), e4m3(-7*t), .. e4m3(-1*t): the kernel multiplies
    by looking up. The scales lose bits; the caller keeps what they were.

    Raises ValueError for another rank, a dtype that is not f32, f16 or bf16, or a scale that is not
    finite.
    """
    import torch

    if scale.dim() != 2 or scale.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"scales must be [N, groups] of f32, f16 or bf16, not {scale.dtype} {list(scale.shape)}"
        )
    wide = scale.to(torch.float32)
    if not bool(wide.isfinite().all()):
        raise ValueError("the scales hold a value that is not finite")
    # By a tensor: CUDA multiplies by the reciprocal of a number.
    channel = wide.abs().amax(1, keepdim=True) / wide.new_tensor(_FP8_MAX)
    channel = channel.clamp_min(1.0 / (_FP8_MAX * 512.0))
    fp8 = torch.float8_e4m3fn
    eighth = ((wide / channel).to(fp8).to(torch.float32) / 8.0).to(fp8)
    table = torch.tensor(_multiples(), dtype=torch.uint8, device=scale.device)
    # Eight bytes at a time: a row of the table is a word.
    index = eighth.t().contiguous().view(torch.uint8).view(-1).to(torch.int32)
    packed = table.view(torch.int64).view(-1).index_select(0, index)
    return packed.view(fp8), channel * 8.0


@cache
def _multiples() -> list[list[int]]:
    """For each e4m3 byte t the bytes of -8*t, -7*t, .. -1*t."""
    import torch

    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    times = torch.arange(-8, 0, dtype=torch.float32)
    made = (values[:, None] * times).to(torch.float8_e4m3fn).view(torch.uint8)
    return made.tolist()
