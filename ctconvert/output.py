"""A checkpoint that ctconvert made, opened by its manifest."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from ctconvert.errors import BadInputError, UsageError, VerificationError
from ctconvert.names import nearest_directory
from ctconvert.records import FileRecord, Manifest, Shard
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.hub import home_path
from ctconvert.store.local import LocalStore
from ctconvert.store.places import recover
from ctconvert.store.safetensors import read_header

#: Files that may stand beside a checkpoint's own, as hidden ones may: no loader takes them for a
#: part of it.
_TOLERATED = {"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", ".gitattributes"}


class Output:
    """A converted or restored checkpoint; sizes and headers are as its manifest says.

    Args:
        store: where it is.
        whole: whether all of its files are there, or its weights alone, as in a cache.

    Raises:
        VerificationError: the manifest or a header is damaged, a file is missing or too many.
    """

    def __init__(self, store: Store, whole: bool = True) -> None:
        self.store = store
        self.whole = whole
        with closing(store):  # it can be used again: no file is held open meanwhile
            self.manifest = Manifest.load(store)
            self.plan = self.manifest.plan
            self._check()

    def _check(self) -> None:
        store = self.store
        sizes = store.sizes()
        for record in self._records:
            if record.name not in sizes:
                reason = store.left_out().get(record.name)
                raise VerificationError(
                    f"{store.path(record.name)}: {reason or 'missing'}",
                    file=store.path(record.name),
                )
            if sizes[record.name] != record.size:
                raise VerificationError(
                    f"{store.path(record.name)}: {sizes[record.name]} bytes, "
                    f"expected {record.size}",
                    file=store.path(record.name),
                )
        for shard in self.plan.shards:
            header = self.plan.header(shard)
            if store.read(shard.name, 0, len(header)) != header:
                raise VerificationError(
                    f"{store.path(shard.name)}: damaged: its header has changed"
                    f"{self._changed(shard)}",
                    file=store.path(shard.name),
                )
        if stray := strays(store, self.manifest):
            raise VerificationError(
                f"{store.path(stray[0])}: not part of this checkpoint; remove it",
                file=store.path(stray[0]),
            )

    def _changed(self, shard: Shard) -> str:
        """The first tensor that a shard's header has otherwise than the plan, for a message."""
        try:
            found = {one.name: one for one in read_header(self.store, shard.name).tensors}
        except BadInputError:
            return ""
        for name in shard.tensors:
            if name not in found:
                return f": it lacks tensor {name}"
            if found[name] != self.plan.entries[name]:
                spec = self.plan.entries[name].spec
                return f": tensor {name} is {found[name].spec}, not {spec}, or lies elsewhere"
        return ""

    @classmethod
    def open(cls, out: str | Path) -> Output:
        """The checkpoint in a directory, brought back where a killed run has left it aside.

        Raises:
            UsageError: there is no such directory.
            VerificationError: as for the class.
            ConversionError: it cannot be brought back.
        """
        path = home_path(out)
        recover(path)
        if not path.is_dir():
            raise UsageError(f"{out}: no such directory{nearest_directory(path)}")
        return cls(LocalStore(path))

    @property
    def where(self) -> str:
        return self.store.where

    def check_unchanged(self) -> None:
        """Made sure of when it was read, as another may have taken its place meanwhile.

        Raises:
            ConversionError: a file is no longer the one that was opened.
        """
        self.store.check_unchanged([MANIFEST, *(record.name for record in self._records)])

    @property
    def _records(self) -> list[FileRecord]:
        shards = {shard.name for shard in self.plan.shards}
        return [record for record in self.manifest.files if self.whole or record.name in shards]

    def whole_files(self) -> list[FileRecord]:
        """The files whose hash is of the whole: all but the shards."""
        shards = {shard.name for shard in self.plan.shards}
        return [record for record in self.manifest.files if record.name not in shards]


def strays(store: Store, manifest: Manifest) -> list[str]:
    """What stands in a checkpoint's directory and is not in its manifest."""
    known = manifest.file_records
    return [
        name
        for name in [*store.sizes(), *store.left_out()]
        if name not in known and name != MANIFEST and name not in _TOLERATED
    ]
