"""Where the tests' data lies."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ctconvert"
CHECKPOINTS = ROOT / "tests" / "checkpoints"
GOLDEN = ROOT / "tests" / "golden"
#: The checkpoint of the README.
EXAMPLE = ROOT / "examples" / "smollm2-w4a16-g64"
