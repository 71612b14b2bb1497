"""What Python sees of the package: the verbs, by name, with types."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import msgspec
import pytest
from conftest import EXAMPLE, ROOT

import ctconvert


@pytest.mark.parametrize("verb", [n for n in ctconvert.__all__ if n.islower() and n[0] != "_"])
def test_a_verb_is_shown_and_returns_a_record(verb: str) -> None:
    assert verb in dir(ctconvert)
    function = getattr(ctconvert, verb)
    assert inspect.getdoc(function)
    from ctconvert import api, records
    from ctconvert.planning.inspection import Inspection

    name = inspect.signature(function).return_annotation
    assert getattr(ctconvert, name) is vars(api)[name] and name in dir(ctconvert)
    found = {**vars(records), "Inspection": Inspection}[name]
    assert issubclass(found, msgspec.Struct)
    assert function is getattr(api, verb)


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="'bogus'"):
        ctconvert.bogus  # noqa: B018


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "use --resume to continue or --overwrite",
            "use resume=True to continue or overwrite=True",
        ),
        ("--independent needs --against MODEL", "independent=True needs against=MODEL"),
        ("--workers 300: too many", "workers 300: too many"),
        (
            "(--keep-unsupported copies) --max-shard-size",
            "(keep_unsupported=True copies) max_shard_size",
        ),
        ("on cuda; use --device cpu", "on cuda; use device='cpu'"),
        ("--push is for --commit, not --part 1/2", "push_to is for commit=True, not part 1/2"),
        ("/tmp/a--resume: `ctconvert verify --against MODEL`",) * 2,
        ("--overwrites --json",) * 2,
    ],
)
def test_errors_advise_in_terms_of_python(message: str, told: str) -> None:
    error = ctconvert.CtconvertError(message)
    assert (str(error), error.message) == (told, message)


def test_every_option_in_a_message_is_an_argument() -> None:
    """Of the verbs that are functions; and each flag of them is one without a value."""
    from ctconvert import errors

    parameters = {
        name: one
        for verb in ("doctor", "push", "repack", "restore", "verify")
        for name, one in inspect.signature(getattr(ctconvert, verb)).parameters.items()
    }
    flags = {name.replace("-", "_") for name in errors._FLAGS}
    assert flags <= {n for n, one in parameters.items() if one.annotation == "bool"}
    valued = {errors._NAMES.get(name, name).replace("-", "_") for name in errors._VALUED}
    assert valued <= parameters.keys() - flags


def test_every_option_that_a_message_names_is_known() -> None:
    """But those that only the command line has, and vLLM's own."""
    from ctconvert import errors

    named: set[str] = set()
    for path in (ROOT / "ctconvert").rglob("*.py"):
        if "cli" in path.parts or path.name == "nvcc.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(r"`[^`]*`", "", node.value)
                named |= set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text))
    elsewhere = {"dry-run", "json", "json-events", "load", "plot", "revision", "version"}
    elsewhere |= {"enable-expert-parallel", "tensor-parallel-size"}
    assert named - elsewhere <= {*errors._FLAGS, *errors._VALUED}


def test_a_verb_advises_in_each_ones_terms(tmp_path: Path) -> None:
    from support.cli import run

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(ctconvert.CtconvertError, match="overwrite=True"):
        ctconvert.repack(EXAMPLE, tmp_path / "out", target="triton", device="cpu")
    told = run("repack", EXAMPLE, tmp_path / "out", "-t", "triton", "--device", "cpu")
    assert "--overwrite" in told.stderr and "=True" not in told.stderr


def test_progress_adds_up(tmp_path: Path) -> None:
    """A subclass has what it is for alone; every phase ends at its total."""

    class Counting(ctconvert.Progress):
        def __init__(self) -> None:
            self.phases: list[list[object]] = []

        def phase(self, label: str, total: int) -> None:
            self.phases.append([label, total, 0])

        def advance(self, count: int) -> None:
            self.phases[-1][2] += count  # type: ignore[operator]

    told, out = Counting(), tmp_path / "out"
    for fuse in (False, True):
        ctconvert.repack(
            EXAMPLE,
            out,
            target="triton",
            device="cpu",
            fuse=fuse,
            overwrite=True,
            max_shard_size=1_000_000,
            progress=told,
        )
        ctconvert.verify(out, against=EXAMPLE, independent=True, progress=told)
        ctconvert.restore(out, tmp_path / f"back{fuse}", device="cpu", progress=told)
        ctconvert.diff(EXAMPLE, out, progress=told)
    ctconvert.doctor(EXAMPLE, target="triton", progress=told)
    labels = {label for label, _, _ in told.phases}
    assert labels == {
        *("converting", "verifying", "comparing", "judging", "restoring", "examining")
    }
    assert [phase for phase in told.phases if phase[1] != phase[2]] == []


#: What a user may write, and what types it has.
USER = """
import ctconvert
from ctconvert.records import Report

class Bar(ctconvert.Progress):
    def advance(self, count: int) -> None:
        print(count)

report: Report = ctconvert.repack("m", "out", target="cuda", progress=Bar())
reveal_type(report.layouts)
reveal_type(ctconvert.inspect("m").modules[0].layout)
try:
    ctconvert.verify("out", against=None)
except ctconvert.CtconvertError as error:
    reveal_type(error.module)
ctconvert.repack("m", target=1)
"""
#: What checking it would follow for a minute: its types are others'.
SKIPPED = "torch triton transformers compressed_tensors huggingface_hub typer rich matplotlib numpy"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_types_are_there_where_it_is_installed(kind: str, tmp_path: Path) -> None:
    """``py.typed`` is found in both kinds of installation, by mypy in its strict mode."""
    pytest.importorskip("mypy")
    backend = pytest.importorskip("hatchling.build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ctconvert", source / "ctconvert", ignore=ignored)
    build = f"import {backend.__name__} as b; b.build_{kind}({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(str(Path(msgspec.__file__).parent.parent) + "\n")
    user = tmp_path / "user"
    user.mkdir()
    (user / "use.py").write_text(USER)
    skipped = "".join(f"[mypy-{n}.*]\nfollow_imports = skip\n" for n in SKIPPED.split())
    (user / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{skipped}")
    python = tmp_path / "venv" / "bin" / "python"
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", python, "use.py"],
        cwd=user,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    told = [line.partition(": ")[2] for line in found.stdout.splitlines()]
    assert told == [
        'note: Revealed type is "dict[str, int]"',
        'note: Revealed type is "str | None"',
        'note: Revealed type is "str | None"',
        'error: Argument "target" to "repack" has incompatible type "int"; '
        'expected "str"  [arg-type]',
        "",
    ], found.stdout + found.stderr
