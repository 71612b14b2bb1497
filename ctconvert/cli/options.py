"""Arguments and options that several verbs share, and the texts they are read from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ctconvert.errors import UsageError


def directories(incomplete: str) -> list[str]:
    """What completes a directory's name."""
    path = Path(incomplete)
    folder = path if incomplete.endswith("/") or not incomplete else path.parent
    try:
        found = [item for item in folder.expanduser().iterdir() if item.is_dir()]
    except (OSError, RuntimeError):
        return []
    begun = "" if folder == path else path.name
    lead = incomplete[: len(incomplete) - len(begun)]
    names = sorted(item.name for item in found if item.name.startswith(begun))
    return [f"{lead}{name}/" for name in names if begun or not name.startswith(".")]


def targets(incomplete: str) -> list[str]:
    """What completes a target."""
    from ctconvert.layouts import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def pattern_layouts(incomplete: str) -> list[str]:
    """What completes the layout of ``PATTERN=LAYOUT``."""
    from ctconvert.layouts import LAYOUTS

    pattern, equals, begun = incomplete.rpartition("=")
    names = [layout.name for layout in LAYOUTS if layout.name.startswith(begun)]
    return [f"{pattern}={name}" for name in names] if equals else []


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, or a Hub id: org/name[@revision].",
        autocompletion=directories,
    ),
]
Out = Annotated[
    Path,
    typer.Argument(
        metavar="OUT",
        help="A converted checkpoint: a directory, or a Hub id.",
        autocompletion=directories,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
JsonEvents = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|-", help="Write what happens to a file or stdout, a JSON object a line."
    ),
]
Device = Annotated[
    str,
    typer.Option(help="Where transforms run: auto, cpu, cuda (all GPUs), cuda:1 (that one), xpu."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="[bfloat16|float16]",
        help="Of the activations, which some layouts depend on; config.json's by default.",
    ),
]
KernelDevice = Annotated[str, typer.Option(help="Where kernels run: auto, cpu, cuda, cuda:1, xpu.")]
Workers = Annotated[int | None, typer.Option(help="Threads that read, transform and write.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue a killed run from what it finished.")
]
#: The most digits that are read as a number; Python itself refuses a few thousand.
_DIGITS = 40


def parse_size(text: str) -> int:
    """Bytes of ``5GB``, ``500MB``, ``2GiB`` or a plain number.

    Raises:
        UsageError: it is none of these, or no size that a file can have.
    """
    match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or (match[4] and not match[3]):
        raise UsageError(f"{shortened(text)!r} is no size; write for instance 5GB, 500MB or 2GiB")
    whole, part = match[1], match[2] or ""
    unit = (1024 if match[4] else 1000) ** " KMGT".index(match[3].upper() or " ")
    count = 2**63 if len(whole + part) > _DIGITS else int(whole + part) * unit // 10 ** len(part)
    if count < 1:
        raise UsageError(f"{text!r}: a shard must hold at least one byte")
    if count >= 2**63:
        raise UsageError(f"{shortened(text)!r}: no shard is so large; write for instance 5GB")
    return count


def parse_layouts(texts: list[str]) -> dict[str, str]:
    """``PATTERN=LAYOUT`` options as a dictionary, in order.

    Raises:
        UsageError: one has no ``=``.
    """
    found = {}
    for text in texts:
        pattern, equals, name = text.rpartition("=")
        if not equals or not pattern or not name:
            raise UsageError(f"--layout {text!r}: write it as PATTERN=LAYOUT")
        found[pattern] = name
    return found


def parse_part(text: str) -> tuple[int, int]:
    """The two numbers of ``I/N``.

    Raises:
        UsageError: they are none.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None:
        raise UsageError(f"--part {shortened(text)!r}: write it as I/N, for instance 2/4")
    return int(match[1]), int(match[2])


def parse_counts(
    text: str, option: str = "--m", of: str = "tokens", example: str = "1,16,256"
) -> tuple[int, ...]:
    """Numbers separated by commas, as ``option`` takes them.

    Raises:
        UsageError: they are not.
    """
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text) or any(
        len(item) > _DIGITS for item in text.split(",")
    ):
        raise UsageError(
            f"{option} {shortened(text)!r}: write numbers of {of} separated by commas: {example}"
        )
    return tuple(map(int, text.split(",")))


def shortened(text: str) -> str:
    """The beginning of a text that may be of any length."""
    return text if len(text) <= _DIGITS else f"{text[:_DIGITS]}..."
