"""The checkpoints that are converted for every target, and the layouts they get."""

from __future__ import annotations

from typing import Any

import torch

from support.block_floats import FP8, fp8_group, mxfp8, mxfp8_group, nvfp4, nvfp4_group
from support.builders import DYNAMIC_INT8, STATIC_INT8, group_config, quantised, weight_args

#: Columns of the tables below, and the short names in them; ``-`` is a refusal.
COLUMNS = ("triton", "cuda", "cuda-sm80", "cuda-sm90", "cuda-sm100", "rocm", "xpu", "cpu")
SHORT = {
    "t": "triton-wna16",
    "m": "marlin",
    "m4": "marlin-mxfp4",
    "m8": "marlin-fp8",
    "ma": "machete",
    "h": "humming",
    "s": "scaled-mm",
    "cs": "cutlass-sparse24",
    "x8": "xpu-w4a8",
    "x16": "xpu-w4a16",
    "c8": "cpu-w4a8",
    "c16": "cpu-w4a16",
    "ci": "cpu-int8",
    "g": "gather",
}


def row(text: str) -> dict[str, set[str]]:
    """The layouts of each target that takes all of a checkpoint."""
    found = dict(zip(COLUMNS, text.split(), strict=True))
    return {
        target: {SHORT[name] for name in names.split("+")}
        for target, names in found.items()
        if names != "-"
    }


#: Layouts each real checkpoint gets, by target.
REAL: dict[str, dict[str, set[str]]] = {
    #                                  triton cuda sm80 sm90 sm100 rocm xpu cpu
    "smol-w4a16-g64-sym": row("         t     m    m    ma   m     t    x16 c16"),
    "smol-w4a16-g32-asym": row("        t     m    m    h    m     t    t   c16"),
    "smol-mixed-w4-w8-regex-ignore": row("t   m    m    ma+h m     t    t+x16 -"),
    "smol-w8a8o8-static-sym": row("     t     m    m    ma   m     t    t   -"),
    "smol-w4a8o8-pack-static": row("    t     m    m    h    m     t    x16 c16"),
    "smol-w4a8-int8dyn-g32-packed": row("t    m    m    h    m     t    x8  c8"),
    "smol-w4-embed-head-g64": row("     t+g   m+g  m+g  ma+g m+g   t+g  x16+g c16+g"),
    "smol-mxfp4a16": row("              m4    m4   m4   m4   m4    m4   m4  -"),
    "old071-smol-sparse24-bf16": row("  -     cs   -    cs   -     -    -   -"),
    "old071-smol-sparse24-fp8-dynamic-channel": row("- cs - cs - - - -"),
    "old071-rand-w4a16-g128-actorder-group-gidx": row("- m m m m - - -"),
    "rand-w3a16-g128-sym": row("        -     -    -    -    -     -    -   -"),
    "old071-rand-w3a16-g128-legacypack": row("- - - - - - - -"),
}


def fp8(dynamic: bool) -> dict[str, Any]:
    return (DYNAMIC_INT8 if dynamic else STATIC_INT8) | {"type": "float"}


