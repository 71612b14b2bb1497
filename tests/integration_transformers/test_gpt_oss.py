"""gpt-oss, whose experts are transposed in the model, have biases, and gate and up row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.builders import config_of, group_config, quantised, weight_args
from support.reference import load_tensors

transformers = pytest.importorskip("transformers", "5.18", reason="transformers 5.18 is needed")

from support.hf import TINY, dequantised, error  # noqa: E402

import ctconvert  # noqa: E402
import ctconvert.integrations.transformers  # noqa: E402
from ctconvert.errors import ConversionError  # noqa: E402
from ctconvert.integrations.transformers.standins import KernelMoe  # noqa: E402
from ctconvert.runtime import load_model  # noqa: E402

EXPERTS, H, I = 4, TINY["hidden_size"], TINY["intermediate_size"]  # noqa: E741
MXFP4 = group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized")
INT4 = group_config(weight_args(4, 32))
IDS = torch.arange(1, 24).reshape(1, -1)
LIMIT = 0.02
#: How the experts of a checkpoint are named: as parameters, as modules, as modules whose biases are
#: the model's parameters, and one by one, gate and up apart.
FORMS = ("parameters", "modules", "biases apart", "one by one")


def projection(leaf: str, group: Any, seed: int) -> tuple[list[dict[str, torch.Tensor]], Any]:
    """The tensors of each expert, and what compressed-tensors makes of them: [E, N, K]."""
    n, k = (2 * I, H) if leaf == "gate_up_proj" else (H, I)
    each = [quantised(n, k, group, seed + e) for e in range(EXPERTS)]
    for made in each:  # smaller, so that the limit of the activation cuts some values and not all
        scale = made["weight_scale"]
        made["weight_scale"] = scale - 5 if scale.dtype == torch.uint8 else scale / 4
    return each, torch.stack([dequantised(group, made) for made in each]).bfloat16()


def named(form: str, leaf: str, each: list[dict[str, torch.Tensor]], bias: torch.Tensor) -> Any:
    """The tensors of one projection as a checkpoint has them, without the block's name."""
    if form == "one by one":
        parts = {"down_proj": slice(None)}
        if leaf == "gate_up_proj":
            parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
        found = {}
        for e, made in enumerate(each):
            for part, rows in parts.items():
                own = {local: t[rows] for local, t in made.items() if local != "weight_shape"}
                if "weight_shape" in made:
                    k = int(made["weight_shape"][1])
                    own["weight_shape"] = torch.tensor([len(own["weight_packed"]), k])
                own["bias"] = bias[e, rows]
                found |= {f"{e}.{part}.{local}": t.contiguous() for local, t in own.items()}
        return found
    whole = {
        local: torch.stack([made[local] for made in each])
        for local in each[0]
        if local != "weight_shape"
    }
    if form == "parameters":
        found = {f"{leaf}_{local.removeprefix('weight_')}": t for local, t in whole.items()}
        return found | {f"{leaf}_bias": bias}
    if "weight_shape" in each[0]:
        whole["weight_shape"] = torch.tensor([EXPERTS, *each[0]["weight_shape"].tolist()])
    found = {f"{leaf}.{local}": t for local, t in whole.items()}
    return found | {f"{leaf}.bias" if form == "modules" else f"{leaf}_bias": bias}


def write(folder: Path, group: Any, form: str, without: str = "") -> tuple[Path, Path]:
    """The quantised checkpoint and the plain one of the same weights."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **TINY, num_local_experts=EXPERTS, num_experts_per_tok=2, dtype=torch.bfloat16
    )
    plain, source = folder / "plain", folder / "in"
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(plain)
    dense = load_tensors(plain)
    tensors = dict(dense)
    for layer in range(TINY["num_hidden_layers"]):
        block = f"model.layers.{layer}.mlp.experts"
        for seed, leaf in enumerate(("gate_up_proj", "down_proj")):
            each, weight = projection(leaf, group, 100 * layer + 10 * seed)
            bias = torch.randn(EXPERTS, weight.shape[1]).bfloat16()
            dense |= {
                f"{block}.{leaf}": weight.mT.contiguous(),
                f"{block}.{leaf}_bias": bias,
            }
            del tensors[f"{block}.{leaf}"], tensors[f"{block}.{leaf}_bias"]
            made = named(form, leaf, each, bias)
            tensors |= {f"{block}.{name}": t for name, t in made.items() if name != without}
    save_file(dense, plain / "model.safetensors", {"format": "pt"})
    source.mkdir()
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = config_of(group, ignore=[])
    (source / "config.json").write_text(json.dumps(config))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source, plain


@pytest.mark.parametrize(
    ("group", "target", "form", "fuse"),
    [
        *((MXFP4, target, form, False) for target in ("triton", "cuda") for form in FORMS),
        *((MXFP4, target, "one by one", True) for target in ("triton", "cuda")),
        (INT4, "cuda", "parameters", False),
        (INT4, "triton", "one by one", True),
    ],
)
def test_logits(group: Any, target: str, form: str, fuse: bool, tmp_path: Path) -> None:
    source, plain = write(tmp_path, group, form)
    ctconvert.repack(source, tmp_path / "out", target=target, device="cpu", fuse=fuse)
    auto = transformers.AutoModelForCausalLM
    found = auto.from_pretrained(tmp_path / "out")
    expected = auto.from_pretrained(plain, dtype=torch.bfloat16)
    blocks = [module for module in found.modules() if isinstance(module, KernelMoe)]
    wholes = [layer.mlp.experts for layer in expected.model.layers]
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(3)).bfloat16()
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1], [1, 3], [3, 1], [0, 3], [1, 0]])
    weights = torch.rand(9, 2, generator=torch.Generator().manual_seed(4)).bfloat16()
    with torch.inference_mode():
        for block, whole in zip(blocks, wholes, strict=True):
            made, wanted = block(x, chosen, weights), whole(x, chosen, weights)
            assert error(made, wanted) < LIMIT
        logits = [model(input_ids=IDS).logits for model in (found, expected)]
    assert error(*logits) < LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["parameters", "one by one"])
@pytest.mark.parametrize("target", ["triton", "cuda"])
def test_on_a_gpu(target: str, form: str, tmp_path: Path) -> None:
    source, plain = write(tmp_path, MXFP4, form)
    ctconvert.repack(source, tmp_path / "out", target=target, fuse=True)
    auto = transformers.AutoModelForCausalLM
    found = auto.from_pretrained(tmp_path / "out", device_map="cuda")
    expected = auto.from_pretrained(plain, dtype=torch.bfloat16).to("cuda")
    ids = IDS.to("cuda")
    with torch.inference_mode():
        assert error(found(input_ids=ids).logits, expected(input_ids=ids).logits) < LIMIT


@pytest.mark.parametrize("form", ["modules", "biases apart", "one by one"])
def test_a_bias_that_is_missing(form: str, tmp_path: Path) -> None:
    without = {"modules": "down_proj.bias", "biases apart": "down_proj_bias"}
    source, _ = write(tmp_path, MXFP4, form, without.get(form, "2.down_proj.bias"))
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    with pytest.raises(ConversionError, match=r"down_proj") as raised:
        load_model(tmp_path / "out", "cpu")
    assert "bias" in str(raised.value) and "\n" not in str(raised.value)
