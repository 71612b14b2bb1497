"""Directories that an output may be made in, and that it may replace; in one step where it can.

An output is built beside its place, in ``OUT.partial``. Where the system cannot exchange two
directories, OUT is moved into ``OUT.partial`` before the new one takes its place; whoever opens OUT
after a kill between the two renames brings it back (:func:`recover`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from ctconvert.errors import UsageError
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.local import LocalStore
from ctconvert.store.writer import cannot_write, fsync_directory

#: What stood under OUT, inside its partial output, while it is replaced in two steps.
OLD = "old"
#: What every partial output holds from its first file to its last; a directory without is not ours.
JOURNAL = "journal.jsonl"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def partial_of(out: Path) -> Path:
    """Where the output of that name is built."""
    return out.with_name(out.name + ".partial")


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two directories in one step; False where the system cannot.

    Raises:
        OSError: it can, and refuses these.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def take_lock(root: Path, file: str | None = None) -> int | None:
    """Locks a partial output.

    Args:
        root: its directory.
        file: a file in it to lock in its stead, which is made: other machines see the lock of a
            file where the storage can do that, and that of a directory nowhere.

    Returns:
        a descriptor, which holds the lock until it is closed; None where another run holds it.

    Raises:
        OSError: there is no such directory, or a link in its place.
    """
    kind = os.O_RDONLY | os.O_DIRECTORY if file is None else os.O_RDWR | os.O_CREAT
    path = root if file is None else root / file
    while True:
        descriptor = os.open(path, kind | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another run has made it again since it was opened


@contextmanager
def locked(root: Path, file: str | None = None) -> Iterator[bool]:
    """Holds the lock of a partial output; False where another run does, or it is gone."""
    try:
        descriptor = take_lock(root, file)
    except OSError:
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def recover(out: Path) -> None:
    """Brings back an output that a kill between two renames has left aside.

    Raises:
        ConversionError: it is there and cannot be moved.
    """
    if out.is_symlink():
        out = out.resolve()  # beside which it was made
    partial = partial_of(out)
    old = partial / OLD
    if not os.path.lexists(old) or in_use(out):
        return
    with locked(partial) as free:
        ours = (partial / JOURNAL).is_file()
        if free and ours and os.path.lexists(old) and not in_use(out):
            try:
                old.rename(out)
                fsync_directory(out.parent)
            except OSError as error:
                raise cannot_write(out, error) from None


def check_replaceable(out: Path) -> None:
    """Refuses to replace what ctconvert has not made.

    The manifest may be of any version and its hash wrong: an output that is damaged or that only
    another version reads is replaced, too. All that counts is that no file is there which it does
    not list.

    Raises:
        UsageError: it has no manifest that lists its files, or it holds others.
    """
    if not out.is_dir() or out.is_symlink():
        raise UsageError(f"{out} is no directory; only a checkpoint of ctconvert's is replaced")
    with closing(LocalStore(out)) as store:
        if MANIFEST not in store.sizes():
            raise UsageError(
                f"{out} has no {MANIFEST}, so ctconvert did not make it, and it is not replaced; "
                "remove it yourself or choose another place"
            )
        files = replaceable_files(store)
    if files is None:
        raise UsageError(
            f"{out / MANIFEST} is damaged, so what ctconvert made is not known, and it is not "
            "replaced; remove it yourself or choose another place"
        )
    known = {MANIFEST, *files}
    for folder, subfolders, names in os.walk(out):
        at = Path(folder)
        links = [name for name in subfolders if (at / name).is_symlink()]
        for name in [*names, *links]:
            found = (at / name).relative_to(out).as_posix()
            if found not in known:
                raise UsageError(
                    f"{out} holds {found}, which ctconvert did not make and --overwrite would "
                    "remove; move it or choose another place"
                )


class _AnyManifest(Struct):
    """What every version of the manifest holds."""

    class _Tool(Struct):
        name: str

    tool: _Tool
    files: dict[str, msgspec.Raw] | list[msgspec.Raw]


class _Named(Struct):
    name: str


def replaceable_files(store: Store) -> list[str] | None:
    """The files that a manifest of any version lists; None where it is none of ctconvert's."""
    try:
        found = msgspec.json.decode(store.read(MANIFEST), type=_AnyManifest)
        if found.tool.name != "ctconvert":
            return None
        if isinstance(found.files, dict):
            return list(found.files)
        return [msgspec.json.decode(item, type=_Named).name for item in found.files]
    except (ValueError, RecursionError):
        return None


def is_empty(path: Path) -> bool:
    """Whether it is a directory with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def in_use(path: Path) -> bool:
    """Whether something other than an empty directory stands there."""
    return os.path.lexists(path) and not (is_empty(path) and not path.is_symlink())


def remove(path: Path) -> None:
    """Removes a file or a whole directory, or nothing where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_file(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """Checks that a file can be written, before work is done for it; leaves nothing behind.

    Raises:
        UsageError: ``option`` names a directory, a file of another kind, or none that can be made.
    """
    try:
        if path.is_dir():
            raise UsageError(f"{option} {path}: a directory; name a file in it")
        if path.suffix.lower() not in suffixes:
            raise UsageError(f"{option} {path}: write a {', '.join(suffixes)} file")
        new = not (path.exists() or path.is_symlink())
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written: {error.strerror}") from None


def check_place(source: Path | None, out: Path) -> Path:
    """Where an output may be made.

    Args:
        source: the directory it is made of, where it is one.
        out: the directory the user named.

    Returns:
        the directory to make: what a link leads to, since the partial output lies beside it.

    Raises:
        UsageError: it is the source, inside or around it, or the current directory.
    """
    if out.is_symlink() or out.name in ("", ".."):
        out = out.resolve()
    if source is not None:
        check_apart(source, out)
        check_apart(source, partial_of(out))
    current = Path.cwd().resolve()
    if out.resolve() in (current, *current.parents):
        raise UsageError(
            f"{out} is the current directory or holds it, and cannot be replaced; name another"
        )
    return out


def check_links(source: LocalStore, out: Path) -> None:
    """Refuses a source that would lose files with what is replaced.

    Raises:
        UsageError: a file of it is a link into the output, or into its partial one.
    """
    places = [place.resolve() for place in (out, partial_of(out))]
    for name in source.sizes():
        path = source.root / name
        if path.is_symlink() and not {*places}.isdisjoint(path.resolve().parents):
            raise UsageError(
                f"{path} is a link to a file in {path.resolve().parent}, where the output is made; "
                "copy the file into the source or choose another place"
            )


def check_apart(source: Path, out: Path) -> None:
    """Refuses an output equal to, inside or around the source.

    Raises:
        UsageError: it is.
    """
    real_source, real_out = source.resolve(), out.resolve()
    if real_source == real_out:
        raise UsageError(f"{out}: the output is the source itself; choose another directory")
    if real_source in real_out.parents:
        raise UsageError(f"{out}: the output lies inside the source {source}; choose another place")
    if real_out in real_source.parents:
        raise UsageError(f"{out}: the source {source} lies inside the output; choose another place")
