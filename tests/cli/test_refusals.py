"""What a user or a system can do wrong ends in one line and a documented exit code."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLE
from support.cli import Outcome, environment, program, run

import ctconvert
from ctconvert.cli.failures import failures
from ctconvert.cli.sink import Sink
from ctconvert.errors import UsageError

OPTIONS = ("-t", "triton", "--device", "cpu")
LONG = "x" * 5000
pytestmark = pytest.mark.timeout(60)  # a FIFO that is waited for is a hang


def one_line(outcome: Outcome, code: int, *says: str) -> None:
    assert outcome.code == code, outcome.stderr
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    for text in says:
        assert text in outcome.stderr


# --- what a user writes --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["~nosuchuser", "~nosuchuser/x", f"/{LONG}", LONG])
def test_a_path_that_names_nothing(path: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one_line(run("inspect", path), 2)
    one_line(run("repack", path, *OPTIONS), 2)
    one_line(run("repack", EXAMPLE, path, *OPTIONS), 2)
    one_line(run("verify", path), 2)
    one_line(run("restore", path, out, "--device", "cpu"), 2)
    one_line(run("bench", path, "--device", "cpu"), 2)
    assert not list(tmp_path.iterdir())


def test_a_path_that_holds_a_nul() -> None:
    """No command line can hold one; a call can."""
    with pytest.raises(UsageError, match="no path holds a NUL"):
        ctconvert.inspect("a\0b")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_where_a_directory_belongs(name: str, tmp_path: Path) -> None:
    file = EXAMPLE / name
    one_line(run("inspect", file), 2, str(file), "is a file")
    one_line(run("repack", file, tmp_path / "out", *OPTIONS), 2, "is a file")
    one_line(run("verify", file), 2, str(file))
    one_line(run("restore", file, tmp_path / "out", "--device", "cpu"), 2, str(file))
    one_line(run("bench", file, "--device", "cpu"), 2, str(file))


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_huge_numbers(digits: int, tmp_path: Path) -> None:
    number, out = "9" * digits, tmp_path / "out"
    one_line(run("repack", EXAMPLE, out, *OPTIONS, "--max-shard-size", number), 2, "shard")
    one_line(run("repack", EXAMPLE, out, *OPTIONS, "--workers", number), 2, "--workers")
    one_line(run("verify", EXAMPLE, "--workers", number), 2, "--workers")
    if digits > 40:
        one_line(run("bench", EXAMPLE, "--m", number), 2, "--m")
    assert not list(tmp_path.iterdir())


# --- FIFOs where files belong --------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EXAMPLE, tmp_path / "model"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_fifo_in_a_source(model: Path, tmp_path: Path, name: str) -> None:
    (model / name).unlink()
    os.mkfifo(model / name)
    one_line(run("inspect", model), 2, str(model))
    one_line(run("repack", model, tmp_path / "out", *OPTIONS), 2, str(model))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fifos_beside_a_source_are_left_out(model: Path, tmp_path: Path) -> None:
    for name in ("ctconvert.json", "notes.txt"):
        os.mkfifo(model / name)
    outcome = run("repack", model, tmp_path / "out", *OPTIONS)
    assert outcome.code == 0
    assert not (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("flag", [(), ("--resume",), ("--overwrite",)])
def test_a_fifo_where_the_output_belongs(tmp_path: Path, name: str, flag: tuple[str, ...]) -> None:
    os.mkfifo(tmp_path / name)
    one_line(run("repack", EXAMPLE, tmp_path / "out", *OPTIONS, *flag), 2, str(tmp_path / name))
    assert (tmp_path / name).is_fifo()
    one_line(run("verify", tmp_path / "out"), 2, str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["ctconvert.json", "config.json", "model.safetensors"])
def test_a_fifo_in_an_output(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert run("repack", EXAMPLE, out, *OPTIONS).code == 0
    (out / name).unlink()
    os.mkfifo(out / name)
    one_line(run("verify", out), 1, str(out), name)
    one_line(run("restore", out, tmp_path / "back", "--device", "cpu"), 1, str(out), name)
    one_line(run("bench", out, "--device", "cpu"), 1, str(out), name)
    ours = name != "ctconvert.json"
    again = run("repack", EXAMPLE, out, *OPTIONS, "--resume")
    assert again.code == (1 if ours else 2) and again.stderr.splitlines()[-1].startswith("error: ")
    assert run("repack", EXAMPLE, out, *OPTIONS, "--overwrite").code == (0 if ours else 2)


# --- where the output goes -----------------------------------------------------------------------


def test_a_full_stdout() -> None:
    for args in (["layouts"], ["layouts", "--json"], ["--help"]):
        with Path("/dev/full").open("w") as full:
            found = program(*args, stdout=full, capture_output=False, stderr=subprocess.PIPE)
        assert found.returncode == 1
        assert found.stderr.endswith("No space left on device\n")
        assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


def test_nobody_reads_stdout() -> None:
    for args in (["layouts"], ["schema"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        found = program(*args, stdout=writer, capture_output=False, stderr=subprocess.PIPE)
        os.close(writer)
        assert (found.returncode, found.stderr) == (1, "")


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("ctconvert", f"{sys.executable} -m ctconvert")],
        capture_output=True,
        text=True,
        env=environment(),
    )


def test_head_is_enough() -> None:
    found = shell("ctconvert layouts | head -1")
    assert found.stdout.startswith("layout  ") and found.stderr == ""


def test_a_closed_stdout() -> None:
    """Nothing is begun of which the result could not be told."""
    found = shell("ctconvert layouts >&-")
    assert found.returncode == 2
    assert found.stderr.startswith("error: stdout is closed") and found.stderr.count("\n") == 1


@pytest.mark.parametrize("where", [">&-", ">/dev/full"])
def test_a_stderr_that_cannot_be_written(where: str) -> None:
    found = shell(f"ctconvert layouts 2{where}")
    assert found.returncode == 0 and found.stdout == run("layouts").stdout
    assert shell(f"ctconvert bogus 2{where}").returncode == 2
    assert shell("ctconvert bogus >&- 2>&- <&-").returncode == 2


# --- what a system says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EIO, "Input/output error", "a\x1bb"), r"a\x1bb: Input/output error"),
        (OSError(errno.EPIPE, "Broken pipe"), "Broken pipe"),  # not of stdout: it is told
        (OSError("something"), "something"),
        (MemoryError(), "out of memory on cpu; free some, or use a machine with more"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_other_errors(error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("ctconvert.api.inspect", fails)
    code = 130 if isinstance(error, KeyboardInterrupt) else 1
    assert run("inspect", "x") == (code, "", f"error: {line}\n")


def test_a_mistake_of_this_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("mistake"), KeyError("mistake")):
        with pytest.raises(type(error), match="mistake"), failures(Sink()):
            raise error
