"""2:4 sparse matmul on the layout ``cutlass-sparse24`` (SM90, CUTLASS 3.x).

Before, in the layout (N = output features, K = input features, Np = N rounded up to 64,
Kp = K rounded up to 128):

- ``weight`` [N, K/2]: the two values kept of every four columns, in column order; f16, bf16, i8
  or f8_e4m3
- ``meta`` u8 [Np, Kp/8]: a nibble ``i0 | i1 << 2`` for every four columns, in the compressed
  metadata order of CUTLASS's SM90 kernels
- ``weight_scale`` f32 [N, 1] (8-bit weights) or [1]
- ``x`` [M, K] in the weight's dtype, ``x_scale`` f32 [M, 1] (per token) or [1] (static)

After: ``out`` [M, N] f16 or bf16 = ``x_scale * (weight_scale * (x @ W^T)) + bias``.

The kernel is CUTLASS's sparse warp-specialised GEMM with our epilogue (``sparse24.cu``), compiled
at first use, one library for each element type and output type. It accumulates in f32, for i8 in
i32. f8_e4m3 products are accumulated by the tensor cores alone, as ``torch._scaled_mm`` does with
``use_fast_accum=True``: they keep fewer bits than an f32 between steps.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ctconvert.device import on_device
from ctconvert.runtime import nvcc
from ctconvert.runtime.kernels._common import check_tensor
from ctconvert.runtime.kernels.scaled_mm import quantize_per_token, quantize_static
from ctconvert.runtime.nvcc import KernelUnavailableError
from ctconvert.transforms.sparse24 import sm90_decompress

__all__ = ["KernelUnavailableError", "sparse24_linear", "sparse24_mm", "sparse24_mm_reference"]

Backend = Literal["cutlass", "reference"]

_SOURCE = Path(__file__).with_name("sparse24.cu")
_ELEMENTS = {
    torch.float16: ("f16", "cutlass::half_t"),
    torch.bfloat16: ("bf16", "cutlass::bfloat16_t"),
    torch.int8: ("i8", "int8_t"),
    torch.float8_e4m3fn: ("f8_e4m3", "cutlass::float_e4m3_t"),
}
_OUT_DTYPES = (torch.float16, torch.bfloat16)


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
            "CT_ELEMENT": _ELEMENTS[dtype][1],
            "CT_ACCUMULATOR": "int32_t" if dtype == torch.int8 else "float",
            "CT_OUT": _ELEMENTS[out_dtype][1],
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
_VARIANTS: dict[int, tuple[Variant, ...]] = {
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

    variants = _VARIANTS[dtype.itemsize]
    return min(range(len(variants)), key=lambda i: cost(variants[i]))


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    k: int,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_tensor("weight", weight, dtypes=tuple(_ELEMENTS), shape=(None, None))
    n, multiple = weight.shape[0], 32 // weight.element_size()
    if k <= 0 or k % multiple or n <= 0 or n % 8:
        raise ValueError(
            f"N = {n}, K = {k}: the kernel needs N a multiple of 8 and, for {weight.dtype}, "
            f"K a multiple of {multiple}"
        )
    if out_dtype not in _OUT_DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}; the result is float16 or bfloat16")
    device = x.device
    check_tensor("x", x, dtypes=(weight.dtype,), shape=(None, k))
    check_tensor("weight", weight, dtypes=(x.dtype,), shape=(n, k // 2), device=device)
    meta_shape = (-(-n // 64) * 64, -(-k // 128) * 16)
    check_tensor("meta", meta, dtypes=(torch.uint8,), shape=meta_shape, device=device)
    for name, scale, rows in (("weight_scale", weight_scale, n), ("x_scale", x_scale, x.shape[0])):
        if scale is not None:
            shape = (1,) if scale.dim() == 1 else (rows, 1)
            check_tensor(name, scale, dtypes=(torch.float32,), shape=shape, device=device)
    if bias is not None:
        check_tensor("bias", bias, dtypes=(out_dtype,), shape=(n,), device=device)


def sparse24_mm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    *,
    k: int,
    weight_scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """:func:`sparse24_mm` in plain torch: decompress, multiply in f32 (i8: exactly), scale."""
    _check(x, weight, meta, k, weight_scale, x_scale, bias, out_dtype)
    dense = sm90_decompress(weight, meta, weight.shape[0], k)
    # A sum of K products of i8 is exact in f64.
    wide = torch.float64 if weight.dtype == torch.int8 else torch.float32
    out = (x.to(wide) @ dense.to(wide).t()).float()
    if weight_scale is not None:
        out = out * weight_scale.view(1, -1)
    if x_scale is not None:
        out = out * x_scale.view(-1, 1)
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype)


@functools.cache
def _library(dtype: torch.dtype, out_dtype: torch.dtype) -> ctypes.CDLL:
    include, version = nvcc.cutlass_include()
    name = f"sparse24-{_ELEMENTS[dtype][0]}-{_ELEMENTS[out_dtype][0]}"
    variants = _VARIANTS[dtype.itemsize]
    units = [v.macros(f"sparse24_{i}", dtype, out_dtype) for i, v in enumerate(variants)]
    library = nvcc.build(name, _SOURCE, units, include, version, "90a")
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    for i in range(len(variants)):
        function = getattr(library, f"sparse24_{i}")
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
    return library


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) != (9, 0):
        raise KernelUnavailableError(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; the "
            "2:4 kernels need 9.0 (H100, H200): the reference runs with device cpu"
        )
    return torch.cuda.get_device_properties(device).multi_processor_count


def _run_cutlass(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    k: int,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    variant: int | None = None,
) -> torch.Tensor:
    tokens, n = x.shape[0], weight.shape[0]
    if x.device.type != "cuda" or torch.version.hip is not None:
        raise KernelUnavailableError(
            f"the tensors are on {x.device.type}; the 2:4 kernels run on NVIDIA GPUs of compute "
            "capability 9.0: move them there; the reference runs with device cpu"
        )
    multiprocessors = _multiprocessors(x.device)
    library = _library(weight.dtype, out_dtype)
    out = torch.empty(tokens, n, dtype=out_dtype, device=x.device)
    if tokens == 0:
        return out
    for name, tensor in (("x", x), ("weight", weight), ("meta", meta)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} does not start at a multiple of 16 bytes")
    if variant is None:
        variant = select(weight.dtype, n, tokens, multiprocessors)
    order = _VARIANTS[weight.dtype.itemsize][variant]
    with on_device(x.device):
        status = getattr(library, f"sparse24_{variant}")(
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


@torch.library.custom_op(
    "ctconvert::sparse24_mm",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor meta, SymInt k, Tensor? weight_scale, Tensor? x_scale, "
        "Tensor? bias, ScalarType out_dtype) -> Tensor"
    ),
)
def _sparse24_mm_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    k: int,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(x, weight, meta, k, weight_scale, x_scale, bias, out_dtype)
    return _run_cutlass(x, weight, meta, k, weight_scale, x_scale, bias, out_dtype)


@_sparse24_mm_op.register_kernel("cpu")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    k: int,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return sparse24_mm_reference(
        x,
        weight,
        meta,
        k=k,
        weight_scale=weight_scale,
        x_scale=x_scale,
        bias=bias,
        out_dtype=out_dtype,
    )


@_sparse24_mm_op.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    k: int,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(x, weight, meta, k, weight_scale, x_scale, bias, out_dtype)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


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
    backend: Backend = "cutlass",
) -> torch.Tensor:
    """``x @ W^T`` for a 2:4 sparse W, with scales and bias in the kernel's epilogue.

    ``weight`` and ``meta`` are as in the module's docstring. The registered op is
    ``ctconvert::sparse24_mm``; on the CPU it runs the reference. The first call on a GPU compiles
    the kernels of its types (about a minute) and keeps them in the user's cache.

    Args:
        x: [M, K] in the weight's dtype (for i8 and f8_e4m3: already quantised).
        weight: [N, K/2], f16, bf16, i8 or f8_e4m3.
        meta: u8 [Np, Kp/8].
        k: K, which neither ``weight`` nor ``meta`` tells where it is padded.
        weight_scale: f32 [N, 1] or [1]; None is 1.
        x_scale: f32 [M, 1] or [1]; None is 1.
        bias: [N] in ``out_dtype``.
        out_dtype: torch.float16 or torch.bfloat16.
        backend: "cutlass", or "reference" for plain torch on any device.

    Returns:
        [M, N] in ``out_dtype``.

    Raises:
        TypeError: a dtype does not fit.
        ValueError: a shape, a device, a stride or an alignment does not fit. N must be a multiple
            of 8, K of 16 (16-bit weights) or 32 (8-bit), which is what the copy engine needs. The
            reference also looks at the metadata themselves.
        KernelUnavailableError: "cutlass" on a GPU that is not SM90, or without nvcc or the
            package ``nvidia-cutlass``.
    """
    if backend == "reference":
        return sparse24_mm_reference(
            x,
            weight,
            meta,
            k=k,
            weight_scale=weight_scale,
            x_scale=x_scale,
            bias=bias,
            out_dtype=out_dtype,
        )
    if backend != "cutlass":
        raise ValueError(f"backend is {backend!r}; there are 'cutlass' and 'reference'")
    out: torch.Tensor = torch.ops.ctconvert.sparse24_mm(
        x, weight, meta, k, weight_scale, x_scale, bias, out_dtype
    )
    return out


def sparse24_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    meta: torch.Tensor,
    *,
    k: int,
    weight_scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: Backend = "cutlass",
) -> torch.Tensor:
    """A linear layer on the layout: quantises the activations as it asks, then :func:`sparse24_mm`.

    8-bit weights: x becomes ``round(x / s)`` in i8 (half to even, clamped to -128..127) or
    ``x / s`` in f8_e4m3 (clamped to +-448), where s is ``input_scale`` or, where that is None, per
    token the largest magnitude over 127 or 448. 16-bit weights: x is used as it is, and
    ``input_scale``, which the layout stores as ones, is not.

    Args:
        x: f16 or bf16 [..., K].
        weight, meta, k, weight_scale, bias, backend: as for :func:`sparse24_mm`.
        input_scale: f32 [1], or None for dynamic per-token scales.
        out_dtype: torch.float16 or torch.bfloat16; x's dtype by default.

    Returns:
        [..., N] in ``out_dtype``.

    Raises:
        TypeError, ValueError, KernelUnavailableError: as :func:`sparse24_mm`.
    """
    if x.dtype not in _OUT_DTYPES:
        raise TypeError(f"x is {x.dtype}; activations are f16 or bf16")
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(f"x is {list(x.shape)}; its last dimension must be K = {k}")
    if input_scale is not None and (
        tuple(input_scale.shape) != (1,) or input_scale.dtype != torch.float32
    ):
        raise ValueError(
            f"input_scale is {input_scale.dtype} {list(input_scale.shape)}; it is f32 [1]"
        )
    flat, x_scale = x.reshape(-1, k), None
    if weight.element_size() == 1:
        if input_scale is None:
            flat, x_scale = quantize_per_token(flat.contiguous(), weight.dtype)
        else:
            flat = quantize_static(flat.contiguous(), input_scale, None, weight.dtype)
            x_scale = input_scale
    out = sparse24_mm(
        flat.contiguous(),
        weight,
        meta,
        k=k,
        weight_scale=weight_scale,
        x_scale=x_scale,
        bias=bias,
        out_dtype=out_dtype or x.dtype,
        backend=backend,
    )
    return out.view(*x.shape[:-1], weight.shape[0])
