"""A Hub repository as a store, and what a user's MODEL names: a directory or a Hub id."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ctconvert.errors import ConversionError, UsageError
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import OTHER_WEIGHTS
from ctconvert.store.local import LocalStore

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")


class HubStore(Store):
    """A Hub repository read by byte ranges, for planning without a download.

    Args:
        repo: ``org/name``.
        revision: a branch, tag or commit; the default branch where None.
    """

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

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        path = f"{self.id}@{self.revision}/{name}"
        with hub_failures(self.where):
            # without a cache only the range itself is fetched, not megabytes of weights after it
            data = self._system.cat_file(
                path, start=offset, end=offset + len(buffer), cache_type="none"
            )
        if len(data) != len(buffer):
            raise ConversionError(
                f"{self.path(name)}: ends at byte {offset + len(data)}", file=self.path(name)
            )
        buffer[:] = data

    def fingerprint(self, name: str) -> str:
        """A commit's files never change."""
        return f"{self.revision}-{self._sizes[name]}"


def open_store(model: str, *, download: bool) -> Store:
    """The store of a directory or a Hub id (``org/name``, ``org/name@revision``).

    Args:
        model: what the user named.
        download: whether a Hub repository's weights will be read in full; if not, only the
            ranges that are asked for are fetched.

    Raises:
        UsageError: there is no such directory and it is not a Hub id that can be had.
    """
    path = home_path(model)
    if path.is_dir():
        return LocalStore(path)
    if path.exists():
        raise UsageError(f"{model} is a file; name the checkpoint's directory or a Hub id")
    if model.startswith((".", "/", "~")) or not _HUB_ID.match(model):
        raise UsageError(f"{model}: no such directory, and not a Hub id (org/name[@revision])")
    return _open_hub(model, download)


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
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    repo, _, revision = model.partition("@")
    with hub_failures(model):
        if not download:
            try:
                return HubStore(repo, revision or None)
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
    return LocalStore(root, id=repo, revision=root.name)


@contextmanager
def hub_failures(model: str) -> Iterator[None]:
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
