"""What vLLM's GPU kernels are called with: ops that record it, by the schemas of two versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from ctconvert import layouts
from ctconvert.errors import UsageError
from ctconvert.integrations.vllm import engine
from ctconvert.integrations.vllm.engine import base, marlin
from ctconvert.integrations.vllm.running import Running
from ctconvert.runtime.kernels import Binding
from ctconvert.specs import WeightSpec
from ctconvert.transforms.dtypes import torch_dtype

N, K = 192, 256
#: ``marlin_gemm`` of vLLM 0.26, and of 0.33.
OLD = """(Tensor a, Tensor? c_or_none, Tensor b_q_weight, Tensor? b_bias_or_none, Tensor b_scales,
Tensor? a_scales, Tensor? global_scale, Tensor? b_zeros_or_none, Tensor? g_idx_or_none,
Tensor? perm_or_none, Tensor workspace, int b_type_id, SymInt size_m, SymInt size_n, SymInt size_k,
bool is_k_full, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor"""
NEW = """(Tensor a, Tensor b_q_weight, Tensor? b_bias, Tensor b_scales, Tensor? a_scales,
Tensor? global_scale, Tensor? b_zeros, Tensor? workspace, int b_q_type_id, SymInt size_m,
SymInt size_n, SymInt size_k, bool use_atomic_add, bool use_fp32_reduce, bool is_zp_float) -> Tensor
"""
MACHETE = """(Tensor A, Tensor B, int b_type, ScalarType? out_type, Tensor? group_scales,
Tensor? group_zeros, int? group_size, Tensor? channel_scales, Tensor? token_scales, str? schedule)
-> Tensor"""
SCALED = """(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias)
-> ()"""
AZP = """(Tensor(a!) out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor azp_adj,
Tensor? azp, Tensor? bias) -> ()"""
INT8 = "(Tensor(a!) result, Tensor input, {}Tensor{} scale, Tensor{}? azp) -> ()"
STATIC, DYNAMIC = INT8.format("", "", ""), INT8.format("", "(b!)", "(c!)")
FP8 = "(Tensor(a!) result, Tensor input, Tensor(b!) scale, Tensor? scale_ub) -> ()"
W4A8 = """(Tensor A, Tensor B, Tensor group_scales, int group_size, Tensor channel_scales,
Tensor token_scales, ScalarType? out_type, str? maybe_schedule) -> Tensor"""
OPS: dict[str, str] = {
    "machete_mm": MACHETE,
    "cutlass_scaled_mm": SCALED,
    "cutlass_scaled_mm_azp": AZP,
    "static_scaled_int8_quant": STATIC,
    "dynamic_scaled_int8_quant": DYNAMIC,
    "dynamic_per_token_scaled_fp8_quant": FP8,
    "cutlass_w4a8_mm": W4A8,
}
Calls = dict[str, dict[str, Any]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Calls]:
    """A build of vLLM with these ops, on SM90; what they are called with comes into the result."""

    def make(**schemas: str) -> Calls:
        calls: Calls = {}
        found: dict[tuple[str, str], Any] = {}
        for key, schema in schemas.items():
            namespace, _, name = key.rpartition("__")
            parsed = torch._C.parse_schema(name + schema.replace("\n", " "))

            class Op:
                _schema = parsed

                def __init__(self, name: str = name, parsed: Any = parsed) -> None:
                    self.name, self.names = name, [one.name for one in parsed.arguments]

                def __call__(self, *given: Any) -> torch.Tensor:
                    assert len(given) == len(self.names)
                    calls[self.name] = dict(zip(self.names, given, strict=True))
                    first = given[0]
                    if "quant" in self.name:
                        first.fill_(1)
                    return torch.full((len(first), 256), 2.0, dtype=torch.bfloat16)

            found[namespace or "_C", name] = Op()
        monkeypatch.setattr(base, "op", lambda name, namespace="_C": found.get((namespace, name)))
        monkeypatch.setattr(base, "capability", lambda: 90)
        monkeypatch.setattr(marlin, "locks", lambda device: torch.zeros(8, dtype=torch.int32))
        return calls

    return make


def weight(layout: str, **more: Any) -> tuple[Binding, dict[str, torch.Tensor]]:
    """A weight of N x K, padded as the layout wants it, and tensors that are all ones."""
    fields: dict[str, Any] = {
        "format": "pack-quantized",
        "family": "wna16",
        "kind": "int",
        "bits": 4,
        "n": N,
        "k": K,
        "storage": "packed",
        "strategy": "group",
        "group_size": 64,
        "scale_dtype": "BF16",
        "scale_shape": (N, K // 64),
    }
    spec = WeightSpec(**(fields | more))
    found = layouts.get(layout)
    assert found is not None and found.supports(spec)
    n, k = found.padded_shape(spec)
    stored = found.output_specs(WeightSpec(**(fields | more | {"n": n, "k": k})))
    tensors = {
        name: torch.ones(one.shape, dtype=torch.float32).to(torch_dtype(one.dtype))
        for name, one in stored.items()
    }
    return Binding(layout, spec, (n, k), (N,)), tensors


def run(
    bound: Binding, tensors: dict[str, torch.Tensor], bias: bool = True
) -> tuple[Running, torch.Tensor]:
    running = Running("module", bound, torch.bfloat16)
    running.prepare(tensors)
    x = torch.ones(3, bound.spec.k, dtype=torch.bfloat16)
    return running, running(tensors, x, torch.ones(N).bfloat16() if bias else None)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_marlin_with_locks_and_act_order(build: Callable[..., Calls], asymmetric: bool) -> None:
    calls = build(marlin_gemm=OLD)
    bound, tensors = weight("marlin", symmetric=not asymmetric, has_g_idx=not asymmetric)
    running, out = run(bound, tensors)
    assert running.by == "vLLM's marlin_gemm"
    assert out.shape == (3, N) and (out == 3).all()  # the op's 2 and the bias
    given = calls["marlin_gemm"]
    assert given["b_q_weight"] is tensors["qweight"] and given["b_scales"] is tensors["scales"]
    assert (given["size_m"], given["size_n"], given["size_k"]) == (3, *bound.padded)
    assert given["b_bias_or_none"] is None
    assert given["workspace"].dtype == torch.int32
    assert given["is_k_full"] and given["use_fp32_reduce"]
    assert not given["use_atomic_add"] and not given["is_zp_float"]
    zeros = tensors.get("qzeros") if asymmetric else None
    assert given["b_zeros_or_none"] is zeros
    from vllm.scalar_type import scalar_types

    codes = scalar_types.uint4 if asymmetric else scalar_types.uint4b8
    assert given["b_type_id"] == codes.id
    if asymmetric:
        assert given["g_idx_or_none"] is None and given["perm_or_none"] is None
    else:
        assert given["g_idx_or_none"].tolist() == [column // 64 for column in range(K)]
        assert given["perm_or_none"] is tensors["g_idx_sort_indices"]


def test_marlin_without(build: Callable[..., Calls]) -> None:
    calls = build(marlin_gemm=OLD, vllm__marlin_gemm=NEW)
    running, _ = run(*weight("marlin"))
    assert running.derived == {} and calls["marlin_gemm"]["workspace"] is None
    assert "b_q_type_id" in calls["marlin_gemm"]
    bound, _ = weight("marlin", has_g_idx=True)
    assert Running("module", bound, torch.bfloat16).by == "ctconvert"


def test_an_argument_that_is_not_known(build: Callable[..., Calls]) -> None:
    build(marlin_gemm=OLD.replace("bool is_zp_float", "bool is_zp_float, bool novelty"))
    assert Running("module", weight("marlin")[0], torch.bfloat16).by == "ctconvert"


NVFP4 = {
    "format": "nvfp4-pack-quantized",
    "family": "nvfp4",
    "kind": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "F8_E4M3",
    "scale_shape": (N, K // 16),
    "side": (("weight_global_scale", "F32"),),
}


def test_nvfp4_in_marlins_tiles(build: Callable[..., Calls]) -> None:
    calls = build(marlin_gemm=OLD)
    bound, tensors = weight("marlin-nvfp4", **NVFP4)
    run(bound, tensors)
    given = calls["marlin_gemm"]
    assert given["global_scale"] is tensors["weight_global_scale"]
    assert given["b_scales"].dtype == torch.float8_e4m3fn  # bytes, seen as what the op calls them
    assert given["b_scales"].data_ptr() == tensors["weight_scale"].data_ptr()


@pytest.mark.parametrize("group, given_group", [(64, 64), (None, -1)])
def test_machete(build: Callable[..., Calls], group: int | None, given_group: int) -> None:
    calls = build(**OPS)
    strategy = {"strategy": "channel", "scale_shape": (N, 1)} if group is None else {}
    bound, tensors = weight("machete", group_size=group, symmetric=False, **strategy)
    running, out = run(bound, tensors)
    assert running.by == "vLLM's machete_mm" and out.shape == (3, N)
    given = calls["machete_mm"]
    assert given["A"].shape == (3, bound.padded[1]) and given["B"] is tensors["qweight"]
    assert given["group_zeros"] is tensors["zeros"] and given["group_size"] == given_group


W8A8 = {
    "format": "int-quantized",
    "family": "w8a8",
    "bits": 8,
    "storage": "plain",
    "element": "I8",
    "strategy": "channel",
    "group_size": None,
    "scale_shape": (N, 1),
    "input_type": "I8",
}


def test_int8_with_static_zero_points(build: Callable[..., Calls]) -> None:
    calls = build(**OPS)
    bound, tensors = weight(
        "scaled-mm",
        **W8A8,
        activations="int8 static tensor in",
        input_symmetric=False,
        side=(("input_scale", "BF16"), ("input_zero_point", "I8")),
        side_zero_points=(("input_zero_point", 3),),
    )
    tensors["input_zero_point"].fill_(3)
    running, _ = run(bound, tensors)
    assert running.by == "vLLM's cutlass_scaled_mm_azp"
    given = calls["cutlass_scaled_mm_azp"]
    assert given["azp"] is None  # it is in the sums: 3 * 1 * K
    assert given["azp_adj"].shape == (1, N) and (given["azp_adj"] == 3 * K).all()
    assert given["b"].shape == (K, N) and given["b"].stride() == (1, K)
    quantised = calls["static_scaled_int8_quant"]
    assert quantised["azp"].dtype == torch.int32 and quantised["scale"] is given["a_scales"]


def test_int8_per_token(build: Callable[..., Calls]) -> None:
    calls = build(**OPS)
    bound, tensors = weight("scaled-mm", **W8A8, activations="int8 dynamic token in")
    running, out = run(bound, tensors)
    assert running.by == "vLLM's cutlass_scaled_mm" and out.dtype == torch.bfloat16
    given = calls["cutlass_scaled_mm"]
    assert given["a_scales"].shape == (3, 1) and given["b_scales"] is tensors["weight_scale"]
    assert given["out"].shape == (3, N) and given["bias"].dtype == torch.bfloat16


def test_w4a8(build: Callable[..., Calls]) -> None:
    calls = build(**OPS)
    more = {"group_size": 128, "scale_shape": (N, K // 128), "input_type": "F8_E4M3"}
    bound, tensors = weight("w4a8-fp8", **more, activations="fp8 dynamic token in")
    running, out = run(bound, tensors)
    assert running.by == "vLLM's cutlass_w4a8_mm" and out.shape == (3, N)
    given, n = calls["cutlass_w4a8_mm"], bound.padded[0]
    assert given["group_scales"].shape == (K // 128, n, 8) and given["group_size"] == 128
    assert given["B"].shape == (K // 8, n) and given["A"].dtype == torch.float8_e4m3fn


def test_what_vllm_has_no_kernel_for(build: Callable[..., Calls]) -> None:
    build(marlin_gemm=OLD, **OPS)
    static = weight("marlin", side=(("input_scale", "BF16"),))[0]
    wide = weight("marlin", bits=8, symmetric=False)[0]
    half = weight("marlin", scale_dtype="F16")[0]
    for bound in (static, wide, half):
        assert Running("module", bound, torch.bfloat16).by == "ctconvert"
    assert engine.find(weight("marlin")[0], torch.bfloat16, prepared=False) is None


def test_own_kernels(build: Callable[..., Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    build(marlin_gemm=OLD)
    monkeypatch.setenv(engine.KERNELS, "own")
    assert Running("module", weight("marlin")[0], torch.bfloat16).by == "ctconvert"
    monkeypatch.setenv(engine.KERNELS, "stock")
    with pytest.raises(UsageError, match="CTCONVERT_VLLM_KERNELS is 'stock'"):
        Running("module", weight("marlin")[0], torch.bfloat16)
