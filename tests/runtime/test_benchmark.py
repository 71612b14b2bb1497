"""``bench``: what is timed and on which device, the limits beside it, and how it fails."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import DYNAMIC_INT8, config_of, group_config, quantised, weight_args
from support.cli import run
from support.conversion import converted, converted_module
from support.paths import ROOT
from typer.testing import CliRunner

from ctconvert.cli import app
from ctconvert.output import Output
from ctconvert.runtime import benchmark
from ctconvert.runtime.benchmark import Limits, eight_bit_rate, median_seconds, product_of
from ctconvert.runtime.loading import binding as binding_of

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
DYNAMIC_FP8 = DYNAMIC_INT8 | {"type": "float"}
#: A small module each: group config.
MODULES = {
    "int4": group_config(weight_args(4, 32)),
    "int8 dynamic": group_config(
        weight_args(8, None), format="int-quantized", inputs=dict(DYNAMIC_INT8)
    ),
    "fp8 dynamic": group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=DYNAMIC_FP8
    ),
    "fp8 weight-only": group_config(weight_args(8, None, kind="float"), format="float-quantized"),
    "embedding": group_config(weight_args(4, 32), ["Embedding"]),
}
N, K = 80, 64


def made(kind: str, folder: Path) -> Path:
    """The output for a checkpoint of one module [N, K]."""
    group = MODULES[kind]
    name = "model.embed_tokens" if kind == "embedding" else "model.layers.0.down_proj"
    return converted_module(quantised(N, K, group, 1), config_of(group), "triton", folder, name)


def nothing_converted(folder: Path) -> Path:
    out = converted("rand-w3a16-g128-sym", "triton", folder, keep_unsupported=True)
    assert not Output.open(out).plan.modules
    return out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that take no time to measure."""
    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1e9, 4e9))


def untimed(*_: Any) -> Any:
    raise AssertionError("timed")


# --- the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_device_is_current_while_it_is_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, streams and the buffer that clears the cache are the current device's."""
    device = torch.device(kind, 1)
    current: list[torch.device] = [torch.device(kind, 0)]
    seen = []

    @contextmanager
    def guard(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.pop()

    def do_bench(call: Any, **_: Any) -> float:
        seen.append(("timed", current[-1]))
        return 2.0

    def captured(call: Any, _: torch.device) -> Any:
        seen.append(("captured", current[-1]))
        return call

    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(device=guard))
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(benchmark, "_captured", captured)
    assert median_seconds(lambda: None, device) == 2e-3
    assert seen == [("captured", device)] * (kind == "cuda") + [("timed", device)]
    assert len(current) == 1


@pytest.mark.gpu
def test_another_device_than_the_current_one_is_timed() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for graph in (False, True):
        seconds = median_seconds(lambda: target.copy_(source), device, graph)
        assert 1e10 < 2 * source.nbytes / seconds < 2e13
    assert torch.cuda.current_device() == 0


# --- the limits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "product"),
    [
        ("smol-w4a16-g32-asym", "cuda", "bf16"),
        ("smol-w8a8o8-static-sym", "triton", "bf16"),  # int8 activations, multiplied as bf16
        ("smol-mxfp4a16", "cuda", "bf16"),
        ("old071-smol-sparse24-bf16", "cuda", "bf16 2:4"),
        ("old071-smol-sparse24-fp8-dynamic-channel", "cuda", "fp8 2:4"),
        ("smol-w4a8-int8dyn-g32-packed", "xpu", "int8"),
    ],
)
def test_what_a_real_module_multiplies_in(
    name: str, target: str, product: str, tmp_path: Path
) -> None:
    found = map(binding_of, Output.open(converted(name, target, tmp_path)).plan.modules)
    found = list(found)
    assert {product_of(binding, CUDA) for binding in found} == {product}
    assert {product_of(binding, CPU) for binding in found} == {"bf16"}


@pytest.mark.parametrize(
    ("kind", "product"),
    [
        ("int4", "bf16"),
        ("int8 dynamic", "int8"),
        ("fp8 dynamic", "fp8"),
        ("fp8 weight-only", "bf16"),
        ("embedding", None),
    ],
)
def test_what_a_module_multiplies_in(kind: str, product: str | None, tmp_path: Path) -> None:
    (binding,) = map(binding_of, Output.open(made(kind, tmp_path)).plan.modules)
    assert product_of(binding, CUDA) == product
    assert product_of(binding, CPU) == (product and "bf16")


