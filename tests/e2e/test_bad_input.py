"""What is wrong with a checkpoint or a command line ends in one clear line and the right exit code.

Every failure is provoked through the command line itself. After each: one line on stderr, no
traceback, nothing on stdout, nothing left that could pass for a checkpoint, the source untouched.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import STATIC_INT8, config_of, group_config, quantised, weight_args, write_checkpoint
from ctconvert.checkpoint.header import MAX_HEADER
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ctconvert.cli import app

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
PLAIN = "model.embed_tokens.weight"
GROUP = group_config(weight_args(4, 32))


def tensors_of(group: dict[str, Any], *modules: tuple[str, int, int]) -> dict[str, torch.Tensor]:
    made = {PLAIN: torch.randn(24, 64, generator=torch.Generator().manual_seed(7))}
    for seed, (name, n, k) in enumerate(modules):
        parts = quantised(n, k, group, seed)
        made |= {f"{name}.{local}": tensor for local, tensor in parts.items()}
    return made


def small() -> dict[str, torch.Tensor]:
    """Three int4 modules of different shapes, a bias and a plain tensor."""
    made = tensors_of(GROUP, (Q, 48, 64), (UP, 96, 64), (DOWN, 64, 96))
    return made | {f"{Q}.bias": torch.arange(48, dtype=torch.bfloat16)}


def tree(folder: Path) -> dict[str, str]:
    """Every file below a directory with the hash of its bytes, links not followed."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Outcome:
    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr


