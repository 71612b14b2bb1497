"""What was converted for what: ``covered.py [--write] FOLDER ...``, of checkpoints or of one.

Every checkpoint is converted for every target on the CPU and every code and scale compared with the
source again. Prints a Markdown table, which ``--write`` puts into the page of the layouts: ``ok``;
a number where a target refuses a module, ``part`` where it takes others; the reasons below. What
fails otherwise ends the run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from readme import LAYOUTS_PAGE, put

import ctconvert
from ctconvert.errors import BadInputError
from ctconvert.layouts import TARGETS


@dataclass
class Reasons:
    """Refusals, numbered as they come."""

    found: list[str] = field(default_factory=list)

    def number(self, reason: str) -> str:
        """For a table; the reason without what differs between targets and modules."""
        text = reason.split("; ")[0]
        layout, colon, rest = text.partition(": ")
        text = rest if colon and " " not in layout else text
        if text.startswith("no layout of target"):
            text = "that target has no layout for such weights"
        if text not in self.found:
            self.found.append(text)
        return f"({self.found.index(text) + 1})"


def checkpoints(folders: list[str]) -> list[Path]:
    """The folders that are checkpoints, and those in the others."""
    found = []
    for folder in map(Path, folders):
        inside = [folder] if (folder / "config.json").exists() else sorted(folder.iterdir())
        found += [path for path in inside if (path / "config.json").exists()]
    return found


def cell(source: Path, target: str, reasons: Reasons) -> str:
    """What came of one checkpoint for one target."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = ctconvert.repack(source, out, target=target, device="cpu", keep_unsupported=True)
        ctconvert.verify(out, against=source)
    numbers = dict.fromkeys(reasons.number(item.reason) for item in report.kept)
    if not numbers:
        return "ok"
    return " ".join(["part"] * bool(report.modules) + list(numbers))


def family(architectures: list[str]) -> str:
    names = [name.removesuffix("ForCausalLM") for name in architectures]
    return ", ".join(name.removesuffix("ForConditionalGeneration") for name in names)


def table(sources: list[Path]) -> str:
    reasons = Reasons()
    lines = [f"| architecture | checkpoint | weights | {' | '.join(TARGETS)} |"]
    lines.append("|---" * (3 + len(TARGETS)) + "|")
    rows = []
    for source in sources:
        made_for = family(json.loads((source / "config.json").read_text())["architectures"])
        try:
            found = ctconvert.inspect(source)
        except BadInputError as error:
            text = str(error).split(": ", 1)[-1]
            cells = [reasons.number(text)] * len(TARGETS)
            rows.append((made_for, source.name, "not read", *cells))
            continue
        weights = ", ".join(sorted({module.weights for module in found.modules}))
        cells = [cell(source, target, reasons) for target in TARGETS]
        rows.append((made_for, source.name, weights, *cells))
    lines += [f"| {' | '.join(row)} |" for row in sorted(rows)]
    lines += ["", *(f"({number}) {text}  " for number, text in enumerate(reasons.found, 1))]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    made = table(checkpoints([text for text in arguments if text != "--write"]))
    if "--write" in arguments:
        LAYOUTS_PAGE.write_text(put(LAYOUTS_PAGE.read_text(), "covered", made))
    else:
        print(made)


if __name__ == "__main__":
    main(sys.argv[1:])
