"""What an engine makes of a source's tensors when it loads them, in plain torch on any device.

Written from vLLM 0.33 (``model_executor/kernels/linear/mixed_precision``: ``triton_w4a16.py``,
``marlin.py``, ``machete.py``; ``layers/quantization/utils/marlin_utils.py`` and
``marlin_utils_test.py``; ``fp8_utils.py``), which has compiled kernels for the orders of Marlin's
and Machete's codes: those are permutations here, after their definitions. None of it is shared
with :mod:`ctconvert.transforms`, so that each is a check of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch

from ctconvert.assembly import holds_padding, leaves
from ctconvert.records import Convert
from ctconvert.specs import WeightSpec

Tensors = dict[str, torch.Tensor]
Transform = Callable[[Mapping[str, torch.Tensor], WeightSpec], Tensors]


def transform_of(module: Convert) -> Transform | None:
    """What an engine does at load for the weight that a converted module holds.

    Returns:
        a function of one unit's source tensors by local name, parts joined along N, that gives the
        layout's tensors; None where there is none here: other layouts, act-order, padded weights
        and those cut for ranks, FP8 scales per tensor or block, INT8 with zero points.
    """
    spec = module.recipe.weight
    cut = any(part.rows or part.columns for unit in module.units for part in leaves(unit))
    if cut or spec.has_g_idx or spec.side or any(map(holds_padding, module.units)):
        return None
    if module.recipe.layout == "scaled-mm":
        alike = {source.strategy for source in module.specs} == {"channel"}
        plain = alike and spec.storage == "plain" and spec.symmetric and spec.input_symmetric
        return _scaled_mm if plain else None
    if (
        spec.storage != "packed"
        or spec.bits not in (4, 8)
        or not (spec.symmetric or spec.bits == 4)
    ):
        return None
    return {"triton-wna16": _triton, "marlin": _marlin, "machete": _machete}.get(
        module.recipe.layout
    )


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, bits, dtype=torch.int32, device=device)


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes i32 [R, C*32/b] of words i32 [R, C]."""
    codes = (words[:, :, None] >> _shifts(bits, words.device)) & ((1 << bits) - 1)
    return codes.flatten(1)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of :func:`_unpack`."""
    parts = codes.view(codes.shape[0], -1, 32 // bits) << _shifts(bits, codes.device)
    return parts.sum(dim=2, dtype=torch.int32)


def _zero_points(given: Mapping[str, torch.Tensor], spec: WeightSpec) -> torch.Tensor:
    """Codes i32 [groups, N] of words i32 [N*b/32, groups]."""
    return _unpack(given["weight_zero_point"].t(), spec.bits)


def _triton(given: Mapping[str, torch.Tensor], spec: WeightSpec) -> Tensors:
    codes = _unpack(given["weight_packed"], spec.bits).t().contiguous()
    made = {"qweight": _pack(codes, spec.bits), "scales": given["weight_scale"].t().contiguous()}
    if not spec.symmetric:
        made["qzeros"] = given["weight_zero_point"].t().contiguous()
    return made


@cache
def _interleave(bits: int) -> tuple[int, ...]:
    return (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3)


@cache
def _tile_order(bits: int, device: torch.device) -> torch.Tensor:
    """``get_weight_perm``: which codes of four tiles of 16 x 16, one after the other."""
    order = []
    for lane in range(32):
        first = 2 * (lane % 4)
        rows = (first, first + 1, first + 8, first + 9)
        one = [16 * row + lane // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [place + 256 * tile for tile in range(4) for place in one]
    places = torch.tensor(order).view(-1, 32 // bits)[:, list(_interleave(bits))]
    return places.flatten().to(device)


@cache
def _scale_order(grouped: bool, device: torch.device) -> torch.Tensor:
    """``get_scale_perms``."""
    if grouped:
        order = [i + 8 * j for i in range(8) for j in range(8)]
    else:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return torch.tensor(order, device=device)


def _in_order(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Every run of as many elements as ``order`` has, in that order."""
    return rows.reshape(-1, len(order))[:, order].reshape(rows.shape)


def _marlin(given: Mapping[str, torch.Tensor], spec: WeightSpec) -> Tensors:
    words, bits, n, k = given["weight_packed"], spec.bits, spec.n, spec.k
    codes = _unpack(words, bits).t().reshape(k // 16, 16, n // 16, 16).transpose(1, 2)
    tiles = _in_order(codes.reshape(k // 16, n * 16), _tile_order(bits, words.device))
    scales = given["weight_scale"].t().contiguous()
    made = {
        "qweight": _pack(tiles, bits),
        "scales": _in_order(scales, _scale_order(len(scales) > 1, words.device)),
    }
    if not spec.symmetric:
        zeros = _in_order(_zero_points(given, spec), _scale_order(True, words.device))
        order = torch.tensor(_interleave(bits), device=words.device)
        made["qzeros"] = _pack(_in_order(zeros, order), bits)
    return made


def _machete(given: Mapping[str, torch.Tensor], spec: WeightSpec) -> Tensors:
    """``machete_prepack_B`` for 16-bit activations: blocks of 64 k by 16 n, those of n first."""
    bits, n, k = spec.bits, spec.n, spec.k
    codes = _unpack(given["weight_packed"], bits)
    # n % 16 is (n3, n2 n1 n0), k % 64 is (k5 k4, k3, k2 k1, k0)
    bit = codes.view(n // 16, 2, 8, k // 64, 4, 2, 4, 2)
    order = (3, 0, 2, 6, 4, 7, 5, 1) if bits == 4 else (3, 0, 2, 6, 4, 5, 1, 7)
    packed = _pack(bit.permute(order).reshape(k // 64, -1), bits)
    scales = given["weight_scale"].t().contiguous()
    made = {"qweight": packed.view(k * bits // 32, n), "scales": scales}
    if not spec.symmetric:
        made["zeros"] = -1.0 * scales * _zero_points(given, spec).to(scales.dtype)
    return made


def _scaled_mm(given: Mapping[str, torch.Tensor], spec: WeightSpec) -> Tensors:
    """The weight as it lies, of which the kernel takes the transposed view."""
    return {"weight": given["weight"], "weight_scale": given["weight_scale"].to(torch.float32)}
