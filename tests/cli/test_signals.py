"""Ctrl-C, SIGTERM and SIGHUP: one line, one exit code, workers stopped, staged work kept.

Real processes. Most run a job that takes as long as it is let, in place of a conversion: what is
tested is the way from the signal to the exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.cli import environment, run
from support.paths import EXAMPLE

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
WORDS = {INT: "interrupted", TERM: "stopped by SIGTERM", HUP: "stopped by SIGHUP"}

ARGUMENTS = ("repack", "x", "-t", "triton")


def resumes(verb: str, *rest: object) -> str:
    """How the line of a stopped run ends: with the command that goes on."""
    return f"; to continue: ctconvert {verb} --resume {shlex.join(map(str, rest))}"


pytestmark = pytest.mark.timeout(60)

#: A repack of jobs that take STEP seconds each; it says when they run and when they have stopped.
JOBS = """
import sys, time
from ctconvert import api
from ctconvert.work.executors import Threads
class Context:
    def stop(self): pass
class Job:
    def __init__(self, number): self.number = number
    def run(self, context):
        if self.number == 0:
            print("ready", flush=True)
        time.sleep(STEP)
def repack(*_, **__):
    try:
        for _ in Threads(2).run(map(Job, range(10**6)), Context()):
            pass
    finally:
        print("stopped", flush=True)
api.repack = api.inspect = repack
from ctconvert.__main__ import main
main()
"""


class Program:
    """A Python program under test."""

    def __init__(self, script: str, *args: object, ignored: int | None = None) -> None:
        def ignore() -> None:
            if ignored is not None:
                signal.signal(ignored, signal.SIG_IGN)

        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=ignore,
        )

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n"

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        stdout, stderr = self.process.communicate(timeout=30)
        return self.process.returncode, stdout, stderr


def jobs(step: float, *args: str, ignored: int | None = None) -> Program:
    program = Program(JOBS.replace("STEP", str(step)), *args, ignored=ignored)
    program.wait_for("ready")
    return program


@pytest.mark.parametrize("number", WORDS)
def test_one_signal(number: int) -> None:
    program = jobs(0.05, *ARGUMENTS, "--json")
    program.send(number)
    code, stdout, stderr = program.end()
    line = f"{WORDS[number]}{resumes(*ARGUMENTS)} --json"
    assert (code, stderr) == (128 + number, f"error: {line}\n")
    stopped, _, document = stdout.partition("\n")
    assert stopped == "stopped" and json.loads(document) == failure(code, line)


def failure(code: int, line: str) -> dict[str, object]:
    error = {"kind": "Interrupted", "message": line}
    return {"ok": False, "exit_code": code, "error": error, "refusals": []}


def test_a_verb_that_stages_nothing_has_nothing_to_resume() -> None:
    program = jobs(0.05, "inspect", "x")
    program.send(INT)
    assert program.end() == (130, "stopped\n", "error: interrupted\n")


@pytest.mark.parametrize("second", [INT, TERM])
def test_a_second_signal_ends_it_at_once(second: int) -> None:
    """A worker may hang, on a network disk; the first signal still decides what is said."""
    program = jobs(60, *ARGUMENTS)
    program.send(HUP)
    time.sleep(0.3)
    assert program.process.poll() is None  # it waits for its workers
    begin = time.monotonic()
    program.send(second)
    code, stdout, stderr = program.end()
    assert (code, stderr) == (129, f"error: stopped by SIGHUP{resumes(*ARGUMENTS)}\n")
    assert stdout in ("", "stopped\n")  # the first may meet a thread that is not yet waited for
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("numbers", [(INT, INT), (INT, INT, INT), (TERM, TERM), (HUP, TERM)])
def test_signals_in_a_row(numbers: tuple[int, ...]) -> None:
    """As ``timeout`` and terminals send them; those that come together may have any order."""
    program = jobs(0.05, *ARGUMENTS)
    program.send(*numbers)
    code, stdout, stderr = program.end()
    assert code - 128 in numbers and stdout in ("", "stopped\n")
    assert stderr == f"error: {WORDS[signal.Signals(code - 128)]}{resumes(*ARGUMENTS)}\n"


def test_an_ignored_signal_stays_ignored() -> None:
    """``nohup`` ignores SIGHUP, and a shell SIGINT for what runs in its background."""
    program = jobs(0.05, "repack", "x", "-t", "triton", ignored=HUP)
    program.send(HUP)
    time.sleep(0.3)
    assert program.process.poll() is None
    program.send(TERM)
    assert program.end()[0] == 143


@pytest.mark.parametrize("module", ["typer", "ctconvert.api"])
@pytest.mark.parametrize("number", WORDS)
def test_while_importing(module: str, number: int) -> None:
    script = f"""
