"""Which config group a module belongs to, held to compressed-tensors' own matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from support.builders import config_of, group_config, weight_args
from support.versions import needs_judge

from ctconvert.errors import BadInputError
from ctconvert.formats.quantization import QuantizationSettings, family, guess_class, looks_linear


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(8, 8)
        self.k_proj = torch.nn.Linear(8, 8)
        self.down_proj = torch.nn.Linear(8, 8)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(8, 8)
        self.layers = torch.nn.ModuleList([Block(), Block()])
        self.lm_head = torch.nn.Linear(8, 8)


CONFIGS: dict[str, dict[str, Any]] = {
    "a name beats a pattern beats a class": config_of(
        group_config(weight_args(8, None), ["Linear"]),
        group_config(weight_args(4, None), ["re:.*q_proj"]),
        group_config(weight_args(2, None), ["layers.1.q_proj"]),
    ),
    "a pattern is tried in sorted order": config_of(
        group_config(weight_args(8, None), ["re:.*layers.*"]),
        group_config(weight_args(4, None), ["re:.*0.*"]),
    ),
    "a pattern matches from the start": config_of(
        group_config(weight_args(4, None), ["re:q_proj", "re:layers.0"]), ignore=[]
    ),
    "ignore takes names, patterns and classes": config_of(
        group_config(weight_args(4, None), ["Linear", "Embedding"]),
        ignore=["lm_head", "re:.*k_proj", "Embedding"],
    ),
    "embeddings are a class of their own": config_of(
        group_config(weight_args(4, None), ["Linear"]),
        group_config(weight_args(8, None), ["Embedding"]),
        ignore=[],
    ),
    "the last group with a target has it": config_of(
        group_config(weight_args(4, None), ["Linear"]),
        group_config(weight_args(8, None), ["Linear"]),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            id=name,
            marks=[needs_judge("its patterns mean containers too")] if "pattern " in name else [],
        )
        for name in CONFIGS
    ],
)
def test_precedence_is_compressed_tensors_own(name: str) -> None:
    config = CONFIGS[name]
    settings = QuantizationSettings.parse({"quantization_config": config}, "config.json")
    model = Model()
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for module_name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        theirs = getattr(module, "quantization_scheme", None)
        ours = settings.schemes_of(module_name, guess_class(module_name))
        assert bool(ours) == (theirs is not None), module_name
        if ours:
            assert ours[0].scheme.weights.num_bits == theirs.weights.num_bits, module_name


def parse(**config: Any) -> QuantizationSettings:
    return QuantizationSettings.parse({"quantization_config": config}, "config.json")


def test_a_groups_own_format_wins() -> None:
    config = config_of(group_config(weight_args(4, None))) | {"format": "mixed-precision"}
    found = parse(**config).schemes_of("layers.0.q_proj", "Linear")[0]
    assert found.format == "pack-quantized"


def test_an_old_group_takes_the_configs_format() -> None:
    group = group_config(weight_args(4, None)) | {"format": None}
    found = parse(**config_of(group) | {"format": "pack-quantized"}).schemes_of("q_proj", "Linear")[
        0
    ]
    assert found.format == "pack-quantized"


def test_actorder_group_is_read_though_newer_versions_refuse_it() -> None:
    group = group_config(weight_args(4, 32, actorder="group"))
    found = parse(**config_of(group)).schemes_of("q_proj", "Linear")[0]
    assert found.actorder_group


def test_a_preset_is_a_scheme() -> None:
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    found = parse(**config, config_groups={"W4A16": ["Linear"]}).schemes_of("q_proj", "Linear")[0]
    assert found.scheme.weights.num_bits == 4


def test_sparsity_has_targets_of_its_own() -> None:
    sparsity = {"format": "sparse-24-bitmask", "targets": ["re:.*q_proj"], "ignore": ["a.q_proj"]}
    group = group_config(weight_args(8, None, kind="float"), format="float-quantized")
    settings = parse(**config_of(group, sparsity_config=sparsity))
    formats = {
        name: settings.schemes_of(name, "Linear")[0].format
        for name in ("a.q_proj", "b.q_proj", "c.k")
    }
    assert formats == {
        "a.q_proj": "float-quantized",
        "b.q_proj": "sparse-24-bitmask",
        "c.k": "float-quantized",
    }


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (group_config(weight_args(4, 32)), "wna16"),
        (group_config(weight_args(8, None)), "wna16"),
        (group_config(weight_args(8, None, kind="float"), format="float-quantized"), "w8a8"),
        (group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"), "mxfp4"),
    ],
)
def test_families(group: dict[str, Any], expected: str) -> None:
    found = parse(**config_of(group)).schemes_of("q_proj", "Linear")[0]
    assert family(found, found.format, embedding=False) == expected


def test_a_contradiction_names_the_place() -> None:
    with pytest.raises(BadInputError, match=r"config_groups\.group_0\.weights\.unknown_field"):
        parse(**config_of(group_config(weight_args(4, 32, unknown_field=1))))


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("q_proj", True),
        ("fc1", True),
        ("w2", True),
        ("lm_head", True),
        ("dense_4h_to_h", False),
        ("embed_tokens", True),
        ("relative_attention_bias", False),
        ("conv1d", False),
        ("norm", False),
    ],
)
def test_names_of_linears(leaf: str, expected: bool) -> None:
    assert looks_linear(f"model.layers.0.{leaf}") == expected
