"""Outputs that are changed behind the manifest's back, with hashes that match all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3
from msgspec.structs import replace

from ctconvert.records import Manifest
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.local import LocalStore


@contextmanager
def flip_bit(out: Path, tensor: str, byte: int, bit: int) -> Iterator[None]:
    """Flips a bit of a tensor and makes the manifest agree; puts both back at the end."""
    manifest = Manifest.load(LocalStore(out))
    entry = manifest.plan.entries[tensor]
    file = out / entry.file
    sound, sound_manifest = file.read_bytes(), (out / MANIFEST).read_bytes()
    data = bytearray(sound)
    data[entry.offset + byte] ^= 1 << bit
    digest = blake3(data[entry.offset : entry.end]).hexdigest()
    changed = replace(manifest, tensors=manifest.tensors | {tensor: digest})
    try:
        file.write_bytes(data)
        (out / MANIFEST).write_bytes(changed.dump())
        yield
    finally:
        file.write_bytes(sound)
        (out / MANIFEST).write_bytes(sound_manifest)
