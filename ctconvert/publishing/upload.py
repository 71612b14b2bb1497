"""Uploads a converted checkpoint: verified before, compared with the Hub's hashes after."""

from __future__ import annotations

import glob
import hashlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ctconvert.errors import ConversionError, UsageError
from ctconvert.output import CARD, TOLERATED, Output
from ctconvert.progress import Progress
from ctconvert.publishing.card import model_card
from ctconvert.records import Pushed
from ctconvert.store.answers import first_line, hub_failures
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.hub import HUB_ID, HubFile, HubStore
from ctconvert.store.places import replaceable_files
from ctconvert.version import __version__
from ctconvert.work.executors import Executor
from ctconvert.work.verify import verify_output

#: What the Hub takes for an answer while it stores something, in times of a download's.
_PATIENCE = 6


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes.

    Args:
        repo: ``org/name``; made where it is not there.
        private: make it private, where it is made.
        create_pr: open a pull request.
        branch: made where it is not there; the default one where None.
    """

    repo: str
    private: bool = False
    create_pr: bool = False
    branch: str | None = None


def check_place(place: Place) -> None:
    """Raises UsageError where it is no place."""
    if not HUB_ID.fullmatch(place.repo) or "@" in place.repo:
        raise UsageError(f"{place.repo}: no Hub id (org/name); --branch names another branch")
    if place.create_pr and place.branch is not None:
        raise UsageError("--create-pr opens a pull request on the default branch; without --branch")


def upload(
    output: Output, place: Place, dry_run: bool, executor: Executor, progress: Progress
) -> Pushed:
    """Puts a converted checkpoint, which is verified first, on the Hub.

    What the Hub has already is not sent again, so that a push that was killed goes on where it was.
    Files of an earlier push that are no part of this one are removed in the same commit.

    Args:
        output: the checkpoint, in a directory.
        place: where to.
        dry_run: send nothing.
        executor: what runs the verification.
        progress: told of bytes done.

    Raises:
        UsageError: the repository holds other files, or the Hub refuses.
        VerificationError: the checkpoint is damaged.
        ConversionError: the upload failed, or the Hub has other bytes now.
    """
    check_place(place)
    if output.plan.kind == "restored":
        raise UsageError(
            f"{output.where} is a restored checkpoint, which is none of ctconvert's any more; push "
            f"it by `hf upload {place.repo} {output.where}`"
        )
    verify_output(output, executor, progress)
    with _bounded():
        with hub_failures(place.repo, path=False):
            there = _there(place)
        if there is not None and place.private and there.visible:
            raise UsageError(
                f"{place.repo} is public; make it private on the Hub, or push elsewhere"
            )
        remote = there.store if there is not None else None
        earlier = _earlier(remote)
        removed = _superseded(output, remote, earlier)
        text, notes = _card(output, place, remote)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _link(output, folder, text)
            ours = _hashed(folder, progress)
            output.check_unchanged()  # what was hashed, and is compared in the end, was verified
            old = remote.files if remote is not None else {}
            new = {name: file for name, file in ours.items() if not _same(old.get(name), file)}
            for name in sorted(new.keys() & old.keys() - earlier - TOLERATED):
                raise _others(place.repo, name)
            found = Pushed(
                out=output.where,
                repo=place.repo,
                revision=place.branch or "main",
                dry_run=dry_run,
                created=there is None,
                files=len(ours),
                bytes=sum(file.size for file in ours.values()),
                uploaded=tuple(new),
                upload_bytes=sum(file.size for file in new.values()),
                removed=tuple(removed),
                notes=tuple(notes),
            )
            parent = remote.revision if remote is not None else None
            return found if dry_run else _send(found, folder, place, parent, ours)


# --- what is there -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _There:
    store: HubStore
    visible: bool


def _there(place: Place) -> _There | None:
    """The repository as the push will find it, None where there is none yet."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        try:
            store, info = HubStore.described(place.repo, place.branch)
        except RevisionNotFoundError:  # a branch begins as the default one
            store, info = HubStore.described(place.repo, None)
    except RepositoryNotFoundError:
        return None
    return _There(store, not info.private)


def _earlier(remote: HubStore | None) -> set[str]:
    """The files that an earlier push put there."""
    if remote is None or MANIFEST not in remote.sizes():
        return set()
    found = replaceable_files(remote)
    return set() if found is None else {MANIFEST, *found}


def _superseded(output: Output, remote: HubStore | None, earlier: set[str]) -> list[str]:
    """Files of an earlier push that this one does not have.

    Raises:
        UsageError: there are files of nobody's.
    """
    if remote is None:
        return []
    known = {MANIFEST, *output.manifest.file_records, *TOLERATED}
    rest = [name for name in remote.sizes() if name not in known]
    for name in rest:
        if name not in earlier:
            raise _others(remote.where, name)
    return rest


def _others(where: str, name: str) -> UsageError:
    return UsageError(
        f"{where} holds {name}, which no push of ctconvert's put there; remove it, or push to "
        "another repository or --branch"
    )


