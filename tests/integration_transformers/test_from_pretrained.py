"""``from_pretrained`` of a converted checkpoint gives the dequantised model's logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.block_floats import FP8, fp8_group
from support.builders import DYNAMIC_INT8, group_config, weight_args
from support.reference import equal, load_tensors

transformers = pytest.importorskip("transformers", "5.18", reason="transformers 5.18 is needed")

from support.hf import TINY, error, linears, write_models  # noqa: E402

import ctconvert  # noqa: E402
import ctconvert.integrations.transformers  # noqa: E402
from ctconvert.integrations.transformers.standins import KernelMoe, KernelSlot  # noqa: E402
from ctconvert.runtime import load_model  # noqa: E402

T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}

INT4 = group_config(weight_args(4, 32))
SCHEMES = {
    "int4": INT4,
    "int4 asym": group_config(weight_args(4, 32, False)),
    "int8": group_config(weight_args(8, None)),
    "fp8": fp8_group("channel", None),
    "fp8 activations": fp8_group("channel", FP8),
    "w8a8": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
}
#: The relative error of logits. An activation that falls on the other side of a rounding step, of
#: FP8 an eighth of its value, moves all that follows; other weights would give an error above 1.
LIMIT = 0.02
LIMITS = {"w8a8": 0.05, "fp8 activations": 0.15}
IDS = torch.arange(1, 24).reshape(1, -1)
MOE = TINY | {
    "moe_intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def made(kind: str, config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return getattr(transformers, kind)(config).eval()


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(**inputs).logits.float()


def quantise_inputs(model: Any, group: Any) -> None:
    """Gives a plain model what the scheme makes of activations: 8 bits a token."""
    whole = group["input_activations"]["type"] == "int"

    def quantised(module: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        x = inputs[0].float()
        scale = x.abs().amax(-1, keepdim=True) / (127 if whole else 448)
        codes = (x / scale).round() if whole else (x / scale).to(torch.float8_e4m3fn).float()
        return (codes * scale).to(inputs[0].dtype)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(quantised)


def both(
    auto: Any, source: Path, plain: Path, out: Path, target: str, fuse: bool = False
) -> tuple[Any, Any]:
    """The converted model and the plain one, both by ``from_pretrained``."""
    ctconvert.repack(source, out, target=target, device="cpu", fuse=fuse)
    return auto.from_pretrained(out), auto.from_pretrained(plain, dtype=torch.bfloat16)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("scheme", "target"),
    [
        ("int4", "triton"),
        ("int4 asym", "cuda"),
        ("int4", "cpu"),
        ("int8", "cuda"),
        ("fp8", "cuda"),
        ("fp8 activations", "triton"),
        ("w8a8", "triton"),
    ],
)
def test_a_dense_model(scheme: str, target: str, fuse: bool, tmp_path: Path) -> None:
    model = made("LlamaForCausalLM", transformers.LlamaConfig(**TINY, dtype=torch.bfloat16))
    source, plain = write_models(model, tmp_path, SCHEMES[scheme])
    auto = transformers.AutoModelForCausalLM
    found, expected = both(auto, source, plain, tmp_path / "out", target, fuse)
    slots = [module for module in found.modules() if isinstance(module, KernelSlot)]
    assert len(slots) == 14
    assert found.dtype == torch.bfloat16
    if SCHEMES[scheme]["input_activations"]:
        quantise_inputs(expected, SCHEMES[scheme])
    limit = LIMITS.get(scheme, LIMIT)
    assert error(logits(found, input_ids=IDS), logits(expected, input_ids=IDS)) < limit
    text = found.generate(IDS, max_new_tokens=4, do_sample=False)
    assert text.shape == (1, IDS.shape[1] + 4)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("scheme", "target"),
    [("int4", "triton"), ("int4", "cuda"), ("fp8", "cuda"), ("w8a8", "triton")],
)
@pytest.mark.parametrize("kind", ["Qwen3Moe", "Mixtral"])
def test_experts(kind: str, scheme: str, target: str, fuse: bool, tmp_path: Path) -> None:
    """One by one, and stacked: in one launch (``cuda``) or each by itself."""
    more = MOE if kind == "Qwen3Moe" else TINY | {"num_local_experts": 4}
    config = getattr(transformers, f"{kind}Config")(**more, dtype=torch.bfloat16)
    source, plain = write_models(made(f"{kind}ForCausalLM", config), tmp_path, SCHEMES[scheme])
    auto = transformers.AutoModelForCausalLM
    found, expected = both(auto, source, plain, tmp_path / "out", target, fuse)
    blocks = [module for module in found.modules() if isinstance(module, KernelMoe)]
    assert [block.num_experts for block in blocks] == [4, 4]
    for block, whole in zip(
        blocks,
        [module.experts for module in expected.modules() if hasattr(module, "experts")],
        strict=True,
    ):
        made_seed = torch.Generator().manual_seed(3)
        x = torch.randn(9, TINY["hidden_size"], generator=made_seed).bfloat16()
        chosen = torch.tensor(
            [[0, 3], [3, 1], [1, 0], [3, 0], [0, 1], [1, 3], [3, 1], [0, 3], [1, 0]]
        )
        weights = torch.rand(9, 2, generator=made_seed).bfloat16()
        with torch.inference_mode():
            limit = 0.06 if scheme == "w8a8" else LIMIT  # this reference quantises no inputs
            assert error(block(x, chosen, weights), whole(x, chosen, weights)) < limit
            none = block(x, torch.full_like(chosen, 4), weights)
        assert not none.any()  # 4 is no expert
    assert torch.isfinite(logits(found, input_ids=IDS)).all()


def test_experts_whose_down_projection_is_not_quantised(tmp_path: Path) -> None:
    model = made("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**MOE, dtype=torch.bfloat16))
    choose = lambda name, tensor: linears(name, tensor) and "down_proj" not in name  # noqa: E731
    source, plain = write_models(model, tmp_path, INT4, choose)
    auto = transformers.AutoModelForCausalLM
    found, expected = both(auto, source, plain, tmp_path / "out", "triton")
    assert error(logits(found, input_ids=IDS), logits(expected, input_ids=IDS)) < LIMIT


@pytest.mark.parametrize("fuse", [False, True])
def test_a_tied_and_quantised_embedding(fuse: bool, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True, dtype=torch.bfloat16)
    choose = lambda name, tensor: linears(name, tensor) or "embed" in name  # noqa: E731
    group = group_config(weight_args(4, 32), ["Linear", "Embedding"])
    source, plain = write_models(made("LlamaForCausalLM", config), tmp_path, group, choose)
    auto = transformers.AutoModelForCausalLM
    found, expected = both(auto, source, plain, tmp_path / "out", "triton", fuse)
    assert isinstance(found.lm_head, KernelSlot)
    assert error(logits(found, input_ids=IDS), logits(expected, input_ids=IDS)) < LIMIT


@pytest.mark.parametrize("fuse", [False, True])
def test_a_tied_embedding_beside_quantised_modules(fuse: bool, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**TINY, tie_word_embeddings=True, dtype=torch.bfloat16)
    source, plain = write_models(made("LlamaForCausalLM", config), tmp_path, INT4)
    auto = transformers.AutoModelForCausalLM
    found, expected = both(auto, source, plain, tmp_path / "out", "cuda", fuse)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert error(logits(found, input_ids=IDS), logits(expected, input_ids=IDS)) < LIMIT


def test_an_encoder_decoder(tmp_path: Path) -> None:
    """T5 asks for the dtype of a weight, ties three tables, and wants ``wo`` in float32."""
    config = transformers.T5Config(
        **T5,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dtype=torch.bfloat16,
        decoder_start_token_id=0,
    )
    choose = lambda name, tensor: linears(name, tensor) and "relative" not in name  # noqa: E731
    model = made("T5ForConditionalGeneration", config)
    source, plain = write_models(model, tmp_path, INT4, choose)
    auto = transformers.AutoModelForSeq2SeqLM
    found, expected = both(auto, source, plain, tmp_path / "out", "triton")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}
    assert error(logits(found, **inputs), logits(expected, **inputs)) < LIMIT
    half, _ = load_model(tmp_path / "out", "cpu", torch.float16)
    assert type(half) is type(expected)
    assert error(logits(half, **inputs), logits(expected, **inputs)) < 0.05


def test_an_encoder_decoder_with_its_shared_table_quantised(tmp_path: Path) -> None:
    config = transformers.T5Config(
        **T5,
        num_layers=1,
        dtype=torch.bfloat16,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    choose = lambda name, tensor: name == "shared.weight"  # noqa: E731
    group = group_config(weight_args(8, None), ["Embedding"])
    model = made("T5ForConditionalGeneration", config)
    source, plain = write_models(model, tmp_path, group, choose)
    auto = transformers.AutoModelForSeq2SeqLM
    found, expected = both(auto, source, plain, tmp_path / "out", "triton")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :7]}
    assert error(logits(found, **inputs), logits(expected, **inputs)) < LIMIT


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def test_a_model_of_text_and_images(tmp_path: Path) -> None:
    """Gemma 3, whose files name the tensors otherwise than the model does."""
    config = transformers.Gemma3Config(
        text_config=TINY,
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=100,
        dtype=torch.bfloat16,
    )
    choose = lambda name, tensor: linears(name, tensor) and "language_model" in name  # noqa: E731
    model = made("Gemma3ForConditionalGeneration", config)
    source, plain = write_models(model, tmp_path, INT4, choose)
    auto = transformers.AutoModelForImageTextToText
    found, expected = both(auto, source, plain, tmp_path / "out", "triton", fuse=True)
    assert sum(isinstance(module, KernelSlot) for module in found.modules()) == 14
    ids = torch.cat([torch.full((1, 4), 100), IDS[:, :9]], dim=1)
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = {"input_ids": ids, "pixel_values": image, "token_type_ids": (ids == 100).long()}
    assert error(logits(found, **inputs), logits(expected, **inputs)) < LIMIT
    loaded, _ = load_model(tmp_path / "out", "cpu")
    assert type(loaded) is type(expected)
    assert torch.equal(logits(loaded, **inputs), logits(found, **inputs))


def test_the_tensors_are_the_checkpoints_own(tmp_path: Path) -> None:
    """Whatever the dtype of the model, every kernel has the bytes of the file."""
    config = transformers.T5Config(
        **T5,
        num_layers=1,
        dtype=torch.bfloat16,
    )
    choose = lambda name, tensor: linears(name, tensor) and "relative" not in name  # noqa: E731
    source, _ = write_models(made("T5ForConditionalGeneration", config), tmp_path, INT4, choose)
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_pretrained(tmp_path / "out", dtype=torch.float16)
    files, checked = load_tensors(tmp_path / "out"), 0
    for name, module in model.named_modules():
        if isinstance(module, KernelSlot):
            for local, tensor in module.kernel.tensors().items():
                assert equal(tensor, files[f"{name}.{local}"])
                checked += 1
    assert checked == 2 * (6 + 10)


@pytest.mark.parametrize("target", ["triton", "cuda"])
def test_experts_whose_tensors_are_3d(target: str, tmp_path: Path) -> None:
    """The checkpoint has them as the model does: ``experts.gate_up_proj``, [E, 2I, H]."""
    model = made("Qwen3MoeForCausalLM", transformers.Qwen3MoeConfig(**MOE, dtype=torch.bfloat16))
    source, plain = write_models(model, tmp_path, INT4)
    tensors = load_tensors(source)
    block = r"(.*\.experts)\.\d+\.(\w+)\.(\w+)"
    apart = {name for name in tensors if re.fullmatch(block, name)}
    whole = {name: tensor for name, tensor in tensors.items() if name not in apart}
    for experts in sorted({re.fullmatch(block, name)[1] for name in apart}):
        for local in ("weight_packed", "weight_scale"):
            gate, up, down = (
                torch.stack([tensors[f"{experts}.{e}.{leaf}.{local}"] for e in range(4)])
                for leaf in ("gate_proj", "up_proj", "down_proj")
            )
            whole[f"{experts}.gate_up_proj.{local}"] = torch.cat([gate, up], 1)
            whole[f"{experts}.down_proj.{local}"] = down
        whole[f"{experts}.gate_up_proj.weight_shape"] = torch.tensor([4, 192, 64])
        whole[f"{experts}.down_proj.weight_shape"] = torch.tensor([4, 64, 96])
    save_file(whole, source / "model.safetensors", {"format": "pt"})
    auto = transformers.AutoModelForCausalLM
    found, expected = both(auto, source, plain, tmp_path / "out", target)
    assert sum(isinstance(module, KernelMoe) for module in found.modules()) == 2
    assert error(logits(found, input_ids=IDS), logits(expected, input_ids=IDS)) < LIMIT


def test_a_model_of_text_and_pictures_with_a_rope_of_its_own(tmp_path: Path) -> None:
    """Qwen2-VL, all of whose Linear modules are quantised, the vision tower's too."""
    config = transformers.Qwen2VLConfig(
        text_config=TINY
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 4},
        image_token_id=100,
        vision_start_token_id=101,
        vision_end_token_id=102,
        video_token_id=103,
        dtype=torch.bfloat16,
    )
    model = made("Qwen2VLForConditionalGeneration", config)
    source, plain = write_models(model, tmp_path, INT4)
    auto = transformers.AutoModelForImageTextToText
    found, expected = both(auto, source, plain, tmp_path / "out", "cuda", fuse=True)
    assert sum(isinstance(module, KernelSlot) for module in found.model.visual.modules()) == 6
    ids = torch.cat([torch.tensor([[101]]), torch.full((1, 4), 100), IDS[:, :9]], dim=1)
    made_seed = torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 3 * 2 * 14 * 14, generator=made_seed).bfloat16()
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 100).int(),
    }
    assert error(logits(found, **inputs), logits(expected, **inputs)) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe"])
@pytest.mark.parametrize("target", ["triton", "cuda"])
def test_on_a_gpu(kind: str, target: str, fuse: bool, tmp_path: Path) -> None:
    more = MOE if kind == "Qwen3Moe" else TINY
    config = getattr(transformers, f"{kind}Config")(**more, dtype=torch.bfloat16)
    source, plain = write_models(made(f"{kind}ForCausalLM", config), tmp_path, INT4)
    ctconvert.repack(source, tmp_path / "out", target=target, fuse=fuse)
    auto, ids = transformers.AutoModelForCausalLM, IDS.to("cuda")
    found = auto.from_pretrained(tmp_path / "out", device_map="cuda")
    assert {tensor.device.type for tensor in [*found.parameters(), *found.buffers()]} == {"cuda"}
    expected = auto.from_pretrained(plain, dtype=torch.bfloat16).to("cuda")
    answer = logits(found, input_ids=ids)
    assert error(answer, logits(expected, input_ids=ids)) < LIMIT
    loaded, _ = load_model(tmp_path / "out", "cuda")
    assert torch.equal(logits(loaded, input_ids=ids), answer)