import sys, time
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            print("ready", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from ctconvert.__main__ import main
main()
"""
    program = Program(script, "inspect", "x", "--json")
    program.wait_for("ready")
    program.send(number)
    code, stdout, stderr = program.end()
    assert (code, stderr) == (128 + number, f"error: {WORDS[number]}\n")
    assert json.loads(stdout) == failure(code, WORDS[number])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    assert run("repack", EXAMPLE, out, "--target", "triton").code == 0
    return out


@pytest.mark.parametrize(
    "line",
    [
        "repack MODEL NEW -t triton",
        "repack MODEL NEW -t triton --device cuda:99",
        "verify OUT --against MODEL",
        "diff OUT MODEL",
        "doctor MODEL",
        "bench OUT",
    ],
)
def test_while_torch_imports_numpy(line: str, made: Path, tmp_path: Path) -> None:
    """Torch takes whatever is raised then for the absence of NumPy, and goes on."""
    script = """
import os, signal, sys
class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy.linalg":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Signal())
from ctconvert.__main__ import main
main()
"""
    places = {"MODEL": EXAMPLE, "OUT": made, "NEW": tmp_path / "new"}
    args = [str(places.get(word, word)) for word in line.split()]
    code, stdout, stderr = Program(script, *args).end()
    ends = resumes(*args) if args[0] == "repack" else ""
    assert (code, stdout, stderr) == (130, "", f"error: interrupted{ends}\n")


def test_after_the_end() -> None:
    """What has succeeded does not fail while the interpreter ends."""
    script = """
import atexit, time
def last():
    print("ready", flush=True)
    time.sleep(60)
atexit.register(last)
from ctconvert.__main__ import main
main()
"""
    program = Program(script, "--version")
    program.wait_for(run("--version").stdout.strip())
    program.wait_for("ready")
    program.send(INT)
    assert program.end() == (0, "", "")


def test_a_bar_on_a_terminal_is_taken_down() -> None:
    """The cursor is never hidden, so that not even a kill leaves it so."""
    script = """
import sys, time
from ctconvert import api
def repack(*_, progress, **__):
    progress.phase("converting", 100)
    progress.note("a note \\x1b]0;owned\\x07")
    progress.advance(50)
    time.sleep(0.3)
    print("ready", flush=True)
    time.sleep(60)
api.repack = repack
from ctconvert.__main__ import main
main()
"""
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script, "repack", "x", "-t", "triton"],
        env=environment() | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=follower,
        text=True,
    )
    os.close(follower)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(INT)
    assert process.wait(30) == 130
    shown = b""
    while chunk := _read(leader):
        shown += chunk
    os.close(leader)
    process.stdout.close()
    text = shown.decode()
    assert "converting" in text and "50/100 bytes" in text
    assert r"a note \x1b]0;owned\x07" in text and "\x1b]" not in text and "\x07" not in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor shows
    assert text.endswith(f"error: interrupted{resumes(*ARGUMENTS)}\r\n") and "Traceback" not in text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # the other end is closed
        return b""


# --- a real conversion ---------------------------------------------------------------------------

#: Slowed down where the disk is waited for.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slower(descriptor):
    time.sleep(0.15)
    fsync(descriptor)
os.fsync = slower
from ctconvert.__main__ import main
main()
"""
OPTIONS = ("-t", "triton", "--device", "cpu", "--max-shard-size", "3kB", "--json")


def test_staged_work_is_kept(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = {f"model.{i}.weight": torch.full((4,), float(i)) for i in range(2)}
    for i in range(12):
        parts = quantised(64, 64, group, i)
        tensors |= {f"model.{i}.q_proj.{local}": tensor for local, tensor in parts.items()}
    model = write_checkpoint(tmp_path / "model", tensors, config_of(group))
    program = Program(SLOW_DISK, "repack", model, tmp_path / "out", *OPTIONS)
    journal, limit = tmp_path / "out.partial" / "journal.jsonl", time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count('"shard"') >= 2):
        assert program.process.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    program.send(TERM, TERM)
    code, _, stderr = program.end()
    again = resumes("repack", model, tmp_path / "out", *OPTIONS)
    assert (code, stderr) == (143, f"error: stopped by SIGTERM{again}\n")
    assert not (tmp_path / "out").exists()
    finished = journal.read_text().count('"shard"')
    outcome = run(*shlex.split(again)[4:])
    assert outcome.code == 0
    report = json.loads(outcome.stdout)
    assert report["resumed_shards"] == finished < report["shards"]
    assert run("verify", tmp_path / "out", "--against", model).code == 0
