"""The compiled variants of ``sparse24.cu``, which one is run, and how."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ctconvert.runtime import nvcc
from ctconvert.runtime.nvcc import KernelUnavailableError
from ctconvert.transforms.device import on_device

SOURCE = Path(__file__).with_name("sparse24.cu")
ELEMENTS = {
    torch.float16: ("f16", "cutlass::half_t"),
    torch.bfloat16: ("bf16", "cutlass::bfloat16_t"),
    torch.int8: ("i8", "int8_t"),
    torch.float8_e4m3fn: ("f8_e4m3", "cutlass::float_e4m3_t"),
}


@dataclass(frozen=True)
class Variant:
    """One compiled kernel.

    ``tile`` is N, tokens, K and ``cluster`` N, tokens. ``cost`` is the time of one tile in
    nanoseconds for every 128 columns, with all multiprocessors at work. ``raster`` (0 CUTLASS's
    choice, 1 along N, 2 along the tokens) and ``swizzle`` are the order in which tiles are taken.
    """

    tile: tuple[int, int, int]
    cluster: tuple[int, int]
    schedule: Literal["Cooperative", "Pingpong"]
    cost: int
    raster: int = 0
    swizzle: int = 1

    def macros(self, symbol: str, dtype: torch.dtype, out_dtype: torch.dtype) -> dict[str, str]:
        """The macros of ``sparse24.cu`` that make this kernel for one pair of types."""
        fast = "FP8FastAccum" if dtype == torch.float8_e4m3fn else ""
        cooperative = "Cooperative" if self.schedule == "Cooperative" else ""
        return {
            "CT_NAME": symbol,
            "CT_ELEMENT": ELEMENTS[dtype][1],
            "CT_ACCUMULATOR": "int32_t" if dtype == torch.int8 else "float",
            "CT_OUT": ELEMENTS[out_dtype][1],
            "CT_TILE_N": str(self.tile[0]),
            "CT_TILE_T": str(self.tile[1]),
            "CT_TILE_K": str(self.tile[2]),
            "CT_CLUSTER_N": str(self.cluster[0]),
            "CT_CLUSTER_T": str(self.cluster[1]),
            "CT_MAINLOOP": f"KernelTmaWarpSpecialized{self.schedule}{fast}",
            "CT_EPILOGUE": f"TmaWarpSpecialized{cooperative}",
        }


# By the bytes of an element. The costs were fitted to an H200's times for weights of 4096 x 4096,
# 8192 x 8192, 4096 x 14336 and 28672 x 4096 and 16 to 4096 tokens. K of a tile is a multiple of
# 128: with less, CUTLASS would want the metadata in another order.
VARIANTS: dict[int, tuple[Variant, ...]] = {
    1: (
        Variant((64, 16, 256), (1, 1), "Pingpong", 76),
        Variant((64, 32, 256), (1, 1), "Pingpong", 81),
        Variant((64, 64, 256), (2, 1), "Pingpong", 145),
        Variant((64, 128, 128), (2, 1), "Pingpong", 200),
        Variant((128, 128, 128), (1, 2), "Cooperative", 280, raster=2),
        Variant((128, 256, 128), (2, 1), "Cooperative", 500, raster=2, swizzle=8),
    ),
    2: (
        Variant((64, 16, 256), (1, 1), "Pingpong", 125),
        Variant((64, 32, 256), (1, 1), "Pingpong", 155),
        Variant((64, 64, 128), (2, 1), "Pingpong", 275),
        Variant((128, 64, 128), (2, 1), "Cooperative", 410),
        Variant((128, 128, 128), (1, 2), "Cooperative", 540, raster=2),
        Variant((256, 128, 128), (1, 2), "Cooperative", 950, raster=1),
    ),
}


def select(dtype: torch.dtype, n: int, tokens: int, multiprocessors: int = 132) -> int:
    """The variant for a weight of ``n`` rows and this many tokens, by number.

    It is the one with the least waves of tiles over the multiprocessors times the cost of a tile.
    """

    def cost(variant: Variant) -> int:
        tiles = 1
        for extent, tile, cluster in zip(
            (n, tokens), variant.tile[:2], variant.cluster, strict=True
        ):
            tiles *= -(-extent // (tile * cluster)) * cluster
        return -(-tiles // multiprocessors) * variant.cost

    variants = VARIANTS[dtype.itemsize]
    return min(range(len(variants)), key=lambda i: cost(variants[i]))


@functools.cache
def library(dtype: torch.dtype, out_dtype: torch.dtype) -> ctypes.CDLL:
    """The compiled variants for one pair of types, ``sparse24_0`` and on.

    Raises:
        KernelUnavailableError: nvcc or CUTLASS's headers are missing, or nvcc fails.
    """
    include, version = nvcc.cutlass_include()
    name = f"sparse24-{ELEMENTS[dtype][0]}-{ELEMENTS[out_dtype][0]}"
    variants = VARIANTS[dtype.itemsize]
    units = [v.macros(f"sparse24_{i}", dtype, out_dtype) for i, v in enumerate(variants)]
    built = nvcc.build(name, SOURCE, units, include, version, "90a")
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    for i in range(len(variants)):
        function = getattr(built, f"sparse24_{i}")
        function.restype = integer
        function.argtypes = [
            *(pointer,) * 5,
            integer,
            pointer,
            integer,
            pointer,
            *(integer,) * 7,
            pointer,
        ]
    return built


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        raise KernelUnavailableError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the "
            "2:4 kernels need 9.0 (H100, H200): the reference runs with device cpu"
        )
    return torch.cuda.get_device_properties(device).multi_processor_count


def sparse24_mm(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    *,
    k: int,
    weight_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype,
    variant: int | None = None,
) -> torch.Tensor:
    """``sparse24_mm`` on arguments already checked; ``variant`` overrides :func:`select`."""
    tokens, n = x.shape[0], weight.shape[0]
    if x.device.type != "cuda" or torch.version.hip is not None:
        raise KernelUnavailableError(
            f"the tensors are on {x.device.type}; the 2:4 kernels run on NVIDIA GPUs of compute "
            "capability 9.0: move them there; the reference runs with device cpu"
        )
    multiprocessors = _multiprocessors(x.device)
    kernels = library(weight.dtype, out_dtype)
    out = torch.empty(tokens, n, dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    for name, tensor in (("x", x), ("weight", weight), ("meta", meta)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} does not start at a multiple of 16 bytes")
    if variant is None:
        variant = select(weight.dtype, n, tokens, multiprocessors)
    order = VARIANTS[weight.dtype.itemsize][variant]
    with on_device(x.device):
        status = getattr(kernels, f"sparse24_{variant}")(
            weight.data_ptr(),
            meta.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            None if weight_scale is None else weight_scale.data_ptr(),
            weight_scale is not None and weight_scale.dim() == 2,
            None if x_scale is None else x_scale.data_ptr(),
            x_scale is not None and x_scale.dim() == 2,
            None if bias is None else bias.data_ptr(),
            n,
            tokens,
            k,
            order.swizzle,
            order.raster,
            x.device.index,
            multiprocessors,
            torch.cuda.current_stream().cuda_stream,
        )
    if status != 0:
        raise RuntimeError(
            f"CUTLASS refused the 2:4 matmul {tokens} x {n} x {k} in {weight.dtype} "
            f"(variant {variant}, status {status})"
        )
    return out
