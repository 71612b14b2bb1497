"""A small model, and a folder to convert it in."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import faults
from support.executors import Inline
from support.folders import quick_folder
from support.models import repack, restore, tree, write_model

from ctconvert.work.journal import ShardDone, read_journal


class Place:
    """A folder with a model in it, and where OUT and its partial output come to lie."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        self.out = folder / "out"
        self.partial = folder / "out.partial"
        self.built = self.partial / "checkpoint"
        self.journal = self.partial / "journal.jsonl"

    def killed(self, run: Callable[..., object] = repack, after: int = 4, **more: object) -> int:
        """A run that is killed when it has made so many items; returns the shards it finished."""
        source = self.model if run is repack else self.folder / "converted"
        executor = Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), after)
        ended = faults.run(lambda: run(source, self.out, executor=executor, **more))
        assert ended.end == "killed"
        finished = self.finished()
        assert 0 < len(finished) < 3
        return len(finished)

    def finished(self) -> list[str]:
        """The shards that the journal says are finished."""
        entries = read_journal(self.journal)
        return [entry.name for entry in entries if isinstance(entry, ShardDone)]

    @property
    def names(self) -> set[str]:
        """What stands in the folder."""
        return {path.name for path in self.folder.iterdir()}

    @property
    def is_clean(self) -> bool:
        """Whether nothing but whole checkpoints is there."""
        return self.names <= {"model", "converted", "out"}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def place(small_model: Path) -> Iterator[Place]:
    with quick_folder() as folder:
        yield Place(folder, small_model)


@pytest.fixture(scope="session")
def whole(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed conversion of the model, called ``out``."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = repack(small_model, out)
    assert report.shards == 3 and report.resumed_shards == 0
    found = tree(out)
    assert found is not None and "templates/chat.jinja" in found
    return found


@pytest.fixture
def converted(place: Place, whole: dict[str, str]) -> Path:
    """A conversion of the model, to be restored."""
    out = place.folder / "converted"
    repack(place.model, out)
    assert tree(out) == whole
    return out


@pytest.fixture(scope="session")
def restored(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed restoration of it."""
    folder = tmp_path_factory.mktemp("restored")
    repack(small_model, folder / "converted")
    restore(folder / "converted", folder / "out")
    found = tree(folder / "out")
    assert found is not None
    return found
