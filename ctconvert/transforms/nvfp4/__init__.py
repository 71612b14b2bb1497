"""NVFP4 block scales as the Marlin mixed-precision GEMM reads them.

Before (N output features, G = K/16 groups)::

    scales         f8_e4m3 or its bytes, u8 [N, G]    an effective scale is scale / divisor
    global scale   f32 [1], the divisor

After::

    packed         u8 [G, N]           E5M3 bytes, reordered along N
    lost           u8 [N, ceil(G/2)]   what E5M3 has no room for, group 2i in the low nibble
    global scale   f32 [1]             a factor

An E5M3 byte has no sign, five bits of exponent and three of mantissa; the kernel shifts it into a
16-bit float. With the power p it holds ``scale * 2**p``, or 0 for what would be below 128: scales
under ``2**-(6 + p)`` are flushed, which are E4M3's subnormals 1 .. 7 only, and none for p >= 3.
Those are what ``lost`` holds, in four bits a scale: a plane of fixed shape, since the place and
number of flushed scales are in the data, and every tensor's shape is planned before it is read.

Along N, every run of 64 is in the grouped order of
:func:`ctconvert.transforms.marlin.marlin_permute_scales`, then every run of four as (0, 2, 1, 3).
With the column's bits in its run n5..n0, position (n2 n1 n0 n5 n3 n4).

These are vLLM's ``nvfp4_marlin_process_scales``, ``_nvfp4_compute_scale_factor`` and
``nvfp4_marlin_process_global_scale`` (vllm/model_executor/layers/quantization/utils/
marlin_utils_fp4.py) for 16-bit activations.

CPU tensors take the torch code of :mod:`ctconvert.transforms.nvfp4.blocks`, CUDA and XPU tensors
the kernels of :mod:`ctconvert.transforms.nvfp4.kernels`; the results are equal bit for bit.
"""

from __future__ import annotations

import math

import torch

from ctconvert.transforms.nvfp4 import blocks

RUN = 64
#: The greatest finite E4M3 byte, 448; the one after it is NaN, the others are negative.
GREATEST = 0x7E
#: The power that makes the smallest scale there is, 2**-9, as great as 448 allows.
GREATEST_POWER = 17
# The kernel's E2M1 and E5M3 values lack 2**(B - 7), which the global scale makes up for.
_BIAS = {torch.float16: 14, torch.bfloat16: 126}


def nvfp4_power(scales: torch.Tensor) -> int:
    """The p for bfloat16: the greatest with ``scale * 2**p <= 448`` for all scales; 0 for none.

    ``scales`` are f8_e4m3 or u8 bytes of any shape, on any device, whose queue is waited for. All
    weights that share a global scale need one p: that of the smallest. For float16 p is 0.

    Raises ValueError for another dtype, or a scale that is negative or NaN.
    """
    greatest = _greatest(_bytes(scales))
    return _power_of_byte(greatest) if greatest else 0


