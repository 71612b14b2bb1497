"""Kills, interrupts, full disks and memory: what a conversion leaves behind, and how it goes on.

Runs that are killed are processes of their own. Most are forked from a server that has done the
slow imports already; they run the same ``main`` as the command. A run is killed either from
outside, while it is slowed down by a slower ``fsync``, or by itself at an exact place.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import config_of, group_config, weight_args
from safetensors.torch import save_file
from typer.testing import CliRunner

from ctconvert.cli import app

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["ctconvert.cli", "ctconvert.execution", "ctconvert.comparison", "compressed_tensors"]
)
GROUP = group_config(weight_args(4, 128))
MODULES = 24
#: Two modules a shard, and the last tensor, which is larger than any other shard, alone in one.
OPTIONS = ("--target", "triton", "--max-shard-size", "1MB")


def module_name(index: int) -> str:
    return f"model.layers.{index:02}.mlp.up_proj"


def write_model(folder: Path, seed: int) -> Path:
    """17 MB: int4 modules of [1024, 768] and a few plain tensors, in two files."""
    made = torch.Generator().manual_seed(seed)
    first: dict[str, torch.Tensor] = {"model.norm.weight": torch.randn(1024, generator=made)}
    for index in range(MODULES):
        codes = torch.randint(-(1 << 31), 1 << 31, (1024, 96), generator=made)
        scale = torch.rand(1024, 6, generator=made) + 0.5
        first |= {
            f"{module_name(index)}.weight_packed": codes.to(torch.int32),
            f"{module_name(index)}.weight_scale": scale.to(torch.bfloat16),
            f"{module_name(index)}.weight_shape": torch.tensor([1024, 768]),
        }
    second = {"lm_head.weight": torch.randn(1024, 1500, generator=made)}
    folder.mkdir(parents=True)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file(first, folder / names[0], metadata={"format": "pt"})
    save_file(second, folder / names[1], metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": config_of(GROUP)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "templates").mkdir()
    (folder / "templates" / "chat.jinja").write_text("{{ messages }}")
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- running the command -------------------------------------------------------------------------


def _die_at(place: str, call: int) -> None:
    """Makes the process kill itself when ``module:name`` or ``module:Class.name`` is called."""
    module_path, _, attribute = place.partition(":")
    owner: Any = __import__(module_path, fromlist=["x"])
    *outer, name = attribute.split(".")
    for item in outer:
        owner = getattr(owner, item)
    original, calls = getattr(owner, name), [0]

    def replacement(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def _slow_fsync(seconds: float) -> None:
    original = os.fsync

    def slower(descriptor: Any) -> None:
        time.sleep(seconds)
        original(descriptor)

    os.fsync = slower  # type: ignore[assignment]


def _child(arguments: list[str], stdout: str, stderr: str, settings: dict[str, Any]) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, descriptor)
    if "slow" in settings:
        _slow_fsync(settings["slow"])
    if "die_at" in settings:
        _die_at(*settings["die_at"])
    if "file_size" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_size"],) * 2)
    if "pause_in" in settings:
        module = __import__(settings["pause_in"][0], fromlist=["x"])
        setattr(module, settings["pause_in"][1], lambda *args, **kwargs: time.sleep(60))
    if settings.get("any_free_space"):
        usage = shutil.disk_usage("/")
        shutil.disk_usage = lambda path: usage._replace(free=1 << 60)
    from ctconvert.__main__ import main

    sys.argv = ["ctconvert", *arguments]
    main()


class Run:
    """The command in a process of its own, started; what it does there is in ``settings``."""

    count = 0

    def __init__(self, logs: Path, *arguments: object, **settings: Any) -> None:
        Run.count += 1
        self._out, self._err = (logs / f"{name}.{Run.count}" for name in ("stdout", "stderr"))
        self.process = CONTEXT.Process(
            target=_child,
            args=([str(item) for item in arguments], str(self._out), str(self._err), settings),
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def wait(self) -> int:
        self.process.join(120)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def signal_when(self, happened: Callable[[], bool], number: int) -> None:
        limit = time.monotonic() + 60
        while not happened():
            assert self.process.is_alive(), f"ended too early: {self.stderr}"
            assert time.monotonic() < limit
            time.sleep(0.002)
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def stderr(self) -> str:
        return self._err.read_text() if self._err.exists() else ""


class Outcome:
    def __init__(self, code: int, stdout: str, stderr: str) -> None:
        self.code, self.stdout, self.stderr = code, stdout, stderr

    @property
    def resumed(self) -> int:
        return int(json.loads(self.stdout)["resumed_shards"])

    def fails(self, code: int, *says: str) -> None:
        """One line on stderr (finished phases apart) that says all that, an empty stdout."""
        assert self.code == code, self.stderr
        *before, line = self.stderr.splitlines()
        notes = r"(converting|verifying): .* in .* s|.* shards taken over"
        assert all(re.fullmatch(notes, item) for item in before), self.stderr
        assert line.startswith("error: ") and self.stdout == ""
        for text in says:
            assert text in line, f"{text!r} is not in {line!r}"


def run(*arguments: object) -> Outcome:
    """The command in this process, to its end."""
    result = CliRunner().invoke(app, [str(item) for item in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


class Place:
    """A directory with an OUT in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        self.partial = folder / "out.partial"
        self.built = self.partial / "checkpoint"
        self.journal = self.partial / "journal.jsonl"
        self.logs = folder / "logs"
        self.logs.mkdir()

    def finished(self) -> list[str]:
        """The shards that the journal says are finished."""
        if not self.journal.exists():
            return []
        names = []
        for line in self.journal.read_text().splitlines():
            if line.startswith('{"shard"') and line.endswith("}"):
                names.append(json.loads(line)["shard"])
        return names

    def killed(self, model: Path, shards: int, *options: str, slow: float = 0.03) -> int:
        """A conversion killed after some shards; returns how many were finished."""
        process = Run(self.logs, "repack", model, self.out, *OPTIONS, *options, slow=slow)
        wanted = len(self.finished()) + shards
        process.signal_when(
            lambda: self.journal.exists() and len(self.finished()) >= wanted, signal.SIGKILL
        )
        assert process.wait() == -signal.SIGKILL
        return len(self.finished())

    def is_clean(self) -> bool:
        return sorted(path.name for path in self.folder.iterdir()) in (["logs", "out"], ["logs"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "model", seed=1)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("whole") / "out"
    before = tree(model)
    assert run("repack", model, out, *OPTIONS).code == 0
    assert run("verify", out, "--against", model).code == 0
    assert tree(model) == before
    found = tree(out)
    assert sum(name.endswith(".safetensors") for name in found) == 13
    assert "templates/chat.jinja" in found
    return found


SHARDS = 13


# --- kill -9 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [0, 1, 6, 11])
def test_killed_from_outside(model: Path, whole: dict[str, str], place: Place, shards: int) -> None:
    # the later, the slower: the kill must come before the few files that follow the shards
    finished = place.killed(model, shards, slow=0.02 + 0.01 * shards)
    assert finished >= shards
    assert not place.out.exists() and place.partial.is_dir()
    assert not (place.built / "ctconvert.json").exists()
    before = tree(place.partial)
    run("repack", model, place.out, *OPTIONS).fails(2, str(place.partial), "--resume")
    if place.built.exists():
        run("verify", place.built).fails(1, "ctconvert.json")
    assert tree(place.partial) == before
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.resumed == finished
    assert tree(place.out) == whole and place.is_clean()


def test_killed_again_and_again(model: Path, whole: dict[str, str], place: Place) -> None:
    """Each run takes over what all before it have finished."""
    finished = 0
    for attempt in range(3):
        now = place.killed(model, 1, *(["--resume"] if attempt else []))
        assert now > finished
        finished = now
        assert not place.out.exists()
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == finished
    assert tree(place.out) == whole and place.is_clean()


#: Where a run kills itself: (function, which call of it), whether OUT is complete by then.
POINTS: dict[str, tuple[tuple[str, int], bool]] = {
    "nothing made yet": (("ctconvert.checkpoint.staging:Staging._take_lock", 1), False),
    "nothing recorded yet": (("ctconvert.checkpoint.staging:Staging._append", 1), False),
    "nothing written yet": (("ctconvert.checkpoint.staging:Staging.check_space", 1), False),
    "first shard created": (("ctconvert.checkpoint.writer:ShardWriter._write_at", 1), False),
    "inside a shard": (("ctconvert.checkpoint.writer:ShardWriter._write_at", 22), False),
    "shard written, not synced": (("ctconvert.checkpoint.writer:ShardWriter.finish", 5), False),
    "shard synced, not recorded": (
        ("ctconvert.checkpoint.staging:Staging.finished_shard", 5),
        False,
    ),
    "all shards, no side files": (("ctconvert.execution:write_durably", 1), False),
    "all but the manifest": (("ctconvert.execution:output_manifest", 1), False),
    "not verified": (("ctconvert.execution:verify_files", 1), False),
    "not committed": (("ctconvert.checkpoint.staging:Staging.commit", 1), False),
    "not renamed": (("pathlib:Path.rename", 1), False),
    "renamed, not cleaned up": (("ctconvert.checkpoint.staging:Staging.discard", 1), True),
    "half cleaned up": (("pathlib:Path.rmdir", 1), True),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point(model: Path, whole: dict[str, str], place: Place, point: str) -> None:
    die_at, complete = POINTS[point]
    process = Run(place.logs, "repack", model, place.out, *OPTIONS, die_at=die_at)
    assert process.wait() == -signal.SIGKILL
    assert place.out.exists() == complete
    if complete:
        assert tree(place.out) == whole
        run("repack", model, place.out, *OPTIONS).fails(2, "exists")
    finished = len(place.finished())
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.resumed == (SHARDS if complete else finished)
    assert tree(place.out) == whole
    if point != "half cleaned up":  # an empty OUT.partial is all that can be left
        assert place.is_clean()


OVERWRITE_POINTS: dict[str, tuple[tuple[str, int], str]] = {
    "nothing made yet": (("ctconvert.checkpoint.staging:Staging._append", 1), "old"),
    "shard synced, not recorded": (
        ("ctconvert.checkpoint.staging:Staging.finished_shard", 5),
        "old",
    ),
    "not committed": (("ctconvert.checkpoint.staging:Staging.commit", 1), "old"),
    "between the renames": (("pathlib:Path.rename", 2), "none"),
    "renamed, not cleaned up": (("ctconvert.checkpoint.staging:Staging.discard", 1), "new"),
}


@pytest.mark.parametrize("point", OVERWRITE_POINTS)
def test_killed_while_overwriting(
    model: Path, whole: dict[str, str], place: Place, point: str
) -> None:
    """OUT is the old checkpoint or the new one, whole, or for an instant none."""
    assert run("repack", model, place.out, "--target", "triton").code == 0
    old = tree(place.out)
    assert old != whole
    die_at, what = OVERWRITE_POINTS[point]
    process = Run(place.logs, "repack", model, place.out, *OPTIONS, "--overwrite", die_at=die_at)
    assert process.wait() == -signal.SIGKILL
    assert place.out.exists() == (what != "none")
    if place.out.exists():
        assert tree(place.out) == (old if what == "old" else whole)
        assert run("verify", place.out, "--against", model).code == 0
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    if point == "nothing made yet":  # nothing on record says that OUT may be replaced
        outcome.fails(2, str(place.out))
        assert tree(place.out) == old
        outcome = run("repack", model, place.out, *OPTIONS, "--overwrite", "--json")
    assert outcome.code == 0, outcome.stderr
    assert tree(place.out) == whole and place.is_clean()


def test_a_replaced_output_is_back_after_a_kill_between_the_renames(
    model: Path, place: Place
) -> None:
    """The next run puts it back before anything else, even if that run fails."""
    assert run("repack", model, place.out, "--target", "triton").code == 0
    old = tree(place.out)
    process = Run(
        place.logs,
        *("repack", model, place.out, *OPTIONS, "--overwrite"),
        die_at=("pathlib:Path.rename", 2),
    )
    assert process.wait() == -signal.SIGKILL and not place.out.exists()
    run("repack", model, place.out, "--target", "cuda", "--resume").fails(2, "--overwrite")
    assert tree(place.out) == old


# --- what is resumed -----------------------------------------------------------------------------


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[12] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [flip_last, flip_header, lambda path: os.truncate(path, 1000), lambda path: path.unlink()],
    ids=["data", "header", "cut", "missing"],
)
def test_a_damaged_shard_is_made_again(
    model: Path, whole: dict[str, str], place: Place, damage: Callable[[Path], None]
) -> None:
    finished = place.killed(model, 3)
    damage(place.built / place.finished()[1])
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.resumed == finished - 1
    assert tree(place.out) == whole


def test_a_torn_journal_line_loses_nothing_else(
    model: Path, whole: dict[str, str], place: Place
) -> None:
    """A kill can cut a line short; what later runs add must still be found."""
    first = place.killed(model, 3)
    with place.journal.open("a") as file:
        file.write('{"shard": "model-00009-of-000')
    second = place.killed(model, 3, "--resume")
    assert second >= first + 3
    with place.journal.open("a") as file:
        file.write("\0\0\0")
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == second
    assert tree(place.out) == whole


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"5\n", b"\xff\xff\n", b'{"digest"'])
def test_a_journal_without_its_first_line_is_worth_nothing(
    model: Path, whole: dict[str, str], place: Place, text: bytes
) -> None:
    """It does not say what the shards were made from."""
    place.killed(model, 2)
    place.journal.write_bytes(text)
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == 0
    assert tree(place.out) == whole


