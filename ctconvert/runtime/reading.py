"""Tensors from files to a device, as fast as pages come.

Threads read blocks of files into pinned buffers, two each, and have them copied on a stream of
their own while they read the next. A tensor's memory is its own; a stack of experts is one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from ctconvert.store.base import CHUNK, Store
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms.device import on_device
from ctconvert.transforms.dtypes import from_bytes

#: The most threads that read: several are needed to fill the bus from the page cache.
READERS = 8


@dataclass
class _Block:
    """A range of a file, and the tensors' bytes in it, each with where it begins in the block."""

    file: str
    offset: int
    length: int = 0
    targets: list[tuple[torch.Tensor, int]] = field(default_factory=list)


def read(
    store: Store, entries: Iterable[TensorEntry], device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors of a store's files, each in memory of its own on the device, by full name.

    Raises:
        ConversionError: a file cannot be read, or ends early.
        torch.OutOfMemoryError: the device has no memory left.
    """
    entries = sorted(entries, key=lambda entry: (entry.file, entry.offset))
    raw = [torch.empty(entry.nbytes, dtype=torch.uint8, device=device) for entry in entries]
    blocks = deque(_blocks(entries, raw))
    backend = torch.get_device_module(device)
    before = backend.current_stream(device) if device.type != "cpu" else None
    count = min(READERS, os.cpu_count() or 1, len(blocks))
    if count:
        with ThreadPoolExecutor(count) as threads:
            try:
                for done in [
                    threads.submit(_fill, store, blocks, device, before) for _ in range(count)
                ]:
                    done.result()
            finally:
                blocks.clear()  # where one failed, the others end
    return {e.name: from_bytes(data, e.spec) for e, data in zip(entries, raw, strict=True)}


def _blocks(entries: list[TensorEntry], raw: list[torch.Tensor]) -> Iterator[_Block]:
    """Cuts what lies together in a file into blocks of at most :data:`CHUNK` bytes."""
    block = _Block("", 0)
    for entry, data in zip(entries, raw, strict=True):
        done = 0
        while done < entry.nbytes:
            at = entry.offset + done
            follows = block.file == entry.file and block.offset + block.length == at
            if not follows or block.length == CHUNK:
                if block.length:
                    yield block
                block = _Block(entry.file, at)
            step = min(entry.nbytes - done, CHUNK - block.length)
            block.targets.append((data[done : done + step], block.length))
            block.length += step
            done += step
    if block.length:
        yield block


def _fill(store: Store, blocks: deque[_Block], device: torch.device, before: Any) -> None:
    """Reads blocks until none is left; ``before`` is the stream that the tensors' memory is of."""
    backend = torch.get_device_module(device)
    pinned = device.type != "cpu"
    with on_device(device):
        stream = backend.Stream()
        if before is not None:
            stream.wait_stream(before)  # what had that memory before may still be at work
        slots = [
            (torch.empty(CHUNK, dtype=torch.uint8, pin_memory=pinned), backend.Event())
            for _ in range(2)
        ]
        try:
            while True:
                (buffer, copied), other = slots
                try:
                    block = blocks.popleft()
                except IndexError:
                    return
                copied.synchronize()
                store.read_into(block.file, block.offset, buffer[: block.length].numpy().data)
                with backend.stream(stream):
                    for target, start in block.targets:
                        part = buffer[start : start + target.numel()]
                        target.copy_(part, non_blocking=True)
                    copied.record(stream)
                slots = [other, (buffer, copied)]
        finally:
            for _, copied in slots:
                copied.synchronize()
