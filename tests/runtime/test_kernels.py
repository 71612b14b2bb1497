"""The registry of kernels, and how their operations are declared."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

from ctconvert.errors import UsageError
from ctconvert.layouts import LAYOUTS, TARGETS, Layout
from ctconvert.runtime import kernels
from ctconvert.runtime.kernels.fake_quant.kernel import fake_quant_int8
from ctconvert.runtime.kernels.gather.kernel import embedding_gather
from ctconvert.runtime.kernels.marlin.grouped import marlin_grouped
from ctconvert.runtime.kernels.marlin.kernel import marlin_gemm
from ctconvert.runtime.kernels.marlin.tiles import marlin_tiles_gemm
from ctconvert.runtime.kernels.ops import Result, op
from ctconvert.runtime.kernels.quantize.kernel import quantize_per_token, quantize_static
from ctconvert.runtime.kernels.scaled_mm.kernel import scaled_mm
from ctconvert.runtime.kernels.sparse24.kernel import sparse24_mm
from ctconvert.runtime.kernels.wna16.kernel import wna16_gemm
from ctconvert.runtime.kernels.xpu.kernel import int4_gemm_w4a8, int4_gemm_w4a16


def test_a_kernel_is_of_a_layout_that_targets_prefer() -> None:
    found = [kernel.layout for kernel in kernels.KERNELS]
    assert len(found) == len(set(found))
    assert set(found) <= {name for names in TARGETS.values() for name in names}
    assert set(found) >= {*TARGETS["triton"], *TARGETS["cuda"], *TARGETS["rocm"], *TARGETS["xpu"]}
    assert set(found) >= {*TARGETS["cuda-sm80"], *TARGETS["cuda-sm90"], *TARGETS["cpu"]}
    for layout in found:
        assert kernels.get(layout).layout == layout


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_a_layout_says_of_its_kernel_is_so(layout: Layout) -> None:
    kernel = kernels.find(layout.name)
    assert (kernel is None) == layout.read_by.endswith("; none here")
    plain = kernel is not None and kernel.plain
    assert plain == layout.read_by.endswith("; plain torch here")


def test_a_layout_without_a_kernel_is_no_pass() -> None:
    with pytest.raises(UsageError, match="no kernel for layout nvfp4-cutlass here"):
        kernels.get("nvfp4-cutlass")


def test_importing_the_registry_is_light() -> None:
    code = "import ctconvert.runtime.kernels, sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"triton", "transformers", "compressed_tensors", "ctconvert.runtime.nvcc"}
    assert not heavy & set(run.stdout.split())


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (fake_quant_int8, "fake_quant.triton:fake_quant"),
        (quantize_per_token, "quantize.triton:quantize_per_token"),
        (quantize_static, "quantize.triton:quantize_static"),
        (wna16_gemm, "wna16.triton:gemm"),
        (marlin_gemm, "marlin.triton:gemm"),
        (marlin_tiles_gemm, "marlin.triton:tiles_gemm"),
        (marlin_grouped, "marlin.triton:grouped"),
        (scaled_mm, "scaled_mm.triton:scaled_mm"),
        (sparse24_mm, "sparse24.cutlass:sparse24_mm"),
        (int4_gemm_w4a8, "xpu.onednn:int4_gemm_w4a8"),
        (int4_gemm_w4a16, "xpu.onednn:int4_gemm_w4a16"),
        (embedding_gather, "gather.triton:gather"),
    ],
)
def test_a_kernel_takes_what_its_op_takes(call: object, kernel: str) -> None:
    """On a device that has one; what it takes beyond that has a default."""
    module, function = f"ctconvert.runtime.kernels.{kernel}".split(":")
    assert call.kernel == f"{module}:{function}"  # type: ignore[attr-defined]
    launched = inspect.signature(getattr(importlib.import_module(module), function)).parameters
    declared = inspect.signature(call).parameters  # type: ignore[arg-type]
    referred = inspect.signature(call.reference).parameters  # type: ignore[attr-defined]
    for name, parameter in declared.items():
        for other in (launched[name], referred[name]):
            assert (other.kind, other.default) == (parameter.kind, parameter.default), name
    assert list(declared) == list(referred)
    assert list(launched)[: list(declared).index(list(declared)[-1]) + 1] == list(declared)
    for name in launched.keys() - declared.keys():
        assert launched[name].default is None


def test_an_op_checks_runs_and_is_traced() -> None:
    def twice_reference(x: torch.Tensor, y: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        return (x + y) * times

    @op(twice_reference, "no.such.module:kernel")
    def twice(x: torch.Tensor, y: torch.Tensor, *, times: int = 2) -> Result:
        """What it does."""
        if x.shape != y.shape:
            raise ValueError("x and y differ")
        return Result(x.shape, x.dtype)

    x = torch.ones(3)
    assert twice.__doc__ == "What it does."
    assert torch.equal(twice(x, x, times=3), torch.full((3,), 6.0))
    assert torch.equal(twice(y=x, x=x), torch.full((3,), 4.0))
    with pytest.raises(ValueError, match="differ"):
        twice(x, torch.ones(4))
    with pytest.raises(ValueError, match="differ"):
        twice(x.to("meta"), torch.ones(4, device="meta"))
    assert twice(x.to("meta"), x.to("meta")).shape == (3,)
    torch.library.opcheck(torch.ops.ctconvert.twice.default, (x, x))
    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, x), torch.full((3,), 4.0))
