"""What runs a layer: vLLM's own kernel where it has one for the layout, else this package's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ctconvert.errors import UsageError
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels import Binding
from ctconvert.runtime.kernels.base import Tensors, padded
from ctconvert.transforms.dtypes import torch_dtype

Run = Callable[[Binding, Tensors, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Running:
    """The kernel of a layer.

    Args:
        name: the layer's, for messages.
        bound: its weight on this rank.
        dtype: of the activations.

    Raises:
        UsageError: nothing runs such weights here, or not with activations of that dtype.
    """

    def __init__(self, name: str, bound: Binding, dtype: torch.dtype) -> None:
        self.bound, self.dtype = bound, dtype
        self.kernel = kernels.get(bound.layout, bound.spec)
        needed = self.kernel.dtype
        if bound.spec.element in ("F16", "BF16"):
            needed = torch_dtype(bound.spec.element)
        if needed not in (None, dtype):
            held = str(needed).removeprefix("torch.")
            raise UsageError(
                f"module {name}: layout {bound.layout} is made for {held} activations: pass "
                f"--dtype {held}"
            )
        self.derived: dict[str, torch.Tensor] = {}
        self.run: Run = engine_kernel(bound, dtype) or self.kernel.run

    def prepare(self, tensors: Tensors) -> None:
        """Computes what the kernel would on every call; the tensors stay as they are."""
        self.derived = self.kernel.derived(self.bound, tensors)

    def __call__(
        self, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [..., K] to [..., N]."""
        return self.run(self.bound, {**tensors, **self.derived}, x.contiguous(), bias)


def engine_kernel(bound: Binding, dtype: torch.dtype) -> Run | None:
    """vLLM's kernel for a layout, where this build of it and this machine have one."""
    if bound.spec.side:  # static INT8 activations, which no kernel of vLLM's has
        return None
    amx = torch.cpu._is_amx_tile_supported()
    same = bound.spec.scale_dtype is not None and torch_dtype(bound.spec.scale_dtype) == dtype
    wanted = {
        "cpu-w4a16": ("cpu_gemm_wna16", _cpu_w4a16, same),
        "cpu-w4a8": ("int4_scaled_mm_cpu", _cpu_w4a8, amx and dtype == torch.bfloat16),
        "cpu-int8": ("int8_scaled_mm_with_quant", _cpu_int8, amx),
    }
    if bound.layout not in wanted:
        return None
    op, run, fits = wanted[bound.layout]
    if not fits or not hasattr(torch.ops._C, op):
        return None
    if amx:
        torch.cpu._init_amx()  # a kernel that uses it before kills the process
    return run


def _cpu_w4a16(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from vllm import _custom_ops as ops

    amx = torch.cpu._is_amx_tile_supported() and x.dtype == torch.bfloat16
    wide, wide_bias = padded(bound, x, bias)
    out = ops.cpu_gemm_wna16(
        input=wide,
        q_weight=tensors["qweight"],
        scales=tensors["scales"],
        zeros=tensors.get("qzeros"),
        bias=wide_bias,
        pack_factor=8,
        isa_hint="amx" if amx else "vec",
    )
    return out[..., : bound.spec.n]


def _cpu_w4a8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    from vllm import _custom_ops as ops

    wide, wide_bias = padded(bound, x, bias)
    out = ops.int4_scaled_mm_cpu(
        x=wide,
        w=tensors["qweight"],
        w_zeros=tensors["qzeros"],
        w_scales=tensors["scales"],
        bias=None if wide_bias is None else wide_bias.float(),
    )
    return out[..., : bound.spec.n]


def _cpu_int8(
    bound: Binding, tensors: Tensors, x: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    wide, wide_bias = padded(bound, x, bias)
    out = torch.ops._C.int8_scaled_mm_with_quant(
        wide.flatten(0, -2),
        tensors["weight"],
        tensors["weight_scale"],
        None if wide_bias is None else wide_bias.float(),
        x.dtype,
        True,
    )
    return out.reshape(*x.shape[:-1], -1)[..., : bound.spec.n]
