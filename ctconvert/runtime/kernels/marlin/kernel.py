"""Matmul on Marlin tiles: int4 and int8 weights; other forms of them are in ``tiles.py``.

Before, what the checkpoint holds (N = output features, K = input features, G = group size,
b = bits, f = 32/b):

    qweight  i32 [K/16, N*16/f]   codes of 16 x 64 tiles in the order of the tensor cores' operand
    scales   [K/G, N]             permuted along N by 64 (grouped) or by 32 (one row: channel-wise)
    qzeros   i32 [K/G, N/f]       asymmetric only: permuted by 64, interleaved, packed along N

After: out[m, n] = sum over k of x[m, k] * (code[n, k] - zero[n, k // G]) * scale[n, k // G].

The layout is vLLM's: ``gptq_marlin_repack`` for the weight, ``marlin_permute_scales``,
``marlin_zero_points`` and, for the other forms, ``prepare_*_layer_for_marlin`` in
``vllm/model_executor/layers/quantization/utils/marlin_utils.py`` (and ``_fp4.py``, ``_fp8.py``).
The reference builds the permutations from those definitions and undoes them by indexing; the Triton
kernels undo them in the addresses they load from.
"""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.marlin.checks import check_activations, check_weight
from ctconvert.runtime.kernels.marlin.reference import marlin_gemm_reference
from ctconvert.runtime.kernels.ops import Result, check_tensor, op


@op(marlin_gemm_reference, "ctconvert.runtime.kernels.marlin.triton:gemm")
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
) -> Result:
    """Matmul on the ``marlin`` layout: x @ W.T + bias, summed in float32.

    The custom op is ``ctconvert::marlin_gemm``. On a CPU it is
    :func:`marlin_gemm_reference`; elsewhere a Triton kernel that reads the tiles directly and
    may round the dequantised weight to x's dtype, as Marlin does; for many rows of x one pass
    dequantises into a temporary [N, K] before torch's product. The same call gives the same bits.

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
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    names = ("qweight", "scales", "qzeros", "")
    check_weight(x.device, (), qweight, scales, qzeros, None, f"int{bits}", n, k, group_size, names)
    check_activations(x, bias, n, k)
    if g_idx_sort_indices is not None:
        check_tensor(
            "g_idx_sort_indices",
            g_idx_sort_indices,
            dtypes=(torch.int32,),
            shape=(k,),
            device=x.device,
        )
    return Result((*x.shape[:-1], n), x.dtype)
