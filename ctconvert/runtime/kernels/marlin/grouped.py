"""Matmul on stacked Marlin tiles [E, ...]: rows of x, sorted by expert, each with its expert's."""

from __future__ import annotations

import torch

from ctconvert.runtime.kernels.marlin.checks import check_activations, check_weight
from ctconvert.runtime.kernels.marlin.reference import marlin_grouped_reference
from ctconvert.runtime.kernels.ops import Result, check_tensor, op


@op(marlin_grouped_reference, "ctconvert.runtime.kernels.marlin.triton:grouped")
def marlin_grouped(
    x: torch.Tensor,
    rows: torch.Tensor,
    offsets: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    form: str,
    n: int,
    k: int,
    group_size: int,
) -> Result:
    """Grouped matmul: out[p] = x[rows[p]] @ W[e].T + bias[e], e the expert of p, in one launch.

    The custom op is ``ctconvert::marlin_grouped``. On a CPU it is
    :func:`marlin_grouped_reference`; elsewhere the Triton kernel of ``marlin_tiles_gemm``, whose
    blocks of rows find their expert in ``offsets``: as fused mixture-of-experts kernels do, without
    their padded list of tokens. For w13 ``rows`` are the tokens, sorted by the expert they are
    routed to; for w2 they are 0 .. P-1, of rows that are sorted already.

    Args:
        x: f16 or bf16 [M, K].
        rows: i32 [P], in 0..M-1, sorted by expert; a token may be there several times.
        offsets: i32 [E + 1]: expert e has the rows offsets[e] to offsets[e + 1] - 1, maybe none;
            offsets[0] is 0 and offsets[E] P. Neither's values are checked.
        weight, scale, zeros, factor: as ``marlin_tiles_gemm``'s, stacked: [E, ...].
        bias: [E, N] in x's dtype.
        form, n, k, group_size: as ``marlin_tiles_gemm``'s.

    Returns:
        [P, N] in x's dtype, in the order of ``rows``.

    Raises:
        TypeError, ValueError: as ``marlin_tiles_gemm``.
    """
    if x.dim() != 2:
        raise ValueError(f"x must have shape [M, {k}], got {list(x.shape)}")
    int32 = (torch.int32,)
    check_tensor("rows", rows, dtypes=int32, shape=(None,), device=x.device)
    check_tensor("offsets", offsets, dtypes=int32, shape=(None,), device=x.device)
    lead = (len(offsets) - 1,)
    if lead[0] < 1:
        raise ValueError("offsets must have an element more than there are experts, at least 2")
    check_weight(x.device, lead, weight, scale, zeros, factor, form, n, k, group_size)
    check_activations(x, bias, n, k, lead)
    return Result((len(rows), n), x.dtype)