def _card(output: Output, place: Place, remote: HubStore | None) -> tuple[str, list[str]]:
    """The card's text, and what there is to say of it."""
    notes = []
    local = source = written = None
    if CARD in output.store.sizes():
        data = output.store.read(CARD)
        text = data.decode("utf-8-sig", "replace")
        record = output.manifest.file_records.get(CARD)
        if record is not None and record.sha256 == hashlib.sha256(data).hexdigest():
            source = text
        else:
            local = text
    if remote is not None and CARD in remote.sizes():
        written = remote.read(CARD).decode("utf-8-sig", "replace")
        if local is not None and local != written:
            notes.append(f"{output.store.path(CARD)} is not pushed: {place.repo} has a card")
    return model_card(output.manifest, place.repo, written or local, source), notes


# --- sending -------------------------------------------------------------------------------------


def _link(output: Output, folder: Path, card: str) -> None:
    """Makes a folder of exactly what is sent: links to the files, and the card."""
    names = {MANIFEST, *output.manifest.file_records, *(TOLERATED & output.store.sizes().keys())}
    root = Path(output.where).resolve()
    for name in sorted(names - {CARD}):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(root / name)
    (folder / CARD).write_bytes(card.encode())


def _hashed(folder: Path, progress: Progress) -> dict[str, HubFile]:
    """Every file with both names that the Hub may have for its bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    progress.phase("hashing", sum(path.stat().st_size for path in paths))
    found = {}
    for path in paths:
        size = path.stat().st_size
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
        with path.open("rb") as file:
            while data := file.read(8 << 20):
                sha256.update(data)
                blob.update(data)
                progress.advance(len(data))
        name = path.relative_to(folder).as_posix()
        found[name] = HubFile(size, blob.hexdigest(), sha256.hexdigest())
    return found


def _same(there: HubFile | None, ours: HubFile) -> bool:
    if there is None or there.size != ours.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == ours.sha256
    return there.blob == ours.blob


def _send(
    found: Pushed, folder: Path, place: Place, parent: str | None, ours: Mapping[str, HubFile]
) -> Pushed:
    """Uploads, where ``parent`` is still the last commit; None where there was none."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError
    from msgspec.structs import replace

    api = HfApi(library_name="ctconvert", library_version=__version__)
    with hub_failures(place.repo, path=False):
        if found.created:
            api.create_repo(place.repo, private=place.private or None, exist_ok=True)
        if place.branch is not None:
            api.create_branch(place.repo, branch=place.branch, exist_ok=True)
    try:
        commit = api.upload_folder(
            repo_id=place.repo,
            folder_path=folder,
            revision=place.branch,
            create_pr=place.create_pr,
            parent_commit=parent,
            commit_message=f"Checkpoint made by ctconvert {__version__}",
            delete_patterns=[glob.escape(name) for name in found.removed] or None,
        )
    except (RuntimeError, ValueError, HTTPError, OSError) as error:
        reason = first_line(error.__cause__ or error)
        raise ConversionError(
            f"{place.repo}: the upload failed: {reason}; push again, and what the Hub has by then "
            "is not sent again"
        ) from None
    _compare(place.repo, commit.oid, ours)
    return replace(
        found,
        commit=commit.oid,
        url=str(commit.commit_url),
        revision=commit.pr_revision or found.revision,
        pull_request=commit.pr_url,
    )


def _compare(repo: str, commit: str, ours: Mapping[str, HubFile]) -> None:
    """Raises ConversionError where the Hub does not hold what was sent."""
    with hub_failures(repo, path=False):
        there = HubStore.open(repo, commit).files
    for name, file in ours.items():
        if not _same(there.get(name), file):
            what = "is not there" if name not in there else "has other bytes there"
            raise ConversionError(f"{repo}@{commit}: {name} {what} after the upload; push again")


# --- huggingface_hub, as a guest -----------------------------------------------------------------


@contextmanager
def _bounded() -> Iterator[None]:
    """Has huggingface_hub wait no longer than some time for any answer, and say nothing itself.

    A client of its own has no limit, and it makes another one when a connection has failed: so what
    makes them is changed, which there is no public way to ask for. An upload is tried six times.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import _http, disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    patience = _PATIENCE * constants.HF_HUB_DOWNLOAD_TIMEOUT
    hub: Any = huggingface_hub
    http: Any = _http
    if hasattr(http, "_GLOBAL_CLIENT_FACTORY"):
        before, configure = http._GLOBAL_CLIENT_FACTORY, hub.set_client_factory
    else:  # below 1.0
        before, configure = http._GLOBAL_BACKEND_FACTORY, hub.configure_http_backend

    def patient() -> Any:
        client = before()
        if hasattr(client, "timeout"):
            client.timeout = patience
        else:  # of requests, below 1.0
            client.request = partial(client.request, timeout=patience)
        return client

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # of what it tries again it warns in the server's words
    configure(patient)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        configure(before)
        logger.setLevel(level)