def run(*args: object) -> Outcome:
    """The command line, in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def one_line(outcome: Outcome, code: int, *says: str) -> str:
    """Checks a failure: its exit code, one line on stderr that says all that, an empty stdout.

    A phase that was finished before (``verifying: 15.2 kB in 0.0 s``) may have a line of its own.
    """
    assert outcome.code == code, outcome.stderr
    assert "Traceback" not in outcome.stderr and outcome.stderr.endswith("\n")
    *before, line = outcome.stderr.splitlines()
    assert all(re.fullmatch(r"(converting|verifying): .* in .* s", item) for item in before)
    assert line.startswith("error: ") and outcome.stdout == ""
    for text in says:
        assert text in line, f"{text!r} is not in {line!r}"
    return line


def refused(model: Path, *options: str, says: tuple[str, ...], code: int = 2) -> None:
    """Converting ``model`` fails as it should, and leaves everything as it was."""
    beside = model.parent
    before, names = tree(model), sorted(path.name for path in beside.iterdir())
    outcome = run("repack", model, beside / "made" / "out", "--target", "triton", *options)
    if (beside / "made").exists():  # the parent of OUT may have been made, and nothing in it
        assert list((beside / "made").iterdir()) == []
        (beside / "made").rmdir()
    one_line(outcome, code, *says)
    assert sorted(path.name for path in beside.iterdir()) == names
    assert tree(model) == before


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return small()


@pytest.fixture
def model(tmp_path: Path, sound: dict[str, torch.Tensor]) -> Path:
    """A sound checkpoint of one file; tests damage it."""
    return write_checkpoint(tmp_path / "model", sound, config_of(GROUP))


@pytest.fixture
def sharded(tmp_path: Path, sound: dict[str, torch.Tensor]) -> Path:
    """A sound checkpoint of three files and an index."""
    return write_checkpoint(tmp_path / "model", sound, config_of(GROUP), shards=3)


def test_the_undamaged_checkpoints_convert(model: Path, tmp_path: Path) -> None:
    """Otherwise every refusal below might have another cause."""
    before = tree(model)
    outcome = run("repack", model, tmp_path / "out", "--target", "triton", "--json")
    assert outcome.code == 0 and json.loads(outcome.stdout)["modules"] == 3
    assert run("verify", tmp_path / "out", "--against", model).code == 0
    assert tree(model) == before


def test_the_undamaged_sharded_checkpoint_converts(sharded: Path, tmp_path: Path) -> None:
    assert run("repack", sharded, tmp_path / "out", "--target", "triton").code == 0
    assert run("verify", tmp_path / "out", "--against", sharded).code == 0


# --- safetensors files ---------------------------------------------------------------------------


def read_raw(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def in_order(header: dict[str, Any]) -> list[str]:
    names = [name for name in header if name != "__metadata__"]
    return sorted(names, key=lambda name: header[name]["data_offsets"])


def cut_data(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_header(path: Path) -> None:
    os.truncate(path, 100)


def cut_prefix(path: Path) -> None:
    os.truncate(path, 5)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + path.read_bytes()[8:])


def longest_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", MAX_HEADER) + path.read_bytes()[8:])


def header_not_json(path: Path) -> None:
    header, data = read_raw(path)
    write_raw(path, json.dumps(header).encode()[:-1] + b"!", data)


def header_not_text(path: Path) -> None:
    write_raw(path, b"\xff\xfe" * 40, read_raw(path)[1])


def header_a_list(path: Path) -> None:
    write_raw(path, b"[1, 2, 3]", read_raw(path)[1])


def header_too_deep(path: Path) -> None:
    write_raw(path, b"[" * 100_000, read_raw(path)[1])


def name_twice(path: Path) -> None:
    header, data = read_raw(path)
    text = json.dumps(header)
    write_raw(path, (text[:-1] + f', "{PLAIN}": {json.dumps(header[PLAIN])}}}').encode(), data)


def overlap(path: Path) -> None:
    header, data = read_raw(path)
    first, second = in_order(header)[:2]
    shift = header[first]["data_offsets"][0] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [end + shift for end in header[second]["data_offsets"]]
    write_raw(path, header, data)


def beyond_the_end(path: Path) -> None:
    header, data = read_raw(path)
    last = in_order(header)[-1]
    header[last]["data_offsets"] = [end + 4096 for end in header[last]["data_offsets"]]
    write_raw(path, header, data)


def far_beyond_the_end(path: Path) -> None:
    header, data = read_raw(path)
    header["extra"] = {"dtype": "U8", "shape": [1 << 50], "data_offsets": [len(data), 1 << 50]}
    header["extra"]["data_offsets"][1] += len(data)
    write_raw(path, header, data)


def gap(path: Path) -> None:
    header, data = read_raw(path)
    last = in_order(header)[-1]
    start, end = header[last]["data_offsets"]
    header[last]["data_offsets"] = [start + 8, end + 8]
    write_raw(path, header, data[:start] + bytes(8) + data[start:])


def bytes_after(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(8))


def spec_case(**fields: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        header, data = read_raw(path)
        header[PLAIN] |= fields
        write_raw(path, header, data)

    return change


def offsets_backwards(path: Path) -> None:
    header, data = read_raw(path)
    header[PLAIN]["data_offsets"].reverse()
    write_raw(path, header, data)


def entry_a_number(path: Path) -> None:
    header, data = read_raw(path)
    header[PLAIN] = 5
    write_raw(path, header, data)


FILE_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "last byte missing": (cut_data, ("truncated",)),
    "half of it missing": (cut_half, ("truncated",)),
    "cut inside the header": (cut_header, ("truncated",)),
    "cut inside the length": (cut_prefix, ("too short",)),
    "empty": (empty, ("too short",)),
    "header length 2^40": (huge_header, (str(1 << 40),)),
    "header length as long as allowed": (longest_header, ("truncated",)),
    "header is not JSON": (header_not_json, ("not valid JSON",)),
    "header is not text": (header_not_text, ("not valid JSON",)),
    "header is a list": (header_a_list, ("not a JSON object",)),
    "header is nested too deep": (header_too_deep, ("not valid JSON",)),
    "a name occurs twice": (name_twice, ("twice",)),
    "overlapping offsets": (overlap, ("overlaps", "tensor")),
    "offsets out of range": (beyond_the_end, ("tensor", "gap")),
    "offsets far out of range": (far_beyond_the_end, ("truncated",)),
    "gap": (gap, ("gap", "tensor")),
    "bytes after the last tensor": (bytes_after, ("8 bytes follow",)),
    "offsets backwards": (offsets_backwards, (PLAIN, "data_offsets")),
    "negative size": (spec_case(shape=[-24, -64]), (PLAIN, "shape")),
    "shape does not fit": (spec_case(shape=[24, 63]), (PLAIN, "does not fill")),
    "shape is a number": (spec_case(shape=7), (PLAIN, "shape")),
    "unknown dtype": (spec_case(dtype="Q7"), (PLAIN, "Q7")),
    "dtype is a list": (spec_case(dtype=["F32"]), (PLAIN, "dtype")),
    "one offset": (spec_case(data_offsets=[0]), (PLAIN, "data_offsets")),
    "entry is a number": (entry_a_number, (PLAIN,)),
}


@pytest.mark.parametrize("case", FILE_DAMAGE)
def test_damaged_file(model: Path, case: str) -> None:
    damage, says = FILE_DAMAGE[case]
    damage(model / ONE)
    refused(model, says=(str(model / ONE), *says))
    one_line(run("inspect", model), 2, *says)
    one_line(run("repack", model, "--target", "triton", "--dry-run", "--json"), 2, *says)


@pytest.mark.parametrize("case", ["half of it missing", "header length 2^40", "empty"])
def test_damaged_shard_of_several(sharded: Path, case: str) -> None:
    damage, says = FILE_DAMAGE[case]
    name = "model-00002-of-00003.safetensors"
    damage(sharded / name)
    refused(sharded, says=(name, *says))


# --- files and the index -------------------------------------------------------------------------


def change_index(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index["weight_map"])
    (model / INDEX).write_text(json.dumps(index))


def place(name: str, file: Any) -> Callable[[Path], object]:
    return lambda model: change_index(model, lambda weight_map: weight_map.update({name: file}))


def no_index(model: Path) -> None:
    (model / INDEX).unlink()


def no_index_no_shard(model: Path) -> None:
    no_index(model)
    (model / "model-00002-of-00003.safetensors").unlink()


def no_index_odd_shard(model: Path) -> None:
    no_index(model)
    (model / "model-00003-of-00003.safetensors").rename(model / "adapter.safetensors")


def no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()


def shard_lost(model: Path) -> None:
    (model / "model-00002-of-00003.safetensors").unlink()


def shard_dangling(model: Path) -> None:
    shard_lost(model)
    (model / "model-00002-of-00003.safetensors").symlink_to("blobs/none")


def listed_not_held(model: Path) -> None:
    first = "model-00001-of-00003.safetensors"
    place("model.norm.weight", first)(model)


def held_not_listed(model: Path) -> None:
    change_index(model, lambda weight_map: weight_map.pop(PLAIN))


def held_elsewhere(model: Path) -> None:
    change_index(
        model,
        lambda weight_map: weight_map.update(
            {PLAIN: next(file for file in weight_map.values() if file != weight_map[PLAIN])}
        ),
    )


def in_two_shards(model: Path) -> None:
    no_index(model)
    path = model / "model-00001-of-00003.safetensors"
    save_file(load_file(path) | {PLAIN: torch.zeros(2)}, path)
    path = model / "model-00002-of-00003.safetensors"
    save_file(load_file(path) | {PLAIN: torch.zeros(2)}, path)


def index_text(text: str) -> Callable[[Path], object]:
    return lambda model: (model / INDEX).write_text(text)


SET_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a shard is missing": (shard_lost, (INDEX, "model-00002-of-00003.safetensors")),
    "a shard is a dangling link": (shard_dangling, ("model-00002-of-00003.safetensors",)),
    "a shard is missing, no index": (
        no_index_no_shard,
        ("model-00002-of-00003.safetensors is missing",),
    ),
    "files of two kinds, no index": (no_index_odd_shard, ("adapter.safetensors", INDEX)),
    "no weights": (no_weights, ("no safetensors files",)),
    "index names a missing file": (
        place(PLAIN, "model-00009-of-00003.safetensors"),
        (INDEX, "model-00009-of-00003.safetensors"),
    ),
    "index leaves the directory": (place(PLAIN, "../x.safetensors"), (INDEX, PLAIN, "outside")),
    "index leaves it in the middle": (
        place(PLAIN, "a/../../x.safetensors"),
        (INDEX, PLAIN, "outside"),
    ),
    "index has an absolute path": (place(PLAIN, "/tmp/x.safetensors"), (INDEX, PLAIN, "outside")),
    "index names another kind of file": (place(PLAIN, "config.json"), (INDEX, PLAIN)),
    "index names a number": (place(PLAIN, 3), (INDEX, PLAIN)),
    "index lists what no shard holds": (listed_not_held, (INDEX, "model.norm.weight")),
    "a shard holds what the index does not list": (held_not_listed, (PLAIN, "does not list")),
    "index places a tensor in another shard": (held_elsewhere, (PLAIN, "places in")),
    "a tensor is in two shards": (in_two_shards, (PLAIN, "is also in")),
    "half an index": (index_text('{"weight_map": {"a": "mod'), (INDEX, "not valid JSON")),
    "index without a map": (index_text("{}"), (INDEX, "weight_map")),
    "index is a list": (index_text("[]"), (INDEX, "not a JSON object")),
}


@pytest.mark.parametrize("case", SET_DAMAGE)
def test_damaged_set_of_files(sharded: Path, case: str) -> None:
    (sharded.parent / "x.safetensors").write_bytes(
        (sharded / ONE.replace(".", "-00001-of-00003.")).read_bytes()
    )
    damage, says = SET_DAMAGE[case]
    damage(sharded)
    refused(sharded, says=says)


# --- config.json ---------------------------------------------------------------------------------


def change_config(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def quantization(**fields: Any) -> Callable[[Path], object]:
    return lambda model: change_config(
        model, lambda config: config["quantization_config"].update(fields)
    )


def in_group(**fields: Any) -> Callable[[Path], object]:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"].update(fields)

    return lambda model: change_config(model, change)


def in_weights(**fields: Any) -> Callable[[Path], object]:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(fields)

    return lambda model: change_config(model, change)


def half_config(model: Path) -> None:
    os.truncate(model / "config.json", (model / "config.json").stat().st_size // 2)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_text(text: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").write_text(text)


def method(name: str) -> Callable[[Path], object]:
    return lambda model: change_config(
        model, lambda config: config.update(quantization_config={"quant_method": name, "bits": 4})
    )


BAD = "re:model[.(layers"
ROTATED = {"config_groups": {"R1": {"type": "hadamard", "apply": [5]}}}

CONFIG_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "half of it": (half_config, ("not valid JSON",)),
    "none": (no_config, ("no config.json",)),
    "empty": (config_text(""), ("not valid JSON",)),
    "a list": (config_text("[1, 2]"), ("not a JSON object",)),
    "not text": (
        lambda model: (model / "config.json").write_bytes(b"\xff\xfe{}"),
        ("not valid JSON",),
    ),
    "no quantization_config": (
        lambda model: change_config(model, lambda config: config.pop("quantization_config")),
        ("no quantization_config", "llm-compressor"),
    ),
    "quantization_config is a list": (
        lambda model: change_config(model, lambda config: config.update(quantization_config=[1])),
        ("quantization_config is not an object",),
    ),
    "no quant_method": (
        lambda model: change_config(
            model, lambda config: config.update(quantization_config={"bits": 4})
        ),
        ("quant_method",),
    ),
    "gptq": (method("gptq"), ("'gptq'", "vLLM", "GPTQModel")),
    "awq": (method("awq"), ("'awq'", "AutoAWQ converter")),
    "bitsandbytes": (method("bitsandbytes"), ("'bitsandbytes'", "transformers")),
    "fp8": (method("fp8"), ("'fp8'", "convert_checkpoint")),
    "modelopt": (method("modelopt"), ("'modelopt'", "ModelOpt")),
    "torchao": (method("torchao"), ("'torchao'", "load it with torchao")),
    "already converted": (method("ctconvert"), ("'ctconvert'", "ctconvert verify")),
    "a method nobody knows": (method("zipquant"), ("'zipquant'", "the tool that made it")),
    "no groups": (quantization(config_groups={}), ("config_groups",)),
    "groups are a list": (quantization(config_groups=[1]), ("config_groups",)),
    "a group is a number": (quantization(config_groups={"group_0": 5}), ("group_0",)),
    "unknown preset": (quantization(config_groups={"W9A9": ["Linear"]}), ("W9A9",)),
    "unknown format": (quantization(format="zip-quantized"), ("'zip-quantized'", "pack-quantized")),
    "unknown format of a group": (
        in_group(format="zip-quantized"),
        ("group_0.format", "'zip-quantized'", "pack-quantized"),
    ),
    "format is a list": (quantization(format=["pack-quantized"]), ("format",)),
    "format of a group is an object": (in_group(format={"a": 1}), ("group_0.format",)),
    "no format": (
        lambda model: (quantization(format=None)(model), in_group(format=None)(model)),
        ("format",),
    ),
    "unknown sparsity format": (
        quantization(sparsity_config={"format": "zip-sparse", "targets": ["Linear"]}),
        ("sparsity_config.format", "'zip-sparse'"),
    ),
    "unknown field in a group": (in_group(flavour=3), ("group_0.flavour",)),
    "unknown field in a scheme": (in_weights(flavour=3), ("group_0.weights.flavour",)),
    "bits are a word": (in_weights(num_bits="four"), ("group_0.weights.num_bits",)),
    "group size is a word": (in_weights(group_size="big"), ("group_0",)),
    "group size zero": (in_weights(group_size=0), ("group_0",)),
    "bad regular expression in targets": (in_group(targets=[BAD]), ("group_0.targets", BAD)),
    "bad regular expression in ignore": (quantization(ignore=[BAD]), ("ignore", BAD)),
    "targets are a number": (in_group(targets=7), ("group_0.targets",)),
    "ignore is a word": (quantization(ignore="lm_head"), ("ignore", "list of names")),
    "transforms are a word": (quantization(transform_config="hadamard"), ("transform_config",)),
    "a transform is a number": (quantization(transform_config=ROTATED), ("transform_config",)),
    "bits the format does not store": (in_weights(num_bits=16), (f"module {DOWN}", "int16")),
    "group size that does not divide K": (
        in_weights(group_size=40),
        (f"module {DOWN}", "40", "96", "does not divide"),
    ),
    "group size the scales contradict": (
        in_weights(group_size=16),
        (f"module {DOWN}", "weight_scale"),
    ),
    "act-order without weight_g_idx": (
        in_weights(actorder="group"),
        (f"module {DOWN}", "weight_g_idx"),
    ),
    "packed, but in ignore": (quantization(ignore=[DOWN]), (f"module {DOWN}", "contradict")),
    "packed, but ignored by a pattern": (
        quantization(ignore=[r"re:.*down_proj$"]),
        (f"module {DOWN}", "contradict"),
    ),
    "packed, but no target means it": (
        in_group(targets=["re:.*q_proj", "re:.*up_proj"]),
        (f"module {DOWN}", "contradict"),
    ),
    "packed, but the config says int-quantized": (
        in_group(format="int-quantized"),
        (f"module {DOWN}", "weight_packed"),
    ),
    "activation scales the config asks for": (
        in_group(input_activations=STATIC_INT8),
        (f"module {DOWN}", "input_scale is missing"),
    ),
}


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_damaged_config(model: Path, case: str) -> None:
    damage, says = CONFIG_DAMAGE[case]
    damage(model)
    where = () if any(text.startswith("module") for text in says) else (str(model),)
    refused(model, says=(*where, *says))
    one_line(run("inspect", model), 2, *says)


def test_no_value_in_the_config_ends_in_a_traceback(
    model: Path, sound: dict[str, torch.Tensor]
) -> None:
    """Every place of a config in turn holds what does not belong there; CtconvertError or success.

    (:func:`run` raises whatever else comes out.)
    """
    more: dict[str, Any] = {
        "sparsity_config": {"format": "dense", "targets": [], "ignore": []},
        "transform_config": {
            "config_groups": {"R": {"type": "hadamard", "apply": [{"targets": ["Foo"]}]}}
        },
        "kv_cache_scheme": None,
    }
    write_checkpoint(model, sound, config_of(GROUP, **more), tie_word_embeddings=False)
    path = model / "config.json"
    base = json.loads(path.read_text())
    values = [None, 5, -1, 1e30, "x", "\ud800", "re:(", [], [5], [["x"]], {}, {"format": 5}, True]

    def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        if at:
            yield at
        inside = enumerate(value) if isinstance(value, list) else ()
        for key, inner in value.items() if isinstance(value, dict) else inside:
            yield from places(inner, (*at, key))

    tried = 0
    for at in places(base):
        for wrong in values:
            config = copy.deepcopy(base)
            inner = config
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = wrong
            path.write_text(json.dumps(config))
            outcome = run("inspect", model, "--target", "triton")
            tried += 1
            if outcome.code:
                one_line(outcome, 2)
    assert tried > 300


# --- tensors -------------------------------------------------------------------------------------


def edit(model: Path, **tensors: torch.Tensor | None) -> None:
    """Replaces tensors of ``UP`` by local name; None removes one."""
    made = load_file(model / ONE)
    for local, tensor in tensors.items():
        made.pop(f"{UP}.{local}", None)
        if tensor is not None:
            made[f"{UP}.{local}"] = tensor.contiguous()
    save_file(made, model / ONE, metadata={"format": "pt"})


def with_value(name: str, at: tuple[int, ...], value: float) -> Callable[[Path], object]:
    def change(model: Path) -> None:
        tensor = load_file(model / ONE)[f"{UP}.{name}"].clone()
        tensor[at] = value
        edit(model, **{name: tensor})

    return change


def replaced(**tensors: torch.Tensor | None) -> Callable[[Path], object]:
    return lambda model: edit(model, **tensors)


BF16, F32 = torch.bfloat16, torch.float32

#: UP is [96, 64], int4, group size 32: weight_packed [96, 8], weight_scale [96, 2].
TENSOR_DAMAGE: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing scale": (replaced(weight_scale=None), ("weight_scale is missing",)),
    "missing weight_packed": (replaced(weight_packed=None), ("weight_packed",)),
    "missing weight_shape": (replaced(weight_shape=None), ("weight_shape is missing",)),
    "scale of a wrong shape": (
        replaced(weight_scale=torch.ones(96, 3, dtype=BF16)),
        ("weight_scale", "[96, 3]", "[96, 2]"),
    ),
    "scale transposed": (
        replaced(weight_scale=torch.ones(2, 96, dtype=BF16)),
        ("weight_scale", "[2, 96]", "[96, 2]"),
    ),
    "scale of too few rows": (
        replaced(weight_scale=torch.ones(95, 2, dtype=BF16)),
        ("weight_scale", "[95, 2]"),
    ),
    "scale is an integer": (
        replaced(weight_scale=torch.ones(96, 2, dtype=torch.int32)),
        ("weight_scale", "I32"),
    ),
    "NaN scale": (
        with_value("weight_scale", (70, 1), float("nan")),
        ("weight_scale[70, 1]", "nan"),
    ),
    "infinite scale": (
        with_value("weight_scale", (3, 0), float("inf")),
        ("weight_scale[3, 0]", "inf"),
    ),
    "minus infinite scale": (
        with_value("weight_scale", (95, 1), float("-inf")),
        ("weight_scale[95, 1]", "-inf"),
    ),
    "weight_shape of other rows": (
        replaced(weight_shape=torch.tensor([95, 64])),
        ("weight_shape", "[95, 64]", "[96, 8]"),
    ),
    "weight_shape of another K": (
        replaced(weight_shape=torch.tensor([96, 128])),
        ("weight_shape", "128", "8 words"),
    ),
    "weight_shape transposed": (
        replaced(weight_shape=torch.tensor([64, 96])),
        ("weight_shape", "[64, 96]"),
    ),
    "weight_shape negative": (
        replaced(weight_shape=torch.tensor([96, -64])),
        ("weight_shape", "-64"),
    ),
    "weight_shape enormous": (
        replaced(weight_shape=torch.tensor([96, 1 << 62])),
        ("weight_shape", str(1 << 62)),
    ),
    "weight_shape of three numbers": (
        replaced(weight_shape=torch.tensor([1, 96, 64])),
        ("weight_shape", "[3]"),
    ),
    "weight_shape is a float": (
        replaced(weight_shape=torch.tensor([96.0, 64.0])),
        ("weight_shape", "F32"),
    ),
    "weight_shape is a truth value": (
        replaced(weight_shape=torch.tensor([True, False])),
        ("weight_shape", "BOOL"),
    ),
    "packed as i64": (
        replaced(weight_packed=torch.zeros(96, 8, dtype=torch.int64)),
        ("weight_packed", "I64", "I32"),
    ),
    "packed as u8": (
        replaced(weight_packed=torch.zeros(96, 32, dtype=torch.uint8)),
        ("weight_packed", "U8", "I32"),
    ),
    "packed as one dimension": (
        replaced(weight_packed=torch.zeros(768, dtype=torch.int32)),
        ("weight_packed", "[768]"),
    ),
    "packed of too few words": (
        replaced(weight_packed=torch.zeros(96, 7, dtype=torch.int32)),
        ("weight_packed", "7 words"),
    ),
    "dense, but the config says packed": (
        replaced(
            weight_packed=None,
            weight_scale=None,
            weight_shape=None,
            weight=torch.zeros(96, 64, dtype=BF16),
        ),
        ("pack-quantized", "dense", "ignore"),
    ),
}


@pytest.mark.parametrize("case", TENSOR_DAMAGE)
def test_damaged_tensor(model: Path, case: str) -> None:
    damage, says = TENSOR_DAMAGE[case]
    damage(model)
    refused(model, says=(f"module {UP}", *says))


@pytest.mark.parametrize("case", ["NaN scale", "missing scale"])
def test_damage_with_overwrite_leaves_the_old_output(
    model: Path, tmp_path: Path, case: str
) -> None:
    out = tmp_path / "out"
    assert run("repack", model, out, "--target", "triton").code == 0
    before = tree(out)
    TENSOR_DAMAGE[case][0](model)
    one_line(run("repack", model, out, "--target", "triton", "--overwrite"), 2, f"module {UP}")
    assert tree(out) == before and not (tmp_path / "out.partial").exists()
    assert run("verify", out).code == 0


def int_model(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """An int-quantized checkpoint of one 4-bit asymmetric module."""
    group = group_config(weight_args(4, 32, symmetric=False), format="int-quantized")
    tensors = tensors_of(group, (UP, 96, 64))
    change(tensors)
    return write_checkpoint(folder, tensors, config_of(group))


@pytest.mark.parametrize("value", [9, 8, -9, 127, -128])
def test_code_out_of_range(tmp_path: Path, value: int) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight"][70, 41] = value

    model = int_model(tmp_path / "model", change)
    refused(model, says=(f"module {UP}", "weight[70, 41]", f" {value},", "4-bit"))


@pytest.mark.parametrize("value", [9, 8, -9, 127])
def test_zero_point_out_of_range(tmp_path: Path, value: int) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{UP}.weight_zero_point"][70, 1] = value

    model = int_model(tmp_path / "model", change)
    refused(model, says=(f"module {UP}",))


@pytest.mark.parametrize(
    "value",
    [torch.tensor([float("nan")]), torch.tensor([float("inf")]), torch.tensor([-0.5])],
    ids=["nan", "inf", "negative"],
)
def test_activation_scale_that_is_none(tmp_path: Path, value: torch.Tensor) -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8)
    tensors = tensors_of(group, (UP, 96, 64)) | {f"{UP}.input_scale": value.to(BF16)}
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    refused(model, says=(f"module {UP}", "input_scale"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_zero_point_that_is_none(tmp_path: Path, value: float) -> None:
    group = group_config(weight_args(4, 32), inputs=STATIC_INT8 | {"symmetric": False})
    tensors = tensors_of(group, (UP, 96, 64)) | {f"{UP}.input_zero_point": torch.tensor([value])}
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    refused(model, says=(f"module {UP}", "input_zero_point"))


def test_names_that_clash(model: Path) -> None:
    edit(model, qweight=torch.zeros(4))
    assert run("repack", model, model.parent / "out", "--target", "triton").code == 3
    made = load_file(model / ONE)
    del made[f"{UP}.qweight"]
    save_file(made | {f"{UP}.qweight.x": torch.zeros(1)}, model / ONE)  # no clash, no fault
    assert run("repack", model, model.parent / "out", "--target", "triton").code == 0


def test_odd_characters_from_the_source_stay_on_one_line(
    model: Path, sound: dict[str, torch.Tensor]
) -> None:
    name = "evil\nerror: all is well\x1b[2J"
    tensors = {key: tensor for key, tensor in sound.items() if not key.startswith(UP)}
    tensors |= {f"{name}.weight_packed": torch.zeros(8, 8, dtype=torch.int32)}
    save_file(tensors, model / ONE)
    refused(model, says=("evil", "weight_s"))
    assert "\x1b" not in run("inspect", model).stderr


def test_a_config_with_lone_surrogates_converts(model: Path, tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot; it is carried over all the same."""
    change_config(model, lambda config: config.update(note="\ud800", eos="</s>\u2581é"))
    assert run("repack", model, tmp_path / "out", "--target", "triton").code == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["note"] == "\ud800" and made["eos"] == "</s>\u2581é"
    assert run("verify", tmp_path / "out", "--against", model).code == 0


