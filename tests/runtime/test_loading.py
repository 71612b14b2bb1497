"""The transformers model around the modules of a converted checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPU
from safetensors.torch import save_file
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.conversion import converted
from support.hf import TINY
from support.reference import load_tensors

import ctconvert
from ctconvert.errors import ConversionError, UsageError
from ctconvert.runtime import KernelEmbedding, load

pytest.importorskip("transformers", "5.18", reason="transformers 5.18 is needed")
from ctconvert.runtime import load_model


def whole_model(folder: Path, **config: Any) -> Path:
    """A two-layer Llama, every Linear quantised, its embedding too where the config ties it."""
    from compressed_tensors.quantization import QuantizationScheme
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = LlamaConfig(**TINY, dtype=torch.bfloat16, **config)
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
        assert isinstance(model.get_input_embeddings().kernel, KernelEmbedding)
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
