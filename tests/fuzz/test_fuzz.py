"""Damaged and hostile files: whatever they hold, only ctconvert's own errors come out, soon.

``CTCONVERT_FUZZ=10000 pytest --timeout 0 tests/fuzz`` tries ten thousand inputs of each kind
instead of the few hundred of every run, and other ones every time.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.executors import Inline
from support.folders import quick_folder
from support.stores import MemoryStore

import ctconvert
from ctconvert.errors import CtconvertError
from ctconvert.output import Output
from ctconvert.planning.describe import describe
from ctconvert.planning.inspection import inspection
from ctconvert.planning.make import make_plan, refuse, restore_plan
from ctconvert.progress import Silent
from ctconvert.records import Options, to_json
from ctconvert.store.checkpoint import CONFIG, INDEX, MANIFEST, Checkpoint
from ctconvert.work.build import Settings, build
from ctconvert.work.verify import verify_against, verify_output

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
COUNT = int(os.environ.get("CTCONVERT_FUZZ", "0"))
#: Replaced by digits in the text: Python itself refuses to write so many.
_HUGE = "HUGE-NUMBER"
ODD: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    7,
    2**31,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    _HUGE,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "Linear",
    "group",
    "\ud800",
    "\x1b]0;title\x07",
    "\u202egnp.exe",
    "a" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "re:(a|aa)+$",
    "re:(",
    "re:" + "(" * 500 + ")" * 500,
    [],
    {},
    [2**62] * 70,
    [2**62] * 40,
    [1] * 1000,
    [[]],
    {"": ""},
    {"weights": None},
]


def budget(share: float) -> settings:
    """A fixed part of the time of every run, or of the long one."""
    return settings(
        max_examples=COUNT or round(300 * share),
        derandomize=not COUNT,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def files_of(name: str) -> dict[str, bytes]:
    folder = CHECKPOINTS / name
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


SOURCES = {
    name: files_of(name)
    for name in ("smol-w4a16-g32-asym", "smol-w4a8o8-pack-static", "smol-mxfp4a16")
}


@contextmanager
def only_our_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except CtconvertError as error:
            assert str(error)
            first, *refusals = str(error).split("\n")
            assert all(line.startswith("  ") for line in refusals), first


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    yield at
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from paths(item, (*at, key))


@st.composite
def mutated(draw: st.DrawFn, original: Any) -> Any:
    """A JSON value with one to three places replaced, removed, doubled or renamed."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        places = [path for path in paths(value) if path]
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "copy", "rename"]))
        if how == "remove":
            del holder[last]
        elif how == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "weight", "__metadata__", "a.b"]))] = holder.pop(
                last
            )
        elif how == "copy":
            other = draw(st.sampled_from(places))
            found: Any = original
            for key in other:
                found = found[key] if _has(found, key) else None
            holder[last] = copy.deepcopy(found)
        else:
            odd = draw(st.sampled_from(ODD) | st.integers() | st.text(max_size=20))
            holder[last] = copy.deepcopy(odd)  # it may be changed in turn
    return value


def _has(value: Any, key: Any) -> bool:
    if isinstance(value, dict):
        return key in value
    return isinstance(value, list) and isinstance(key, int) and key < len(value)


def text_of(value: Any) -> bytes:
    return json.dumps(value).replace(f'"{_HUGE}"', "9" * 5000).encode()


def with_header(data: bytes, header: bytes) -> bytes:
    length = struct.unpack("<Q", data[:8])[0]
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def header_of(data: bytes) -> Any:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length])


def use(files: Mapping[str, bytes], target: str, fuse: bool) -> None:
    """What inspect, plan and the first module's conversion do with a checkpoint."""
    with only_our_errors():
        description = describe(Checkpoint(MemoryStore(files)))
        options = Options(target=target, fuse=fuse, keep_unsupported=True)
        plan = make_plan(description, options)
        to_json(inspection(description, plan))
        to_json(plan)


targets = st.sampled_from(["triton", "cuda", "xpu"])
sources = st.sampled_from(sorted(SOURCES))


@budget(1)
@given(data=st.data(), name=sources, target=targets, fuse=st.booleans())
def test_config(data: st.DataObject, name: str, target: str, fuse: bool) -> None:
    files = dict(SOURCES[name])
    config = data.draw(mutated(json.loads(files[CONFIG])))
    use(files | {CONFIG: text_of(config)}, target, fuse)


@budget(1)
@given(data=st.data(), name=sources, target=targets, fuse=st.booleans())
def test_header_structure(data: st.DataObject, name: str, target: str, fuse: bool) -> None:
    files = dict(SOURCES[name])
    shard = files["model.safetensors"]
    header = data.draw(mutated(header_of(shard)))
    use(files | {"model.safetensors": with_header(shard, text_of(header))}, target, fuse)