@pytest.mark.parametrize("architectures", [5, "Llama", [5, None], {"a": 1}, ["\ud800"]])
def test_inspect_with_odd_architectures(model: Path, architectures: Any) -> None:
    change_config(model, lambda config: config.update(architectures=architectures))
    assert run("inspect", model).code == 0
    assert json.loads(run("inspect", model, "--json").stdout)["architectures"] == architectures


# --- the command line ----------------------------------------------------------------------------


def test_source_missing(tmp_path: Path) -> None:
    one_line(run("repack", tmp_path / "none", "--target", "triton"), 2, str(tmp_path / "none"))
    one_line(run("inspect", tmp_path / "none"), 2, str(tmp_path / "none"))
    one_line(run("inspect", "./none"), 2, "./none")
    assert list(tmp_path.iterdir()) == []


def test_source_is_a_file(model: Path) -> None:
    one_line(run("repack", model / ONE, "--target", "triton"), 2, str(model / ONE), "is a file")
    one_line(run("inspect", model / "config.json"), 2, "is a file")


def test_output_exists(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    one_line(run("repack", model, out, "--target", "triton"), 2, str(out), "--overwrite")
    assert (out / "precious.txt").read_text() == "mine"


def test_resume_is_no_leave_to_replace_an_output(model: Path, tmp_path: Path) -> None:
    """Only the output of this very conversion is taken as done; anything else is kept."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    one_line(run("repack", model, out, "--target", "triton", "--resume"), 2, str(out))
    assert tree(out).keys() == {"precious.txt"} and not (tmp_path / "out.partial").exists()


def test_output_is_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    one_line(run("repack", model, tmp_path / "out", "--target", "triton"), 2, "exists")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_output_directory_is_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run("repack", model, tmp_path / "out", "--target", "triton").code == 0
    assert run("verify", tmp_path / "out").code == 0


def test_the_current_directory_as_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be replaced under the feet of the user's shell."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path / "out", "../out", "../out/."):
        one_line(run("repack", model, out, "--target", "triton"), 2, "the current directory")
    one_line(run("repack", model, "..", "--target", "triton"), 2, "source")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_linked_output_directory(model: Path, tmp_path: Path) -> None:
    """The checkpoint appears where the link leads, and the link stays."""
    (tmp_path / "disk").mkdir()
    for name, target in (("empty", tmp_path / "disk"), ("dangling", tmp_path / "later")):
        link = tmp_path / name
        link.symlink_to(target)
        assert run("repack", model, link, "--target", "triton").code == 0
        assert link.is_symlink() and (target / "ctconvert.json").is_file()
        assert run("verify", link).code == 0


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
@pytest.mark.parametrize("how", ["equal", "inside", "deep inside", "around", "far around"])
def test_output_that_overlaps_the_source(
    tmp_path: Path, sound: dict[str, torch.Tensor], how: str, flag: tuple[str, ...]
) -> None:
    model = write_checkpoint(tmp_path / "a" / "b" / "model", sound, config_of(GROUP))
    out = {
        "equal": model,
        "inside": model / "out",
        "deep inside": model / "x" / "y",
        "around": tmp_path / "a" / "b",
        "far around": tmp_path / "a",
    }[how]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a", target_is_directory=True)
    before = tree(tmp_path)
    for place_ in (out, link / out.relative_to(tmp_path / "a"), out / ".." / out.name):
        one_line(run("repack", model, place_, "--target", "triton", *flag), 2, "source")
    linked = link / "b" / "model"
    one_line(run("repack", linked, out, "--target", "triton", *flag), 2, "source")
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
def test_a_source_named_like_the_partial_output(
    tmp_path: Path, sound: dict[str, torch.Tensor], flag: tuple[str, ...]
) -> None:
    """The partial output lies under OUT.partial, which must not be the source either."""
    model = write_checkpoint(tmp_path / "out.partial", sound, config_of(GROUP))
    before = tree(tmp_path)
    one_line(run("repack", model, tmp_path / "out", "--target", "triton", *flag), 2, "source")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("flag", [(), ("--overwrite",), ("--resume",)])
def test_a_foreign_directory_where_the_partial_output_belongs(
    model: Path, tmp_path: Path, flag: tuple[str, ...]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("mine")
    outcome = run("repack", model, tmp_path / "out", "--target", "triton", *flag)
    one_line(outcome, 2, str(tmp_path / "out.partial"))
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_default_output_lies_beside_the_source(model: Path, tmp_path: Path) -> None:
    assert run("repack", model, "--target", "triton").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-triton"]


USAGE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "unknown target": (("--target", "tpu"), ("'tpu'", "triton, cuda, xpu")),
    "unknown layout": (("--layout", "*=none"), ("*=none", "triton-wna16")),
    "layout without a pattern": (("--layout", "triton-wna16"), ("PATTERN=LAYOUT",)),
    "layout for a bad pattern": (("--layout", "re:(=triton-wna16"), ("re:(",)),
    "shard size of no unit": (("--max-shard-size", "5 parsecs"), ("5 parsecs",)),
    "shard size nought": (("--max-shard-size", "0"), ("0",)),
    "shard size negative": (("--max-shard-size=-5GB",), ("-5GB",)),
    "no shard size": (("--max-shard-size", ""), ("5GB",)),
    "device that is not there": (("--device", "cuda:9"), ("cuda:9",)),
    "unknown device": (("--device", "abacus"), ("abacus", "cpu")),
    "device of no number": (("--device", "cuda:x"), ("cuda:x",)),
    "no workers": (("--workers", "0"), ("--workers 0",)),
    "fewer than no workers": (("--workers=-1",), ("--workers -1",)),
    "resume and overwrite": (("--resume", "--overwrite"), ("--resume", "--overwrite")),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage(model: Path, case: str) -> None:
    options, says = USAGE[case]
    refused(model, *options, says=says)


def test_bad_usage_of_verify(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("repack", model, out, "--target", "triton").code == 0
    one_line(run("verify", tmp_path / "none"), 2, str(tmp_path / "none"))
    one_line(run("verify", out, "--workers", "0"), 2, "--workers 0")
    one_line(run("verify", out, "--against", tmp_path / "none"), 2, str(tmp_path / "none"))
    one_line(run("verify", model), 1, "ctconvert.json")


# --- what the target cannot take -----------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two int3 modules beside an int4 one."""
    three = group_config(weight_args(3, 32), targets=["re:.*mlp.*"])
    tensors = tensors_of(GROUP, (Q, 48, 64)) | tensors_of(three, (UP, 96, 64), (DOWN, 64, 96))
    return write_checkpoint(tmp_path / "model", tensors, config_of(three, GROUP))


def test_unsupported_modules_are_all_listed(mixed: Path, tmp_path: Path) -> None:
    before = tree(mixed)
    for more in ((), ("--json",), ("--no-verify", "--overwrite")):
        outcome = run("repack", mixed, tmp_path / "out", "--target", "triton", *more)
        assert outcome.code == 3 and outcome.stdout == ""
        first, *refusals = outcome.stderr.splitlines()
        assert first.startswith("error: ") and "2 modules" in first and "nothing" in first
        assert "--keep-unsupported" in first
        assert len(refusals) == 2 and all("3-bit" in line for line in refusals)
        assert any(UP in line for line in refusals) and any(DOWN in line for line in refusals)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert tree(mixed) == before


def test_unsupported_modules_show_in_a_dry_run(mixed: Path, tmp_path: Path) -> None:
    outcome = run("repack", mixed, "--target", "triton", "--dry-run")
    assert outcome.code == 3 and UP in outcome.stderr and DOWN in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_keep_unsupported_copies_them_unchanged(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run("repack", mixed, out, "--target", "triton", "--keep-unsupported")
    assert outcome.code == 0
    assert UP in outcome.stdout and DOWN in outcome.stdout and "3-bit" in outcome.stdout
    source, made = load_file(mixed / ONE), load_file(out / ONE)
    kept = {name for name in source if name.startswith((UP, DOWN)) or name == PLAIN}
    assert made.keys() == kept | {f"{Q}.qweight", f"{Q}.scales"}
    for name in kept:
        assert made[name].dtype == source[name].dtype and torch.equal(made[name], source[name])
    manifest = json.loads((out / "ctconvert.json").read_text())
    assert manifest["kept"].keys() == {UP, DOWN} and "3-bit" in manifest["kept"][UP]
    config = json.loads((out / "config.json").read_text())
    assert sorted(config["quantization_config"]["unconverted"]) == sorted([UP, DOWN])
    assert run("verify", out, "--against", mixed).code == 0


def test_keep_unsupported_is_no_cover_for_damage(mixed: Path) -> None:
    edit(mixed, weight_scale=None)
    refused(mixed, "--keep-unsupported", says=(f"module {UP}", "weight_scale is missing"))


# --- verify --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT, of several shards, beside its source ``model``; tests put back what they change."""
    folder = tmp_path_factory.mktemp("converted")
    write_checkpoint(folder / "model", small(), config_of(GROUP), shards=2)
    out = folder / "out"
    options = ("--target", "triton", "--max-shard-size", "6kB")
    assert run("repack", folder / "model", out, *options).code == 0
    assert len(list(out.glob("*.safetensors"))) >= 3
    return out


def flips(out: Path) -> Iterator[tuple[Path, int, str]]:
    """(file, byte, tensor or '') to flip a bit in: every kind of byte an output has."""
    chosen = random.Random(5)
    for path in sorted(out.iterdir()):
        size = path.stat().st_size
        if path.suffix != ".safetensors":
            for position in {0, size - 1, *(chosen.randrange(size) for _ in range(6))}:
                yield path, position, ""
            continue
        header, data = read_raw(path)
        start = size - len(data)
        for position in range(8):  # the length prefix
            yield path, position, ""
        for _ in range(4):
            yield path, chosen.randrange(8, start), ""
        yield path, start - 1, ""  # its padding, where it has any
        for name in in_order(header):
            begin, end = (start + offset for offset in header[name]["data_offsets"])
            for position in (begin, end - 1, chosen.randrange(begin, end)):
                yield path, position, name


def test_a_flipped_bit_fails_and_names_its_tensor(converted: Path) -> None:
    before = tree(converted)
    chosen = random.Random(6)
    kinds: set[str] = set()
    tried = padding = 0
    for path, position, tensor in flips(converted):
        data = bytearray(path.read_bytes())
        padding += not tensor and path.suffix == ".safetensors" and data[position] == ord(" ")
        data[position] ^= 1 << chosen.randrange(8)
        sound = path.read_bytes()
        path.write_bytes(data)
        try:
            outcome = run("verify", converted)
            one_line(outcome, 1, f"tensor {tensor} " if tensor else path.name, path.name)
        finally:
            path.write_bytes(sound)
        tried += 1
        kinds.add(tensor or path.name)
    assert tried >= 60 and padding > 0
    assert {"config.json", "ctconvert.json", INDEX, "tokenizer.json", PLAIN} <= kinds
    assert tree(converted) == before and run("verify", converted).code == 0


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "model-00002-of-*"])
def test_a_missing_or_cut_file_fails(converted: Path, name: str) -> None:
    (path,) = converted.glob(name)
    name = path.name
    data = path.read_bytes()
    try:
        path.unlink()
        one_line(run("verify", converted), 1, name, "missing")
        path.write_bytes(data[:-1])
        one_line(run("verify", converted), 1, name)
        path.write_bytes(data + b"\0")
        one_line(run("verify", converted), 1, name)
        path.write_bytes(b"")
        one_line(run("verify", converted), 1, name)
    finally:
        path.write_bytes(data)
    assert run("verify", converted).code == 0


