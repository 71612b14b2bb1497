"""Never a silent wrong load: what does not fit is an error that names it, where it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.builders import group_config, module, quantised, sparse24, weight_args
from support.hub import Hub, hub_environment
from support.reference import load_tensors

transformers = pytest.importorskip("transformers", "5.18", reason="transformers 5.18 is needed")

from support.hf import TINY, linears, write_models  # noqa: E402

import ctconvert  # noqa: E402
import ctconvert.integrations.transformers  # noqa: E402
from ctconvert.errors import ConversionError, UsageError, VerificationError  # noqa: E402
from ctconvert.runtime import load_model  # noqa: E402

INT4 = group_config(weight_args(4, 32))
MLP = "model.layers.0.mlp"
IDS = torch.arange(1, 24).reshape(1, -1)


def llama(folder: Path, **more: Any) -> Path:
    """A quantised Llama of two layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY, dtype=torch.bfloat16, **more)
    return write_models(transformers.LlamaForCausalLM(config), folder, INT4)[0]


def moe(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **TINY,
        moe_intermediate_size=96,
        num_experts=4,
        num_experts_per_tok=2,
        dtype=torch.bfloat16,
    )
    return write_models(transformers.Qwen3MoeForCausalLM(config), folder, INT4)[0]


def changed(source: Path, without: str = "", **more: torch.Tensor) -> Path:
    """The checkpoint without the tensors of that pattern, and with others."""
    tensors = load_tensors(source)
    kept = {name: t for name, t in tensors.items() if not (without and re.search(without, name))}
    assert not without or len(kept) < len(tensors)
    save_file(kept | more, source / "model.safetensors", {"format": "pt"})
    return source


def refused(source: Path, kind: type[Exception], says: str, **options: Any) -> None:
    """Converts it; both ways to load it fail in one line that says so."""
    out = source.parent / "out"
    ctconvert.repack(source, out, target="triton", device="cpu", **options)
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(kind, match=says) as raised:
            load(out)
        assert "\n" not in str(raised.value)


# --- what is missing, left over, or other than the model's ---------------------------------------


def test_a_missing_module(tmp_path: Path) -> None:
    source = changed(llama(tmp_path), rf"{MLP}\.up_proj")
    refused(source, ConversionError, rf"no tensor for {MLP}\.up_proj\.weight of the model")


def test_a_missing_norm(tmp_path: Path) -> None:
    source = changed(llama(tmp_path), r"^model\.norm")
    refused(source, ConversionError, r"no tensor for model\.norm\.weight of the model")


def test_a_tensor_too_many(tmp_path: Path) -> None:
    source = changed(llama(tmp_path), **{"model.layers.0.other.weight": torch.ones(3)})
    refused(source, ConversionError, r"model\.layers\.0\.other\.weight: LlamaForCausalLM has no")


def test_a_module_too_many(tmp_path: Path) -> None:
    extra = module("model.layers.2.mlp.up_proj", quantised(96, 64, INT4, 5))
    source = changed(llama(tmp_path), **extra)
    refused(
        source, ConversionError, r"model\.layers\.2\.mlp\.up_proj: LlamaForCausalLM has no such"
    )


def test_a_module_of_another_shape(tmp_path: Path) -> None:
    other = module(f"{MLP}.up_proj", quantised(128, 64, INT4, 5))
    refused(
        changed(llama(tmp_path), **other),
        ConversionError,
        rf"{MLP}\.up_proj: it is \[128, 64\], and .* is Linear \[96, 64\]",
    )


def test_a_plain_tensor_of_another_shape(tmp_path: Path) -> None:
    other = {"model.norm.weight": torch.ones(65, dtype=torch.bfloat16)}
    source = changed(llama(tmp_path), **other)
    refused(source, ConversionError, r"model\.norm\.weight: it is \[65\], .* is \[64\]")


