"""A source checkpoint: a directory or a Hub repository, opened by its headers alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctconvert.checkpoint.header import TensorEntry, header_length, parse_header
from ctconvert.errors import BadInputError, ConversionError, UsageError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors$")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")
_PIECE = 8 << 20
#: Other tools' weights: never converted, never copied.
OTHER_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
    ".lock",
    ".incomplete",
)


class Files(ABC):
    """The files of a checkpoint, wherever they are: names, sizes, byte ranges."""

    #: What the user calls it, for messages.
    where: str
    #: Its name in the manifest: a Hub id, or the directory's own name.
    id: str
    #: The Hub commit, or None.
    revision: str | None

    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Every file by its path relative to the checkpoint, with its size in bytes."""

    @abstractmethod
    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a file; fewer where it ends early."""

    def path(self, name: str) -> str:
        """The file for messages."""
        return f"{self.where}/{name}"

    def pieces(self, name: str) -> Iterator[bytes]:
        """A whole file, a few MB at a time."""
        offset = 0
        while data := self.read(name, offset, _PIECE):
            yield data
            offset += len(data)

    def sha256(self, name: str) -> str:
        """The hash of a file, in hexadecimal."""
        digest = hashlib.sha256()
        for data in self.pieces(name):
            digest.update(data)
        return digest.hexdigest()


class LocalFiles(Files):
    """A directory."""

    def __init__(self, root: Path, id: str | None = None, revision: str | None = None) -> None:
        self.root = root
        self.where = str(root)
        self.id = id or root.resolve().name
        self.revision = revision

    def sizes(self) -> Mapping[str, int]:
        found = {}
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
            for name in sorted(names):
                path = Path(folder) / name
                if path.is_file():  # leaves out dangling links and sockets
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with (self.root / name).open("rb") as file:
            file.seek(offset)
            return file.read() if length is None else file.read(length)


class HubFiles(Files):
    """A Hub repository read by byte ranges, for planning without a download."""

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, HfFileSystem

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        self.where = f"{repo}@{revision}" if revision else repo
        self.id = repo
        self.revision = info.sha
        self._sizes = {item.rfilename: item.size or 0 for item in info.siblings or []}
        self._system = HfFileSystem()

    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = f"{self.id}@{self.revision}/{name}"
        end = self._sizes[name] if length is None else min(offset + length, self._sizes[name])
        with _hub_failures(self.where):
            # without a cache only the range itself is fetched, not megabytes of weights after it
            return self._system.cat_file(path, start=offset, end=end, cache_type="none")


def open_files(model: str, *, download: bool) -> Files:
    """The files of a directory or a Hub id (``org/name``, ``org/name@revision``).

    Args:
        model: what the user named.
        download: whether a Hub repository's weights will be read in full; if not, only the
            ranges that are asked for are fetched.

    Raises:
        UsageError: there is no such directory and it is not a Hub id that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return LocalFiles(path)
    if path.exists():
        raise UsageError(f"{model} is a file; name the checkpoint's directory or a Hub id")
    if model.startswith((".", "/", "~")) or not _HUB_ID.match(model):
        raise UsageError(f"{model}: no such directory, and not a Hub id (org/name[@revision])")
    return _open_hub(model, download)


def _open_hub(model: str, download: bool) -> Files:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repo, _, revision = model.partition("@")
    with _hub_failures(model):
        if not download:
            try:
                return HubFiles(repo, revision or None)
            except (HTTPError, OSError) as error:
                if isinstance(error, HfHubHTTPError):  # the Hub has answered
                    raise
        ignored = [f"*{end}" for end in OTHER_WEIGHTS if "safetensors" not in end]
        found = snapshot_download(
            repo,
            revision=revision or None,
            ignore_patterns=ignored,
            local_files_only=not download,  # it cannot be reached: what an earlier run has left
        )
    root = Path(found)
    return LocalFiles(root, id=repo, revision=root.name)


