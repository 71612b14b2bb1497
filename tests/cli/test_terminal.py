"""Nothing that a checkpoint or a path holds can steer a terminal, in any verb."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.cli import Outcome, run

from ctconvert.cli.progress import ShownProgress
from ctconvert.cli.sink import Sink, to_json
from ctconvert.cli.streams import is_screen

#: A title for the window, a bell, a cleared screen, a forged line, right-to-left, a C1 code, DEL.
ODD = "\x1b]0;owned\x07\x1b[2J\nerror: forged\r\u202e\x9b31m\x7f\u2066"
ESCAPED = r"\x1b]0;owned\x07\x1b[2J\nerror: forged\r\u202e\x9b31m\x7f\u2066"
OPTIONS = ("-t", "triton", "--device", "cpu")


def clean(*outcomes: Outcome) -> None:
    """No control or format character but the newline, on either stream."""
    for outcome in outcomes:
        for text in (outcome.stdout, outcome.stderr):
            odd = [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"]
            assert odd == [], ascii(text)
            assert not any(line.startswith("error: forged") for line in text.splitlines())


def made(folder: Path, bits: int = 4) -> Path:
    """A checkpoint with odd names wherever a name may stand, in a directory of an odd name."""
    group = group_config(weight_args(bits, 32))
    tensors = {
        f"{name}.{local}": tensor
        for name in (f"model.{ODD}.q_proj", "model.0.k_proj")
        for local, tensor in quantised(32, 64, group, 0).items()
    }
    tensors[f"{ODD}.weight"] = torch.zeros(4)
    model = write_checkpoint(folder / f"m{ODD}", tensors, config_of(group))
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = [ODD, "\ud800", 5]
    (model / "config.json").write_text(json.dumps(config))
    (model / f"side{ODD}.txt").write_text("x")
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def out(model: Path) -> Path:
    out = model.parent / f"out{ODD}"
    outcome = run("repack", model, out, *OPTIONS)
    assert outcome.code == 0 and ESCAPED in outcome.stdout
    clean(outcome)
    return out


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_inspect_and_dry_run(model: Path, encoding: str) -> None:
    for args in (
        ["inspect", model],
        ["inspect", model, "--target", "cuda"],
        ["repack", model, "-t", "triton", "--dry-run"],
    ):
        outcome = run(*args, encoding=encoding)
        assert outcome.code == 0 and ESCAPED in outcome.stdout
        clean(outcome)
    assert "\\ud800" in run("inspect", model).stdout


def test_verify_and_restore(model: Path, out: Path, tmp_path: Path) -> None:
    outcomes = [
        run("verify", out, "--against", model),
        run("restore", out, tmp_path / f"back{ODD}", "--device", "cpu"),
    ]
    assert all(outcome.code == 0 and ESCAPED in outcome.stdout for outcome in outcomes)
    clean(*outcomes)


def test_json_has_escapes_of_its_own(model: Path, out: Path, tmp_path: Path) -> None:
    outcomes = [
        run("inspect", model, "--json"),
        run("repack", model, "-t", "triton", "--dry-run", "--json"),
        run("repack", model, tmp_path / "out", *OPTIONS, "--json"),
        run("verify", out, "--json"),
    ]
    clean(*outcomes)
    assert all(outcome.stdout.isascii() for outcome in outcomes)
    inspection, outline, report, verified = (json.loads(outcome.stdout) for outcome in outcomes)
    assert inspection["architectures"][0] == ODD
    assert f"model.{ODD}.q_proj" in [module["name"] for module in inspection["modules"]]
    assert f"side{ODD}.txt" in outline["side_files"] == report["side_files"]
    assert verified["checkpoint"] == str(out)


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": ["\udc80\x7f\x9b"]}])
def test_json_of_lone_surrogates(value: Any) -> None:
    text = to_json([value])
    assert json.loads(text) == [value] and text.isascii() and "\x7f" not in text


def test_refusals(tmp_path: Path) -> None:
    model = made(tmp_path, bits=3)
    outcomes = [run("repack", model, *OPTIONS), run("repack", model, *OPTIONS, "--dry-run")]
    assert all(outcome.code == 3 and ESCAPED in outcome.stderr for outcome in outcomes)
    outcomes.append(run("repack", model, tmp_path / "out", "--keep-unsupported", *OPTIONS))
    assert outcomes[-1].code == 0
    clean(*outcomes)


def test_errors(model: Path, out: Path, tmp_path: Path) -> None:
    outcomes = [
        run("inspect", tmp_path / ODD),
        run("inspect", ODD),
        run("verify", tmp_path / ODD),
        run("verify", out, "--against", ODD),
        run("repack", model, out, *OPTIONS),
        run("repack", model, *OPTIONS, "--layout", f"{ODD}=marlin"),
        run("repack", model, *OPTIONS, "--max-shard-size", ODD),
        run("repack", model, "-t", ODD),
        run("repack", model, "-t", "triton", "--device", ODD),
        run("restore", out, model, "--device", "cpu"),
        run("bench", tmp_path / ODD, "--device", "cpu"),
        run("bench", out, "--m", ODD),
        run("bench", out, "--device", "cpu", "--plot", tmp_path / ODD),
        run(ODD),
        run("verify", out, ODD),
        run("verify", out, "--workers", ODD),
        run("verify", f"--{ODD}"),
    ]
    for outcome in outcomes:
        assert outcome.code == 2 and outcome.stdout == ""
        assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    clean(*outcomes)


def test_damage(out: Path, tmp_path: Path) -> None:
    """What verify says of a damaged output, of which every name is odd."""
    (out / f"side{ODD}.txt").write_text("y")
    try:
        outcome = run("verify", out)
    finally:
        (out / f"side{ODD}.txt").write_text("x")
    assert outcome.code == 1 and ESCAPED in outcome.stderr.splitlines()[-1]
    clean(outcome)
    assert run("verify", out).code == 0


def test_progress_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with ShownProgress() as progress:
        progress.phase(ODD, 5)
        progress.note(f"note {ODD}")
        progress.advance(5)
    clean(Outcome(0, *capsys.readouterr()))


def test_tables_on_a_screen(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Folded to COLUMNS, with a bold header unless NO_COLOR; in a pipe without, not at all."""
    rows = [(f"{'x' * 20} {'x' * 19}", "y")]
    folded = f"{'x' * 20}   y\n{'x' * 19}\n"
    for columns in ("", "no", "-1"):
        monkeypatch.setenv("COLUMNS", columns)
        Sink().table(["module", "n"], rows)
        assert capsys.readouterr().out == f"module{' ' * 36}n\n{rows[0][0]}  y\n"
    monkeypatch.setenv("COLUMNS", "24")
    Sink().table(["module", "n"], rows)
    assert capsys.readouterr().out == f"module{' ' * 17}n\n{folded}"
    monkeypatch.setattr("ctconvert.cli.sink.is_screen", lambda stream: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Sink().table(["module", "n"], rows)
    assert capsys.readouterr().out == f"\x1b[1mmodule{' ' * 17}n\x1b[0m\n{folded}"
    monkeypatch.setenv("NO_COLOR", "1")
    Sink().table(["module", "n"], rows)
    assert capsys.readouterr().out == f"module{' ' * 17}n\n{folded}"


def test_what_a_screen_is(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = os.openpty()
    with open(follower, "w") as stream, open(leader, "rb"):  # noqa: PTH123 (of a descriptor)
        monkeypatch.setenv("TERM", "xterm")
        assert is_screen(stream)
        monkeypatch.setenv("TERM", "dumb")
        assert not is_screen(stream)
