"""Proves an output: its bytes against its manifest, its codes and scales against the source."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from ctconvert.checkpoint import manifest
from ctconvert.checkpoint.header import MAX_HEADER, TensorEntry
from ctconvert.checkpoint.source import LocalFiles, Reader, Source, read_header
from ctconvert.description import Description
from ctconvert.errors import BadInputError, UsageError, VerificationError
from ctconvert.progress import Progress
from ctconvert.specs import TensorSpec

_CHUNK = 8 << 20


class Output:
    """A converted checkpoint, opened by its manifest and headers.

    Raises:
        UsageError: there is no such directory.
        VerificationError: the manifest or a header is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such directory")
        self.folder = folder
        self.manifest: dict[str, Any] = manifest.load(folder)
        self.files = LocalFiles(folder)
        self.sizes = self.files.sizes()
        self.tensors: dict[str, TensorEntry] = {}
        for name, record in self.manifest["files"].items():
            if name not in self.sizes:
                raise VerificationError(f"{folder / name}: missing")
            if self.sizes[name] != record["size"]:
                raise VerificationError(
                    f"{folder / name}: {self.sizes[name]} bytes, expected {record['size']}"
                )
            if name.endswith(".safetensors"):
                self._open_shard(name, record["sha256"])
        stray = [
            name
            for name in self.sizes
            if name.endswith((".safetensors", ".safetensors.index.json"))
            and name not in self.manifest["files"]
        ]
        if stray:
            raise VerificationError(f"{folder / stray[0]}: not part of this checkpoint; remove it")
        for name, record in self.records().items():
            entry = self.tensors.get(name)
            spec = TensorSpec(record["dtype"], tuple(record["shape"]))
            if entry is None or entry.file != record["file"] or entry.spec != spec:
                raise VerificationError(f"tensor {name}: not as the manifest says, {spec}")

    def _open_shard(self, name: str, digest: str) -> None:
        length = int.from_bytes(self.files.read(name, 0, 8), "little")
        # a damaged length must not make us read a file of any size
        header = self.files.read(name, 0, 8 + min(length, MAX_HEADER))
        if hashlib.sha256(header).hexdigest() != digest:
            raise VerificationError(f"{self.folder / name}: damaged: its header has changed")
        try:
            entries = read_header(self.files, self.sizes, name)
        except BadInputError as error:
            raise VerificationError(str(error)) from None
        self.tensors |= {entry.name: entry for entry in entries}

    def records(self) -> dict[str, dict[str, Any]]:
        """The manifest's record of every tensor, by full name."""
        found = dict(self.manifest["tensors"])
        for module in self.manifest["modules"].values():
            found |= module["tensors"]
        return found


def verify_files(folder: Path, progress: Progress, workers: int) -> dict[str, Any]:
    """Checks every byte of an output against its manifest, in one pass.

    Returns:
        the report: tensors, files and bytes checked.

    Raises:
        VerificationError: something differs; the message names the tensor or the file.
    """
    output = Output(folder)
    records = output.records()
    progress.phase("verifying", sum(entry.nbytes for entry in output.tensors.values()))
    for name, record in output.manifest["files"].items():
        whole = not name.endswith(".safetensors")
        if whole and output.files.sha256(name) != record["sha256"]:
            raise VerificationError(f"{folder / name}: damaged: its contents have changed")
    with Reader(folder) as reader:
        reader.add(name for name in output.manifest["files"] if name.endswith(".safetensors"))

        def check(entry: TensorEntry, stop: threading.Event) -> None:
            digest = hashlib.sha256()
            buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
            for start in range(0, entry.nbytes, _CHUNK):
                if stop.is_set():
                    return
                part = buffer[: min(_CHUNK, entry.nbytes - start)]
                reader.read_into(entry.file, entry.offset + start, part)
                digest.update(part)
                progress.advance(len(part))
            if digest.hexdigest() != records[entry.name]["sha256"]:
                raise VerificationError(
                    f"tensor {entry.name} in {folder / entry.file}: damaged: its bytes have changed"
                )

        for_each(sorted(output.tensors.values(), key=_file_order), check, workers)
    return {
        "checkpoint": str(folder),
        "tensors": len(output.tensors),
        "modules": len(output.manifest["modules"]),
        "files": len(output.manifest["files"]) + 1,
        "bytes": sum(output.sizes[name] for name in output.manifest["files"]),
    }


def _same_meaning(output: Output, description: Description) -> None:
    """The same codes can mean other weights; raises VerificationError where they would."""
    for name, record in output.manifest["modules"].items():
        spec = description.modules[record["parts"][0]["name"]].experts[0].spec
        for what in ("bits", "symmetric", "group_size"):
            if record[what] != getattr(spec, what):
                raise VerificationError(
                    f"module {name}: {what} is {record[what]} in the output and "
                    f"{getattr(spec, what)} in {description.source.files.where}"
                )


def _file_order(entry: TensorEntry) -> tuple[str, int]:
    return entry.file, entry.offset


def for_each(
    items: Iterable[Any], work: Callable[[Any, threading.Event], None], workers: int
) -> None:
    """Runs ``work(item, stop)`` over threads; the first error stops the rest and is raised."""
    stop = threading.Event()
    queue = iter(list(items))
    lock = threading.Lock()

    def drain() -> None:
        while not stop.is_set():
            with lock:
                item = next(queue, None)
            if item is None:
                return
            done = False
            try:
                work(item, stop)
                done = True
            finally:
                if not done:
                    stop.set()

    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(drain) for _ in range(workers)}
        try:
            while futures:  # wakes often, so that Ctrl-C is noticed
                done, futures = wait(futures, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            stop.set()


def verify_against(
    folder: Path, source: Source, progress: Progress, workers: int
) -> dict[str, Any]:
    """Inverts every layout of an output and compares it with the source, bit for bit.

    Args:
        folder: the output.
        source: the checkpoint it was made from, opened from a local directory.
        progress: told of source bytes done.
        workers: threads.

    Returns:
        the report: modules and tensors compared.

    Raises:
        VerificationError: a code, scale, zero point or copied tensor differs, is missing, or is
            too many; the message names the module or the tensor.
    """
    from ctconvert.comparison import Comparison

    if not isinstance(source.files, LocalFiles):
        raise UsageError(f"{source.files.where}: download the source before comparing with it")
    output = Output(folder)
    with Reader(folder) as made, Reader(source.files.root) as original:
        made.add(name for name in output.manifest["files"] if name.endswith(".safetensors"))
        original.add(source.shards)
        comparison = Comparison(output, source, made, original, progress)
        _same_meaning(output, comparison.description)
        progress.phase("comparing", comparison.total)
        for_each(comparison.work, lambda item, stop: item(stop), workers)
    return {
        "checkpoint": str(folder),
        "source": source.files.where,
        "modules": len(output.manifest["modules"]),
        "copied_tensors": len(output.manifest["tensors"]),
        "source_bytes": comparison.total,
    }