@contextmanager
def _hub_failures(model: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of whichever HTTP library this version uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
        return
    except GatedRepoError:
        reason = "the repository is gated: accept its terms and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = "no such directory, and no such repository on the Hub (or log in: `hf auth login`)"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {model.partition('@')[2]!r}"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "no such directory, and the Hub cannot be reached and holds no cached copy"
    except (HFValidationError, HTTPError, OSError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        reason = f"no such directory, and the Hub gave: {first}"
    raise UsageError(f"{model}: {reason}") from None


@dataclass
class Source:
    """An open checkpoint. ``tensors`` is in file and offset order; ``config`` is config.json."""

    files: Files
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    shards: list[str]
    sizes: Mapping[str, int]

    @classmethod
    def open(cls, files: Files) -> Source:
        """Reads config.json, the index and every header.

        Raises:
            BadInputError: one of them is missing, damaged or contradicts another.
        """
        sizes = files.sizes()
        config = _json_object(files, sizes, "config.json")
        weight_map = None
        if INDEX in sizes:
            weight_map = _weight_map(files, sizes)
            shards = sorted(set(weight_map.values()))
        else:
            shards = _shards_without_index(files, sizes)
        tensors: dict[str, TensorEntry] = {}
        for shard in shards:
            for entry in read_header(files, sizes, shard):
                if weight_map is not None and weight_map.get(entry.name) != shard:
                    listed = weight_map.get(entry.name)
                    raise BadInputError(
                        f"{files.path(shard)}: holds tensor {entry.name}, which the index "
                        + (f"places in {listed}" if listed else "does not list")
                        + "; the index and the shards do not belong together"
                    )
                if entry.name in tensors:
                    raise BadInputError(
                        f"{files.path(shard)}: tensor {entry.name} is also in "
                        f"{tensors[entry.name].file}"
                    )
                tensors[entry.name] = entry
        for name, shard in (weight_map or {}).items():
            if name not in tensors:
                raise BadInputError(
                    f"{files.path(INDEX)}: places tensor {name} in {shard}, which does not hold it"
                )
        return cls(files, config, tensors, shards, sizes)

    def side_files(self) -> list[str]:
        """Files to copy beside the weights: tokenizer, generation config, chat template, ..."""
        made = ("config.json", "ctconvert.json")
        return [
            name
            for name in self.sizes
            if not name.endswith(OTHER_WEIGHTS)
            and name not in made
            and not any(part.startswith(".") for part in name.split("/"))
        ]

    def values(self, entries: Iterable[TensorEntry]) -> dict[str, bytes]:
        """The bytes of few-element tensors, neighbouring ones read together."""
        found: dict[str, bytes] = {}
        run: list[TensorEntry] = []

        def flush() -> None:
            if not run:
                return
            first = run[0].offset
            end = run[-1].offset + run[-1].nbytes
            data = self.files.read(run[0].file, first, end - first)
            for entry in run:
                found[entry.name] = data[entry.offset - first :][: entry.nbytes]

        for entry in sorted(entries, key=lambda item: (item.file, item.offset)):
            near = run and run[-1].file == entry.file and entry.offset - run[-1].offset < 1 << 16
            if not near:
                flush()
                run = []
            run.append(entry)
        flush()
        return found


def _json_object(files: Files, sizes: Mapping[str, int], name: str) -> dict[str, Any]:
    if name not in sizes:
        raise BadInputError(f"{files.where}: no {name}; name a checkpoint's directory")
    try:
        value = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{files.path(name)}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInputError(f"{files.path(name)}: not a JSON object")
    return value


def _weight_map(files: Files, sizes: Mapping[str, int]) -> dict[str, str]:
    where = files.path(INDEX)
    weight_map = _json_object(files, sizes, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{where}: no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise BadInputError(f"{where}: tensor {name}: {file!r} is no safetensors file")
        if file.startswith("/") or "\\" in file or ".." in file.split("/"):
            raise BadInputError(
                f"{where}: tensor {name}: {file!r} is outside the checkpoint's directory"
            )
        if file not in sizes:
            raise BadInputError(
                f"{where}: names {file}, which is not there; the download is incomplete"
            )
    return weight_map


def _shards_without_index(files: Files, sizes: Mapping[str, int]) -> list[str]:
    if "model.safetensors" in sizes:
        return ["model.safetensors"]
    found = sorted(n for n in sizes if n.endswith(".safetensors") and "/" not in n)
    if not found:
        raise BadInputError(f"{files.where}: no safetensors files")
    numbered = [match for match in map(_SHARD.match, found) if match]
    if len(found) == 1 and not numbered:
        return found
    if len({(match[1], match[3]) for match in numbered}) != 1 or len(numbered) != len(found):
        raise BadInputError(
            f"{files.where}: {len(found)} safetensors files ({', '.join(found[:3])}, ...) and no "
            f"{INDEX} to say which belong together"
        )
    have = {int(match[2]) for match in numbered}
    missing = sorted(set(range(1, int(numbered[0][3]) + 1)) - have)
    if missing:
        name = f"{numbered[0][1]}-{missing[0]:05}-of-{numbered[0][3]}.safetensors"
        raise BadInputError(f"{files.where}: shard {name} is missing; the download is incomplete")
    return found


def read_header(files: Files, sizes: Mapping[str, int], name: str) -> list[TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
        BadInputError: the file is truncated or its header is damaged.
    """
    where = files.path(name)
    length = header_length(files.read(name, 0, 8), sizes[name], where)
    return parse_header(files.read(name, 8, length), sizes[name], name, where)


class Reader:
    """Reads tensors of a local checkpoint into memory of its own; safe to share by threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def add(self, names: Iterable[str]) -> None:
        """Opens files ahead of the threads that will read them."""
        for name in names:
            if name not in self._open:
                self._open[name] = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from a file.

        Raises:
            ConversionError: the file ends early (it changed after its header was read), or the
                file system cannot read it.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._open[name], [buffer[done:]], offset + done)
            except OSError as error:
                raise ConversionError(
                    f"{self.root / name}: cannot read: {error.strerror}"
                ) from None
            if count == 0:
                raise ConversionError(
                    f"{self.root / name}: ends at byte {offset + done}; it changed while it was "
                    "being read"
                )
            done += count

    def tensor(self, entry: TensorEntry) -> torch.Tensor:
        """One tensor, on the CPU."""
        import torch

        from ctconvert.dtypes import from_bytes

        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        if entry.nbytes:
            self.read_into(entry.file, entry.offset, data.numpy().data)
        return from_bytes(data, entry.spec)
