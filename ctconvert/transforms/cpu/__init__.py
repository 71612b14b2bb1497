"""Weights for vLLM's CPU kernels: INT4 with 16-bit or INT8 activations, and INT8.

Before (N output features, K input features)::

    words        i32 [N, K/8]   4-bit codes, K-packed (INT8: q, i8 [N, K])
    zero points  u8 [N, groups]
    scales       [N, groups]

After::

    w4a16  i32 [N/16, 2*K]            of 16 channels: word (k, h) holds n = 8*h .. 8*h+7 at k
    w4a8   u8 [N/32, K/B, 16*B + 128] of 32 channels and B = min(128, G) columns, see below
    int8   i8 [N, K + 4]              of 32 channels: bytes [K/4, 32, 4], then i32 [32], 128 times
                                      the sum of each channel

A block of w4a8 holds, for k4 = 0 .. B/4, h = 0, 1, ni = 0 .. 7 and ki = 0 .. 3, the byte whose low
nibble is the code of (n = 16*h + ni, k = 4*k4 + ki) and whose high nibble is that of n + 8; then
i32 [32], the sum of each channel's codes less its zero point. Zero points (i8) and scales (f32)
go as [N/32, groups, 32].

Sources, all in vLLM: w4a16 ``CPUWNA16LinearKernel`` and csrc/cpu/cpu_wna16.cpp; w4a8
``convert_weight_packed_scale_zp``, int8 ``convert_weight_packed``, both csrc/cpu/sgl-kernels.

The codes go through :mod:`ctconvert.transforms.reorder`: torch code on the CPU, a Triton kernel on
CUDA and XPU, equal bit for bit.
"""

from __future__ import annotations

from ctconvert.transforms.cpu.int8 import cpu_int8_pack, cpu_int8_unpack
from ctconvert.transforms.cpu.w4a8 import (
    cpu_w4a8_group_rows,
    cpu_w4a8_pack,
    cpu_w4a8_ungroup_rows,
    cpu_w4a8_unpack,
)
from ctconvert.transforms.cpu.w4a16 import cpu_w4a16_pack, cpu_w4a16_unpack

__all__ = [
    "cpu_int8_pack",
    "cpu_int8_unpack",
    "cpu_w4a8_group_rows",
    "cpu_w4a8_pack",
    "cpu_w4a8_ungroup_rows",
    "cpu_w4a8_unpack",
    "cpu_w4a16_pack",
    "cpu_w4a16_unpack",
]
