"""A checkpoint that is wrong, at the command line: one line, an exit code, nothing on stdout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from support.builders import config_of, group_config, weight_args, write_checkpoint
from support.cli import Outcome, run
from support.damage import DOWN, GROUP, INDEX, ONE, UP, Q, edit, small, tensors_of
from support.models import tree

from ctconvert.records import Failure

OPTIONS = ("--target", "triton", "--device", "cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", small(), config_of(GROUP))


def one_line(outcome: Outcome, code: int, *says: str, json: bool = False) -> None:
    """A failure; a phase that was finished before may have a line of its own."""
    assert outcome.code == code and outcome.stderr.endswith("\n")
    assert is_failure(outcome) if json else outcome.stdout == ""
    *before, line = outcome.stderr.splitlines()
    assert all(re.fullmatch(r"(converting|verifying): .* in .* s", item) for item in before)
    assert line.startswith("error: ")
    for text in says:
        assert text in line, f"{text!r} is not in {line!r}"


def is_failure(outcome: Outcome) -> bool:
    """Whether stdout is the document of a failure."""
    return msgspec.json.decode(outcome.stdout, type=Failure).exit_code == outcome.code


def test_a_sound_checkpoint(model: Path, tmp_path: Path) -> None:
    """Otherwise the failures below might have another cause."""
    outcome = run("repack", model, tmp_path / "out", *OPTIONS, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["modules"] == 3
    outcome = run("verify", tmp_path / "out", "--against", model, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["against"]["modules"] == 3


def test_bad_input_is_2(model: Path, tmp_path: Path) -> None:
    edit(model, UP, weight_scale=None)
    before = tree(model)
    for more in ((), ("--json",), ("--dry-run",), ("--keep-unsupported",)):
        outcome = run("repack", model, tmp_path / "out", *OPTIONS, *more)
        one_line(outcome, 2, f"module {UP}", json="--json" in more)
    one_line(run("inspect", model, "--json"), 2, f"module {UP}", json=True)
    assert tree(model) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_target_cannot_take_is_3(tmp_path: Path) -> None:
    three = group_config(weight_args(3, 32), targets=["re:.*mlp.*"])
    tensors = tensors_of(GROUP, (Q, 48, 64)) | tensors_of(three, (UP, 96, 64), (DOWN, 64, 96))
    model = write_checkpoint(tmp_path / "model", tensors, config_of(three, GROUP))
    for more in ((), ("--json",), ("--no-verify", "--overwrite")):
        outcome = run("repack", model, tmp_path / "out", *OPTIONS, *more)
        assert outcome.code == 3
        assert is_failure(outcome) if "--json" in more else outcome.stdout == ""
        first, *refusals = outcome.stderr.splitlines()
        assert first.startswith("error: ") and "2 modules" in first and "nothing" in first
        assert [line.split()[0] for line in refusals] == [DOWN, UP]
    outcome = run("repack", model, *OPTIONS, "--dry-run")
    assert outcome.code == 3 and UP in outcome.stderr and DOWN in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    outcome = run("repack", model, tmp_path / "out", *OPTIONS, "--keep-unsupported")
    assert outcome.code == 0
    assert UP in outcome.stdout and DOWN in outcome.stdout and "3-bit" in outcome.stdout


def test_a_damaged_output_is_1(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("repack", model, out, *OPTIONS).code == 0
    data = bytearray((out / ONE).read_bytes())
    data[-1] ^= 1
    (out / ONE).write_bytes(data)
    one_line(run("verify", out), 1, "tensor ", ONE)
    one_line(run("restore", out, tmp_path / "back", "--device", "cpu"), 1, "tensor ", ONE)
    one_line(run("verify", model, "--json"), 2, "no ctconvert.json", json=True)
    assert not (tmp_path / "back").exists()


def test_odd_characters_from_the_source_stay_on_one_line(model: Path, tmp_path: Path) -> None:
    name = "evil\nerror: all is well\x1b[2J"
    tensors = {key: tensor for key, tensor in small().items() if not key.startswith(UP)}
    tensors |= {f"{name}.weight_packed": torch.zeros(8, 8, dtype=torch.int32)}
    save_file(tensors, model / ONE)
    for outcome in (run("inspect", model), run("repack", model, tmp_path / "out", *OPTIONS)):
        one_line(outcome, 2, "evil", "weight_s")
        assert "\x1b" not in outcome.stderr


def test_odd_characters_of_a_refused_module_too(tmp_path: Path) -> None:
    three = group_config(weight_args(3, 32))
    tensors = tensors_of(three, ("evil\n\x1b[2J.up_proj", 96, 64))
    model = write_checkpoint(tmp_path / "model", tensors, config_of(three))
    outcome = run("repack", model, *OPTIONS)
    assert outcome.code == 3 and outcome.stderr.count("\n") == 2 and "\x1b" not in outcome.stderr
    for more in ((), ("--target", "triton")):
        outcome = run("inspect", model, *more)
        assert outcome.code == 0 and "\x1b" not in outcome.stdout


def test_an_index_of_another_checkpoint(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", small(), config_of(GROUP), shards=2)
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    (model / INDEX).write_text(json.dumps(index))
    one_line(run("inspect", model), 2, INDEX, "model.norm.weight")