def test_shards_without_a_record_of_their_source_are_never_taken(model: Path, place: Place) -> None:
    """A journal that was emptied once does not vouch for what is written after it either."""
    place.killed(model, 2)
    place.journal.write_bytes(b"")
    assert place.killed(model, 2, "--resume") >= 2
    before = tree(place.partial)
    outcome = run("repack", model, place.out, "--target", "cuda", "--resume")
    outcome.fails(2, str(place.partial), "--overwrite")
    assert tree(place.partial) == before


def test_resume_takes_only_the_same_conversion(
    model: Path, whole: dict[str, str], place: Place
) -> None:
    source = place.folder / "logs" / "model"
    shutil.copytree(model, source)
    place.killed(source, 3)
    before = tree(place.partial)

    def refused(*options: str) -> None:
        outcome = run("repack", source, place.out, *(options or OPTIONS), "--resume", "--json")
        outcome.fails(2, str(place.partial), "--overwrite")
        assert tree(place.partial) == before and not place.out.exists()

    refused("--target", "triton", "--max-shard-size", "2MB")
    refused("--target", "cuda", "--max-shard-size", "1MB")
    shard = source / "model-00002-of-00002.safetensors"
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refused()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    sound = shard.read_bytes()
    save_file({"lm_head.weight": torch.zeros(1024, 1501)}, shard)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused()
    shard.write_bytes(sound)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    config = source / "config.json"
    text = config.read_text()
    config.write_text(text.replace("LlamaForCausalLM", "OtherForCausalLM"))
    refused()
    config.write_text(text)
    outcome = run("repack", source, place.out, *OPTIONS, "--overwrite", "--json")
    assert outcome.code == 0 and outcome.resumed == 0
    made = tree(place.out)
    assert made == whole and place.is_clean()


