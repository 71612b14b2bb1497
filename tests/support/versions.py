"""The installed compressed-tensors: any from 0.17 on is read beside, tests judge by the newest."""

from __future__ import annotations

import compressed_tensors
import pytest

#: The release whose own compressors and validators the tests compare with.
JUDGE = (0, 20)
INSTALLED = tuple(int(part) for part in compressed_tensors.__version__.split(".")[:2])


def needs_judge(why: str) -> pytest.MarkDecorator:
    """Skips a comparison with what older releases do otherwise, or not at all."""
    newest = ".".join(map(str, JUDGE))
    reason = f"compressed-tensors {compressed_tensors.__version__}, not {newest}: {why}"
    return pytest.mark.skipif(INSTALLED < JUDGE, reason=reason)
