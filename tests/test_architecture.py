"""Which part may import which, and what starting up may cost.

Imports inside functions count; those for type checkers alone do not.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from support.paths import EXAMPLE, PACKAGE, ROOT

#: What everything may import.
_BASE = {"errors", "specs", "version", "progress", "names", "memory"}
_TRANSFORMS = _BASE | {"assembly", "transforms"}
_RECORDS = _BASE | {"assembly", "store", "records"}
_PLANNING = _RECORDS | {"formats", "layouts", "planning"}
_WORK = _PLANNING | _TRANSFORMS | {"codec", "output", "signals", "work"}
#: Every part of the package (a module or a subpackage) -> the parts that it may import.
MAY_IMPORT: Mapping[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "progress": set(),
    "names": set(),
    "memory": set(),
    "signals": {"errors"},
    "specs": set(),
    "assembly": {"specs"},
    "transforms": _TRANSFORMS,
    "formats": _TRANSFORMS | {"formats"},
    "layouts": _TRANSFORMS | {"layouts"},
    "store": _BASE | {"store"},
    "records": _RECORDS,
    "output": _RECORDS,
    "planning": _PLANNING,
    "codec": _TRANSFORMS | _RECORDS | {"formats", "layouts"},
    "work": _WORK,
    "publishing": _WORK | {"publishing"},
    "runtime": _TRANSFORMS | _RECORDS | {"output", "layouts", "runtime", "integrations"},
    "integrations": _TRANSFORMS | _RECORDS | {"output", "layouts", "runtime", "integrations"},
    "api": _WORK | {"publishing", "runtime", "api"},
    "": {"api", "version"},  # the package itself
    "cli": _WORK | {"", "runtime", "api", "cli"},
    "__main__": {"cli", "signals"},
}


def name_of(path: Path) -> str:
    """``ctconvert.formats.base``; a package's own name for its ``__init__``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node)


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this package that a module imports, wherever in its text."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
                base = ".".join([*parents, *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else base for name in names}
    return frozenset(found & MODULES.keys())


def circles() -> list[list[str]]:
    """Every set of modules that import one another, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports(module)):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1 or module in imports(module):
                found.append(sorted(members))

    for module in MODULES:
        if module not in index:
            visit(module)
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    part = part_of(module)
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {module} may import"
    wrong = {other for other in imports(module) if part_of(other) not in MAY_IMPORT[part]}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_modules_import_one_another() -> None:
    assert circles() == []


def test_nothing_imports_the_command_line() -> None:
    users = {module for module in MODULES if any(part_of(i) == "cli" for i in imports(module))}
    assert all(part_of(module) in ("cli", "__main__") for module in users)


def test_nothing_imports_the_plugin() -> None:
    plugin = "ctconvert.integrations.vllm"
    for module in MODULES:
        if not module.startswith(plugin):
            assert not any(other.startswith(plugin) for other in imports(module)), module


@pytest.mark.parametrize("kind", ["formats", "layouts"])
def test_formats_and_layouts_do_not_import_one_another(kind: str) -> None:
    """Each stands on its base alone; the package's ``__init__`` lists them."""
    package = f"ctconvert.{kind}"
    listed = {other for other in imports(package) if other.startswith(f"{package}.")}
    members = listed - {f"{package}.base"}
    assert len(members) >= 4
    for module in members:
        assert not imports(module) & (members | {package}), module


def test_kernels_know_neither_layouts_nor_files() -> None:
    for module in MODULES:
        if module.startswith("ctconvert.runtime.kernels"):
            parts = {part_of(other) for other in imports(module)}
            assert parts <= _TRANSFORMS | {"runtime"}, module


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_long(module: str) -> None:
    """Kernels may be: one is read as a whole."""
    if "kernels" in module or "triton" in module.rpartition(".")[2]:
        return
    assert len(MODULES[module].read_text().splitlines()) <= 450


# --- starting up ---------------------------------------------------------------------------------

HEAVY = {"torch", "triton", "transformers", "compressed_tensors", "numpy", "pydantic"}
RUN = """
import sys
import ctconvert
example, out = sys.argv[1:]
"""


def loaded_by(code: str, *arguments: object) -> set[str]:
    """The modules that a program of its own has loaded at its end."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import ctconvert",
        "import ctconvert.cli",
        "import ctconvert.api",
        "import ctconvert.integrations.vllm",
        "import ctconvert.planning.make, ctconvert.layouts, ctconvert.formats",
        "import ctconvert.records\nctconvert.records.schema()",
    ],
)
def test_starting_up_is_light(code: str) -> None:
    assert not loaded_by(code) & HEAVY


def test_planning_is_light() -> None:
    """Headers and a config are read: no weights, so no torch."""
    calls = """
assert ctconvert.inspect(example).modules
assert ctconvert.inspect(example, target="cuda").modules[0].layout == "marlin"
assert ctconvert.plan(example, target="triton", fuse=True).modules
assert len(ctconvert.plan(example, target="cuda").digest()) == 64
"""
    assert not loaded_by(RUN + calls, EXAMPLE, "") & HEAVY


def test_verifying_is_light(tmp_path: Path) -> None:
    """Bytes are hashed; only a comparison with a source decodes them."""
    import ctconvert

    ctconvert.repack(EXAMPLE, tmp_path / "out", target="cuda", device="cpu")
    assert not loaded_by(RUN + "ctconvert.verify(out)", "", tmp_path / "out") & HEAVY
