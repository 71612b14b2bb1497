"""vLLM's Marlin GEMM, for every layout on its tiles but Humming's.

``_C::marlin_gemm`` takes act-order and a workspace up to vLLM 0.26; later versions have neither
act-order nor, in ``vllm::marlin_gemm``, a workspace that is not their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from ctconvert.integrations.vllm.engine import base
from ctconvert.integrations.vllm.engine.base import Engine, Make, same_scales
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors, padded

#: The locks of ``_C::marlin_gemm``, one for each of at most so many blocks a multiprocessor.
WORKSPACE, BLOCKS = "marlin_workspace", 4
#: The group of each row, i32 [K], which the op takes beside the columns' order.
GROUPS = "marlin_groups"


class Floats(NamedTuple):
    """What the op calls a layout's codes, and the dtype it calls the bytes of the scales."""

    codes: str
    scales: torch.dtype | None = None


FLOATS: Mapping[str, Floats] = {
    "marlin-mxfp4": Floats("float4_e2m1f", torch.float8_e8m0fnu),
    "marlin-mxfp8": Floats("float8_e4m3fn", torch.float8_e8m0fnu),
    "marlin-nvfp4": Floats("float4_e2m1f", torch.float8_e4m3fn),
    "marlin-nvfp4-f16": Floats("float4_e2m1f", torch.float8_e4m3fn),
    "marlin-fp8": Floats("float8_e4m3fn"),
    "marlin-fp8-f16": Floats("float8_e4m3fn"),
}


def codes(bound: Binding, dtype: torch.dtype) -> str | None:
    """vLLM's name of a layout's codes; None where its Marlin does not run such weights."""
    spec = bound.spec
    if (floats := FLOATS.get(bound.layout)) is not None:
        return floats.codes
    if bound.layout != "marlin" or not same_scales(spec, dtype):
        return None
    names = {(4, True): "uint4b8", (8, True): "uint8b128", (4, False): "uint4"}
    return names.get((spec.bits, spec.symmetric))


def scalar_type(name: str) -> int:
    """The number that vLLM's ops know a type by."""
    from vllm.scalar_type import scalar_types

    return int(getattr(scalar_types, name).id)


def held(bound: Binding, tensors: Tensors) -> dict[str, Any]:
    """A layout's tensors by the names of the op's arguments, dense or stacked."""
    if bound.layout == "marlin":
        return {
            "b_q_weight": tensors["qweight"],
            "b_scales": tensors["scales"],
            "b_zeros": tensors.get("qzeros"),
            "global_scale": None,
            "g_idx": tensors.get(GROUPS),
            "perm": tensors.get("g_idx_sort_indices"),
        }
    seen = FLOATS[bound.layout].scales
    scales = tensors["weight_scale"]
    return {
        "b_q_weight": tensors["weight"],
        "b_scales": scales if seen is None else scales.view(seen),
        "b_zeros": None,
        "global_scale": tensors.get("weight_global_scale"),
        "g_idx": None,
        "perm": None,
    }


#: The arguments that are known here.
KNOWN = {
    *("a", "c", "b_q_weight", "b_bias", "b_scales", "a_scales", "global_scale", "b_zeros"),
    *("g_idx", "perm", "workspace", "b_type_id", "b_q_type_id", "size_m", "size_n", "size_k"),
    *("is_k_full", "use_atomic_add", "use_fp32_reduce", "is_zp_float"),
}


def _gemm() -> tuple[Any, tuple[str, ...]] | None:
    """The op of this version and its arguments; None where it has none."""
    try:  # makes vllm::marlin_gemm, where the version has it
        import vllm.model_executor.layers.quantization.utils.marlin_utils  # noqa: F401
    except ImportError:
        return None
    if base.op("marlin_gemm") is None:
        return None
    found = base.op("marlin_gemm", "vllm") or base.op("marlin_gemm")
    return found, base.arguments(found)


def _make(bound: Binding, dtype: torch.dtype) -> Engine | None:
    name = codes(bound, dtype)
    if name is None or base.capability() < 80 or (gemm := _gemm()) is None:
        return None
    found, names = gemm
    if not KNOWN.issuperset(names) or (bound.spec.has_g_idx and "g_idx" not in names):
        return None
    workspace = not base.optional(found, "workspace")
    run = partial(_run, found, names, scalar_type(name))
    return Engine("marlin_gemm", run, partial(_derived, workspace=workspace))


def _derived(bound: Binding, tensors: Tensors, workspace: bool) -> dict[str, torch.Tensor]:
    made = {}
    device = next(iter(tensors.values())).device
    if workspace:
        made[WORKSPACE] = locks(device)
    if bound.spec.has_g_idx:
        columns = torch.arange(bound.padded[1], dtype=torch.int32, device=device)
        made[GROUPS] = columns // bound.group_size
    return made


def locks(device: torch.device) -> torch.Tensor:
    """i32 zeros, which the kernels leave zero; for one stream."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return torch.zeros(count * BLOCKS, dtype=torch.int32, device=device)


def _run(
    found: Any,
    names: tuple[str, ...],
    number: int,
    bound: Binding,
    tensors: Tensors,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    wide, _ = padded(bound, x, None)
    flat = wide.reshape(-1, wide.shape[-1])
    n, k = bound.padded
    values = held(bound, tensors) | {
        "a": flat,
        "c": None,
        "b_bias": None,  # in an order of the op's own: added afterwards
        "a_scales": None,
        "workspace": tensors.get(WORKSPACE),
        "b_type_id": number,
        "b_q_type_id": number,
        "size_m": flat.shape[0],
        "size_n": n,
        "size_k": k,
        "is_k_full": True,
        "use_atomic_add": False,
        "use_fp32_reduce": True,
        "is_zp_float": False,
    }
    return base.cut(bound, x, found(*[values[name] for name in names]), bias)


LAYOUTS: Mapping[str, Make] = dict.fromkeys(["marlin", *FLOATS], _make)