def test_one_weight_under_two_names(tmp_path: Path) -> None:
    """transformers would take either: it finds tensors without the model's own prefix, too."""
    other = {"norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    source = changed(llama(tmp_path), **other)
    refused(source, ConversionError, r"model\.norm\.weight and norm\.weight both are model\.norm")


def test_what_was_not_loaded_shows_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the names said before: transformers marks what it has loaded."""
    quantizer = ctconvert.integrations.transformers.CtconvertQuantizer
    monkeypatch.setattr(quantizer, "_check_complete", lambda *args: None)
    source = changed(llama(tmp_path), r"^model\.norm")
    refused(source, ConversionError, r"model\.norm\.weight of the model was not loaded")


@pytest.mark.parametrize("fuse", [False, True])
def test_a_bias_the_model_has_not(fuse: bool, tmp_path: Path) -> None:
    bias = {f"{MLP}.{leaf}.bias": torch.ones(96).bfloat16() for leaf in ("gate_proj", "up_proj")}
    source = changed(llama(tmp_path), **bias)
    refused(source, ConversionError, rf"{MLP}\.gate.*: it has a bias, and .* none", fuse=fuse)


def test_a_bias_the_checkpoint_has_not(tmp_path: Path) -> None:
    source = changed(llama(tmp_path, mlp_bias=True), rf"{MLP}\.down_proj\.bias")
    refused(source, ConversionError, rf"{MLP}\.down_proj: it has no bias, and .* one")


@pytest.mark.parametrize("fuse", [False, True])
def test_experts_that_are_not_all_there(fuse: bool, tmp_path: Path) -> None:
    source = changed(moe(tmp_path), rf"{MLP}\.experts\.3\.(up|gate|down)_proj")
    refused(source, ConversionError, r"not all 4 experts of .*experts\.down_proj", fuse=fuse)


def test_experts_without_their_up_projections(tmp_path: Path) -> None:
    source = changed(moe(tmp_path), rf"{MLP}\.experts\.\d\.up_proj")
    refused(source, ConversionError, r"with 96 rows it is not the whole of .*gate_up_proj")


# --- what a kernel cannot stand for, or what has none ---------------------------------------------


def test_an_embedding_that_scales_what_it_looks_up(tmp_path: Path) -> None:
    config = transformers.Gemma3TextConfig(**TINY, dtype=torch.bfloat16)
    choose = lambda name, tensor: "embed_tokens" in name  # noqa: E731
    group = group_config(weight_args(4, 32), ["Embedding"])
    source, _ = write_models(transformers.Gemma3ForCausalLM(config), tmp_path, group, choose)
    refused(source, ConversionError, "cannot stand for Gemma3TextScaledWordEmbedding, which is no")


class Head(torch.nn.Module):
    """A head that is no Linear."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(rows, columns))


def test_a_converted_table_tied_to_another_kind_of_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True, dtype=torch.bfloat16)
    choose = lambda name, tensor: linears(name, tensor) or "embed" in name  # noqa: E731
    group = group_config(weight_args(4, 32), ["Linear", "Embedding"])
    source, _ = write_models(transformers.LlamaForCausalLM(config), tmp_path, group, choose)
    make = transformers.LlamaForCausalLM.__init__

    def with_another_head(self: Any, config: Any) -> None:
        make(self, config)
        self.lm_head = Head(config.vocab_size, config.hidden_size)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", with_another_head)
    says = r"lm_head\.weight: it is tied to a converted table, and a kernel cannot stand for Head"
    refused(source, ConversionError, says)


