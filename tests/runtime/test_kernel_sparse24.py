"""The 2:4 sparse matmul: reference against naive arithmetic, CUTLASS against the reference."""

from __future__ import annotations

import itertools
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctconvert.runtime import nvcc
from ctconvert.runtime.kernels.sparse24 import cutlass
from ctconvert.runtime.kernels.sparse24.kernel import sparse24_linear, sparse24_mm
from ctconvert.runtime.kernels.sparse24.reference import sparse24_mm_reference
from ctconvert.runtime.nvcc import KernelUnavailableError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "cutlass_sparse24.safetensors")
GOLDEN_KEYS = sorted(key.removesuffix(".dense") for key in GOLDEN if key.endswith(".dense"))
DTYPES = [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "S8", torch.float8_e4m3fn: "F8"}
F8_MAX = 448.0


def natural_out(dtype: torch.dtype) -> torch.dtype:
    """Of the results on a GPU: each element type is compiled for one."""
    return torch.float16 if dtype in (torch.float16, torch.int8) else torch.bfloat16


def random_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


def naive_layout(
    n: int, k: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kept values, metadata and dense weight of a random 2:4 matrix, nibble by nibble."""
    values = random_values((n, k // 2), dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    choice = torch.randint(0, 6, (n, k // 4), generator=generator).tolist()
    pairs = list(itertools.combinations(range(4), 2))
    padded_n, padded_k = -(-n // 64) * 64, -(-k // 128) * 128
    meta = [0] * (padded_n * padded_k // 8)
    columns = torch.zeros(n, k // 2, dtype=torch.int64)
    for row in range(n):
        for group in range(k // 4):
            i0, i1 = pairs[choice[row][group]]
            m, c = row % 64, 4 * group % 128
            if dtype.itemsize == 1:
                inner = m * 128 + c
            else:
                inner = c % 16 + 16 * (m // 8 % 2) + 32 * (c // 32) + 128 * (m % 8)
                inner += 1024 * (c // 16 % 2) + 2048 * (m // 16)
            nibble = row // 64 * 64 * 128 + 4 * group // 128 * padded_n * 128 + inner
            assert nibble % 4 == 0
            meta[nibble // 8] |= (i0 | i1 << 2) << (nibble // 4 % 2 * 4)
            columns[row, 2 * group] = 4 * group + i0
            columns[row, 2 * group + 1] = 4 * group + i1
    wide = torch.zeros(n, k, dtype=torch.float64).scatter_(1, columns, values.double())
    packed = torch.tensor(meta, dtype=torch.uint8).view(padded_n, padded_k // 8)
    return values, packed, wide


def expected(
    x: torch.Tensor,
    dense: torch.Tensor,
    weight_scale: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The result in f64."""
    out = x.double() @ dense.double().t()
    if weight_scale is not None:
        out = out * weight_scale.double().flatten()
    if x_scale is not None:
        out = out * x_scale.double().view(-1, 1)
    return out if bias is None else out + bias.double()


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


# Reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", GOLDEN_KEYS)
def test_reference_reads_the_compressor_s_output(key: str) -> None:
    dense, weight, meta = (GOLDEN[f"{key}.{part}"] for part in ("dense", "nzs", "meta"))
    k = dense.shape[1]
    # With one-hot rows of x the product is the weight itself, column by column.
    x = torch.eye(k).to(dense.dtype)
    out = sparse24_mm_reference(x, weight, meta, k=k, out_dtype=torch.bfloat16)
    assert torch.equal(out, dense.to(torch.bfloat16).t())


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_equals_naive(
    dtype: torch.dtype, per_token: bool, per_row: bool, out_dtype: torch.dtype
) -> None:
    n, k, tokens = 72, 160, 5
    weight, meta, dense = naive_layout(n, k, dtype)
    x = random_values((tokens, k), dtype, 3)
    weight_scale = torch.rand(n, 1) / 100 if per_row else torch.tensor([0.01])
    x_scale = torch.rand(tokens, 1) / 100 if per_token else torch.tensor([0.02])
    bias = torch.randn(n).to(out_dtype)
    out = sparse24_mm(
        x,
        weight,
        meta,
        k=k,
        weight_scale=weight_scale,
        x_scale=x_scale,
        bias=bias,
        out_dtype=out_dtype,
    )
    wanted = expected(x, dense, weight_scale, x_scale, bias)
    assert out.shape == (tokens, n)
    assert out.dtype == out_dtype
    assert relative_error(out, wanted) < (3e-3 if out_dtype == torch.bfloat16 else 4e-4)


def test_reference_is_exact_for_i8_beyond_f32() -> None:
    n, k = 64, 4096
    weight = torch.full((n, k // 2), 127, dtype=torch.int8)
    weight[:, 0] = 126
    meta = torch.full((64, k // 8), 0x44, dtype=torch.uint8)  # every pair is (0, 1)
    x = torch.full((1, k), 127, dtype=torch.int8)
    # 127 * 127 * 2048 - 127 = 33032065 is odd and over 2^24.
    out = sparse24_mm(
        x, weight, meta, k=k, x_scale=torch.tensor([2.0**-12]), out_dtype=torch.float16
    )
    assert torch.equal(out, torch.full((1, n), 33032064 * 2.0**-12).half())
    naive = (127 * 127 * 2047 + 127 * 126) * 2.0**-12
    assert abs(out[0, 0].item() - naive) <= 4.0  # half of f16's step at 8064


def test_the_op_on_cpu_is_the_reference() -> None:
    weight, meta, _ = naive_layout(64, 128, torch.bfloat16)
    x = random_values((3, 128), torch.bfloat16, 5)
    args, options = (x, weight, meta), {"k": 128, "out_dtype": torch.bfloat16}
    wanted = sparse24_mm_reference(*args, **options)
    assert torch.equal(torch.ops.ctconvert.sparse24_mm(*args, **options), wanted)
    torch.library.opcheck(torch.ops.ctconvert.sparse24_mm.default, args, options)


def test_torch_compile_sees_one_op() -> None:
    weight, meta, _ = naive_layout(64, 128, torch.int8)
    x = torch.randn(2, 3, 128, dtype=torch.float16)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return sparse24_linear(x, weight, meta, k=128, weight_scale=torch.ones(1)) + 1

    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:, :2]), layer(x[:, :2]))


# Activations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_linear_quantises_activations(dtype: torch.dtype, static: bool) -> None:
    n, k = 64, 96
    weight, meta, dense = naive_layout(n, k, dtype)
    x = torch.randn(2, 4, k) * torch.tensor([0.01, 1.0, 30.0, 0.0]).view(1, 4, 1)
    x = x.to(torch.bfloat16)
    weight_scale = torch.rand(n, 1) / 100
    input_scale = torch.tensor([0.05]) if static else None
    quantised = torch.empty(8, k, dtype=torch.float64)
    scales = torch.empty(8, 1)
    for row, token in enumerate(x.view(8, k).float()):
        limit = 127.0 if dtype == torch.int8 else F8_MAX
        scale = torch.tensor(0.05) if static else token.abs().max() / limit
        scales[row] = scale if scale > 0 else 1.0
        for col in range(k):
            value = token[col] / scales[row, 0]
            if dtype == torch.int8:
                quantised[row, col] = min(127, max(-128, round(value.item())))
            else:
                quantised[row, col] = value.clamp(-F8_MAX, F8_MAX).to(dtype).double()
    out = sparse24_linear(x, weight, meta, k=k, weight_scale=weight_scale, input_scale=input_scale)
    wanted = expected(quantised, dense, weight_scale, scales, None).view(2, 4, n)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, wanted) < 3e-3
    assert not out[:, 3].any()


def test_linear_takes_16_bit_activations_as_they_are() -> None:
    weight, meta, dense = naive_layout(64, 96, torch.float16)
    x = torch.randn(3, 192, dtype=torch.float16)[:, ::2]
    bias = torch.randn(64, dtype=torch.bfloat16)
    out = sparse24_linear(
        x,
        weight,
        meta,
        k=96,
        weight_scale=torch.ones(1),
        input_scale=torch.ones(1),
        bias=bias,
        out_dtype=torch.bfloat16,
    )
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected(x, dense, None, None, bias)) < 3e-3


