"""Parts of the README for programs: ``readme.py run|test|write``.

``run`` and ``test`` print its first two commands, so that CI runs what a reader would; ``write``
brings the tables that come from the registry up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def commands() -> dict[str, str]:
    """The README's first two code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return {"run": blocks[0].strip(), "test": blocks[1].strip()}


def layouts_table() -> str:
    """The layouts table, from the registry."""
    from ctconvert.layouts import LAYOUTS

    lines = ["| layout | takes | writes | read by |", "|---|---|---|---|"]
    for layout in LAYOUTS:
        cells = (f"`{layout.name}`", layout.takes, layout.writes, layout.read_by)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def targets_table() -> str:
    """What each target prefers, in order, from the registry."""
    from ctconvert.layouts import MACHINES, QUANTISED_ACTIVATIONS, TARGETS

    lines = ["| target | for | prefers, in order |", "|---|---|---|"]
    for target, names in TARGETS.items():
        needy = QUANTISED_ACTIVATIONS.get(target, ())
        order = ", ".join(f"`{name}`" + " (1)" * (name in needy) for name in names)
        lines.append(f"| `{target}` | {MACHINES[target]} | {order} |")
    return "\n".join(lines)


#: The parts of the README that programs write, each between ``<!-- name -->`` and ``<!-- end -->``.
WRITTEN = {"layouts": layouts_table, "targets": targets_table}


def put(text: str, name: str, part: str) -> str:
    """A README's text with one of its written parts replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: found[1] + part + found[2], text)
    assert count == 1, name
    return text


def written(text: str) -> str:
    """A README's text with its written parts as they should be."""
    for name, make in WRITTEN.items():
        text = put(text, name, make())
    return text


if __name__ == "__main__":
    if sys.argv[1] == "write":
        README.write_text(written(README.read_text()))
    else:
        print(commands()[sys.argv[1]])
