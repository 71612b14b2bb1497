"""``verify`` passes on what was made, and not beside what a loader could take for a part of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.executors import Inline
from support.models import module_name, plan_of, repack, restore
from support.stores import MemoryStore, Plain, files_of

from ctconvert import api
from ctconvert.errors import UsageError, VerificationError
from ctconvert.output import Output
from ctconvert.progress import Silent
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.local import LocalStore
from ctconvert.work.verify import verify_against, verify_output

if TYPE_CHECKING:
    from .conftest import Place


def made_folder(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")

    return make


ADDED = {
    "weights of another kind": made_folder("pytorch_model.bin"),
    "another shard": made_folder("model-00004-of-00003.safetensors"),
    "code": made_folder("modeling_x.py"),
    "an adapter": made_folder("adapter_config.json"),
    "a chat template": made_folder("chat_template.jinja"),
    "a template with a readme's name": made_folder("README.md.jinja"),
    "a config with a licence's name": made_folder("LICENSE.json"),
    "weights in a folder": made_folder("sub/model.safetensors"),
    "weights in a folder with a licence's name": made_folder("LICENSES/model.safetensors"),
    "a fifo": lambda out: os.mkfifo(out / "fifo"),
    "a dangling link": lambda out: (out / "model.safetensors").symlink_to("gone"),
    "a link to a folder": lambda out: (out / "sub").symlink_to("templates"),
    "a link to a file": lambda out: (out / "extra.json").symlink_to("config.json"),
}


@pytest.mark.parametrize("what", ADDED)
@pytest.mark.parametrize("verb", ["repack", "restore"])
def test_what_a_loader_would_take_is_not_tolerated(
    place: Place, converted: Path, verb: str, what: str
) -> None:
    if verb == "repack":
        converted.rename(place.out)
    else:
        restore(converted, place.out)
    ADDED[what](place.out)
    with pytest.raises(VerificationError, match="not part of this checkpoint; remove it"):
        api.verify(place.out, workers=1)
    if verb == "repack":
        with pytest.raises(VerificationError, match="not part of this checkpoint"):
            api.restore(place.out, place.folder / "back", workers=1)
        with pytest.raises(VerificationError, match="not part of this checkpoint"):
            repack(place.model, place.out, resume=True)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "LICENSE",
        "LICENSE.md",
        "LICENSE.txt",
        ".gitattributes",
        ".DS_Store",
        ".git/config",
        ".cache/x/y.json",
    ],
)
def test_what_no_loader_takes_is_tolerated(converted: Path, name: str) -> None:
    made_folder(name)(converted)
    found = api.verify(converted, workers=1)
    assert found.files == 8 and found.modules == 6


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "ctconvert.json",
        "model.safetensors.index.json",
        "model-00002-of-00003.safetensors",
        "templates/chat.jinja",
        "tokenizer.json",
    ],
)
@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone", "a folder", "a fifo"])
def test_any_damage_is_found(converted: Path, file: str, how: str) -> None:
    path = converted / file
    data = path.read_bytes()
    if how == "flipped":
        for at in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(VerificationError):
                api.verify(converted, workers=1)
        return
    path.unlink()
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    elif how == "a folder":
        path.mkdir()
    elif how == "a fifo":
        os.mkfifo(path)
    with pytest.raises(VerificationError, match=path.name.replace(".", r"\.")):
        api.verify(converted, workers=1)


def test_every_byte_is_read_once(converted: Path) -> None:
    """And every one counts: whatever bit is changed anywhere, it is found."""
    store = LocalStore(converted)
    whole = files_of(store)
    total = sum(map(len, whole.values()))
    for number in range(0, total, total // 150):
        files = dict(whole)
        at = number
        for name, data in whole.items():
            if at < len(data):
                changed = bytes([data[at] ^ (1 << number % 8)])
                files[name] = data[:at] + changed + data[at + 1 :]
                break
            at -= len(data)
        with pytest.raises(VerificationError):
            verify_output(Output(MemoryStore(files)), Inline(), Silent())
    verify_output(Output(MemoryStore(whole)), Inline(), Silent())


def test_what_is_no_output(place: Place) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        api.verify(place.folder / "nothing")
    with pytest.raises(VerificationError, match=r"no ctconvert\.json"):
        api.verify(place.model)


def test_progress_counts_every_byte(converted: Path, place: Place) -> None:
    progress = Plain()
    verify_output(Output.open(converted), Inline(), progress)
    ((label, total),) = progress.phases
    assert (label, progress.done) == ("verifying", total)
    progress = Plain()
    checkpoint = Checkpoint(LocalStore(place.model))
    verify_against(Output.open(converted), checkpoint, Inline(), progress)
    ((label, total),) = progress.phases
    assert label == "comparing" and progress.done == total


# --- against a source ----------------------------------------------------------------------------


def test_the_source_it_was_made_of(place: Place, converted: Path) -> None:
    found = api.verify(converted, against=place.model, workers=2).against
    assert found is not None
    assert (found.modules, found.copied_tensors) == (6, 2)


@pytest.mark.parametrize("tensor", ["weight_packed", "weight_scale", "weight_shape"])
def test_another_source_is_told_by_any_of_its_bits(
    place: Place, converted: Path, tensor: str
) -> None:
    entry = plan_of(LocalStore(place.model)).modules[4].sources[0].tensors[tensor]
    with (place.model / entry.file).open("r+b") as file:
        file.seek(entry.end - (8 if tensor == "weight_shape" else 1))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    expected = "weight_shape" if tensor == "weight_shape" else module_name(4)
    with pytest.raises(Exception, match=expected):
        api.verify(converted, against=place.model, workers=1)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
def test_a_tensor_that_was_copied_is_compared_too(place: Place, converted: Path, name: str) -> None:
    (copy,) = (copy for copy in plan_of(LocalStore(place.model)).copies if copy.name == name)
    with (place.model / copy.source.file).open("r+b") as file:
        file.seek(copy.source.offset + 5)
        file.write(b"\x99")
    with pytest.raises(VerificationError, match=f"tensor {name} differs"):
        api.verify(converted, against=place.model, workers=1)
