"""Matmul on Marlin tiles: int4 and int8 weights (``marlin``) and MXFP4 (``marlin-mxfp4``).

Before, what the checkpoint holds (N = output features, K = input features, G = group size,
b = bits, f = 32/b):

    qweight  i32 [K/16, N*16/f]   codes of 16 x 64 tiles in the order of the tensor cores' operand
    scales   [K/G, N]             permuted along N by 64 (grouped) or by 32 (one row: channel-wise)
    qzeros   i32 [K/G, N/f]       asymmetric only: permuted by 64, interleaved, packed along N
    MXFP4:   weight i32 [K/16, N*2] and scale u8 (E8M0) [K/32, N]

After: out[m, n] = sum over k of x[m, k] * (code[n, k] - zero[n, k // G]) * scale[n, k // G].

The layout is vLLM's: ``gptq_marlin_repack`` for the weight, ``marlin_permute_scales``,
``marlin_zero_points`` and ``prepare_fp4_layer_for_marlin`` in
``vllm/model_executor/layers/quantization/utils/marlin_utils.py`` (and ``_fp4.py``) for the rest.
Here the permutations are built from those definitions and undone by indexing; the Triton kernels
undo them in the addresses they load from.
"""

import functools

import torch

from ctconvert.runtime.kernels._common import check_tensor

_FLOATS = (torch.float16, torch.bfloat16)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _interleave(bits: int) -> list[int]:
    """Order of 8 (b = 4) or 4 (b = 8) codes inside a word, or of two."""
    return [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]


