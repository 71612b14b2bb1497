"""Puts a converted checkpoint on the Hub, with a model card that says what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ctconvert.errors import UsageError
from ctconvert.output import Output
from ctconvert.progress import Progress, Silent
from ctconvert.store.hub import home_path

if TYPE_CHECKING:
    from ctconvert.records import Pushed


def push(
    out: str | Path,
    repo: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    branch: str | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Pushed:
    """Puts a converted checkpoint on the Hub, verified first, with a model card.

    A token is huggingface_hub's own: ``hf auth login``, or ``HF_TOKEN``.

    Args:
        out: a converted checkpoint's directory.
        repo: ``org/name``; made where it is not there.
        private: make it a private one.
        create_pr: open a pull request.
        branch: the branch to push to, made where it is not there.
        dry_run: say what would be sent, and send nothing.
        workers: threads of the verification.
        progress: told of bytes done.

    Returns:
        the report, the content of ``ctconvert push --json``.

    Raises:
        UsageError: there is no such checkpoint, the repository holds other files, or the Hub
            refuses.
        VerificationError: the checkpoint is damaged.
        ConversionError: the upload failed, or the Hub holds other bytes after it.
    """
    from ctconvert.publishing.upload import Place, upload
    from ctconvert.work.choosing import threads

    place = Place(repo, private, create_pr, branch)
    if not home_path(out).is_dir():
        raise UsageError(f"{out}: no such directory")
    return upload(Output.open(out), place, dry_run, threads(workers), progress or Silent())
