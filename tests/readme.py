"""Parts of the pages for programs: ``readme.py run|test|write``.

``run`` and ``test`` print the README's first two commands, so that CI runs what a reader would;
``write`` brings the tables that come from the registry up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
#: The page of the layouts, which has what was converted too.
LAYOUTS_PAGE = ROOT / "ctconvert" / "layouts" / "README.md"


def commands() -> dict[str, str]:
    """The README's first two code blocks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return {"run": blocks[0].strip(), "test": blocks[1].strip()}


def machines_table() -> str:
    """The targets and what each is for, from the registry."""
    from ctconvert.layouts import MACHINES

    lines = ["| target | for |", "|---|---|"]
    lines += [f"| `{target}` | {machine} |" for target, machine in MACHINES.items()]
    return "\n".join(lines)


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


#: The parts of pages that programs write, each between ``<!-- name -->`` and ``<!-- end -->``.
WRITTEN = {
    README: {"machines": machines_table},
    LAYOUTS_PAGE: {"layouts": layouts_table, "targets": targets_table},
}


def put(text: str, name: str, part: str) -> str:
    """A page's text with one of its written parts replaced."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}{part}\n{found[2]}", text)
    assert count == 1, name
    return text


def written(page: Path) -> str:
    """A page's text with its written parts as they should be."""
    text = page.read_text()
    for name, make in WRITTEN[page].items():
        text = put(text, name, make())
    return text


if __name__ == "__main__":
    if sys.argv[1] == "write":
        for page in WRITTEN:
            page.write_text(written(page))
    else:
        print(commands()[sys.argv[1]])
