"""Names that files of a source have, and names that the output needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.models import options, plan_of, repack, restore

from ctconvert import api
from ctconvert.errors import BadInputError
from ctconvert.store.local import LocalStore

if TYPE_CHECKING:
    from .conftest import Place


NAMES = [
    "config.json.partial",
    "model.safetensors.partial",
    "old",
    "checkpoint",
    "journal.jsonl",
    "out.partial/journal.jsonl",
    "deep/er/file.txt",
    "a name with spaces",
    "naïve.txt",
]


def test_side_files_of_any_name_are_carried_along(place: Place) -> None:
    for name in NAMES:
        path = place.model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    place.killed()
    repack(place.model, place.out, resume=True)
    restore(place.out, place.folder / "converted")
    for folder in (place.out, place.folder / "converted"):
        for name in NAMES:
            assert (folder / name).read_text() == name
    api.verify(place.out, against=place.model, workers=1)
    repack(place.model, place.out, overwrite=True, asked=options(max_shard_size=1_000_000))
    assert place.is_clean


@pytest.mark.parametrize(
    "name",
    [
        "ctconvert.json",
        "model-00002-of-00003.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
    ],
)
def test_a_folder_in_the_place_of_a_file_of_the_output_is_refused(place: Place, name: str) -> None:
    """Before anything is written: the file could not be made in the end."""
    folder = place.model / name
    if name == "model.safetensors.index.json":
        (place.model / name).unlink()
    folder.mkdir()
    (folder / "notes.txt").write_text("")
    asked = options(max_shard_size=1_000_000) if name == "model.safetensors" else options()
    with pytest.raises(BadInputError, match=rf"{name}/notes\.txt.* the output"):
        plan_of(LocalStore(place.model), asked)
    other = options(max_shard_size=1_000_000 if asked == options() else 15_000)
    if name != "ctconvert.json":
        repack(place.model, place.out, asked=other)
        with pytest.raises(BadInputError, match=rf"{name}/notes\.txt.* the output"):
            restore(place.out, place.folder / "converted", max_shard_size=asked.max_shard_size)
