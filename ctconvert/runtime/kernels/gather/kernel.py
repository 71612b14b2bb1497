"""Look-up in a quantised embedding (the ``gather`` layout): only the rows asked for are unpacked.

Before (V = rows of the table, H = hidden size, G = H / groups, b = bits):

    weight_packed      i32 [V, words]   codes of a row, low bits first
                       dense:  code k is bits b*k .. b*k + b-1 of the row's bit string, across
                               two words where it falls so; words = ceil(H*b / 32)
                       padded: floor(32/b) codes a word, the top bits unused;
                               words = ceil(H / floor(32/b))
    weight_scale       [V, groups]      groups = 1 (channel-wise) or H/G
    weight_zero_point  u8 [V, groups]   codes, asymmetric only; zero = 2**(b-1) otherwise

After: out[..., h] = (code[id, h] - zero[id, h // G]) * scale[id, h // G] in the scale's dtype.

That is what compressed-tensors' ``dequantize`` computes: it casts code and zero point to the
scale's dtype (exact: both fit in 8 bits), subtracts (exact), multiplies and rounds once. Here the
product is formed in float32 and rounded once, which is the same value. The dense packing is that
of compressed-tensors 0.18 and newer, the padded one that of 0.17 and older and of vLLM's
``CompressedTensorsEmbeddingWNA16Int``.

An FP8 table, ``weight`` f8_e4m3 [V, H] and ``weight_scale`` [V, 1], is looked up by torch.
"""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.base import Binding, Kernel, Tensors
from ctconvert.runtime.kernels.gather.reference import check_range, embedding_gather_reference
from ctconvert.runtime.kernels.ops import Result, check_tensor, op
from ctconvert.transforms.packed import row_words

_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@op(embedding_gather_reference, "ctconvert.runtime.kernels.gather.triton:gather")
def embedding_gather(
    ids: torch.Tensor,
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero_point: torch.Tensor | None = None,
    *,
    bits: int,
    hidden: int,
    packing: str = "dense",
    check: bool = True,
) -> Result:
    """Rows of a quantised embedding, dequantised: the ``gather`` layout.

    The custom op is ``ctconvert::embedding_gather``. On a CPU it is
    :func:`embedding_gather_reference`; elsewhere a Triton kernel. Offsets are 64-bit.

    An id outside the table is an error: with ``check`` the smallest and largest id are read back
    before the kernel is launched, which makes the host wait for the device. Nothing can be read
    back while a CUDA graph is captured, so the check is left out there, as it is with
    ``check=False``: the kernel then reads nothing for such an id and fills its row with NaN, in
    replays of the graph too. Checked calls before the capture (``torch.compile``'s warm-up is
    one) check their own ids.

    Args:
        ids: i64 or i32 [...], any shape, may be empty.
        weight_packed: i32 [V, words], words = :func:`row_words`.
        weight_scale: f16, bf16 or f32 [V, groups]; groups divides ``hidden``, 1 is channel-wise.
        weight_zero_point: u8 codes [V, groups], or None: zero = 2**(bits - 1).
        bits: 2 to 8.
        hidden: H.
        packing: "dense" (a code may straddle two words) or "padded" (floor(32/bits) a word);
            for 2, 4 and 8 bits the two are the same.
        check: raise for ids outside the table.

    Returns:
        [..., H] in the scale's dtype.

    Raises:
        IndexError: an id is outside the table (with ``check``).
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or ``bits``,
            ``hidden`` or ``packing`` is not one of those above.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in 2..8, got {bits}")
    if packing not in ("dense", "padded"):
        raise ValueError(f'packing must be "dense" or "padded", got {packing!r}')
    if hidden <= 0:
        raise ValueError(f"hidden must be positive, got {hidden}")
    check_tensor("ids", ids, dtypes=(torch.int64, torch.int32))
    device = ids.device
    words = row_words(hidden, bits, packing)
    check_tensor(
        "weight_packed", weight_packed, dtypes=(torch.int32,), shape=(None, words), device=device
    )
    rows = weight_packed.shape[0]
    check_tensor("weight_scale", weight_scale, dtypes=_SCALES, shape=(rows, None), device=device)
    groups = weight_scale.shape[1]
    if groups == 0 or hidden % groups:
        raise ValueError(f"weight_scale has {groups} groups, which do not divide hidden = {hidden}")
    if weight_zero_point is not None:
        check_tensor(
            "weight_zero_point",
            weight_zero_point,
            dtypes=(torch.uint8,),
            shape=(rows, groups),
            device=device,
        )
    return Result((*ids.shape, hidden), weight_scale.dtype)


def _run(
    bound: Binding, tensors: Tensors, ids: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if "weight" in tensors:
        return _fp8_rows(ids, tensors["weight"], tensors["weight_scale"])
    return embedding_gather(
        ids,
        tensors["weight_packed"],
        tensors["weight_scale"],
        tensors.get("weight_zero_point"),
        bits=bound.spec.bits,
        hidden=bound.spec.k,
        packing=bound.spec.packing,
    )


def _fp8_rows(ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows [..., H] in the scale's dtype; IndexError for an id outside the table."""
    check_range(ids, weight.shape[0])
    flat = ids.reshape(-1)
    rows = weight.view(torch.uint8).index_select(0, flat).view(weight.dtype)
    made = rows.float() * scale.index_select(0, flat).float()
    return made.to(scale.dtype).reshape(*ids.shape, -1)


GATHER = Kernel("gather", _run, 1e-2, product=lambda spec: None)
