"""A Hub repository as a store, and what a user's MODEL names: a directory or a Hub id."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from ctconvert.errors import BadInputError, ConversionError, UsageError
from ctconvert.names import nearest_directory
from ctconvert.specs import Size
from ctconvert.store.answers import hub_failures, redact_logs
from ctconvert.store.base import CHUNK, Store
from ctconvert.store.checkpoint import OTHER_WEIGHTS
from ctconvert.store.local import LocalStore
from ctconvert.store.remote import Remote
from ctconvert.store.spool import Spool
from ctconvert.version import __version__

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

LOG = logging.getLogger("ctconvert")
#: ``org/name`` or ``org/name@revision``.
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")


_Commit = Annotated[str, Meta(pattern="^[0-9a-f]{40}$")]


class HubFile(Struct, frozen=True):
    """A file of a commit: its size and what the Hub says its hash is.

    ``blob`` is git's name of it (of a file stored with LFS: of the pointer to it), ``sha256`` that
    of a file stored with LFS.
    """

    size: Size
    blob: str | None = None
    sha256: str | None = None


class HubStore(Store):
    """A commit on the Hub, read by byte ranges; from the local cache where that has a file.

    Files read as a whole are compared with the Hub's hash at once, those that a conversion reads
    (:meth:`keep_in`) by :meth:`check_sha256`.

    Args:
        repo: ``org/name``.
        commit: the commit's hash.
        where: what the user called it.
        files: every file of it by name.
    """

    at_once = 8

    def __init__(self, repo: str, commit: str, where: str, files: Mapping[str, HubFile]) -> None:
        self.where = where
        self.id = repo
        self.revision = commit
        #: Every file, hidden ones too.
        self.files = files
        visible = [name for name in files if not any(p.startswith(".") for p in name.split("/"))]
        visible.sort(key=lambda name: (name.split("/")[:-1], name))  # as a directory is walked
        self._sizes = {name: files[name].size for name in visible}
        self._remote = Remote(repo, commit, where)
        self._spool: Spool | None = None
        self._whole: dict[str, bytes] = {}
        self._cached: dict[str, Path | None] = {}
        #: What was read of files before they were there as a whole, to compare it then.
        self._early: dict[str, list[tuple[int, int, bytes]]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, repo: str, revision: str | None) -> HubStore:
        """Asks the Hub what there is; raises what huggingface_hub raises."""
        return cls.described(repo, revision)[0]

    @classmethod
    def described(cls, repo: str, revision: str | None) -> tuple[HubStore, ModelInfo]:
        """:meth:`open`, and all that the Hub answered."""
        where = f"{repo}@{revision}" if revision else repo
        with _described(where):
            info = model_info(repo, revision)
            commit = msgspec.convert(info.sha, _Commit)
            files = {
                msgspec.convert(file.rfilename, str): msgspec.convert(
                    {
                        "size": file.size,
                        "blob": file.blob_id,
                        "sha256": file.lfs.sha256 if file.lfs else None,
                    },
                    HubFile,
                )
                for file in info.siblings or []
            }
        for name in files:
            if not _is_place(name):
                raise BadInputError(
                    f"{where}: holds a file named {name!r}, which is no place in it"
                )
        return cls(repo, commit, where, files), info

    def __getstate__(self) -> tuple[str, str, str, Mapping[str, HubFile]]:
        return self.id, self.revision or "", self.where, self.files

    def __setstate__(self, state: tuple[str, str, str, Mapping[str, HubFile]]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def sizes(self) -> Mapping[str, int]:
        return self._sizes

    def fingerprint(self, name: str) -> str:
        """A commit's files never change."""
        return f"{self.revision}-{self._sizes[name]}"

    def stated_sha256(self, name: str) -> str | None:
        return self.files[name].sha256

    # --- reading ----------------------------------------------------------------------------------

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        file = self.files[name]
        if offset + len(buffer) > file.size:
            raise ConversionError(
                f"{self.path(name)}: ends at byte {file.size}", file=self.path(name)
            )
        if (data := self._small(name)) is not None:
            buffer[:] = data[offset : offset + len(buffer)]
        elif (path := self._in_cache(name)) is not None:
            _fill(buffer, _ranges_of(path, offset, len(buffer)))
        elif self._spool is not None:
            self._spool.read_into(name, file.size, offset, buffer)
        else:
            _fill(buffer, self._remote.stream(name, offset, len(buffer)))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = super().read(name, offset, length)
        if len(data) == self._sizes[name]:
            self._check_whole(name, data)
        elif self._spool is None:
            early = (offset, len(data), hashlib.sha256(data).digest())
            self._early.setdefault(name, []).append(early)
        return data

    def pieces(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[memoryview]:
        left = self._sizes[name] - offset if length is None else length
        near = self._spool is not None or self._small(name) or self._in_cache(name)
        if near or left <= CHUNK:
            yield from super().pieces(name, offset, left)
            return
        # one request for all of it
        stream = self._remote.stream(name, offset, left)
        buffer = memoryview(bytearray(CHUNK))
        rest = memoryview(b"")
        while left > 0:
            part = buffer[: min(CHUNK, left)]
            rest = _fill(part, stream, rest)
            yield part
            left -= len(part)

    def _small(self, name: str) -> bytes | None:
        """A file that git itself stores, fetched as a whole; None of one stored with LFS."""
        if self.files[name].sha256 is not None:
            return None
        with self._lock:
            if name not in self._whole:
                size, path = self.files[name].size, self._in_cache(name)
                data = bytearray(size)
                source = self._remote.stream(name, 0, size) if path is None else _ranges_of(path)
                _fill(memoryview(data), source)
                self._check_whole(name, data)
                self._whole[name] = bytes(data)
            return self._whole[name]

    def _in_cache(self, name: str) -> Path | None:
        if name not in self._cached:
            self._cached[name] = cached_file(self.id, self.revision, name, self._sizes.get(name))
        return self._cached[name]

    # --- a conversion's reading -------------------------------------------------------------------

    def keep_in(self, folder: Path) -> bool:
        self._remote.stop.clear()
        self._spool = Spool(folder, self._remote.stream)
        return True

    def release(self, name: str) -> None:
        if self._spool is not None:
            self._spool.release(name)

    def close(self) -> None:
        if self._spool is not None:
            self._remote.stop.set()
            self._spool.close()
            self._spool = None
            self._remote.stop.clear()

    # --- hashes -----------------------------------------------------------------------------------

    def check_sha256(self, name: str, found: str) -> None:
        """Also raises where what planning read of the file is not what is there."""
        stated = self.files[name].sha256
        if stated is not None and stated != found:
            raise self._other(name)
        for offset, length, digest in self._early.pop(name, ()):
            if hashlib.sha256(self.read(name, offset, length)).digest() != digest:
                raise self._other(name)

    def _check_whole(self, name: str, data: bytes | bytearray) -> None:
        file = self.files[name]
        if file.sha256 is not None:
            same = hashlib.sha256(data).hexdigest() == file.sha256
        elif file.blob is not None:
            same = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == file.blob
        else:
            raise BadInputError(
                f"{self.path(name)}: the Hub does not say what its hash is, so it cannot be "
                "checked; download it yourself and name the directory",
                file=self.path(name),
            )
        if not same:
            raise self._other(name)

    def _other(self, name: str) -> BadInputError:
        path = self._in_cache(name)
        what = "what came" if path is None else f"{path}, in the local cache,"
        advice = "run again" if path is None else "remove it, then run again"
        return BadInputError(
            f"{self.path(name)}: {what} is not the file whose hash the Hub states; {advice}",
            file=self.path(name),
        )


@contextmanager
def _described(where: str) -> Iterator[None]:
    """Turns an answer that no Hub gives, such as a portal's page, into one line."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError):
        raise BadInputError(
            f"{where}: what came is no description of a repository; is HF_ENDPOINT a Hub's, and "
            "nothing in between?"
        ) from None


def _is_place(name: str) -> bool:
    """Whether a file's name is one on this machine, too, in the folder that it is put into."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    parts = name.split("/")
    return not ("\\" in name or "\0" in name or "" in parts or ".." in parts)


def _ranges_of(path: Path, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
    """Pieces of a file of the local cache."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while length is None or length > 0:
                data = file.read(CHUNK if length is None else min(length, CHUNK))
                if not data:
                    return
                yield data
                length = None if length is None else length - len(data)
    except OSError as error:
        raise ConversionError(f"{path}: cannot read: {error.strerror}", file=str(path)) from None


def _fill(
    buffer: memoryview, source: Iterator[bytes], rest: memoryview | None = None
) -> memoryview:
    """Fills a buffer from ``rest``, then from a source; returns what is left of its last piece."""
    done, data = 0, rest if rest is not None else memoryview(b"")
    while done < len(buffer):
        if not data:
            data = memoryview(next(source, b""))
            if not data:
                raise ConversionError(f"a file ends {len(buffer) - done} bytes early")
        count = min(len(data), len(buffer) - done)
        buffer[done : done + count] = data[:count]
        done, data = done + count, data[count:]
    return data


def model_info(repo: str, revision: str | None = None) -> ModelInfo:
    """What the Hub knows of a repository and its files; an answer that does not come ends soon."""
    from huggingface_hub import HfApi, constants

    redact_logs()
    return HfApi(library_name="ctconvert", library_version=__version__).model_info(
        repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )


def cached_file(repo: str, commit: str | None, name: str, size: int | None) -> Path | None:
    """A file of a commit in the local cache, where it is there in full size."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    if not isinstance(found, str) or Path(found).stat().st_size != size:
        return None
    return Path(found)


def to_download(repo: str, commit: str | None, files: Mapping[str, int]) -> int:
    """Bytes of files of a Hub commit that the local cache lacks; 0 where there is no commit."""
    if commit is None:
        return 0
    missing = (s for name, s in files.items() if cached_file(repo, commit, name, s) is None)
    return sum(missing)


def open_store(model: str, *, download: bool) -> Store:
    """The store of a directory or a Hub id (``org/name``, ``org/name@revision``).

    Args:
        model: what the user named.
        download: fetch all of a Hub repository into the local cache first; else only the ranges
            that are asked for are fetched.

    Raises:
        UsageError: there is no such directory and it is not a Hub id that can be had.
    """
    path = home_path(model)
    if path.is_dir():
        return LocalStore(path)
    if path.exists():
        raise UsageError(f"{model} is a file; name the checkpoint's directory or a Hub id")
    if model.startswith((".", "/", "~")) or not HUB_ID.match(model):
        raise UsageError(
            f"{model}: no such directory, and not a Hub id (org/name[@revision])"
            f"{nearest_directory(path)}"
        )
    return _open_hub(model, download)


def at_revision(model: str, revision: str | None) -> str:
    """A Hub id at the revision that was named beside it.

    Raises:
        UsageError: it has one already, or is a directory.
    """
    if revision is None:
        return model
    if home_path(model).exists() or "@" in model:
        raise UsageError(
            f"{model} --revision {revision}: name one revision, of a Hub id (org/name)"
        )
    return f"{model}@{revision}"


def home_path(text: str | Path) -> Path:
    """The path a user wrote, ``~`` expanded.

    Raises:
        UsageError: ``~user`` names nobody, or the text holds a NUL.
    """
    if "\0" in str(text):
        raise UsageError(f"{str(text)!r}: no path holds a NUL")
    try:
        path = Path(text).expanduser()
        path.exists()
    except RuntimeError as error:
        raise UsageError(f"{text}: {error}") from None
    except OSError as error:  # a name that is too long, a directory that may not be entered
        raise UsageError(f"{text}: {error.strerror}") from None
    return path


def _open_hub(model: str, download: bool) -> Store:
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    repo, _, revision = model.partition("@")
    with hub_failures(model):
        try:
            store = HubStore.open(repo, revision or None)
        except (HTTPError, OSError) as error:
            if isinstance(error, HfHubHTTPError):  # the Hub has answered
                raise
            found = _snapshot(repo, revision or None, local_files_only=True)
            LOG.info(
                "%s: the Hub cannot be reached: taking what the local cache has of commit %s",
                *(model, found.revision),
            )
            return found
        if download:
            _snapshot(repo, revision or None, local_files_only=False)
        return store


def local_copy(model: str) -> LocalStore:
    """A Hub repository's files in the local cache, downloaded where they are not there.

    Raises:
        UsageError: it cannot be had.
    """
    store = open_store(model, download=False)
    if isinstance(store, LocalStore):
        return store
    repo, _, revision = model.partition("@")
    with hub_failures(model):  # by the name, under which it is found when the Hub is not
        return _snapshot(repo, revision or None, local_files_only=False)


def _snapshot(repo: str, revision: str | None, *, local_files_only: bool) -> LocalStore:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    ignored = [f"*{end}" for end in OTHER_WEIGHTS if "safetensors" not in end]
    found = snapshot_download(
        repo,
        revision=revision,
        ignore_patterns=ignored,
        local_files_only=local_files_only,
    )
    root = Path(found)
    return LocalStore(root, id=repo, revision=root.name)
