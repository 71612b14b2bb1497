"""What ``verify`` finds: every flipped bit, every file too few or too many, another source."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.builders import config_of, group_config, weight_args, write_checkpoint
from support.damage import (
    DOWN,
    GROUP,
    INDEX,
    PLAIN,
    UP,
    Q,
    Tensors,
    convert,
    fails,
    in_order,
    read_raw,
    small,
    tensors_of,
)
from support.models import tree
from support.stores import MemoryStore, WatchedStore, files_of
from support.tamper import flip_bit

import ctconvert
from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.records import Compared, Verified
from ctconvert.store.local import LocalStore


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT, of several shards, beside its source ``model``; tests put back what they change."""
    folder = tmp_path_factory.mktemp("converted")
    write_checkpoint(folder / "model", small(), config_of(GROUP), shards=2)
    convert(folder / "model", folder / "out", max_shard_size=6000)
    assert len(list((folder / "out").glob("*.safetensors"))) >= 3
    return folder / "out"


def differs(out: Path, *says: str, against: Path | None = None) -> None:
    fails(ctconvert.verify, out, says=says, error=VerificationError, against=against)


def test_what_was_verified_is_a_record(converted: Path) -> None:
    source = converted.parent / "model"
    found = ctconvert.verify(converted, against=source)
    assert isinstance(found, Verified) and isinstance(found.against, Compared)
    assert (found.modules, found.against.modules) == (3, 3)
    assert (found.tensors, found.against.copied_tensors) == (8, 1)
    assert found.files == len(list(converted.iterdir()))
    assert found.against.source == str(source) and found.kernels is None
    assert ctconvert.verify(converted).against is None


def flips(out: Path) -> Iterator[tuple[Path, int, str]]:
    """(file, byte, tensor or '') to flip a bit in: every kind of byte an output has."""
    chosen = random.Random(5)
    for path in sorted(out.iterdir()):
        size = path.stat().st_size
        if path.suffix != ".safetensors":
            for position in {0, size - 1, *(chosen.randrange(size) for _ in range(6))}:
                yield path, position, ""
            continue
        header, data = read_raw(path)
        start = size - len(data)
        for position in range(8):  # the length prefix
            yield path, position, ""
        for _ in range(4):
            yield path, chosen.randrange(8, start), ""
        yield path, start - 1, ""  # its padding, where it has any
        for name in in_order(header):
            begin, end = (start + offset for offset in header[name]["data_offsets"])
            for position in (begin, end - 1, chosen.randrange(begin, end)):
                yield path, position, name


def test_a_flipped_bit_fails_and_names_its_tensor(converted: Path) -> None:
    before = tree(converted)
    chosen = random.Random(6)
    kinds: set[str] = set()
    tried = padding = 0
    for path, position, tensor in flips(converted):
        sound = path.read_bytes()
        data = bytearray(sound)
        padding += not tensor and path.suffix == ".safetensors" and data[position] == ord(" ")
        data[position] ^= 1 << chosen.randrange(8)
        path.write_bytes(data)
        try:
            differs(converted, f"tensor {tensor} " if tensor else path.name, path.name)
        finally:
            path.write_bytes(sound)
        tried += 1
        kinds.add(tensor or path.name)
    assert tried >= 60 and padding > 0
    assert {"config.json", "ctconvert.json", INDEX, "tokenizer.json", PLAIN} <= kinds
    assert tree(converted) == before
    ctconvert.verify(converted)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json", "model-00002-of-*"])
def test_a_missing_or_cut_file_fails(converted: Path, name: str) -> None:
    (path,) = converted.glob(name)
    data = path.read_bytes()
    try:
        path.unlink()
        differs(converted, path.name, "missing")
        for wrong in (data[:-1], data + b"\0", b""):
            path.write_bytes(wrong)
            differs(converted, path.name)
    finally:
        path.write_bytes(data)
    ctconvert.verify(converted)


def test_a_missing_or_cut_manifest_fails(converted: Path) -> None:
    path = converted / "ctconvert.json"
    data = path.read_bytes()
    try:
        path.unlink()
        differs(converted, "no ctconvert.json")
        for text in (data[: len(data) // 2], b"", b"[]", b"5", data[:-2] + b"]"):
            path.write_bytes(text)
            differs(converted, "ctconvert.json", "damaged")
        for version in (3, 5):
            other = data.replace(b'"format_version": 4', b'"format_version": %d' % version)
            path.write_bytes(other)
            differs(converted, "ctconvert.json", f"format_version {version}", "reads 4")
    finally:
        path.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        "model-00009-of-00009.safetensors",
        "adapter.safetensors",
        "LICENSE-adapter.safetensors",
        "notes.txt",
    ],
)
def test_a_stray_file_fails(converted: Path, name: str) -> None:
    save_file({"x": torch.zeros(2)}, converted / name)
    try:
        differs(converted, name, "not part")
    finally:
        (converted / name).unlink()