def test_resume_finds_everything_done(model: Path, whole: dict[str, str], place: Place) -> None:
    assert run("repack", model, place.out, *OPTIONS).code == 0
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == SHARDS
    assert "already complete" in run("repack", model, place.out, *OPTIONS, "--resume").stderr
    assert tree(place.out) == whole and place.is_clean()
    other = run("repack", model, place.out, "--target", "cuda", "--resume")
    other.fails(2, "exists", "--overwrite")
    assert tree(place.out) == whole and place.is_clean()


def test_resume_does_not_call_a_damaged_output_done(model: Path, place: Place) -> None:
    assert run("repack", model, place.out, *OPTIONS).code == 0
    flip_last(place.out / "model-00003-of-00013.safetensors")
    run("repack", model, place.out, *OPTIONS, "--resume").fails(1, "tensor model.layers.")


def test_resume_does_not_call_the_output_of_an_older_source_done(model: Path, place: Place) -> None:
    """A shard of the same size and header, other weights."""
    source = place.logs / "model"
    shutil.copytree(model, source)
    assert run("repack", source, place.out, *OPTIONS).code == 0
    before = tree(place.out)
    time.sleep(0.02)
    flip_last(source / "model-00002-of-00002.safetensors")
    run("repack", source, place.out, *OPTIONS, "--resume").fails(2, "changed", "--overwrite")
    assert tree(place.out) == before
    assert run("repack", source, place.out, *OPTIONS, "--overwrite").code == 0
    assert run("verify", place.out, "--against", source).code == 0