def nvfp4_pack_scales(scales: torch.Tensor, power: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales [N, G] to (packed u8 [G, N], lost u8 [N, ceil(G/2)]), N a multiple of 64.

    ``power`` is :func:`nvfp4_power`, of these scales or of more, or 0. Safe to call from several
    threads; beside input and output it needs under 1 MiB on the CPU, nothing on an accelerator.

    Raises ValueError for another dtype, rank or N, a negative or NaN scale, or a power that these
    scales are too great for.
    """
    raw = _bytes(scales)
    _check_runs(raw.shape, 0)
    _check_power(power)
    greatest = _greatest(raw)
    if greatest and power > _power_of_byte(greatest):
        raise ValueError(f"a scale times 2**{power} is greater than 448")
    raw = raw.contiguous()
    if _has_kernels(raw):
        from ctconvert.transforms.nvfp4 import kernels

        return kernels.pack_scales(raw, power)
    return blocks.pack_scales(raw, power)


def nvfp4_unpack_scales(packed: torch.Tensor, lost: torch.Tensor, power: int) -> torch.Tensor:
    """The inverse of :func:`nvfp4_pack_scales`: to the scales' bytes, u8 [N, G].

    Whether ``packed`` and ``lost`` are what that function makes of the result is not checked:
    packing it again tells.

    Raises ValueError for another dtype, shape or power.
    """
    for name, tensor in (("packed", packed), ("lost", lost)):
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name} scales must be torch.uint8, not {tensor.dtype}")
    _check_runs(packed.shape, 1)
    _check_power(power)
    groups, n = packed.shape
    if tuple(lost.shape) != (n, -(-groups // 2)):
        raise ValueError(
            f"the lost scales of packed [{groups}, {n}] are [{n}, {-(-groups // 2)}], not "
            f"{list(lost.shape)}"
        )
    packed, lost = packed.contiguous(), lost.contiguous()
    if _has_kernels(packed):
        from ctconvert.transforms.nvfp4 import kernels

        return kernels.unpack_scales(packed, lost, power)
    return blocks.unpack_scales(packed, lost, power)


def tile_scales(scales: torch.Tensor) -> torch.Tensor:
    """Bytes u8 [N, G] transposed and in the order above, as they are: u8 [G, N].

    For E8M0 scales, which stay what they are: ``marlin_permute_mxfp4_scales`` of the transpose, in
    one pass (vLLM: ``mxfp4_marlin_process_scales``, also for MXFP8).

    Raises ValueError for another dtype or rank, or N that is no multiple of 64.
    """
    return _in_order(scales, 0)


def untile_scales(tiled: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`tile_scales`: u8 [G, N] to u8 [N, G], with the same ValueError."""
    return _in_order(tiled, 1)


def _in_order(scales: torch.Tensor, axis: int) -> torch.Tensor:
    if scales.dtype != torch.uint8:
        raise ValueError(f"scales must be torch.uint8 bytes, not {scales.dtype}")
    _check_runs(scales.shape, axis)
    scales = scales.contiguous()
    if _has_kernels(scales):
        from ctconvert.transforms.nvfp4 import kernels

        return kernels.tile_scales(scales) if axis == 0 else kernels.untile_scales(scales)
    return blocks.tile_scales(scales) if axis == 0 else blocks.untile_scales(scales)


# ------------------------------------------------------------------------------ global scale


def nvfp4_global_scale(divisor: torch.Tensor, dtype: torch.dtype, power: int) -> torch.Tensor:
    """The kernel's factor for a checkpoint's divisor, f32 [1]: ``(1/d) * 2**(B-7) / 2**p``.

    B is 14 for float16 activations and 126 for bfloat16. The reciprocal is rounded to float32, the
    rest is exact; several divisors may have one reciprocal, so it has no inverse.

    Raises ValueError for another dtype or shape, a divisor that is not finite and positive, or one
    so small that the factor overflows.
    """
    value = float(_one(divisor, "divisor"))
    if not 0 < value < math.inf:
        raise ValueError(f"weight_global_scale is {value}; it must be finite and positive")
    made = divisor.reciprocal() * 2.0 ** _shift(dtype, power)
    if not 0 < float(made) < math.inf:
        raise ValueError(
            f"weight_global_scale is {value}, whose reciprocal times 2**{_shift(dtype, power)} is "
            f"{float(made)} in float32, no scale the kernel can use"
        )
    return made


def nvfp4_power_of(factor: torch.Tensor, divisor: torch.Tensor, dtype: torch.dtype) -> int:
    """The p that :func:`nvfp4_global_scale` made ``factor`` of ``divisor`` with.

    Raises ValueError where there is none.
    """
    for power in range(GREATEST_POWER + 1):
        if torch.equal(nvfp4_global_scale(divisor, dtype, power), _one(factor, "factor")):
            return power
    raise ValueError(
        f"the global scale {float(factor)} is not one that the source's {float(divisor)} gives"
    )


def _shift(dtype: torch.dtype, power: int) -> int:
    if dtype not in _BIAS:
        raise ValueError(f"activations must be torch.float16 or torch.bfloat16, not {dtype}")
    _check_power(power)
    return _BIAS[dtype] - 7 - power


# ------------------------------------------------------------------------------------ checks


def _power_of_byte(byte: int) -> int:
    """The greatest p for which an E4M3 value, by its byte, times 2**p is at most 448."""
    if byte < 8:  # a subnormal as a normal of an exponent below 1, which 2**p can make it
        log2 = byte.bit_length() - 1
        byte = (log2 - 2) * 8 + ((byte << (3 - log2)) & 7)
    return (GREATEST - byte) // 8


def _greatest(raw: torch.Tensor) -> int:
    """The greatest byte, 0 for none; as bytes, E4M3 values that are not negative are in order."""
    greatest = int(raw.max()) if raw.numel() else 0
    if greatest > GREATEST:
        at = (raw > GREATEST).nonzero()[0].tolist()
        value = raw[tuple(at)].view(torch.float8_e4m3fn).item()
        raise ValueError(f"weight_scale{at} is {value}; a scale must be a number and not negative")
    return greatest


def _bytes(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype not in (torch.uint8, torch.float8_e4m3fn):
        raise ValueError(
            f"scales must be torch.float8_e4m3fn or torch.uint8 bytes, not {scales.dtype}"
        )
    return scales.view(torch.uint8)


def _one(scale: torch.Tensor, name: str) -> torch.Tensor:
    if scale.dtype != torch.float32 or tuple(scale.shape) != (1,):
        raise ValueError(
            f"the {name} must be torch.float32 [1], not {scale.dtype} {list(scale.shape)}"
        )
    return scale


def _check_power(power: int) -> None:
    if not 0 <= power <= GREATEST_POWER:
        raise ValueError(f"the power must be in 0 .. {GREATEST_POWER}, not {power}")


def _check_runs(shape: torch.Size, axis: int) -> None:
    if len(shape) != 2 or shape[axis] % RUN:
        wanted = ("[N, G]", "[G, N]")[axis]
        raise ValueError(f"scales must be {wanted} with N a multiple of {RUN}, not {list(shape)}")


def _has_kernels(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cuda", "xpu")
