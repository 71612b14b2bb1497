"""Parts of the README for programs: ``readme.py run|test|layouts``.

``run`` and ``test`` print its first two commands, so that CI runs what a reader would; ``layouts``
prints the layouts table that it should hold.
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
    from ctconvert.layouts import LAYOUTS, TARGETS

    lines = ["| layout | takes | writes | read by | targets |", "|---|---|---|---|---|"]
    for layout in LAYOUTS:
        targets = ", ".join(name for name, names in TARGETS.items() if layout.name in names)
        cells = (f"`{layout.name}`", layout.takes, layout.writes, layout.read_by, targets)
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for target, names in TARGETS.items():
        lines.append(f"- `{target}`: {', then '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(layouts_table() if sys.argv[1] == "layouts" else commands()[sys.argv[1]])
