"""An output that another takes the place of while it is read: the two are never mixed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.models import repack, write_model
from support.stores import Plain

from ctconvert import api
from ctconvert.errors import ConversionError, UsageError
from ctconvert.runtime import proof
from ctconvert.store.places import exchange
from ctconvert.work import build

if TYPE_CHECKING:
    from .conftest import Place


class Meanwhile(Plain):
    """A progress that does something when a phase begins."""

    def __init__(self, label: str, action: Callable[[], object]) -> None:
        super().__init__()
        self._label, self._action = label, action

    def phase(self, label: str, total: int) -> None:
        super().phase(label, total)
        if label == self._label:
            self._action()


@pytest.fixture
def other(place: Place, tmp_path: Path) -> Path:
    """A conversion of another model of the same shapes, beside ``converted``."""
    folder = place.folder / "other"
    repack(write_model(tmp_path / "model", seed=2), folder)
    return folder


def swapped_before(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, a: Path, b: Path
) -> None:
    """Exchanges two directories before a function is called."""
    function = getattr(module, name)

    def late(*args: Any, **more: Any) -> Any:
        assert exchange(a, b)
        return function(*args, **more)

    monkeypatch.setattr(module, name, late)


def test_it_is_not_restored_by_the_plan_of_the_one_before(
    place: Place, converted: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified, exchanged, and only then read: its tensors lie where the other's were."""
    swapped_before(monkeypatch, build, "build", converted, other)
    with pytest.raises(ConversionError, match="changed while"):
        api.restore(converted, place.out, workers=1)
    assert not place.out.exists()


def test_it_is_not_compared_in_the_place_of_the_one_before(
    place: Place, converted: Path, other: Path
) -> None:
    """What was verified is another model's; what was compared is the right one's."""
    progress = Meanwhile("comparing", lambda: exchange(converted, other))
    with pytest.raises(ConversionError, match="changed while"):
        api.verify(other, against=place.model, progress=progress, workers=1)


def test_it_is_not_judged_in_the_place_of_the_one_before(place: Place, converted: Path) -> None:
    same = place.folder / "same"
    shutil.copytree(converted, same)
    progress = Meanwhile("judging", lambda: exchange(converted, same))
    with pytest.raises(ConversionError, match="changed while"):
        api.verify(converted, against=place.model, independent=True, progress=progress, workers=1)


def test_a_source_is_not_compared_in_the_place_of_the_one_before(
    place: Place, converted: Path
) -> None:
    same = place.folder / "same"
    shutil.copytree(place.model, same)
    progress = Meanwhile("comparing", lambda: exchange(place.model, same))
    with pytest.raises(ConversionError, match="changed while"):
        api.verify(converted, against=place.model, progress=progress, workers=1)


def test_its_kernels_are_not_run_in_the_place_of_the_one_before(
    converted: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_before(monkeypatch, proof, "verify_kernels", converted, other)
    with pytest.raises(ConversionError, match="changed while"):
        api.verify(converted, kernels=True, device="cpu", workers=1)


def test_it_is_verified_as_it_was_opened(converted: Path, other: Path) -> None:
    progress = Meanwhile("verifying", lambda: exchange(converted, other))
    with pytest.raises(Exception, match=r"changed|damaged"):
        api.verify(converted, progress=progress, workers=1)


def test_a_wrong_shard_size_is_told_before_anything_is_read(place: Place, converted: Path) -> None:
    progress = Plain()
    with pytest.raises(UsageError, match="max_shard_size 0"):
        api.restore(converted, place.out, max_shard_size=0, progress=progress)
    assert progress.phases == []