def test_no_tokens() -> None:
    weight, meta, _ = naive_layout(64, 128, torch.int8)
    out = sparse24_linear(torch.empty(2, 0, 128, dtype=torch.float16), weight, meta, k=128)
    assert out.shape == (2, 0, 64)
    assert out.dtype == torch.float16


# Refusals ----------------------------------------------------------------------------------------


def good(n: int = 64, k: int = 128, tokens: int = 3) -> dict[str, object]:
    return {
        "x": torch.zeros(tokens, k, dtype=torch.int8),
        "weight": torch.zeros(n, k // 2, dtype=torch.int8),
        "meta": torch.zeros(-(-n // 64) * 64, -(-k // 128) * 16, dtype=torch.uint8),
        "k": k,
        "weight_scale": torch.ones(n, 1),
        "x_scale": torch.ones(tokens, 1),
        "bias": torch.zeros(n, dtype=torch.float16),
        "out_dtype": torch.float16,
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 128)}, TypeError, "x must be int8"),
        (
            {"weight": torch.zeros(64, 64)},
            TypeError,
            "weight must be float16 or bfloat16 or int8 or",
        ),
        (
            {"meta": torch.zeros(64, 16, dtype=torch.int8)},
            TypeError,
            "meta must be uint8, got int8",
        ),
        ({"out_dtype": torch.float32}, TypeError, "the result is float16 or"),
        ({"bias": torch.zeros(64, dtype=torch.bfloat16)}, TypeError, "bias must be float16"),
        ({"x_scale": torch.ones(3, 1).half()}, TypeError, "x_scale must be float32"),
        ({"x": torch.zeros(128, dtype=torch.int8)}, ValueError, r"x must have shape \[any, 128\]"),
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, ValueError, r"x must have .* got \[3, 64\]"),
        (
            {"weight": torch.zeros(64, 128, dtype=torch.int8)},
            ValueError,
            r"weight must have shape \[64, 64\]",
        ),
        (
            {"weight": torch.zeros(72, 64, dtype=torch.int8)},
            ValueError,
            r"meta must have shape \[128, 16\]",
        ),
        ({"weight": torch.zeros(60, 64, dtype=torch.int8)}, ValueError, "N a multiple of 8"),
        ({"k": 112}, ValueError, "K a multiple of 32"),
        ({"weight_scale": torch.ones(64)}, ValueError, r"weight_scale must .* got \[64\]"),
        ({"x_scale": torch.ones(2, 1)}, ValueError, r"x_scale must have shape \[3, 1\]"),
        ({"bias": torch.zeros(1, dtype=torch.float16)}, ValueError, r"bias must have shape \[64\]"),
        ({"x": torch.zeros(128, 3, dtype=torch.int8).t()}, ValueError, "x must be contiguous"),
        ({"bias": torch.zeros(64, device="meta").half()}, ValueError, "bias is on meta"),
    ],
)
def test_refusals(changes: dict[str, object], error: type[Exception], message: str) -> None:
    sparse24_mm(**good())  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        sparse24_mm(**{**good(), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "input_scale", "error", "message"),
    [
        (torch.zeros(3, 128), None, TypeError, "activations are f16 or bf16"),
        (torch.zeros(3, 64).half(), None, ValueError, "must be K = 128"),
        (torch.zeros(3, 128).half(), torch.ones(3, 1), ValueError, "it is f32"),
    ],
)
def test_linear_refusals(
    x: torch.Tensor, input_scale: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    weight, meta, _ = naive_layout(64, 128, torch.int8)
    with pytest.raises(error, match=message):
        sparse24_linear(x, weight, meta, k=128, input_scale=input_scale)


def test_no_gpu_is_one_clear_error() -> None:
    weight, meta, _ = naive_layout(64, 128, torch.bfloat16)
    with pytest.raises(KernelUnavailableError, match=r"compute capability 9\.0.*reference") as info:
        cutlass.sparse24_mm(weight.new_zeros(1, 128), weight, meta, k=128, out_dtype=torch.bfloat16)
    assert isinstance(info.value, RuntimeError)
    assert "\n" not in str(info.value)


def test_another_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    cutlass._multiprocessors.cache_clear()
    with pytest.raises(KernelUnavailableError, match=r"A100 has compute capability 8\.0"):
        cutlass._multiprocessors(torch.device("cuda", 0))


# Compilation -------------------------------------------------------------------------------------


@pytest.fixture
def no_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without CUDA: nothing on PATH but an empty folder, which is returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(nvcc, "_DEFAULT_CUDA", tmp_path / "nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def test_no_nvcc_is_one_clear_error(no_toolkit: Path) -> None:
    with pytest.raises(KernelUnavailableError, match=r"nvcc was not found: install .*CUDA_HOME"):
        nvcc.build("sparse24-i8-f16", cutlass.SOURCE, [{}], no_toolkit, "4.2.0", "90a")


def test_no_headers_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelUnavailableError, match=r"pip install 'ctconvert\[cutlass\]'"):
        nvcc.cutlass_include()


def fake_nvcc(folder: Path, script: str) -> None:
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_library_is_built_once_for_each_key(
    no_toolkit: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler = shutil.which("cc", path=os.defpath)
    if compiler is None:
        pytest.skip("needs a C compiler")
    log = tmp_path / "log"
    # Stands for nvcc: notes each call, and makes any output an empty shared library.
    fake_nvcc(
        no_toolkit,
        f'PATH={os.defpath}\necho "$@" >> {log}\n'
        '[ "$1" = --version ] && { echo 13.0; exit; }\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'echo "int answer(void) {{ return 42; }}" | {compiler} -shared -fPIC -x c - -o "$2"\n',
    )
    source = tmp_path / "kernel.cu"
    source.write_text("int x;")

    def compilations(value: str, version: str = "4.2.0") -> int:
        before = log.read_text().count(" -c ") if log.exists() else 0
        units = [{"CT_NAME": "a"}, {"CT_NAME": value}]
        library = nvcc.build("demo", source, units, tmp_path, version, "90a")
        assert library.answer() == 42
        return log.read_text().count(" -c ") - before

    assert compilations("b") == 2
    assert "compiling demo (2 kernels" in capfd.readouterr().err
    assert compilations("b") == 0
    assert capfd.readouterr().err == ""
    assert compilations("c") == 2
    assert compilations("b", version="4.3.0") == 2
    source.write_text("int y;")
    assert compilations("b") == 2
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "ctconvert").iterdir())
    assert kept == [".lock", ".so", ".so", ".so", ".so"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in log.read_text()


def test_a_failing_nvcc_is_one_clear_error(no_toolkit: Path, tmp_path: Path) -> None:
    fake_nvcc(
        no_toolkit,
        '[ "$1" = --version ] && exit\necho warning >&2\necho "a.cu(3): error: no" >&2\nexit 2\n',
    )
    with pytest.raises(KernelUnavailableError, match=r"build demo: a\.cu\(3\): error: no"):
        nvcc.build("demo", cutlass.SOURCE, [{}], tmp_path, "4.2.0", "90a")
    assert [p.name for p in (tmp_path / "cache" / "ctconvert").iterdir()] == ["demo.lock"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_is_selected_and_can_be_made(dtype: torch.dtype) -> None:
    variants = cutlass.VARIANTS[dtype.itemsize]
    chosen = {
        cutlass.select(dtype, n, tokens)
        for n in (8, 72, 1024, 4096, 8192, 28672, 151936)
        for tokens in (1, 16, 17, 32, 64, 100, 128, 256, 300, 512, 1024, 4096, 100000)
    }
    assert chosen == set(range(len(variants)))  # nothing is compiled that nothing runs
    for variant in variants:
        assert variant.tile[2] % 128 == 0  # a shorter tile would read the metadata in another order
        assert variant.tile[0] % (64 if variant.schedule == "Pingpong" else 128) == 0


def test_selection_counts_waves() -> None:
    tile = {
        (n, tokens): cutlass.VARIANTS[1][cutlass.select(torch.int8, n, tokens)].tile[:2]
        for n, tokens in ((8192, 16), (8192, 64), (4096, 64), (8192, 256), (8192, 4096))
    }
    assert tile == {
        (8192, 16): (64, 16),
        (8192, 64): (64, 64),
        (4096, 64): (64, 32),  # 64 tiles of 64 x 64 would leave half the multiprocessors idle
        (8192, 256): (128, 128),
        (8192, 4096): (128, 256),
    }
    # 66 multiprocessors: 128 tiles of 128 x 128 are two waves, more than one of 128 x 256.
    assert cutlass.VARIANTS[1][cutlass.select(torch.int8, 8192, 256, 66)].tile[:2] == (128, 256)


# CUTLASS -----------------------------------------------------------------------------------------


def check_cutlass(
    dtype: torch.dtype,
    n: int,
    k: int,
    tokens: int,
    out_dtype: torch.dtype,
    per_row: bool = True,
    per_token: bool = True,
    with_bias: bool = True,
) -> None:
    weight, meta, _ = naive_layout(n, k, dtype)
    x = random_values((tokens, k), dtype, 7)
    weight_scale = torch.rand(n, 1) / 50 + 0.01 if per_row else torch.tensor([0.02])
    x_scale = torch.rand(tokens, 1) / 50 + 0.01 if per_token else torch.tensor([0.03])
    bias = torch.randn(n).to(out_dtype) if with_bias else None
    wanted = sparse24_mm_reference(
        x,
        weight,
        meta,
        k=k,
        weight_scale=weight_scale,
        x_scale=x_scale,
        bias=bias,
        out_dtype=out_dtype,
    )
    out = sparse24_mm(
        x.cuda(),
        weight.cuda(),
        meta.cuda(),
        k=k,
        weight_scale=weight_scale.cuda(),
        x_scale=x_scale.cuda(),
        bias=None if bias is None else bias.cuda(),
        out_dtype=out_dtype,
    ).cpu()
    assert out.shape == (tokens, n)
    assert torch.isfinite(out).all()
    assert relative_error(out, wanted.double()) < 3e-3
    torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 64, 256, 700])
@pytest.mark.parametrize(("n", "k"), [(72, 160), (200, 384)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("cutlass", "poisoned")
def test_cutlass_equals_reference(dtype: torch.dtype, n: int, k: int, tokens: int) -> None:
    check_cutlass(dtype, n, k, tokens, natural_out(dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass")
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.usefixtures("poisoned")
def test_cutlass_scales_and_bias(
    dtype: torch.dtype, with_bias: bool, per_token: bool, per_row: bool
) -> None:
    check_cutlass(dtype, 136, 256, 33, natural_out(dtype), per_row, per_token, with_bias)


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cutlass_variant(dtype: torch.dtype) -> None:
    n, k, tokens = 520, 416, 300
    weight, meta, _ = naive_layout(n, k, dtype)
    x = random_values((tokens, k), dtype, 9)
    out_dtype, scale = natural_out(dtype), torch.tensor([2.0**-6])  # f16 ends at 65504
    wanted = sparse24_mm_reference(x, weight, meta, k=k, x_scale=scale, out_dtype=out_dtype)
    assert torch.isfinite(wanted).all()
    for variant in range(len(cutlass.VARIANTS[dtype.itemsize])):
        out = cutlass.sparse24_mm(
            x.cuda(),
            weight.cuda(),
            meta.cuda(),
            k=k,
            x_scale=scale.cuda(),
            out_dtype=out_dtype,
            variant=variant,
        )
        assert relative_error(out.cpu(), wanted.double()) < 3e-3, variant


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["full", "under"])
def test_cutlass_reads_the_compressor_s_output(dtype: torch.dtype, kind: str) -> None:
    for shape in ("M128.K256", "M64.K128", "M72.K192"):
        key = f"cutlass24.{NAMES[dtype]}.{shape}.{kind}"
        dense, weight, meta = (GOLDEN[f"{key}.{part}"] for part in ("dense", "nzs", "meta"))
        k = dense.shape[1]
        x = torch.eye(k).to(dtype).cuda()
        out_dtype = natural_out(dtype)
        out = sparse24_mm(x, weight.cuda(), meta.cuda(), k=k, out_dtype=out_dtype)
        assert torch.equal(out.cpu(), dense.to(out_dtype).t())


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass")
def test_cutlass_i8_sums_are_exact() -> None:
    n, k = 64, 4096
    weight = torch.full((n, k // 2), 127, dtype=torch.int8)
    meta = torch.full((64, k // 8), 0x44, dtype=torch.uint8)
    x = torch.full((17, k), 127, dtype=torch.int8)
    x[:, 0] = -128
    args = {"k": k, "x_scale": torch.tensor([2.0**-11]), "out_dtype": torch.float16}
    wanted = sparse24_mm_reference(x, weight, meta, **args)  # type: ignore[arg-type]
    args["x_scale"] = torch.tensor([2.0**-11]).cuda()
    out = sparse24_mm(x.cuda(), weight.cuda(), meta.cuda(), **args)  # type: ignore[arg-type]
    assert torch.equal(out.cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass")
def test_cutlass_in_torch_compile_and_a_cuda_graph() -> None:
    n, k = 128, 256
    weight, meta, _ = naive_layout(n, k, torch.int8)
    weight, meta, scale = weight.cuda(), meta.cuda(), torch.rand(n, 1).cuda() / 100
    bias = torch.randn(n, dtype=torch.float16).cuda()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return sparse24_linear(x, weight, meta, k=k, weight_scale=scale, bias=bias)

    x = torch.randn(33, k, dtype=torch.float16).cuda()
    eager = layer(x)
    compiled = torch.compile(layer, fullgraph=True)(x)
    assert relative_error(compiled, eager.double()) < 5e-3

    graph = torch.cuda.CUDAGraph()
    static = torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = layer(static)
    static.copy_(x)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.gpu
@pytest.mark.usefixtures("cutlass")
def test_cutlass_refuses_unaligned_x() -> None:
    weight, meta, _ = naive_layout(64, 128, torch.int8)
    x = torch.zeros(3 * 128 + 4, dtype=torch.int8).cuda()[4:].view(3, 128)
    with pytest.raises(ValueError, match="x does not start at a multiple of 16 bytes"):
        sparse24_mm(x, weight.cuda(), meta.cuda(), k=128, out_dtype=torch.float16)