def test_no_verify_makes_the_same_bytes(
    model: Path, whole: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ctconvert.execution.verify_files", lambda *args, **kwargs: pytest.fail("verified")
    )
    outcome = run("repack", model, place.out, *OPTIONS, "--no-verify")
    assert outcome.code == 0 and "not verified" in outcome.stdout
    assert tree(place.out) == whole


def test_json_is_all_there_is_on_stdout(model: Path, place: Place) -> None:
    outcome = run("repack", model, place.out, *OPTIONS, "--json")
    report = json.loads(outcome.stdout)
    assert outcome.code == 0 and outcome.stderr == ""
    assert report["modules"] == MODULES and report["shards"] == SHARDS
    assert report["resumed_shards"] == 0 and report["out"] == str(place.out)
    run("repack", model, place.out, *OPTIONS, "--json").fails(2, "exists")


def test_a_source_that_changes_meanwhile_is_no_source(
    model: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read before and after the change does not belong together."""
    from ctconvert.checkpoint.writer import ShardWriter

    source = place.logs / "model"
    shutil.copytree(model, source)
    finish = ShardWriter.finish

    def finish_and_touch(self: ShardWriter) -> None:
        finish(self)
        os.utime(source / "model-00001-of-00002.safetensors")

    monkeypatch.setattr(ShardWriter, "finish", finish_and_touch)
    outcome = run("repack", source, place.out, *OPTIONS)
    outcome.fails(1, "model-00001-of-00002.safetensors", "changed while")
    assert place.is_clean()


# --- two at once, interrupts ---------------------------------------------------------------------


def test_two_runs_at_once(model: Path, whole: dict[str, str], place: Place) -> None:
    first = Run(place.logs, "repack", model, place.out, *OPTIONS, slow=0.15)
    first.signal_when(lambda: len(place.finished()) >= 1, 0)
    for flag in ((), ("--resume",), ("--overwrite",)):
        outcome = run("repack", model, place.out, *OPTIONS, *flag)
        outcome.fails(2, str(place.partial), "another run")
    assert first.process.is_alive()
    assert first.wait() == 0, first.stderr
    assert tree(place.out) == whole and place.is_clean()


def test_ctrl_c(model: Path, whole: dict[str, str], place: Place) -> None:
    """The command as a user starts it, slowed down."""
    script = """
import os, time
original = os.fsync
def slower(descriptor):
    time.sleep(0.1)
    original(descriptor)
os.fsync = slower
from ctconvert.__main__ import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, "repack", str(model), str(place.out), *OPTIONS, "--json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 100
    while len(place.finished()) < 2:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == "" and stderr == "error: interrupted\n"
    assert not place.out.exists()
    finished = len(place.finished())
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == finished >= 2
    assert tree(place.out) == whole and place.is_clean()


def test_ctrl_c_while_verifying(model: Path, whole: dict[str, str], place: Place) -> None:
    process = Run(
        place.logs,
        *("repack", model, place.out, *OPTIONS),
        pause_in=("ctconvert.execution", "verify_files"),
    )
    manifest = place.built / "ctconvert.json"
    process.signal_when(manifest.exists, signal.SIGINT)
    assert process.wait() == 130, process.stderr
    assert process.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in process.stderr and not place.out.exists()
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == SHARDS
    assert tree(place.out) == whole and place.is_clean()


# --- the disk ------------------------------------------------------------------------------------


def test_a_file_size_limit_midway(model: Path, whole: dict[str, str], place: Place) -> None:
    """The last shard is larger than the limit, the others are not."""
    process = Run(place.logs, "repack", model, place.out, *OPTIONS, "--json", file_size=2 << 20)
    assert process.wait() == 1
    Outcome(1, process.stdout, process.stderr).fails(
        1, str(place.built), "File too large", "--resume"
    )
    finished = len(place.finished())
    assert finished >= 1 and not place.out.exists()
    assert not (place.built / "ctconvert.json").exists()
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == finished
    assert tree(place.out) == whole and place.is_clean()


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_midway(model: Path, whole: dict[str, str], tmpfs: Path) -> None:
    """There seemed to be space enough, and then somebody else took it."""
    place = Place(tmpfs)
    process = Run(tmpfs.parent, "repack", model, place.out, *OPTIONS, "--json", any_free_space=True)
    assert process.wait() == 1
    Outcome(1, process.stdout, process.stderr).fails(
        1, str(place.partial), "No space left on device", "--resume"
    )
    finished = len(place.finished())
    assert finished >= 1 and not place.out.exists()
    run("repack", model, place.out, *OPTIONS, "--resume").fails(1, "are free")
    assert len(place.finished()) == finished  # kept for when there is space
    subprocess.run(["mount", "-o", "remount,size=64m", str(tmpfs)], check=True)
    outcome = run("repack", model, place.out, *OPTIONS, "--resume", "--json")
    assert outcome.code == 0 and outcome.resumed == finished
    assert tree(place.out) == whole


def test_free_space_is_checked_before_anything_is_written(
    model: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    written: list[str] = []
    monkeypatch.setattr(
        "ctconvert.checkpoint.writer.ShardWriter.open",
        lambda self: written.append(self.path.name),
    )
    run("repack", model, place.out, *OPTIONS).fails(1, str(place.out), "0.02 GB", "0.00 GB", "free")
    assert written == [] and sorted(path.name for path in place.folder.iterdir()) == ["logs"]


def test_a_parent_that_cannot_hold_the_output(model: Path, place: Place) -> None:
    (place.logs / "file").write_text("")
    outcome = run("repack", model, place.logs / "file" / "out", *OPTIONS)
    outcome.fails(1, str(place.logs / "file"), "Not a directory")


# --- what a failed run holds on to ---------------------------------------------------------------


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_failed_run_leaves_no_open_files(model: Path, place: Place) -> None:
    """A program that calls it in a loop must neither run out of files nor meet its own lock."""
    source = place.logs / "model"
    shutil.copytree(model, source)
    header = (source / "model-00001-of-00002.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", header[:8])
    entries = json.loads(header[8 : 8 + length])
    begin, _ = entries[f"{module_name(17)}.weight_scale"]["data_offsets"]
    with (source / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(8 + length + begin)
        file.write(b"\x80\x7f")  # infinity in BF16
    run("repack", source, place.out, *OPTIONS).fails(2, module_name(17), "inf")
    before = descriptors()
    for _ in range(3):
        run("repack", source, place.out, *OPTIONS).fails(2, module_name(17))
        assert place.is_clean()
    place.killed(model, 1)
    for options in (["--target", "cuda"], ["--target", "triton"]):
        run("repack", model, place.out, *options, "--resume").fails(2, "--overwrite")
    assert descriptors() == before
    assert run("repack", model, place.out, *OPTIONS, "--resume").code == 0
    assert descriptors() == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "device", "cpu"],
)
def test_out_of_memory_is_one_line(
    model: Path, place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def transform(*args: Any) -> Any:
        raise error

    monkeypatch.setattr("ctconvert.execution.transform", transform)
    outcome = run("repack", model, place.out, *OPTIONS)
    outcome.fails(1, "model.layers.", "out of memory", "--workers")
    assert not place.out.exists()


# --- memory --------------------------------------------------------------------------------------

MIB = 1 << 20
BIG = (4096, 4096)


def write_sparse_model(folder: Path, modules: int, plain: int, shape: tuple[int, int] = BIG) -> int:
    """A checkpoint that takes next to no disk: codes and scales are zeros, in holes of the file.

    Args:
        folder: the directory to make.
        modules: how many int4 modules.
        plain: bytes of one tensor that is not quantised.
        shape: N and K of a module.

    Returns:
        the bytes of all tensors.
    """
    n, k = shape
    header: dict[str, Any] = {}
    position = 0
    shapes = []

    def add(name: str, dtype: str, shape: list[int], nbytes: int) -> int:
        nonlocal position
        start, position = position, position + nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, position]}
        return start

    for index in range(modules):
        name = module_name(index)
        shapes.append(add(f"{name}.weight_shape", "I64", [2], 16))
        add(f"{name}.weight_packed", "I32", [n, k // 8], n * k // 2)
        add(f"{name}.weight_scale", "BF16", [n, k // 128], n * k // 64)
    add("model.norm.weight", "F32", [plain // 4], plain)
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for offset in shapes:
            file.seek(start + offset)
            file.write(struct.pack("<qq", n, k))
        file.truncate(start + position)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": config_of(GROUP)}
    (folder / "config.json").write_text(json.dumps(config))
    return position


def peak_of(*command: str | Path) -> int:
    """The most anonymous memory that a command, started as a user does, ever has."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ctconvert", *map(str, command)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    peak = samples = 0
    while process.poll() is None:
        try:
            found = re.search(r"^Anonymous:\s+(\d+) kB", rollup.read_text(), re.MULTILINE)
        except (FileNotFoundError, ProcessLookupError):
            break
        if found:
            peak = max(peak, int(found[1]) * 1024)
            samples += 1
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert samples > 20
    return peak


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs smaps_rollup")
def test_memory_is_bounded_by_the_largest_module_not_by_the_checkpoint(tmp_path: Path) -> None:
    largest = BIG[0] * BIG[1] // 2 + BIG[0] * BIG[1] // 64 + 16
    write_sparse_model(tmp_path / "tiny", 1, 1000)
    total = write_sparse_model(tmp_path / "big", 64, 96 * MIB)
    assert total >= 8 * (4 * largest) and total > 600_000_000
    target = ("--target", "triton")
    options = (*target, "--max-shard-size", "200MB", "--workers", "8")  # more workers hold more
    baseline = peak_of("repack", tmp_path / "tiny", tmp_path / "tiny-out", *target)
    plan = json.loads(run("repack", tmp_path / "big", *target, "--dry-run", "--json").stdout)
    for more in (["--no-verify"], []):
        peak = peak_of("repack", tmp_path / "big", tmp_path / "out", *options, *more)
        shutil.rmtree(tmp_path / "out")
        assert peak < 1024 * MIB + 4 * largest
        assert peak - baseline < 256 * MIB + 4 * largest
        assert peak <= plan["peak_memory_bytes"]
    shutil.rmtree(tmp_path / "big")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs smaps_rollup")
def test_comparing_and_restoring_are_bounded_too(tmp_path: Path) -> None:
    n, k = 8192, 16384
    largest = n * k // 2 + n * k // 64 + 16
    source, out = tmp_path / "big", tmp_path / "out"
    write_sparse_model(source, 10, 1000, (n, k))
    assert run("repack", source, out, "--target", "triton").code == 0
    for command in (
        ("verify", out, "--against", source),
        ("restore", out, tmp_path / "back"),
    ):
        assert peak_of(*command, "--workers", "8") < 1024 * MIB + 4 * largest
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
    shutil.rmtree(out)


def test_a_large_side_file_is_not_held_in_memory(
    model: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else lies beside the weights is copied and checked piece by piece."""
    from ctconvert.checkpoint.source import LocalFiles

    source = place.logs / "model"
    shutil.copytree(model, source)
    with (source / "video.mp4").open("wb") as file:
        file.truncate(40 * MIB)
    read = LocalFiles.read
    longest = 0

    def watched(self: Any, name: str, offset: int = 0, length: int | None = None) -> bytes:
        nonlocal longest
        data: bytes = read(self, name, offset, length)
        longest = max(longest, len(data))
        return data

    monkeypatch.setattr(LocalFiles, "read", watched)
    assert run("repack", source, place.out, *OPTIONS).code == 0
    assert (place.out / "video.mp4").stat().st_size == 40 * MIB
    assert longest <= 16 * MIB
