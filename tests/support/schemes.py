"""The checkpoints that are converted for every target, and the layouts they get."""

from __future__ import annotations

from typing import Any

from support.builders import DYNAMIC_INT8, STATIC_INT8, group_config, weight_args

#: Layouts each real checkpoint gets, by target; None where a target refuses it.
REAL: dict[str, dict[str, set[str] | None]] = {
    "smol-w4a16-g64-sym": {"triton": {"triton-wna16"}, "cuda": {"marlin"}, "xpu": {"xpu-w4a16"}},
    "smol-w4a16-g32-asym": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"triton-wna16"},
    },
    "smol-mixed-w4-w8-regex-ignore": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"triton-wna16", "xpu-w4a16"},
    },
    "smol-w8a8o8-static-sym": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"triton-wna16"},
    },
    "smol-w4a8o8-pack-static": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"xpu-w4a16"},
    },
    "smol-w4a8-int8dyn-g32-packed": {
        "triton": {"triton-wna16"},
        "cuda": {"marlin"},
        "xpu": {"xpu-w4a8"},
    },
    "smol-w4-embed-head-g64": {
        "triton": {"triton-wna16", "gather"},
        "cuda": {"marlin", "gather"},
        "xpu": {"xpu-w4a16", "gather"},
    },
    "smol-mxfp4a16": {"triton": None, "cuda": {"marlin-mxfp4"}, "xpu": None},
    "old071-smol-sparse24-bf16": {"triton": None, "cuda": {"cutlass-sparse24"}, "xpu": None},
    "old071-smol-sparse24-fp8-dynamic-channel": {
        "triton": None,
        "cuda": {"cutlass-sparse24"},
        "xpu": None,
    },
    "old071-rand-w4a16-g128-actorder-group-gidx": {
        "triton": None,
        "cuda": {"marlin"},
        "xpu": None,
    },
    "rand-w3a16-g128-sym": {"triton": None, "cuda": None, "xpu": None},
    "old071-rand-w3a16-g128-legacypack": {"triton": None, "cuda": None, "xpu": None},
}


def fp8(dynamic: bool) -> dict[str, Any]:
    return (DYNAMIC_INT8 if dynamic else STATIC_INT8) | {"type": "float"}


#: Fresh checkpoints by name: the config group and the layout each target gives it.
FRESH: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "w8a8 int8 dynamic": (
        group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "w8a8 int8 asymmetric": (
        group_config(weight_args(8, None, False), format="int-quantized", inputs=DYNAMIC_INT8),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "w8a8 int8 per tensor, static": (
        group_config(weight_args(8, strategy="tensor"), format="int-quantized", inputs=STATIC_INT8),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "fp8 dynamic": (
        group_config(
            weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(True)
        ),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "fp8 per tensor, static": (
        group_config(
            weight_args(8, kind="float", strategy="tensor"),
            format="float-quantized",
            inputs=fp8(False),
        ),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "fp8 block-wise": (
        group_config(
            weight_args(8, kind="float", strategy="block", block_structure=[128, 128]),
            format="float-quantized",
            inputs=fp8(True) | {"strategy": "group", "group_size": 128},
        ),
        {"triton": "scaled-mm", "cuda": "scaled-mm"},
    ),
    "mxfp4": (
        group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
        {"cuda": "marlin-mxfp4"},
    ),
    "w8a16 asymmetric": (
        group_config(weight_args(8, 128, False)),
        {"triton": "triton-wna16", "cuda": "marlin", "xpu": "triton-wna16"},
    ),
    "w2a16": (
        group_config(weight_args(2, 64)),
        {"triton": "triton-wna16", "cuda": "triton-wna16", "xpu": "triton-wna16"},
    ),
    "w4a16 of an odd group size": (
        group_config(weight_args(4, 16)),
        {"triton": "triton-wna16", "cuda": "triton-wna16", "xpu": "triton-wna16"},
    ),
    "w2 static int8": (
        group_config(
            weight_args(2, 32), format="int-quantized", inputs=STATIC_INT8, outputs=STATIC_INT8
        ),
        {"triton": "triton-wna16", "cuda": "triton-wna16", "xpu": "triton-wna16"},
    ),
    "w4a8 in int8": (
        group_config(weight_args(4, 128), format="int-quantized", inputs=DYNAMIC_INT8),
        {"triton": "triton-wna16", "cuda": "marlin", "xpu": "xpu-w4a8"},
    ),
}
