"""FP8 scales as the Marlin mixed-precision GEMM reads them; the weights are 8-bit Marlin tiles.

Before (N output features, K input features)::

    scale   float [N, 1], or [ceil(N/bn), ceil(K/bk)] block-wise

After::

    scale   [groups, N] in the activations' dtype, reordered along N, times 2**120 (bfloat16) or
            2**8 (float16), which the kernel's conversion of FP8 lacks; groups = 1 or ceil(K/bk)

A block's scale is repeated for each of its rows. The order is the channel-wise one where there is
one group, else the grouped one (:func:`ctconvert.transforms.marlin.marlin_permute_scales`).

The layout of vLLM's ``prepare_fp8_layer_for_marlin`` and ``fp8_fused_exponent_bias_into_scales``
(vllm/model_executor/layers/quantization/utils/marlin_utils_fp8.py) for 16-bit activations. The
scales are few: they need no kernel but the one that reorders them.
"""

from __future__ import annotations

import torch

from ctconvert.transforms.marlin import marlin_permute_scales, marlin_unpermute_scales

_POWERS = {torch.float16: 8, torch.bfloat16: 120}


def fp8_marlin_scales(
    scale: torch.Tensor, dtype: torch.dtype, n: int, rows: int = 1
) -> torch.Tensor:
    """Scales [ceil(n/rows), groups] of a 16- or 32-bit float dtype to ``dtype`` [groups, n].

    ``rows`` is how many share a scale: bn of blocks, else 1. Casting rounds where ``dtype`` is not
    the scale's; multiplying is exact.

    Raises ValueError for another dtype or shape, n that is no multiple of 64, or a scale that
    overflows: of 256 or more, or not finite.
    """
    power = _power(dtype)
    _check_shape(scale, n, rows)
    cast = scale.to(dtype)
    made = (cast.float() * 2.0**power).to(dtype)
    if not bool(torch.isfinite(made).all()):
        row, column = (~torch.isfinite(made)).nonzero()[0].tolist()
        raise ValueError(
            f"weight_scale[{row}, {column}] is {scale[row, column].item()}; the kernel takes it "
            f"times 2**{power}, which {str(dtype).removeprefix('torch.')} does not hold"
        )
    if rows > 1:
        made = made.repeat_interleave(rows, 0)[:n]
    return marlin_permute_scales(made.t().contiguous(), channelwise=made.shape[1] == 1)


def fp8_marlin_scales_back(made: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """The inverse: ``made`` [groups, n] to [ceil(n/rows), groups], in its dtype.

    That is the scale of the source where that has this dtype, else the rounded one.

    Raises ValueError for another dtype, n that is no multiple of 64, or rows of a block whose
    scales differ.
    """
    power = _power(made.dtype)
    scales = marlin_unpermute_scales(made, channelwise=made.shape[0] == 1).t()
    found = scales[::rows]
    raw = scales.contiguous().view(torch.int16)
    if not torch.equal(
        found.contiguous().view(torch.int16).repeat_interleave(rows, 0)[: len(raw)], raw
    ):
        raise ValueError("the scales of a block's rows differ")
    return (found.float() * 2.0**-power).to(made.dtype).contiguous()


def _power(dtype: torch.dtype) -> int:
    if dtype not in _POWERS:
        raise ValueError(f"activations must be torch.float16 or torch.bfloat16, not {dtype}")
    return _POWERS[dtype]


def _check_shape(scale: torch.Tensor, n: int, rows: int) -> None:
    if scale.dtype not in (*_POWERS, torch.float32):
        raise ValueError(f"scales must be float16, bfloat16 or float32, not {scale.dtype}")
    if scale.dim() != 2 or scale.shape[0] != -(-n // rows):
        raise ValueError(
            f"scales of {n} rows, {rows} a scale, are [{-(-n // rows)}, groups], not "
            f"{list(scale.shape)}"
        )
