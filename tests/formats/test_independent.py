"""compressed-tensors' own decompressors as the judge of what the formats here decode."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import DYNAMIC_INT8, group_config, quantised, sparse24, weight_args
from support.paths import CHECKPOINTS
from support.reference import load_tensors
from support.versions import needs_judge

from ctconvert import formats
from ctconvert.errors import UsageError
from ctconvert.formats.base import METADATA_NAMES, ModuleTensors
from ctconvert.formats.independent import (
    NotJudgedError,
    dense_by_compressed_tensors,
    difference,
)
from ctconvert.formats.quantization import ModuleScheme, QuantizationSettings
from ctconvert.formats.quantization.reading import read_group
from ctconvert.transforms.dense import dense_weight
from ctconvert.transforms.dtypes import spec_of

#: What the judge says of each checkpoint; every module counts.
VERDICTS = {
    "old071-rand-w3a16-g128-legacypack": "padded packing",
    "old071-rand-w4a16-g128-actorder-group-gidx": "act-order",
    "old071-smol-sparse24-bf16": "does not decode sparse-24-bitmask",
    "old071-smol-sparse24-fp8-dynamic-channel": "does not decode sparse-24-bitmask",
    "rand-w3a16-g128-sym": "",
    "smol-mixed-w4-w8-regex-ignore": "",
    "smol-mxfp4a16": "",
    "smol-w4-embed-head-g64": "",
    "smol-w4a16-g32-asym": "",
    "smol-w4a16-g64-sym": "",
    "smol-w4a8-int8dyn-g32-packed": "",
    "smol-w4a8o8-pack-static": "",
    "smol-w8a8o8-static-sym": "",
}


def modules_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in load_tensors(folder).items():
        name, _, local = full.rpartition(".")
        found.setdefault(name, {})[local] = tensor
    return found


def ours(scheme: ModuleScheme, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    handler = formats.get(scheme.format)
    assert handler is not None
    values = {
        local: tensor.double().flatten().tolist()
        for local, tensor in tensors.items()
        if local in METADATA_NAMES
    }
    specs = {local: spec_of(tensor) for local, tensor in tensors.items()}
    spec = handler.spec(ModuleTensors("m", specs, values=values, version=(0, 20)), scheme)
    return dense_weight(handler.decode(tensors, spec))


def beside(names: Iterable[str], part: str, why: str) -> list[Any]:
    """The names, those with ``part`` only where the installed release is the one to judge."""
    return [
        pytest.param(name, id=name, marks=[needs_judge(why)] if part in name else [])
        for name in names
    ]


def test_every_checkpoint_has_a_verdict() -> None:
    assert {folder.name for folder in CHECKPOINTS.iterdir()} == VERDICTS.keys()


@pytest.mark.parametrize("name", beside(VERDICTS, "w3a16", "it reads the other packing"))
def test_checkpoints(name: str) -> None:
    config = json.loads((CHECKPOINTS / name / "config.json").read_text())
    settings = QuantizationSettings.parse(config, "config.json")
    groups = config["quantization_config"].get("config_groups", {})
    by_target = {target: group for group in groups.values() for target in group["targets"]}
    verdicts: Counter[str] = Counter()
    for module, tensors in modules_of(CHECKPOINTS / name).items():
        if not tensors.keys() & {"weight_scale", "compressed"}:
            continue
        scheme = settings.schemes_of_quantised(module)[0]
        group = by_target.get(scheme.target, {"targets": ["Linear"]})
        try:
            theirs = dense_by_compressed_tensors(
                module, tensors, group, scheme.format, settings.version
            )
        except NotJudgedError as error:
            assert VERDICTS[name]
            assert VERDICTS[name] in str(error)
            verdicts["not judged"] += 1
        else:
            assert difference(theirs, ours(scheme, tensors)) == ""
            verdicts["judged"] += 1
    # beside the 2:4 modules of the fp8 checkpoint stand plain fp8 ones
    assert verdicts["judged"] > 0 or VERDICTS[name]
    assert bool(verdicts["not judged"]) == bool(VERDICTS[name])


CASES: dict[str, dict[str, Any]] = {
    **{
        f"int{bits} {'sym' if symmetric else 'asym'} g{group}": group_config(
            weight_args(bits, group, symmetric)
        )
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for group in (32, None)
        for symmetric in (True, False)
    },
    "int8": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
    "int4 in i8": group_config(weight_args(4, 32), format="int-quantized", inputs=DYNAMIC_INT8),
    "int8 asym": group_config(weight_args(8, None, False), format="int-quantized"),
    "fp8": group_config(weight_args(8, None, kind="float"), format="float-quantized"),
    "fp8 tensor": group_config(
        weight_args(8, kind="float", strategy="tensor"), format="float-quantized"
    ),
    "fp8 blocks": group_config(
        weight_args(8, kind="float", strategy="block", block_structure=[64, 48]),
        format="float-quantized",
    ),
    "mxfp4": group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
}


def made(
    group: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> tuple[ModuleScheme, dict[str, torch.Tensor]]:
    scheme = ModuleScheme(group["format"], read_group("group_0", group), "Linear")
    return scheme, quantised(72, 160, group, 7, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", beside(CASES, "fp8 blocks", "it misreads partial blocks"))
def test_schemes_exactly(name: str, dtype: torch.dtype) -> None:
    scheme, tensors = made(CASES[name], dtype)
    theirs = dense_by_compressed_tensors("m", tensors, CASES[name], scheme.format)
    assert difference(theirs, ours(scheme, tensors)) == ""
    assert scheme.scheme is not None
    again = dense_by_compressed_tensors("m", tensors, scheme.scheme, scheme.format)
    assert torch.equal(again, theirs)


@pytest.mark.parametrize("name", beside(CASES, "fp8 blocks", "it misreads partial blocks"))
def test_one_flipped_bit_is_caught(name: str) -> None:
    scheme, tensors = made(CASES[name])
    theirs = dense_by_compressed_tensors("m", tensors, CASES[name], scheme.format)
    weight = next(local for local in ("weight_packed", "weight") if local in tensors)
    flipped = tensors[weight].clone()
    raw = flipped.view(torch.uint8)
    raw[5, 7] ^= 1  # the lowest bit of a code, or of an element
    said = difference(theirs, ours(scheme, tensors | {weight: flipped}))
    assert said.startswith("[5, ")
    assert "1 of 11520 weights differ" in said


def test_every_power_of_two_of_mxfp4() -> None:
    group = CASES["mxfp4"]
    scheme = ModuleScheme(group["format"], read_group("group_0", group), "Linear")
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    tensors = {
        "weight_packed": codes,
        "weight_scale": torch.arange(255, dtype=torch.uint8)[:, None].repeat(1, 16),
    }
    theirs = dense_by_compressed_tensors("m", tensors, group, scheme.format)
    assert difference(theirs, ours(scheme, tensors)) == ""


def test_a_channel_scale_may_be_a_vector() -> None:
    scheme, tensors = made(CASES["int8"])
    flat = tensors | {"weight_scale": tensors["weight_scale"].flatten()}
    theirs = dense_by_compressed_tensors("m", flat, CASES["int8"], scheme.format)
    assert difference(theirs, ours(scheme, tensors)) == ""


@needs_judge("it reads the other packing")
def test_words_that_fit_both_packings_need_the_version() -> None:
    group = group_config(weight_args(3, None))
    tensors = quantised(72, 10, group, 7)  # one word a row either way
    with pytest.raises(NotJudgedError, match="dense or padded packing"):
        dense_by_compressed_tensors("m", tensors, group, "pack-quantized")
    with pytest.raises(NotJudgedError, match="in padded packing"):
        dense_by_compressed_tensors("m", tensors, group, "pack-quantized", (0, 17, 1))
    assert dense_by_compressed_tensors("m", tensors, group, "pack-quantized", (0, 20)).shape


@pytest.mark.parametrize(
    "spoilt",
    ["missing", pytest.param("wrong shape", marks=needs_judge("it decodes to another shape"))],
)
def test_what_their_decompressor_chokes_on_is_not_judged(spoilt: str) -> None:
    scheme, tensors = made(CASES["int4 sym g32"])
    if spoilt == "missing":
        del tensors["weight_packed"]
    else:
        tensors["weight_scale"] = tensors["weight_scale"][:, :-1]
    with pytest.raises(NotJudgedError, match="module m: compressed-tensors cannot decode it"):
        dense_by_compressed_tensors("m", tensors, CASES["int4 sym g32"], scheme.format)


def test_sparse_weights_are_not_judged() -> None:
    group = group_config(None)
    with pytest.raises(NotJudgedError, match="sparse-24-bitmask"):
        dense_by_compressed_tensors("m", sparse24(64, 64, group, 1), group, "sparse-24-bitmask")


def test_the_judge_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors", None)
    with pytest.raises(UsageError, match="not installed"):
        dense_by_compressed_tensors("m", {}, {}, "pack-quantized")


def test_a_difference_of_shape_is_told() -> None:
    assert "says [2, 3]" in difference(torch.zeros(2, 3), torch.zeros(3, 2))