def test_a_sparse_product_may_be_twice_as_fast() -> None:
    limits = Limits(1e12, {"bf16": 1e14, "int8": 3e14})
    products = ("bf16", "bf16 2:4", "int8", "int8 2:4", "fp8", "fp8 2:4", None)
    assert [limits.flops(p) for p in products] == [1e14, 2e14, 3e14, 6e14, None, None, None]


@pytest.mark.parametrize("product", ["int8", "int8 2:4", "fp8"])
def test_a_floor_is_of_the_type_multiplied_in(
    product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """Which is faster than bf16; where it cannot be measured, only bytes are counted."""
    measured = []

    def rate(kind: str, device: torch.device) -> float | None:
        measured.append(kind)
        return {"int8": 7e9}.get(kind)

    monkeypatch.setattr(benchmark, "eight_bit_rate", rate)
    monkeypatch.setattr(benchmark, "product_of", lambda *_: product)
    out = made("int8 dynamic", tmp_path)
    found = benchmark.bench(out, "cpu", (1000,))
    assert measured == [product.partition(" ")[0]]
    assert found.matmul_flops == {"bf16": 4e9} | ({} if product == "fp8" else {"int8": 7e9})
    (row,) = found.rows
    assert row.product == product
    bytes_floor = (N * K + N * 4 + 2 * 1000 * (N + K)) / 1e9
    flops = 2 * 1000 * N * K
    floor = {"int8": flops / 7e9, "int8 2:4": flops / 14e9, "fp8": bytes_floor}[product]
    assert row.floor_seconds == pytest.approx(max(floor, bytes_floor))
    assert row.floor_seconds < flops / 4e9
    code, text, _ = run("bench", out, "--device", "cpu", "--m", "1000")
    assert code == 0
    assert "bf16 matmul 0.00 TFLOP/s" in text
    assert ("int8 matmul" in text) == (product != "fp8")
    assert ("no fp8 limit can be measured" in text) == (product == "fp8")
    assert ("twice the dense" in text) == (product == "int8 2:4")


def test_only_bf16_is_measured_where_nothing_else_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(benchmark, "eight_bit_rate", untimed)
    found = benchmark.bench(made("int8 dynamic", tmp_path), "cpu", (3,))
    assert found.matmul_flops == {"bf16": 4e9}
    assert found.rows[0].product_flops == 4e9


def test_eight_bit_limits_are_measured_on_cuda_only() -> None:
    assert eight_bit_rate("int8", CPU) is None
    assert eight_bit_rate("fp8", torch.device("xpu")) is None


@pytest.mark.gpu
def test_eight_bit_limits_can_be_measured() -> None:
    assert (eight_bit_rate("int8", CUDA) or 0) > 1e12
    has_fp8 = torch.cuda.get_device_capability(CUDA) >= (8, 9)
    assert ((eight_bit_rate("fp8", CUDA) or 0) > 1e12) == has_fp8


# --- the table ----


def test_bench_reports_every_shape(tmp_path: Path) -> None:
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    code, text, _ = run("bench", out, "--device", "cpu", "--m", "1,3", "--json")
    assert code == 0
    found = json.loads(text)
    assert {(row["n"], row["k"], row["m"]) for row in found["rows"]} == {
        (n, 576, m) for n in (192, 576) for m in (1, 3)
    }
    for row in found["rows"]:
        assert row["seconds"] >= 0.2 * row["floor_seconds"] > 0
    code, _, err = run("bench", out, "--m", "0")
    assert code == 2
    assert "--m" in err


# --- embeddings ----------------------------------------------------------------------------------


def test_a_look_up_is_timed(tmp_path: Path, quick: None) -> None:
    out = made("embedding", tmp_path)
    found = benchmark.bench(out, "cpu", (3, 200))
    for row, m in zip(found.rows, (3, 200), strict=True):
        assert (row.layout, row.n, row.k, row.m) == ("gather", N, K, m)
        assert row.product is row.product_flops is row.flops is row.intensity is None
        # Packed words and bf16 scales of the distinct rows; ids and bf16 output of all.
        moved = min(m, N) * (K // 2 + 2 * K // 32) + m * (8 + 2 * K)
        assert row.bytes_per_second * row.seconds == pytest.approx(moved)
        assert row.floor_seconds == pytest.approx(moved / 1e9)
        assert row.dense_seconds is not None and row.dense_seconds > 0
    code, text, err = run("bench", out, "--device", "cpu", "--m", "3")
    assert (code, err) == (0, "")
    assert "gather" in text
    assert "multiplies nothing" in text


def test_no_table_is_made_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(benchmark, "_LARGEST_TABLE", 2 * N * K - 1)
    out = made("embedding", tmp_path)
    assert benchmark.bench(out, "cpu", (3,)).rows[0].dense_seconds is None
    assert run("bench", out, "--device", "cpu", "--m", "3")[0] == 0


def test_embeddings_and_matmuls_in_one_table(tmp_path: Path, quick: None) -> None:
    out = converted("smol-w4-embed-head-g64", "triton", tmp_path)
    code, text, _ = run("bench", out, "--device", "cpu", "--m", "2", "--json")
    assert code == 0
    layouts = {row["layout"]: row for row in json.loads(text)["rows"]}
    assert set(layouts) == {"gather", "triton-wna16"}
    assert layouts["triton-wna16"]["product"] == "bf16"
    assert layouts["gather"]["product"] is None


def test_nothing_to_time_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ceilings", untimed)
    out = nothing_converted(tmp_path)
    code, text, err = run("bench", out, "--device", "cpu")
    assert (code, text) == (2, "")
    assert err == f"error: {out}: holds no converted module, so there is no kernel to time\n"


# --- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int4", "embedding"])
@pytest.mark.parametrize("m", [10**13, 10**18, 10**30])
def test_too_many_tokens_for_the_memory(kind: str, m: int, tmp_path: Path, quick: None) -> None:
    out = made(kind, tmp_path)
    code, text, err = run("bench", out, "--device", "cpu", "--m", f"1,{m}")
    assert (code, text) == (1, "")
    assert err.startswith("error: model.")
    assert err.endswith(f"with M = {m}: out of memory on cpu; use a smaller --m\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["device", "cpu", "python"],
)
def test_a_kernel_without_memory(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    out = made("int4", tmp_path)
    monkeypatch.setattr(benchmark, "median_seconds", fails)
    code, _, err = run("bench", out, "--device", "cpu", "--m", "5")
    assert code == 1
    assert "with M = 5: out of memory on cpu" in err
    assert err.count("\n") == 1
    monkeypatch.setattr("ctconvert.runtime.proof.verify_kernels", fails)
    for device, advice in (("cuda:1", "use --device cpu"), ("cpu", "more")):
        code, _, err = run("verify", out, "--kernels", "--device", device)
        assert code == 1
        line = err.splitlines()[-1]
        assert line.startswith(f"error: out of memory on {device}; ")
        assert advice in line


def test_another_error_of_a_kernel_is_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access")

    out = made("int4", tmp_path)
    monkeypatch.setattr(benchmark, "median_seconds", fails)
    monkeypatch.setattr("ctconvert.runtime.proof.verify_kernels", fails)
    for verb in (["bench"], ["verify", "--kernels"]):
        result = CliRunner().invoke(app, [*verb, str(out), "--device", "cpu"])
        assert isinstance(result.exception, RuntimeError)
        assert "illegal" in str(result.exception)


# --- tests/bench ---------------------------------------------------------------------------------

SCRIPTS = sorted(path.stem for path in (ROOT / "tests" / "bench").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    assert importlib.import_module(name).__doc__


@pytest.mark.parametrize("wrong", ["op", "kernel"])
@pytest.mark.parametrize("m", [1, 300])
def test_a_wrong_product_is_not_timed(wrong: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tokens there are."""
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    script = importlib.import_module("bench_scaled_mm")
    right = script.scaled_mm_reference

    def product(*operands: Any, out_dtype: torch.dtype, name: str) -> torch.Tensor:
        out: torch.Tensor = right(*operands, out_dtype=out_dtype)
        if name == wrong:
            out[:, 5] = 0
        return out

    def kernel(*args: Any, out_dtype: torch.dtype, config: Any) -> torch.Tensor:
        return product(*args, out_dtype=out_dtype, name="kernel")

    monkeypatch.setattr(script, "SHAPES", [(32, 64)])
    monkeypatch.setattr(script, "TOKENS", [m])
    monkeypatch.setattr(script, "scaled_mm", lambda *a, **more: product(*a, **more, name="op"))
    monkeypatch.setattr(script.triton, "scaled_mm", kernel)
    monkeypatch.setattr(script, "_us", untimed)
    with pytest.raises(AssertionError, match=rf"int8 {m} x 32 x 64: error"):
        script.measure(CPU)