def test_a_readme_beside_it_is_no_fault(converted: Path) -> None:
    (converted / "README.md").write_text("# A model")
    try:
        ctconvert.verify(converted)
    finally:
        (converted / "README.md").unlink()


def test_no_shard_is_read_for_a_damaged_header_length(converted: Path) -> None:
    """A shard may be larger than memory; a header never is."""
    files, plan = files_of(LocalStore(converted)), Output.open(converted).plan
    shard = max(plan.shards, key=lambda item: item.size)
    name, limit = shard.name, max(len(plan.header(item)) for item in plan.shards)
    assert shard.size > 2 * limit
    store = WatchedStore(MemoryStore(files | {name: b"\xff" * 8 + files[name][8:]}))
    with pytest.raises(VerificationError, match=name):
        Output(store)
    read = [length for file, _, length in store.reads if file.endswith(".safetensors")]
    assert read and max(read) <= limit


# --- against a source ----------------------------------------------------------------------------


def flip(name: str, at: tuple[int, int], bit: int) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        raw = tensors[name].view(torch.uint8)
        width = tensors[name].element_size()
        raw[at[0], at[1] * width + bit // 8] ^= 1 << bit % 8

    return change


def without(tensors: Tensors, module: str) -> None:
    for name in [name for name in tensors if name.startswith(module)]:
        del tensors[name]


OTHER_SOURCES: dict[str, tuple[Callable[[Tensors], object], tuple[str, ...]]] = {
    "last code": (flip(f"{DOWN}.weight_packed", (63, 11), 31), (f"module {DOWN}", "codes")),
    "first code": (flip(f"{UP}.weight_packed", (0, 0), 0), (f"module {UP}", "codes")),
    "scale": (flip(f"{Q}.weight_scale", (47, 1), 0), (f"module {Q}", "scale")),
    "plain tensor": (flip(PLAIN, (23, 63), 0), (f"tensor {PLAIN}",)),
    "bias": (lambda tensors: tensors[f"{Q}.bias"].add_(1), (f"tensor {Q}.bias",)),
    "plain tensor transposed": (
        lambda tensors: tensors.update({PLAIN: torch.zeros(64, 24)}),
        (PLAIN,),
    ),
    "plain tensor missing": (lambda tensors: tensors.pop(PLAIN), (PLAIN,)),
    "one tensor more": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
        ("model.norm",),
    ),
    "module missing": (lambda tensors: without(tensors, UP), (UP,)),
    "bias missing": (lambda tensors: tensors.pop(f"{Q}.bias"), (Q,)),
}


@pytest.mark.parametrize("case", OTHER_SOURCES)
def test_another_source_is_not_the_one(converted: Path, tmp_path: Path, case: str) -> None:
    change, says = OTHER_SOURCES[case]
    tensors = small()
    change(tensors)
    other = write_checkpoint(tmp_path / "other", tensors, config_of(GROUP))
    differs(converted, *says, against=other)


def test_a_source_without_its_zero_points_is_another(tmp_path: Path) -> None:
    """The same codes and scales, but symmetric: what the weights mean has changed."""
    group = group_config(weight_args(4, 32, symmetric=False))
    tensors = tensors_of(group, (UP, 96, 64))
    convert(write_checkpoint(tmp_path / "model", tensors, config_of(group)), tmp_path / "out")
    del tensors[f"{UP}.weight_zero_point"]
    other = write_checkpoint(tmp_path / "other", tensors, config_of(GROUP))
    differs(tmp_path / "out", UP, "symmetric", against=other)


def test_against_catches_what_the_hashes_cannot(converted: Path) -> None:
    """A code changed in OUT with the manifest made to match: only the source can tell."""
    source = converted.parent / "model"
    for name, what in ((f"{UP}.qweight", "codes"), (f"{UP}.scales", "scale")):
        with flip_bit(converted, name, 5, bit=4):
            ctconvert.verify(converted)
            differs(converted, f"module {UP}", what, against=source)
    with flip_bit(converted, PLAIN, 9, bit=0):
        ctconvert.verify(converted)
        differs(converted, f"tensor {PLAIN}", against=source)
    ctconvert.verify(converted, against=source)