#: Fresh checkpoints by name: the config group and the layout each target gives it.
FRESH: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "w8a8 int8 dynamic": (
        group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
        row("s s s s s s s ci"),
    ),
    "w8a8 int8 asymmetric": (
        group_config(weight_args(8, None, False), format="int-quantized", inputs=DYNAMIC_INT8),
        row("s s s s s s s -"),
    ),
    "w8a8 int8 per tensor, static": (
        group_config(weight_args(8, strategy="tensor"), format="int-quantized", inputs=STATIC_INT8),
        row("s s s s s s s -"),
    ),
    "fp8 dynamic": (
        group_config(
            weight_args(8, None, kind="float"), format="float-quantized", inputs=fp8(True)
        ),
        row("s s m8 s s s s -"),
    ),
    "fp8 per tensor, static": (
        group_config(
            weight_args(8, kind="float", strategy="tensor"),
            format="float-quantized",
            inputs=fp8(False),
        ),
        row("s s m8 s s s s -"),
    ),
    "fp8 block-wise": (
        group_config(
            weight_args(8, kind="float", strategy="block", block_structure=[128, 128]),
            format="float-quantized",
            inputs=fp8(True) | {"strategy": "group", "group_size": 128},
        ),
        row("s s m8 s s s s -"),
    ),
    "mxfp4": (
        group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
        row("m4 m4 m4 m4 m4 m4 m4 -"),
    ),
    "w8a16 asymmetric": (
        group_config(weight_args(8, 128, False)),
        row("t m m ma m t t -"),
    ),
    "w2a16": (
        group_config(weight_args(2, 64)),
        row("t t t t t t t -"),
    ),
    "w4a16 of an odd group size": (
        group_config(weight_args(4, 16)),
        row("t t t t t t t c16"),
    ),
    "w2 static int8": (
        group_config(
            weight_args(2, 32), format="int-quantized", inputs=STATIC_INT8, outputs=STATIC_INT8
        ),
        row("t t t t t t t -"),
    ),
    "w4a8 in int8": (
        group_config(weight_args(4, 128), format="int-quantized", inputs=DYNAMIC_INT8),
        row("t m m ma m t x8 c8"),
    ),
}

FP4 = weight_args(4, 32, kind="float")
W4A8_FP8 = DYNAMIC_INT8 | {"type": "float"}
#: What each layout is tried with, but the 2:4 one and the one for tables.
LAYOUT_GROUPS: dict[str, list[dict[str, Any]]] = {
    "triton-wna16": [group_config(weight_args(bits, 32, False)) for bits in (2, 4, 8)]
    + [group_config(weight_args(4, None), format="int-quantized")],
    "marlin": [group_config(weight_args(bits, 32, False)) for bits in (4, 8)],
    "marlin-mxfp4": [group_config(FP4, format="mxfp4-pack-quantized")],
    "scaled-mm": [group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)],
    "xpu-w4a8": [group_config(weight_args(4, 32), inputs=DYNAMIC_INT8)],
    "xpu-w4a16": [group_config(weight_args(4, 64)), group_config(weight_args(4, None))],
    "machete": [group_config(weight_args(bits, 64, False)) for bits in (4, 8)],
    "humming": [group_config(weight_args(4, 32, False)), group_config(weight_args(8, 32))],
    "humming-nvfp4": [nvfp4_group()],
    "marlin-nvfp4": [nvfp4_group(False)],
    "marlin-nvfp4-f16": [nvfp4_group()],
    "marlin-fp8": [
        fp8_group(),
        fp8_group("tensor"),
        fp8_group("block", block_structure=[128, 128]),
        fp8_group("block", block_structure=[2, 64]),
    ],
    "marlin-fp8-f16": [fp8_group(inputs=FP8)],
    "marlin-mxfp8": [mxfp8_group()],
    "nvfp4-cutlass": [nvfp4_group()],
    "mxfp8-swizzled": [mxfp8_group(True)],
    "mxfp4-swizzled": [
        group_config(FP4, format="mxfp4-pack-quantized", inputs=FP4 | {"dynamic": True})
    ],
    "w4a8-fp8": [
        group_config(weight_args(4, 128), format=format, inputs=W4A8_FP8)
        for format in ("int-quantized", "pack-quantized")
    ],
    "cpu-w4a16": [group_config(weight_args(4, 32, False))],
    "cpu-w4a8": [group_config(weight_args(4, None, False), inputs=DYNAMIC_INT8)],
    "cpu-int8": [group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8)],
}


def module_of(n: int, k: int, group: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a module of such a group, by local name."""
    if group["format"] == "nvfp4-pack-quantized":
        return nvfp4(n, k, seed, inputs=bool(group["input_activations"]))
    if group["format"] == "mxfp8-quantized":
        return mxfp8(n, k, seed)
    return quantised(n, k, group, seed)