def experts_that_say(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Has the model's experts say of themselves what others do."""
    kind = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    made = kind.__init__

    def init(self: Any, *args: Any) -> None:
        made(self, *args)
        vars(self).update(settings)

    monkeypatch.setattr(kind, "__init__", init)


def test_experts_with_a_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts_that_say(monkeypatch, has_post_expert_norm=True)
    refused(moe(tmp_path), ConversionError, "Qwen3MoeExperts, which say has_post_expert_norm")


def test_experts_that_are_not_of_the_common_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts
    monkeypatch.delattr(kind, "_apply_gate")
    refused(moe(tmp_path), ConversionError, "Qwen3MoeExperts, which are not experts of")


def test_experts_whose_biases_the_model_has_not(tmp_path: Path) -> None:
    bias = {f"{MLP}.experts.{e}.down_proj.bias": torch.ones(64).bfloat16() for e in range(4)}
    source = changed(moe(tmp_path), **bias)
    refused(source, ConversionError, r"down_proj: it has a bias, and .*experts\.down_proj .* none")


def test_activations_of_another_dtype_than_the_weights(tmp_path: Path) -> None:
    """2:4 sparse and else as it was: bfloat16."""
    config = transformers.LlamaConfig(
        **TINY | {"intermediate_size": 128, "num_hidden_layers": 1}, dtype=torch.bfloat16
    )
    source = tmp_path / "in"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
    sparse = module(f"{MLP}.down_proj", sparse24(64, 128, {"weights": None}, 1))
    changed(source, rf"{MLP}\.down_proj", **sparse)
    text = json.loads((source / "config.json").read_text())
    sparsity = {"format": "sparse-24-bitmask", "targets": ["re:.*down_proj"], "ignore": []}
    text["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": sparsity,
    }
    (source / "config.json").write_text(json.dumps(text))
    ctconvert.repack(source, tmp_path / "out", target="cuda", device="cpu")
    load_model(tmp_path / "out", "cpu", torch.bfloat16)
    with pytest.raises(UsageError, match=r"down_proj: weights of bfloat16 .*pass dtype=torch\.bf"):
        load_model(tmp_path / "out", "cpu", torch.float16)


# --- the files -----------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path) -> Path:
    ctconvert.repack(llama(tmp_path), tmp_path / "out", target="triton", device="cpu")
    return tmp_path / "out"


def test_a_file_cut_short(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises((VerificationError, UsageError), match=r"model\.safetensors"):
            load(out)


def test_no_manifest(out: Path) -> None:
    (out / "ctconvert.json").unlink()
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(VerificationError, match=r"no ctconvert\.json"):
            load(out)


def test_a_tensor_renamed_in_the_file(out: Path) -> None:
    file = out / "model.safetensors"
    data = file.read_bytes()
    assert data.count(b"0.mlp.up_proj.qweight") == 1
    file.write_bytes(data.replace(b"0.mlp.up_proj.qweight", b"0.mlp.up_proj.qweighs"))
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(VerificationError, match="header has changed"):
            load(out)


def test_a_file_that_is_not_of_the_manifest(out: Path) -> None:
    """An index names other files than the manifest does."""
    (out / "model.safetensors").rename(out / "other.safetensors")
    names = load_tensors(out)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "other.safetensors")}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(VerificationError, match=r"safetensors"):
            load(out)


def test_a_restored_checkpoint_that_says_it_is_converted(out: Path, tmp_path: Path) -> None:
    ctconvert.restore(out, tmp_path / "restored")
    (tmp_path / "restored" / "config.json").write_text((out / "config.json").read_text())
    with pytest.raises(VerificationError, match=r"config\.json: .* bytes, expected"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "restored")


# --- what is asked for ---------------------------------------------------------------------------


def test_float32(out: Path) -> None:
    for load in (transformers.AutoModelForCausalLM.from_pretrained, load_model):
        with pytest.raises(
            UsageError, match=r"float16 and bfloat16 activations, not torch\.float32"
        ):
            load(out, dtype=torch.float32)


def test_saving(out: Path, tmp_path: Path) -> None:
    model, _ = load_model(out, "cpu")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")


def test_the_weight_of_a_kernel(out: Path) -> None:
    """It tells its shape and dtype, and nobody can compute with it."""
    model, _ = load_model(out, "cpu")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert (weight.shape, weight.dtype) == ((96, 64), torch.bfloat16)
    assert weight.device.type == "cpu"
    with pytest.raises(ConversionError, match="computes with the weight of a converted module"):
        torch.nn.functional.linear(torch.ones(1, 64).bfloat16(), weight)


