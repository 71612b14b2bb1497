"""A source that changes: nothing of what it was and what it is comes together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import faults
from support.changes import flip, replaced_unseen, rewritten_unseen
from support.executors import Inline
from support.models import module_name, plan_of, repack, restore, tree
from support.stores import Plain

from ctconvert import api
from ctconvert.errors import BadInputError, ConversionError
from ctconvert.progress import Silent
from ctconvert.store.local import LocalStore
from ctconvert.work.build import Settings, build

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen])
@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "tokenizer.json"])
def test_nothing_of_another_source_is_taken_over(
    place: Place, whole: Whole, file: str, change: Callable[[Path], None]
) -> None:
    place.killed()
    change(place.model / file)
    progress = Plain()
    report = repack(place.model, place.out, resume=True, progress=progress)
    assert report.resumed_shards == 0
    assert any("source has changed" in note for note in progress.notes)
    assert tree(place.out) != whole and place.is_clean
    assert api.verify(place.out, against=place.model, workers=1).against is not None
    clean = place.folder / "converted"
    repack(place.model, clean)
    assert tree(place.out) == tree(clean)


def test_nothing_of_another_config_is_taken_over(place: Place, whole: Whole) -> None:
    place.killed()
    config = place.model / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "OtherForCausalLM"))
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    changed = {name for name, digest in (tree(place.out) or {}).items() if whole[name] != digest}
    assert changed == {"config.json", "ctconvert.json"}


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen, os.utime, Path.unlink])
@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_source_that_changes_meanwhile_is_no_source(
    place: Place, file: str, change: Callable[[Path], None]
) -> None:
    """What was read before and after the change does not belong together."""
    with pytest.raises(ConversionError, match=file):
        repack(place.model, place.out, executor=Inline(lambda: change(place.model / file)))
    assert not place.out.exists()
    assert place.is_clean or change is Path.unlink  # it may come back as it was


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen])
def test_a_source_that_changes_between_plan_and_run_is_no_source(
    place: Place, change: Callable[[Path], None]
) -> None:
    """Its headers were read, and its file may be open still: neither is what it is now."""
    store = LocalStore(place.model)
    plan = plan_of(store)
    change(place.model / "model-00001-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"model-00001-of-00002\.safetensors: changed"):
        build(plan, store, place.out, Settings(Inline(), Silent()))
    assert place.is_clean and not place.out.exists()


def test_a_converted_checkpoint_that_changes_meanwhile_is_not_restored(
    place: Place, converted: Path
) -> None:
    shard = converted / "model-00001-of-00003.safetensors"
    with pytest.raises(ConversionError, match="changed while"):
        restore(converted, place.out, executor=Inline(lambda: flip(shard)))
    assert place.is_clean and not place.out.exists()


def test_times_in_the_future_mean_nothing(place: Place, whole: Whole) -> None:
    for path in place.model.rglob("*"):
        os.utime(path, (2**32, 2**32))
    finished = place.killed()
    assert repack(place.model, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == whole


def test_damaged_data_leaves_nothing(place: Place) -> None:
    """Only another source helps, so that nothing of it is worth keeping."""
    store = LocalStore(place.model)
    scale = plan_of(store).modules[3].sources[0].tensors["weight_scale"]
    with (place.model / scale.file).open("r+b") as file:
        file.seek(scale.offset)
        file.write(b"\x80\x7f")  # infinity in BF16
    before = faults.descriptors()
    for _ in range(3):
        with pytest.raises(BadInputError, match=rf"{module_name(3)}.*inf"):
            repack(place.model, place.out)
        assert place.is_clean and not place.out.exists()
    store.close()
    assert faults.descriptors() <= before