def test_a_missing_or_cut_manifest_fails(converted: Path) -> None:
    path = converted / "ctconvert.json"
    data = path.read_bytes()
    later = data.replace(b'"format_version": 1', b'"format_version": 2')
    later = later.replace(
        json.loads(later)["manifest_sha256"].encode(),
        hashlib.sha256(later.replace(json.loads(later)["manifest_sha256"].encode(), b"0" * 64))
        .hexdigest()
        .encode(),
    )
    try:
        path.unlink()
        one_line(run("verify", converted), 1, "ctconvert.json", "no complete")
        for text in (data[: len(data) // 2], b"", b"[]", b"{}", b"5"):
            path.write_bytes(text)
            one_line(run("verify", converted), 1, "ctconvert.json", "damaged")
        path.write_bytes(later)
        one_line(run("verify", converted), 1, "ctconvert.json", "format_version 2")
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["model-00009-of-00009.safetensors", "adapter.safetensors"])
def test_a_stray_shard_fails(converted: Path, name: str) -> None:
    save_file({"x": torch.zeros(2)}, converted / name)
    try:
        one_line(run("verify", converted), 1, name, "not part")
    finally:
        (converted / name).unlink()


def test_verify_does_not_read_a_shard_for_a_damaged_header_length(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard may be larger than memory; a header never is."""
    from ctconvert.checkpoint import source

    monkeypatch.setattr("ctconvert.checkpoint.header.MAX_HEADER", 2000)
    monkeypatch.setattr("ctconvert.verification.MAX_HEADER", 2000, raising=False)
    asked: list[int | None] = []
    read = source.LocalFiles.read

    def watched(self: Any, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name.endswith(".safetensors"):
            asked.append(length)
        return read(self, name, offset, length)

    monkeypatch.setattr(source.LocalFiles, "read", watched)
    path = max(converted.glob("*.safetensors"), key=lambda item: item.stat().st_size)
    data = path.read_bytes()
    assert len(data) > 4000
    path.write_bytes(b"\xff" * 8 + data[8:])
    try:
        one_line(run("verify", converted), 1, path.name)
    finally:
        path.write_bytes(data)
    assert asked and all(length is not None and length <= 2008 for length in asked)


def other_source(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any
) -> Path:
    tensors = small()
    change(tensors)
    return write_checkpoint(folder / "other", tensors, config_of(GROUP), **config)


def flip(name: str, at: tuple[int, int], bit: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        width = tensors[name].element_size() * 8
        view = tensors[name].view({16: torch.int16, 32: torch.int32}[width])
        value = int(view[at]) ^ (1 << bit)
        sign = 1 << (width - 1)
        view[at] = ((value & (2 * sign - 1)) ^ sign) - sign

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flip(f"{DOWN}.weight_packed", (63, 11), 31), (f"module {DOWN}", "codes")),
        (flip(f"{UP}.weight_packed", (0, 0), 0), (f"module {UP}", "codes")),
        (flip(f"{Q}.weight_scale", (47, 1), 0), (f"module {Q}", "scale")),
        (flip(PLAIN, (23, 63), 0), (f"tensor {PLAIN}",)),
        (lambda tensors: tensors[f"{Q}.bias"].add_(1), (f"tensor {Q}.bias",)),
        (lambda tensors: tensors.update({PLAIN: torch.zeros(64, 24)}), (PLAIN,)),
        (lambda tensors: tensors.pop(PLAIN), (PLAIN,)),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), ("model.norm",)),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith(UP)],
            (UP,),
        ),
    ],
    ids=[
        "last code",
        "first code",
        "scale",
        "plain tensor",
        "bias",
        "plain tensor transposed",
        "plain tensor missing",
        "one tensor more",
        "module missing",
    ],
)
def test_verify_against_another_source(
    converted: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    says: tuple[str, ...],
) -> None:
    other = other_source(tmp_path, change)
    assert run("verify", converted).code == 0
    one_line(run("verify", converted, "--against", other), 1, *says)


def test_verify_against_a_source_without_its_zero_points(tmp_path: Path) -> None:
    """The same codes and scales, but symmetric: what the weights mean has changed."""
    group = group_config(weight_args(4, 32, symmetric=False))
    tensors = tensors_of(group, (UP, 96, 64))
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    out = tmp_path / "out"
    assert run("repack", model, out, "--target", "triton").code == 0
    del tensors[f"{UP}.weight_zero_point"]
    other = write_checkpoint(tmp_path / "other", tensors, config_of(GROUP))
    one_line(run("verify", out, "--against", other), 1, UP)


def test_verify_against_catches_what_the_hashes_cannot(converted: Path, tmp_path: Path) -> None:
    """A code changed in OUT with the manifest made to match: only the source can tell."""
    names = [path for path in converted.glob("*.safetensors") if f"{UP}.qweight" in load_file(path)]
    path, manifest_path = names[0], converted / "ctconvert.json"
    sound, sound_manifest = path.read_bytes(), manifest_path.read_bytes()
    header, data = read_raw(path)
    begin, end = header[f"{UP}.qweight"]["data_offsets"]
    changed = bytearray(data)
    changed[begin + 5] ^= 16
    manifest = json.loads(sound_manifest)
    manifest["modules"][UP]["tensors"][f"{UP}.qweight"]["sha256"] = hashlib.sha256(
        changed[begin:end]
    ).hexdigest()
    from ctconvert.checkpoint.manifest import dump

    try:
        path.write_bytes(sound[: len(sound) - len(data)] + changed)
        manifest_path.write_bytes(dump(manifest))
        assert run("verify", converted).code == 0
        outcome = run("verify", converted, "--against", converted.parent / "model")
        one_line(outcome, 1, f"module {UP}", "codes")
    finally:
        path.write_bytes(sound)
        manifest_path.write_bytes(sound_manifest)
    assert run("verify", converted, "--against", converted.parent / "model").code == 0


def test_json_on_stdout_only_when_it_succeeds(converted: Path, tmp_path: Path) -> None:
    outcome = run("verify", converted, "--json", "--against", converted.parent / "model")
    assert outcome.code == 0 and json.loads(outcome.stdout)["ok"] is True
    assert outcome.stderr == ""
    one_line(run("verify", tmp_path, "--json"), 1, "ctconvert.json")
    one_line(run("inspect", tmp_path, "--json"), 2, "config.json")
