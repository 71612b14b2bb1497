"""The code blocks of the pages, and who runs each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from readme import ROOT

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_APART = {"build", "dist"}


class Block(NamedTuple):
    """``page`` is relative to the checkout."""

    page: str
    language: str
    text: str

    @property
    def first(self) -> str:
        return self.text.partition("\n")[0]


#: Who runs a block, by its page and how its first line begins.
RUN_BY = {
    ("README.md", "pip install -q -e . &&"): ".ci/run",
    ("README.md", "pip install -q -e '.[dev]' &&"): ".ci/run",
    ("README.md", "import ctconvert.integrations.transformers"): "tests/test_pages.py",
    ("README.md", "pip install 'ctconvert[vllm]'"): "tests/integration/test_pages.py",
    ("CONTRIBUTING.md", "python -m venv"): ".ci/run",
    ("CONTRIBUTING.md", "CTCONVERT_FUZZ="): "by hand",
    ("CONTRIBUTING.md", "Store -> Description"): "nobody: a drawing",
    ("CONTRIBUTING.md", "errors, memory"): "nobody: a drawing",
    ("ctconvert/layouts/README.md", "from ctconvert.runtime import"): "tests/test_pages.py",
    ("ctconvert/integrations/transformers/README.md", "# pip install"): "tests/test_pages.py",
    ("ctconvert/integrations/vllm/README.md", "pip install"): "tests/integration/test_pages.py",
    ("ctconvert/integrations/vllm/README.md", "$ python examples/prove_smollm2.py"): (
        "tests/integration/test_pages.py"
    ),
    ("examples/README.md", "examples/stranger.sh"): ".ci/run",
    ("examples/README.md", "python examples/pipeline.py"): "tests/test_pages.py",
    ("examples/README.md", "$ ctconvert inspect"): "tests/test_pages.py",
    ("examples/README.md", "$ python examples/prove_smollm2.py --target triton --device cpu"): (
        "tests/integration/test_pages.py"
    ),
    ("examples/README.md", "$ python examples/prove_smollm2.py --target triton --device cuda"): (
        "tests/integration/test_pages.py"
    ),
    ("examples/README.md", "$ python examples/prove_smollm2.py --target cpu"): (
        "tests/integration/test_pages.py"
    ),
}


def pages() -> list[Path]:
    """Every page of the checkout, but what was built."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in _APART]
        found += [Path(folder, name) for name in names if name.endswith(".md")]
    return sorted(found)


def blocks() -> list[Block]:
    """Every fenced block, as it stands."""
    return [
        Block(page.relative_to(ROOT).as_posix(), *found)
        for page in pages()
        for found in _FENCE.findall(page.read_text())
    ]


def block(page: str, start: str) -> Block:
    """The one of a page whose first line begins so."""
    (found,) = (one for one in blocks() if one.page == page and one.first.startswith(start))
    return found


def session(text: str) -> list[tuple[str, str]]:
    """The commands of a console, each with what it printed."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def commands_here(folder: Path) -> dict[str, str]:
    """An environment whose ``ctconvert`` and ``python`` are this checkout's, on this machine.

    ``folder`` gets the programs.
    """
    folder.mkdir(exist_ok=True)
    for name, words in {"ctconvert": " -m ctconvert", "python": ""}.items():
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
        program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PATH": path, "PYTHONPATH": packages}


def shell(command: str, cwd: Path, environment: dict[str, str]) -> str:
    """What a command that must succeed prints, to both streams."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout
