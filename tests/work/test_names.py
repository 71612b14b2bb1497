"""Names that files of a source have, and names that the output needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.models import options, repack, restore

from ctconvert import api

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