@functools.cache
def _weight_order(bits: int) -> torch.Tensor:
    """i64 [1024]: Marlin's place p of a run holds code order[p] of the four 16 x 16 tiles."""
    order: list[int] = []
    for i in range(32):
        one = []
        for block in (0, 1):
            for row in (2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4) + 8, 2 * (i % 4) + 9):
                one.append(16 * row + i // 4 + 8 * block)
        for j in range(4):
            order.extend(place + 256 * j for place in one)
    run = _interleave(bits)
    return torch.tensor(order).reshape(-1, len(run))[:, run].reshape(-1)


def _scale_order(grouped: bool) -> list[int]:
    """Order of 64 (grouped) or 32 (channel-wise) scales along N."""
    if grouped:
        return [i + 8 * j for i in range(8) for j in range(8)]
    return [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]


def _unpermute(t: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Undo a permutation of every run of ``len(order)`` along the last dimension."""
    inverse = torch.empty(len(order), dtype=torch.int64)
    inverse[torch.tensor(order)] = torch.arange(len(order))
    runs = t.reshape(t.shape[0], -1, len(order))
    return runs[:, :, inverse.to(t.device)].reshape(t.shape)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """i32 [R, C] to codes i32 [R, C*32/bits], low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1)


def _codes(qweight: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
    """Codes i32 [K, N] of Marlin tiles."""
    packed = _unpack(qweight, bits).reshape(k // 16, -1, 1024)
    order = _weight_order(bits).to(qweight.device)
    tiles = torch.empty_like(packed)
    tiles[:, :, order] = packed
    return tiles.reshape(k // 16, n // 16, 16, 16).transpose(1, 2).reshape(k, n)


def _group_rows(group_size: int, k: int) -> int:
    """Rows along K that share a scale: all of them where channel-wise."""
    return k if group_size == -1 else group_size


def marlin_dequantize(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    *,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """The weight of Marlin tiles, float32 [N, K]; see :func:`marlin_gemm` for the arguments.

    With act-order the columns are in the order of the sorted groups, as they are stored.
    """
    rows = _group_rows(group_size, k)
    codes = _codes(qweight, bits, n, k)
    scale = _unpermute(scales.float(), _scale_order(scales.shape[0] > 1))
    if qzeros is None:
        values = (codes - (1 << (bits - 1))).float()
    else:
        # Zero points take the permutation of grouped scales even where there is one row.
        run = _interleave(bits)
        zeros = _unpermute(_unpermute(_unpack(qzeros, bits), run), _scale_order(True))
        values = (codes - zeros.repeat_interleave(rows, dim=0)).float()
    return (values * scale.repeat_interleave(rows, dim=0)).t().contiguous()


def marlin_mxfp4_dequantize(
    weight: torch.Tensor, scale: torch.Tensor, *, n: int, k: int
) -> torch.Tensor:
    """The MXFP4 weight of Marlin tiles, float32 [N, K]; see :func:`marlin_mxfp4_gemm`."""
    values = torch.tensor(_E2M1, device=weight.device)[_codes(weight, 4, n, k).long()]
    exponent = _unpermute(_unpermute(scale, [0, 2, 1, 3]), _scale_order(True))
    factor = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent.int() - 127)
    factor = torch.where(exponent == 255, torch.nan, factor)
    return (values * factor.repeat_interleave(32, dim=0)).t().contiguous()


def _matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    out = x.float() @ weight.t()
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def marlin_gemm_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    g_idx_sort_indices: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """:func:`marlin_gemm` in plain torch, through the float32 weight."""
    weight = marlin_dequantize(qweight, scales, qzeros, bits=bits, n=n, k=k, group_size=group_size)
    if g_idx_sort_indices is not None:
        x = x[..., g_idx_sort_indices.long()]
    return _matmul(x, weight, bias)


def marlin_mxfp4_gemm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    n: int,
    k: int,
) -> torch.Tensor:
    """:func:`marlin_mxfp4_gemm` in plain torch, through the float32 weight."""
    return _matmul(x, marlin_mxfp4_dequantize(weight, scale, n=n, k=k), bias)


def _check_size(n: int, k: int) -> None:
    if n <= 0 or n % 64:
        raise ValueError(f"n must be a positive multiple of 64 (a tile's columns), got {n}")
    if k <= 0 or k % 16:
        raise ValueError(f"k must be a positive multiple of 16 (a tile's rows), got {k}")


def _check_activations(x: torch.Tensor, bias: torch.Tensor | None, n: int, k: int) -> None:
    check_tensor("x", x, dtypes=_FLOATS)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have shape [..., {k}], got {list(x.shape)}")
    if bias is not None:
        check_tensor("bias", bias, dtypes=(x.dtype,), shape=(n,), device=x.device)


def _check_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    g_idx_sort_indices: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    _check_size(n, k)
    rows = _group_rows(group_size, k)
    if rows <= 0 or rows % 16 or k % rows:
        raise ValueError(
            f"group_size must be -1 (channel-wise) or a multiple of 16 that divides k = {k}, "
            f"got {group_size}"
        )
    _check_activations(x, bias, n, k)
    int32 = (torch.int32,)
    shape = (k // 16, n * bits // 2)
    check_tensor("qweight", qweight, dtypes=int32, shape=shape, device=x.device)
    check_tensor("scales", scales, dtypes=_SCALES, shape=(k // rows, n), device=x.device)
    if qzeros is not None:
        shape = (k // rows, n * bits // 32)
        check_tensor("qzeros", qzeros, dtypes=int32, shape=shape, device=x.device)
    if g_idx_sort_indices is not None:
        check_tensor(
            "g_idx_sort_indices", g_idx_sort_indices, dtypes=int32, shape=(k,), device=x.device
        )


def _check_mxfp4(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
) -> None:
    _check_size(n, k)
    if k % 32:
        raise ValueError(f"k must be a multiple of 32 (an MXFP4 group), got {k}")
    _check_activations(x, bias, n, k)
    check_tensor("weight", weight, dtypes=(torch.int32,), shape=(k // 16, n * 2), device=x.device)
    check_tensor("scale", scale, dtypes=(torch.uint8,), shape=(k // 32, n), device=x.device)


@torch.library.custom_op("ctconvert::marlin_gemm", mutates_args=())
def _marlin_gemm_op(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    g_idx_sort_indices: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    _check_gemm(x, qweight, scales, qzeros, g_idx_sort_indices, bias, bits, n, k, group_size)
    if x.device.type == "cpu":
        return marlin_gemm_reference(
            x,
            qweight,
            scales,
            qzeros,
            g_idx_sort_indices,
            bias,
            bits=bits,
            n=n,
            k=k,
            group_size=group_size,
        )
    from ctconvert.runtime.kernels import marlin_triton

    return marlin_triton.gemm(
        x, qweight, scales, qzeros, g_idx_sort_indices, bias, bits, group_size
    )


@_marlin_gemm_op.register_fake
def _(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None,
    g_idx_sort_indices: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    _check_gemm(x, qweight, scales, qzeros, g_idx_sort_indices, bias, bits, n, k, group_size)
    return x.new_empty((*x.shape[:-1], n))


@torch.library.custom_op("ctconvert::marlin_mxfp4_gemm", mutates_args=())
def _marlin_mxfp4_gemm_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
) -> torch.Tensor:
    _check_mxfp4(x, weight, scale, bias, n, k)
    if x.device.type == "cpu":
        return marlin_mxfp4_gemm_reference(x, weight, scale, bias, n=n, k=k)
    from ctconvert.runtime.kernels import marlin_triton

    return marlin_triton.mxfp4_gemm(x, weight, scale, bias)


@_marlin_mxfp4_gemm_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
) -> torch.Tensor:
    _check_mxfp4(x, weight, scale, bias, n, k)
    return x.new_empty((*x.shape[:-1], n))


def marlin_gemm(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    g_idx_sort_indices: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    bits: int,
    n: int,
    k: int,
    group_size: int,
) -> torch.Tensor:
    """Matmul on the ``marlin`` layout: x @ W.T + bias, summed in float32.

    The custom op is ``ctconvert::marlin_gemm``. On a CPU it is
    :func:`marlin_gemm_reference`; elsewhere a Triton kernel that reads the tiles directly and
    rounds the dequantised weight to x's dtype, as Marlin does; for many rows of x one pass
    dequantises into a temporary [N, K] before torch's product.

    Args:
        x: f16 or bf16 [..., K].
        qweight: i32 [K/16, N*16/f], f = 32/bits: Marlin tiles.
        scales: f16, bf16 or f32 [K/G, N] in Marlin's order: by 64 where it has several rows, by
            32 where it has one.
        qzeros: i32 [K/G, N/f] in Marlin's order, or None: zero = 2**(bits - 1).
        g_idx_sort_indices: i32 [K], act-order only: row j of the tiles holds column
            ``g_idx_sort_indices[j]`` of the weight; x's columns are permuted to match. Its
            values must be in 0..K-1 (they are not checked). Groups are G consecutive rows of
            the tiles.
        bias: [N] in x's dtype and plain order.
        bits: 4 or 8.
        n: output features, a multiple of 64.
        k: input features, a multiple of 16.
        group_size: a multiple of 16 that divides K; -1 or K: channel-wise.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or a size the
            layout does not have.
    """
    out: torch.Tensor = _marlin_gemm_op(
        x, qweight, scales, qzeros, g_idx_sort_indices, bias, bits, n, k, group_size
    )
    return out


def marlin_mxfp4_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    n: int,
    k: int,
) -> torch.Tensor:
    """Matmul on the ``marlin-mxfp4`` layout: x @ W.T + bias, summed in float32.

    The custom op is ``ctconvert::marlin_mxfp4_gemm``. On a CPU it is
    :func:`marlin_mxfp4_gemm_reference`; elsewhere a Triton kernel that reads the tiles directly.
    A weight 2**(s - 127) * e2m1 is exact in bf16, so an f16 x is split into two bf16 parts
    rather than the weight being rounded to f16's narrower range.

    Args:
        x: f16 or bf16 [..., K].
        weight: i32 [K/16, N*2]: Marlin tiles of E2M1 codes.
        scale: u8 or f8_e8m0 [K/32, N], E8M0 bytes in Marlin's order for MXFP4: by 64, then by 4.
        bias: [N] in x's dtype and plain order.
        n: output features, a multiple of 64.
        k: input features, a multiple of 32.

    Returns:
        [..., N] in x's dtype.

    Raises:
        TypeError: an argument has a dtype the kernel does not take.
        ValueError: an argument has a wrong shape or device or is not contiguous, or a size the
            layout does not have.
    """
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    out: torch.Tensor = _marlin_mxfp4_gemm_op(x, weight, scale, bias, n, k)
    return out