def test_several_devices_by_transformers(out: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(out)
    config.distributed_config = {"tp_plan": "auto"}
    with pytest.raises(UsageError, match="not split over devices by transformers"):
        transformers.AutoModelForCausalLM.from_pretrained(out, config=config)


def test_offloading(out: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    load = transformers.AutoModelForCausalLM.from_pretrained
    asked = {"": "cpu", "model.layers.1": "disk"}
    with pytest.raises(UsageError, match=r"not offloaded: .*, without disk"):
        load(out, device_map=asked, offload_folder=tmp_path / "offloaded")
    with pytest.raises(UsageError, match=r"not offloaded: .*, without disk"):
        load(out, device_map="auto", max_memory={"cpu": 30_000})
    with pytest.raises(UsageError, match=r"not offloaded: .*, without cpu"):
        load(out, device_map={"": 0, "model.layers.1": "cpu"})


def test_training(out: Path) -> None:
    """Nothing of it asks for a gradient, and transformers' trainer is told so."""
    model, _ = load_model(out, "cpu")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.hf_quantizer.is_trainable


def test_an_adapter(out: Path) -> None:
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises((UsageError, VerificationError), match="adapter_config"):
        load_model(out, "cpu")


def test_another_config(out: Path) -> None:
    file = out / "config.json"
    config = json.loads(file.read_text()) | {"_attn_implementation": "someone/kernel"}
    file.write_text(json.dumps(config))
    with pytest.raises(VerificationError, match=r"config\.json"):
        load_model(out, "cpu")


def test_code_of_others(tmp_path: Path) -> None:
    """A kernel from the Hub that the source's own config asks for."""
    source = llama(tmp_path)
    file = source / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_attn_implementation": "a/b"}))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    with pytest.raises(UsageError, match="_attn_implementation 'a/b' is not one of transformers'"):
        load_model(tmp_path / "out", "cpu")


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory, and not a Hub id"):
        load_model(tmp_path / "nothing")


# --- programs of their own -----------------------------------------------------------------------

#: What transformers alone does with a folder, which is to make weights up and only warn; then the
#: line that the README gives, and the same checkpoint from a Hub.
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM
made = [AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj.weight
        for _ in range(2)]
assert not torch.equal(*made)
import ctconvert.integrations.transformers
from ctconvert.runtime import load_model
ids = torch.arange(1, 24)[None]
models = [AutoModelForCausalLM.from_pretrained("org/tiny"), load_model("org/tiny", "cpu")[0]]
torch.save([model(input_ids=ids).logits.detach() for model in models], sys.argv[2])
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    served = Hub()
    yield served
    served.close()


def test_without_the_import_weights_are_random_and_with_it_a_hub_id_loads(
    out: Path, hub: Hub, tmp_path: Path
) -> None:
    """Plain ``from_pretrained`` fetches the weights alone; the manifest is fetched with them.

    Before the import it warns, as the README says in its first lines; the day that it is an error
    there, that line can go.
    """
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub.add("org/tiny", out, oid=commit)
    script = [sys.executable, "-c", PROGRAM, str(out), str(tmp_path / "logits.pt")]
    done = subprocess.run(
        script, env=hub_environment(hub, tmp_path), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization type, got ctconvert" in done.stderr
    expected = load_model(out, "cpu")[0](input_ids=IDS).logits
    for found in torch.load(tmp_path / "logits.pt"):
        assert torch.equal(found, expected)
    assert hub.sent["ctconvert.json"] == (out / "ctconvert.json").stat().st_size


def test_a_checkpoint_that_is_cut_for_ranks(tmp_path: Path) -> None:
    source, out = llama(tmp_path / "in"), tmp_path / "out"
    kept = ["*.down_proj"]  # whose groups would be cut
    ctconvert.repack(source, out, target="triton", device="cpu", tensor_parallel=2, exclude=kept)
    with pytest.raises(UsageError, match="cut for 2 ranks, which transformers does not load"):
        load_model(out, "cpu")