@st.composite
def damaged(draw: st.DrawFn, data: bytes, within: int) -> bytes:
    """Bytes with a few changed, inserted or cut near the beginning."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(within, len(found)) - 1)))
        how = draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if how == "set" and found:
            found[at] = draw(st.integers(0, 255))
        elif how == "insert":
            found[at:at] = draw(st.binary(max_size=6))
        elif how == "delete":
            del found[at : at + draw(st.integers(1, 9))]
        elif how == "cut" and draw(st.integers(0, 9)) == 0:
            del found[at:]
    return bytes(found)


@budget(1)
@given(data=st.data(), name=sources, target=targets)
def test_bytes_of_any_file(data: st.DataObject, name: str, target: str) -> None:
    files = dict(SOURCES[name])
    which = data.draw(st.sampled_from([CONFIG, "model.safetensors"]))
    files[which] = data.draw(damaged(files[which], 3000))
    use(files, target, fuse=True)


@budget(0.5)
@given(data=st.data(), name=sources)
def test_index(data: st.DataObject, name: str) -> None:
    files = dict(SOURCES[name])
    weight_map = dict.fromkeys(header_of(files["model.safetensors"]), "model.safetensors")
    weight_map.pop("__metadata__", None)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    if data.draw(st.booleans()):
        files[INDEX] = text_of(data.draw(mutated(index)))
    else:
        files[INDEX] = data.draw(damaged(json.dumps(index).encode(), 4000))
    use(files, "triton", fuse=False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Small outputs by name, each with its source's."""
    found = {}
    for name, target in (("smol-w4a16-g32-asym", "cuda"), ("smol-w4a8o8-pack-static", "triton")):
        out = tmp_path_factory.mktemp("converted") / "out"
        ctconvert.repack(CHECKPOINTS / name, out, target=target, fuse=True, device="cpu")
        found[name] = {path.name: path.read_bytes() for path in out.iterdir()}
    return found


def signed(manifest: Any) -> bytes:
    """A manifest's bytes with the hash that belongs to them, whatever it says."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("manifest_sha256"), str):
        return text_of(manifest)
    blank = text_of(manifest | {"manifest_sha256": "0" * 64})
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(b"0" * 64, digest.encode())


@budget(1)
@given(data=st.data())
def test_manifest(data: st.DataObject, converted: dict[str, dict[str, bytes]]) -> None:
    name = data.draw(st.sampled_from(sorted(converted)))
    files = dict(converted[name])
    if data.draw(st.integers(0, 9)) == 0:
        files[MANIFEST] = data.draw(damaged(files[MANIFEST], len(files[MANIFEST])))
    else:
        files[MANIFEST] = signed(data.draw(mutated(json.loads(files[MANIFEST]))))
    with only_our_errors():
        output = Output(MemoryStore(files))
        verify_output(output, Inline(), Silent())
    with only_our_errors():
        output = Output(MemoryStore(files))
        with quick_folder() as folder:
            plan = restore_plan(output.manifest, "out", 1 << 20)
            build(plan, output.store, folder / "back", Settings(Inline(), Silent()))
    with only_our_errors():
        output = Output(MemoryStore(files))
        verify_against(output, Checkpoint(MemoryStore(SOURCES[name])), Inline(), Silent())


@budget(0.3)
@given(data=st.data(), name=sources)
def test_weight_data(data: st.DataObject, name: str, tmp_path_factory: Any) -> None:
    """Any bytes in the place of weights: converted exactly, or refused."""
    files = dict(SOURCES[name])
    shard = bytearray(files["model.safetensors"])
    start = 8 + struct.unpack("<Q", shard[:8])[0]
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(start, len(shard) - 9))
        shard[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    files["model.safetensors"] = bytes(shard)
    store = MemoryStore(files)
    out = tmp_path_factory.mktemp("fuzz") / "out"
    with only_our_errors():
        plan = make_plan(describe(Checkpoint(store)), Options(target="cuda"))
        refuse(plan)
        build(plan, store, out, Settings(executor=Inline(), progress=Silent()))
        output = Output.open(out)
        verify_against(output, Checkpoint(MemoryStore(files)), Inline(), Silent())


@budget(0.3)
@given(names=st.lists(st.binary(min_size=1, max_size=40), max_size=5))
def test_names_of_side_files(names: list[bytes], tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("side") / "model"
    folder.mkdir()
    for name, content in SOURCES["smol-w4a16-g32-asym"].items():
        (folder / name).write_bytes(content)
    for name in names:
        path = folder / os.fsdecode(name.replace(b"/", b"_").replace(b"\0", b"_"))
        if name.strip(b".") and not os.path.lexists(path):
            path.write_bytes(b"side")
    out = folder.with_name("out")
    with only_our_errors():
        ctconvert.repack(folder, out, target="triton", device="cpu", workers=1)
        ctconvert.verify(out, against=folder, workers=1)
