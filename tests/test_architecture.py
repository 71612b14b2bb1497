"""Which part may import which, and what starting up may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ctconvert"

#: part -> what it must never import, anywhere in its files.
FORBIDDEN = {
    "errors.py": ("ctconvert",),
    "specs.py": ("ctconvert.formats", "ctconvert.layouts", "ctconvert.checkpoint"),
    "transforms": (
        "ctconvert.formats",
        "ctconvert.layouts",
        "ctconvert.checkpoint",
        "ctconvert.planning",
        "ctconvert.runtime",
    ),
    "formats": (
        "ctconvert.layouts",
        "ctconvert.checkpoint",
        "ctconvert.planning",
        "ctconvert.execution",
        "ctconvert.runtime",
    ),
    "layouts": (
        "ctconvert.formats",
        "ctconvert.checkpoint",
        "ctconvert.planning",
        "ctconvert.execution",
        "ctconvert.runtime",
    ),
    "checkpoint": (
        "ctconvert.formats",
        "ctconvert.layouts",
        "ctconvert.planning",
        "ctconvert.execution",
        "ctconvert.runtime",
    ),
    "planning.py": ("ctconvert.execution", "ctconvert.verification", "ctconvert.runtime"),
    "runtime": ("ctconvert.formats", "ctconvert.planning", "ctconvert.execution"),
    "runtime/kernels": ("ctconvert.formats", "ctconvert.layouts", "ctconvert.checkpoint"),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files_of(part: str) -> list[Path]:
    path = PACKAGE / part
    return [path] if path.suffix else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_go_one_way(part: str) -> None:
    for path in files_of(part):
        for name in imports(path):
            for forbidden in FORBIDDEN[part]:
                assert name != forbidden and not name.startswith(f"{forbidden}."), (path, name)


def test_nothing_imports_the_command_line() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__main__.py":
            assert "ctconvert.cli" not in imports(path), path


@pytest.mark.parametrize("kind", ["formats", "layouts"])
def test_formats_and_layouts_do_not_import_one_another(kind: str) -> None:
    for path in files_of(kind):
        if path.name in ("__init__.py", "base.py"):
            continue
        siblings = {f"ctconvert.{kind}.{p.stem}" for p in files_of(kind) if p.stem != "base"}
        shared = imports(path) & siblings
        assert not shared, (path, shared)


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import ctconvert", "import ctconvert.cli", "import ctconvert.planning, ctconvert.layouts"],
)
def test_starting_up_is_light(statement: str) -> None:
    heavy = {"torch", "triton", "transformers", "compressed_tensors", "numpy"}
    assert not loaded_by(statement) & heavy
