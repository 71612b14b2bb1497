"""Loading converted checkpoints, proving them by running them, and timing them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    group_config,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from conftest import CHECKPOINTS, GPU
from reference import load_tensors
from safetensors.torch import save_file
from test_cli import run
from test_schemes import FRESH, REAL
from torch.utils._python_dispatch import TorchDispatchMode

import ctconvert
from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.layouts import LAYOUTS
from ctconvert.runtime import (
    KernelEmbedding,
    KernelLinear,
    bindings,
    load,
    load_model,
    loading,
    modules,
    proof,
)
from ctconvert.runtime.proof import TOLERANCE

DYNAMIC_FP8 = DYNAMIC_INT8 | {"type": "float"}

#: One real checkpoint a layout; the slow ones of them are left to the GPU.
ONE_EACH = (
    ("smol-w4a16-g32-asym", "triton", "triton-wna16"),
    ("smol-w4a16-g32-asym", "cuda", "marlin"),
    ("smol-mxfp4a16", "cuda", "marlin-mxfp4"),
    ("old071-smol-sparse24-fp8-dynamic-channel", "cuda", "cutlass-sparse24"),
    ("old071-smol-sparse24-bf16", "cuda", "cutlass-sparse24"),
    ("smol-w4a8-int8dyn-g32-packed", "xpu", "xpu-w4a8"),
    ("smol-w4a8o8-pack-static", "xpu", "xpu-w4a16"),
    ("smol-w4-embed-head-g64", "triton", "gather"),
)


def converted(name: str, target: str, tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "out"
    ctconvert.repack(CHECKPOINTS / name, out, target=target, device="cpu", **options)
    return out


@pytest.mark.parametrize(("name", "target", "layout"), ONE_EACH)
def test_kernels_agree_with_the_reference(
    name: str, target: str, layout: str, tmp_path: Path
) -> None:
    out = converted(name, target, tmp_path)
    report = ctconvert.verify(out, kernels=True, device="cpu")["kernels"]
    assert report[layout]["modules"] > 0
    assert report[layout]["worst_error"] <= TOLERANCE[layout]


@pytest.mark.parametrize("name", [name for name in FRESH if "8" in name and "wna" not in name])
def test_w8a8_kernels_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    group, layouts = FRESH[name]
    if layouts.get("triton") != "scaled-mm":
        pytest.skip("not W8A8")
    tensors = {f"a.down_proj.{x}": t for x, t in quantised(192, 256, group, 1).items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    report = ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")["kernels"]
    assert report["scaled-mm"]["worst_error"] <= TOLERANCE["scaled-mm"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("fuse", [False, True])
def test_kernels_agree_with_the_reference_on_the_gpu(name: str, fuse: bool, tmp_path: Path) -> None:
    for target, layouts in REAL[name].items():
        if layouts is not None:
            out = converted(name, target, tmp_path / target, fuse=fuse)
            report = ctconvert.verify(out, kernels=True, device="cuda")["kernels"]
            assert set(report) == layouts


class ReciprocalDivision(TorchDispatchMode):
    """Division by a plain number as CUDA computes it: times the reciprocal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.div.Tensor and not isinstance(args[1], torch.Tensor):
            return args[0] * (1 / torch.tensor(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["fp8 token", "fp8 2:4", "fp8 block", "int8 token"])
def test_activations_are_quantised_alike_on_every_device(kind: str, tmp_path: Path) -> None:
    """Of tokens whose largest value makes their quotients lie half-way between two codes."""
    eight = {"float": DYNAMIC_FP8, "int": DYNAMIC_INT8}["int" if "int" in kind else "float"]
    blocks = {"strategy": "block", "block_structure": [128, 128]} if "block" in kind else {}
    weights = weight_args(8, None, kind=eight["type"]) | blocks
    inputs = eight | ({"strategy": "group", "group_size": 128} if blocks else {})
    group = group_config(weights, format=f"{eight['type']}-quantized", inputs=inputs)
    n, k = 128, 256
    config = config_of(group)
    if "2:4" in kind:
        made = sparse24(n, k, group, 1)
        config["sparsity_config"] = {"format": "sparse-24-bitmask", "targets": ["Linear"]}
    else:
        made = quantised(n, k, group, 1)
    tensors = {f"model.down_proj.{local}": value for local, value in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    target = "cuda" if "2:4" in kind else "triton"
    ctconvert.repack(source, tmp_path / "out", target=target, device="cpu")
    module = load(tmp_path / "out", "cpu")["model.down_proj"]
    assert isinstance(module, KernelLinear)
    # Of all of bfloat16's, the numbers that the reciprocal changes most by.
    largest = 49 / 16 if eight["type"] == "float" else 143 / 128
    x = ((torch.rand(64, k) * 2 - 1) * largest).bfloat16()
    x[:, ::64] = largest
    expected = proof._quantised_activations(module, x)
    scale = torch.tensor(largest / (448.0 if eight["type"] == "float" else 127.0))
    codes = x.float() / scale
    codes = codes.round() if eight["type"] == "int" else codes.to(torch.float8_e4m3fn)
    assert torch.equal(expected, codes.double() * scale.double())
    with ReciprocalDivision():
        assert torch.equal(proof._quantised_activations(module, x), expected)
    if GPU:
        module.cuda()
        assert torch.equal(proof._quantised_activations(module, x.cuda()).cpu(), expected)


def test_every_layout_can_be_run() -> None:
    names = {layout.name for layout in LAYOUTS}
    assert set(TOLERANCE) == names
    assert set(bindings.LINEAR) | {"gather"} == names


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = converted("smol-w4a16-g32-asym", "triton", tmp_path)
    right = bindings.LINEAR["triton-wna16"]

    def wrong(*args: Any) -> torch.Tensor:
        y = right(*args)
        y[..., 7] = 0  # one column of many
        return y

    monkeypatch.setitem(bindings.LINEAR, "triton-wna16", wrong)
    with pytest.raises(VerificationError, match=r"triton-wna16 kernel is off by"):
        ctconvert.verify(out, kernels=True, device="cpu")
    code, _, err = run("verify", out, "--kernels", "--device", "cpu")
    assert code == 1
    assert "off by" in err


@pytest.mark.parametrize("wrong", [1.0, float("nan")])
def test_a_wrong_output_quantisation_is_found(
    wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right sums, but the quantised result a step off, or no number."""
    out = converted("smol-w8a8o8-static-sym", "triton", tmp_path)
    ctconvert.verify(out, kernels=True, device="cpu")
    right = bindings.LINEAR["triton-wna16"]

    def off(binding: Any, tensors: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        y = right(binding, tensors, x, bias)
        if "output_scale" in tensors:
            y[..., 0] += wrong * tensors["output_scale"].to(y.dtype)
            y[0] += wrong * tensors["output_scale"].to(y.dtype)
        return y

    monkeypatch.setitem(bindings.LINEAR, "triton-wna16", off)
    with pytest.raises(VerificationError, match=r"triton-wna16 kernel is off by"):
        ctconvert.verify(out, kernels=True, device="cpu")


def test_one_token_of_one_sequence_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A binding may go wrong only on the shape [1, 1, K] that a model decodes with."""
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    right = bindings.LINEAR["triton-wna16"]

    def wrong(binding: Any, tensors: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        return right(binding, tensors, x, bias) * (2 if x.shape[:-1] == (1, 1) else 1)

    monkeypatch.setitem(bindings.LINEAR, "triton-wna16", wrong)
    with pytest.raises(VerificationError, match=r"off by .* \(random M=1\)"):
        ctconvert.verify(out, kernels=True, device="cpu")


def test_an_asymmetric_input_brings_the_sums_of_the_weight(tmp_path: Path) -> None:
    """Summed once, not on every call: what the GPU's kernel takes the zero point out with."""
    inputs = STATIC_INT8 | {"symmetric": False}
    group = group_config(
        weight_args(8, None, False), format="int-quantized", inputs=inputs, outputs=None
    )
    made = quantised(48, 64, group, 1) | {"input_zero_point": torch.tensor([-7], dtype=torch.int8)}
    tensors = {f"model.down_proj.{local}": value for local, value in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    module = load(tmp_path / "out", "cpu")["model.down_proj"]
    assert "input_zero_point" in module.tensors() and "weight_sum" not in module.tensors()
    assert module.get_buffer("weight_sum").tolist() == made["weight"].long().sum(1).tolist()
    ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")


@pytest.mark.parametrize("axis", [0, 1])
def test_one_wrong_row_or_column_of_many_is_seen(axis: int) -> None:
    """Nothing to see in the norm of the whole: 1 of 30000 columns."""
    torch.manual_seed(0)
    expected = torch.randn(64, 30000).double()
    made = expected.bfloat16().double()
    assert 1e-4 < proof._error(made, expected, expected) < 1e-2
    made.select(1 - axis, 17).zero_()
    assert (made - expected).norm() / expected.norm() < 0.2
    assert proof._error(made, expected, expected) > 0.9


def test_what_is_too_large_for_the_result_is_not_an_error(tmp_path: Path) -> None:
    """float16 results past 65504 are infinite, as they should be."""
    group = group_config(weight_args(4, 64))
    made = quantised(64, 2048, group, 1, scale_dtype=torch.float16)
    made["weight_scale"] = torch.full_like(made["weight_scale"], 0.5)
    tensors = {f"model.down_proj.{local}": value for local, value in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    for target in ("triton", "cuda"):
        ctconvert.repack(source, tmp_path / target, target=target, device="cpu")
        ctconvert.verify(tmp_path / target, kernels=True, device="cpu")


@pytest.mark.parametrize("kind", ["int4", "mxfp4", "fp8", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_of_any_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    group = {
        "int4": group_config(weight_args(4, 64)),
        "mxfp4": group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
        "fp8": group_config(weight_args(8, None, kind="float"), format="float-quantized"),
        "2:4": {"weights": None},
    }[kind]
    config = config_of(group) if kind != "2:4" else {"quant_method": "compressed-tensors"}
    if kind == "2:4":
        config["sparsity_config"] = {
            "format": "sparse-24-bitmask",
            "targets": ["Linear"],
            "ignore": ["lm_head"],
        }
        made = sparse24(192, 256, group, 1, torch.bfloat16)
    else:
        made = quantised(192, 256, group, 1)
    made["bias"] = torch.randn(192).to(dtype)
    tensors = {f"model.down_proj.{local}": value for local, value in made.items()}
    source = write_checkpoint(tmp_path / "in", tensors, config)
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")
    module = load(tmp_path / "out", "cpu")["model.down_proj"]
    x = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    assert torch.equal(module(x)[0, 0], made["bias"].bfloat16())


def test_kernels_are_verified_one_module_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many modules there are, only the last one is held while the next is read."""
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    alive: list[weakref.ref[Any]] = []
    most = 0
    right = loading.Loader.modules

    def watched(self: loading.Loader, name: str) -> loading.Modules:
        nonlocal most
        most = max(most, sum(one() is not None for one in alive))
        made = right(self, name)
        alive.extend(map(weakref.ref, made.values()))
        return made

    monkeypatch.setattr(loading.Loader, "modules", watched)
    ctconvert.verify(out, kernels=True, device="cpu")
    assert len(alive) >= 3
    assert most <= 1


@pytest.mark.parametrize("fuse", [False, True])
def test_modules_compute_the_layer(fuse: bool, tmp_path: Path) -> None:
    out = converted("smol-w4a16-g32-asym", "triton", tmp_path, fuse=fuse)
    loaded = load(out, "cpu")
    name = "model.layers.0.self_attn." + ("qkv_proj" if fuse else "k_proj")
    module = loaded[name]
    assert isinstance(module, KernelLinear)
    assert (module.out_features, module.in_features) == (960 if fuse else 192, 576)
    assert module.widths == ((576, 192, 192) if fuse else (192,))
    x = torch.randn(3, 5, 576, dtype=torch.bfloat16)
    expected = x.float() @ module.dequantize().t()
    torch.testing.assert_close(module(x).float(), expected, rtol=0.02, atol=0.05)


def test_experts_are_loaded_one_by_one(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32), ["re:.*experts.*"])
    name = "model.layers.0.mlp.experts.down_proj"
    each = [quantised(64, 96, group, seed) for seed in range(3)]
    tensors = {
        f"{name}.{local}": torch.stack([made[local] for made in each])
        for local in ("weight_packed", "weight_scale")
    }
    tensors[f"{name}.weight_shape"] = torch.tensor([3, 64, 96])
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    loaded = load(tmp_path / "out", "cpu")
    assert list(loaded) == [f"{name}.{index}" for index in range(3)]
    ctconvert.verify(tmp_path / "out", kernels=True, device="cpu")


def whole_model(folder: Path, **config: Any) -> Path:
    """A two-layer Llama, every Linear quantised, its embedding too where the config ties it."""
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype=torch.bfloat16,
        **config,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    tied = settings.tie_word_embeddings
    group = group_config(weight_args(4, 32), ["Linear", "Embedding"] if tied else ["Linear"])
    QuantizationScheme.model_validate(group)
    tensors = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and tensor.ndim == 2 and (tied or "embed" not in name):
            if tied and "lm_head" in name:
                continue
            made = quantised(*tensor.shape, group, seed)
            made["weight_scale"] /= 4
            tensors |= {f"{module}.{local}": value for local, value in made.items()}
        else:
            tensors[name] = tensor.clone()
    return write_checkpoint(
        folder, tensors, config_of(group, ignore=[]), **json.loads(settings.to_json_string())
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_the_whole_model_gives_the_dequantised_models_logits(
    tied: bool, fuse: bool, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = whole_model(tmp_path / "in", tie_word_embeddings=tied)
    out = tmp_path / "out"
    ctconvert.repack(source, out, target="triton", device="cpu", fuse=fuse)
    device = "cuda" if GPU else "cpu"
    model, tokenizer = load_model(out, device)
    assert tokenizer is None
    raw = json.loads((source / "config.json").read_text())
    raw.pop("quantization_config")
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = plain.state_dict()
    ctconvert.repack(source, tmp_path / "apart", target="triton", device="cpu")
    for name, module in load(tmp_path / "apart", "cpu").items():
        state[f"{name}.weight"] = module.dequantize().bfloat16()
    if tied:
        assert isinstance(model.get_input_embeddings(), KernelEmbedding)
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    else:
        state["model.embed_tokens.weight"] = load_tensors(source)["model.embed_tokens.weight"]
    plain.load_state_dict(state)
    plain.eval()
    ids = torch.arange(1, 24).reshape(1, -1)
    with torch.inference_mode():
        expected = plain(input_ids=ids).logits.float()
        made = model(input_ids=ids.to(device)).logits.float().cpu()
    assert float((made - expected).norm() / expected.norm()) < 0.03
    assert torch.isfinite(made).all()
    assert made.std() > 0


def test_a_model_runs_in_the_dtype_asked_for(tmp_path: Path) -> None:
    """Around a quantised embedding too, whose scales have a dtype of their own."""
    source = whole_model(tmp_path / "in", tie_word_embeddings=True)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    batch = torch.arange(48).reshape(2, 24)
    for dtype in (torch.float16, torch.bfloat16):
        model, _ = load_model(tmp_path / "out", "cpu", dtype)
        with torch.inference_mode():
            logits = model(input_ids=batch[:, :5]).logits  # ids that are not contiguous
        assert logits.dtype == dtype
        assert torch.isfinite(logits).all()
    with pytest.raises(UsageError, match=r"float16 and bfloat16 activations, not torch\.float32"):
        load_model(tmp_path / "out", "cpu", torch.float32)


def test_older_files_hold_what_transformers_computes(tmp_path: Path) -> None:
    source = whole_model(tmp_path / "in", tie_word_embeddings=False)
    tensors = load_tensors(source) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    model, _ = load_model(tmp_path / "out", "cpu")
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.arange(4)[None]).logits).all()


def test_a_16_bit_sparse_model_runs_in_its_own_dtype_only(tmp_path: Path) -> None:
    out = converted("old071-smol-sparse24-bf16", "cuda", tmp_path)
    with pytest.raises(UsageError, match=r"weights of bfloat16.*dtype=torch\.bfloat16"):
        load_model(out, "cpu", torch.float16)


def test_a_module_that_does_more_is_not_replaced(tmp_path: Path) -> None:
    """Gemma 3 scales what its embedding looks up; the plain look-up would lose that."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    settings = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    group = group_config(weight_args(8, None), ["Embedding"])
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "model.embed_tokens.weight":
            made = quantised(*tensor.shape, group, 1)
            tensors |= {f"model.embed_tokens.{local}": value for local, value in made.items()}
        elif "lm_head" not in name:
            tensors[name] = tensor.clone()
    config = json.loads(settings.to_json_string())
    source = write_checkpoint(tmp_path / "in", tensors, config_of(group, ignore=[]), **config)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    with pytest.raises(ConversionError, match=r"embed_tokens.*Gemma3TextScaledWordEmbedding"):
        load_model(tmp_path / "out", "cpu")
    assert isinstance(load(tmp_path / "out", "cpu")["model.embed_tokens"], KernelEmbedding)


def test_the_parts_of_a_fused_module_share_one_product(tmp_path: Path) -> None:
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path, fuse=True)
    whole = load(out, "cpu")["model.layers.0.self_attn.qkv_proj"]
    assert isinstance(whole, KernelLinear)
    shared: dict[str, Any] = {}
    parts = [modules.FusedPart(whole, index, shared) for index in range(3)]
    x = torch.randn(2, 576, dtype=torch.bfloat16)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    whole.register_forward_hook(count)
    for order in ((0, 1, 2), (2, 0, 1)):
        made = {index: parts[index](x) for index in order}
        assert torch.equal(torch.cat([made[0], made[1], made[2]], -1), whole(x))
        assert not shared  # nothing is kept once all parts have been served
    assert calls == 4
    before = parts[0](x)
    x.copy_(torch.randn(2, 576))
    assert not torch.equal(parts[0](x), before)  # asked twice: x may have changed in place


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


def test_bench_draws_a_roofline(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    assert run("bench", out, "--device", "cpu", "--m", "1", "--plot", tmp_path / "r.png")[0] == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
