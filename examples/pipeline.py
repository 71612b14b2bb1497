"""From the Hub to the Hub in Python: judge, convert, verify, push.

::

    python examples/pipeline.py org/model you/model-triton --target triton

Pushing needs a token: ``hf auth login`` or ``HF_TOKEN``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import ctconvert


def convert(model: str, name: str, target: str) -> None:
    """Raises ctconvert.CtconvertError, before anything is uploaded, where something is wrong."""
    found = ctconvert.doctor(model, target=target)
    for finding in found.findings:
        print(f"{finding.severity}: {finding.module or model}: {finding.message}")
    if found.errors:
        raise ctconvert.CtconvertError(f"{model}: {found.errors} errors, see above")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        made = ctconvert.repack(model, out, target=target)
        print(f"{model}: {made.layouts}")
        ctconvert.verify(out, against=model)
        pushed = ctconvert.push(out, name)
    print(f"ok: {pushed.url}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint: a Hub id or a directory")
    parser.add_argument("name", help="where it goes on the Hub: org/name")
    parser.add_argument("--target", default="triton")
    args = parser.parse_args()
    try:
        convert(args.model, args.name, args.target)
    except ctconvert.CtconvertError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
