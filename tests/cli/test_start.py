"""What a start costs: no verb that reads headers alone imports what only weights need."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import EXAMPLE
from support.cli import environment, run

#: None of these is needed to read JSON and headers.
HEAVY = {
    *("torch", "triton", "transformers", "compressed_tensors", "pydantic", "numpy"),
    *("huggingface_hub", "rich"),
}
#: A verb's arguments of which nothing but headers is read.
LIGHT = (["layouts"], ["layouts", "--json"], ["schema"], ["--help"], ["repack", "--help"])
#: Those that wait for other parts: the light reader of formats/, shapes without transforms/.
READING = (
    ["inspect", str(EXAMPLE)],
    ["inspect", str(EXAMPLE), "--target", "cuda", "--json"],
    ["repack", str(EXAMPLE), "--target", "triton", "--dry-run"],
    ["repack", str(EXAMPLE), "--target", "cuda", "--dry-run", "--json", "--fuse"],
    ["doctor", str(EXAMPLE), "--target", "cuda", "--no-data"],
)


def loaded(code: str) -> set[str]:
    """The heavy modules that a program has imported at its end."""
    script = f"{code}\nimport sys\nsys.stderr.write(' '.join(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return HEAVY & set(found.stderr.split())


@cache
def typers_own() -> set[str]:
    """What typer itself imports to read one argument: of its newer versions, pydantic."""
    return loaded(
        "import typer\n"
        "app = typer.Typer(add_completion=False, rich_markup_mode=None)\n"
        "app.command()(lambda: None)\n"
        "@app.command('x')\n"
        "def x(name: str) -> None: pass\n"
        "app(['x', 'y'], standalone_mode=False)\n"
    )


def loaded_by(*runs: list[str]) -> set[str]:
    code = f"from ctconvert.cli import run\nfor args in {runs!r}: assert run(args) == 0"
    return loaded(code) - typers_own()


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_a_light_verb(args: list[str]) -> None:
    assert not loaded_by(args)


def test_verbs_that_read_headers() -> None:
    assert not loaded_by(*READING)


def test_verify(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("repack", EXAMPLE, out, "-t", "triton", "--device", "cpu").code == 0
    assert not loaded_by(["verify", str(out)])


def test_the_source_is_being_read_before_torch_is_there(tmp_path: Path) -> None:
    args = ["repack", str(EXAMPLE), str(tmp_path / "out"), "-t", "triton"]
    code = (
        "import sys\n"
        "from ctconvert.cli import run\n"
        "from ctconvert.work import executors\n"
        "submit = executors.ThreadPoolExecutor.submit\n"
        "def note(self, job, *given):\n"
        "    kind = type(given[0] if given else None).__name__\n"
        "    found.append((kind, 'torch' in sys.modules))\n"
        "    return submit(self, job, *given)\n"
        "found, executors.ThreadPoolExecutor.submit = [], note\n"
        f"assert run({args!r}) == 0\n"
        "assert found[0] == ('HashJob', False), found[0]\n"
        "assert ('ConvertJob', True) in found, found\n"
    )
    loaded(code)
