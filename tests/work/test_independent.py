"""``verify --independent``: compressed-tensors' own decompressors as the judge."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.executors import Inline
from support.paths import CHECKPOINTS
from support.stores import MemoryStore

import ctconvert
from ctconvert.errors import UsageError, VerificationError
from ctconvert.output import Output
from ctconvert.progress import Silent
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.local import LocalStore
from ctconvert.work.verify import verify_independently


@pytest.mark.parametrize(
    ("name", "target", "agree"),
    [
        ("smol-w4a16-g32-asym", "triton", 3),
        ("smol-w4-embed-head-g64", "cuda", 4),
        ("smol-mxfp4a16", "cuda", 3),
        ("smol-w8a8o8-static-sym", "triton", 3),
    ],
)
def test_another_decoder_agrees(name: str, target: str, agree: int, tmp_path: Path) -> None:
    source, out = CHECKPOINTS / name, tmp_path / "out"
    ctconvert.repack(source, out, target=target, fuse=True, device="cpu")
    found = ctconvert.verify(out, against=source, independent=True).independent
    assert found is not None
    assert (found.agree, found.not_judged) == (agree, {})


def test_what_it_cannot_decode_is_counted_with_the_reason(tmp_path: Path) -> None:
    source, out = CHECKPOINTS / "old071-smol-sparse24-bf16", tmp_path / "out"
    ctconvert.repack(source, out, target="cuda", device="cpu")
    found = ctconvert.verify(out, against=source, independent=True).independent
    assert found is not None
    assert found.agree == 0
    assert found.not_judged == {"compressed-tensors does not decode sparse-24-bitmask": 3}


def test_one_wrong_code_is_named(tmp_path: Path) -> None:
    source, out = CHECKPOINTS / "smol-w4a16-g32-asym", tmp_path / "out"
    ctconvert.repack(source, out, target="triton", device="cpu")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    entry = next(e for e in Output.open(out).plan.entries.values() if e.name.endswith("qweight"))
    shard = bytearray(files[entry.file])
    shard[entry.offset + 5] ^= 1
    files[entry.file] = bytes(shard)
    with pytest.raises(VerificationError, match=r"weight\[\d+, \d+\] is .* of \d+ weights differ"):
        verify_independently(
            Output(MemoryStore(files)), Checkpoint(LocalStore(source)), Inline(), Silent()
        )


def test_it_needs_a_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="against=MODEL"):
        ctconvert.verify(tmp_path, independent=True)
