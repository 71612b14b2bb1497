"""Records: JSON and back without loss, and nothing but one line for what is no manifest."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec import Struct
from support.builders import config_of, group_config, layer, quantised, weight_args
from support.executors import Inline
from support.memory import described, planned
from support.models import options, repack, restore, write_model
from support.stores import MemoryStore, files_of

from ctconvert import assembly, records, specs
from ctconvert.assembly import Concat, Pad, Part, Stack
from ctconvert.errors import CtconvertError, VerificationError
from ctconvert.output import Output
from ctconvert.planning.inspection import inspection
from ctconvert.planning.make import restore_plan
from ctconvert.progress import Silent
from ctconvert.records import (
    Convert,
    Copy,
    Manifest,
    Options,
    Plan,
    Refusal,
    Report,
    Restore,
    SourceModule,
    Verified,
    from_json,
    schema,
    to_json,
)
from ctconvert.records.manifest import _wrong_module as wrong_module
from ctconvert.specs import TensorSpec
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.local import LocalStore
from ctconvert.work.verify import verify_output


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of one module, and beside it its restoration."""
    folder = tmp_path_factory.mktemp("records")
    repack(write_model(folder / "model", modules=1), folder / "out", asked=options(fuse=True))
    restore(folder / "out", folder / "back")
    return folder / "out"


@pytest.fixture(scope="module")
def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / MANIFEST).read_bytes())


def again(record: Struct) -> Struct:
    return from_json(to_json(record), type(record), "here")


# --- round trips ---------------------------------------------------------------------------------

GROUP = group_config(weight_args(4, 32))
MIXED = group_config(weight_args(8, 32, False), ["re:.*mlp.*"])


PLANS = ("fused", "alone", "experts", "refused", "kept")


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """Plans that hold every kind of record."""
    tensors = layer(GROUP)
    experts = {}
    for local, first in quantised(64, 256, GROUP, 1).items():
        whole = first if local == "weight_shape" else torch.stack([first, first])
        experts[f"model.layers.0.mlp.experts.up_proj.{local}"] = whole
    refused = layer(group_config(weight_args(3, 32)))
    three = config_of(group_config(weight_args(3, 32)))
    return {
        "fused": planned(tensors, config_of(GROUP), "cuda", fuse=True),
        "alone": planned(tensors, config_of(GROUP), "triton", overrides=(("*q_proj", "marlin"),)),
        "experts": planned(experts, config_of(GROUP), "triton", max_shard_size=2**63 - 1),
        "refused": planned(refused, three, "triton"),
        "kept": planned(refused, three, "triton", keep_unsupported=True),
    }


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_survives_json(plans: dict[str, Plan], name: str) -> None:
    plan = plans[name]
    found = again(plan)
    assert found == plan and found.digest() == plan.digest()
    assert found.entries == plan.entries and found.layouts() == plan.layouts()
    assert to_json(found) == to_json(plan)
    assert from_json(to_json(plan, indent=2), Plan, "here") == plan


def test_every_kind_of_record_is_tried(plans: dict[str, Plan]) -> None:
    assert plans.keys() == set(PLANS)
    assert any(module.beside for module in plans["alone"].modules)
    assert any(isinstance(item.recipe.assembly, Concat) for item in plans["fused"].modules)
    assert isinstance(plans["experts"].modules[0].recipe.assembly, Stack)
    assert plans["refused"].refusals and plans["kept"].kept and plans["kept"].copies


def test_a_manifest_and_the_way_back_survive_json(out: Path) -> None:
    for folder in (out, out.with_name("back")):
        data = (folder / MANIFEST).read_bytes()
        manifest = Manifest.load(LocalStore(folder))
        assert again(manifest) == manifest
        assert manifest.dump() == data
        assert Manifest.parse(manifest.dump(), "here") == manifest
    back = restore_plan(Manifest.load(LocalStore(out)), "out", 1000)
    assert {type(item) for item in back.items} == {Restore, Copy}
    assert again(back) == back


def test_reports_survive_json(out: Path, tmp_path: Path) -> None:
    report = repack(out.with_name("model"), tmp_path / "out")
    verified = verify_output(Output.open(tmp_path / "out"), Inline(), Silent())
    description = described(layer(GROUP), config_of(GROUP))
    inspected = inspection(description, None)
    for record in (report, verified, inspected):
        assert again(record) == record
    assert isinstance(report, Report) and isinstance(verified, Verified)


@pytest.mark.parametrize(
    "tree",
    [
        Part(0),
        Part(3, 7),
        Concat((Part(0), Part(1))),
        Concat((Part(0), Part(1, rows=(64, 96), columns=(0, 32)))),
        Pad(Part(0, columns=(3, 4)), 64, 128),
        Stack((Pad(Part(0, 0), 1, 1), Pad(Part(0, 1), 1, 1))),
    ],
)
def test_an_assembly_survives_json(tree: Any) -> None:
    data = msgspec.json.encode(tree)
    assert msgspec.json.decode(data, type=assembly.Assembly) == tree


def test_a_plan_is_linear_in_its_modules() -> None:
    """A module's JSON does not grow with the number of the others, nor an expert's."""

    def size(modules: int) -> int:
        made = {}
        for index in range(modules):
            for local, tensor in quantised(64, 64, GROUP, 0).items():
                made[f"model.layers.{index:04}.up_proj.{local}"] = tensor
        return len(to_json(planned(made, config_of(GROUP), "triton")))

    one, ten, hundred = size(1), size(10), size(100)
    assert (hundred - ten) / 90 == pytest.approx((ten - one) / 9, rel=0.02)

    def stacked(experts: int) -> int:
        made = {}
        for local, tensor in quantised(64, 64, GROUP, 0).items():
            whole = tensor if local == "weight_shape" else torch.stack([tensor] * experts)
            made[f"model.layers.0.mlp.experts.up_proj.{local}"] = whole
        return len(to_json(planned(made, config_of(GROUP), "triton")))

    one, ten, hundred = stacked(1), stacked(10), stacked(100)
    assert (hundred - ten) / 90 == pytest.approx((ten - one) / 9, rel=0.1)
    assert (hundred - ten) / 90 < 60


# --- records are closed --------------------------------------------------------------------------


def every_struct() -> Iterator[type[Struct]]:
    for module in (records, assembly, specs):
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Struct) and value is not Struct:
                yield value


def test_no_record_has_an_open_field() -> None:
    """``Any`` and bare dictionaries end at the border; what verify's kernels report is the rest."""
    for struct in every_struct():
        for name, hint in typing.get_type_hints(struct, include_extras=True).items():
            if name.startswith("_") or (struct is Verified and name == "kernels"):
                continue
            assert "Any" not in str(hint) and hint not in (dict, list, tuple, object), (
                struct,
                name,
            )


def test_records_cannot_be_changed() -> None:
    for struct in every_struct():
        if not struct.__name__.startswith("_"):
            assert struct.__struct_config__.frozen, struct


def test_the_schema_names_every_record() -> None:
    found = schema()
    assert found["$schema"].endswith("2020-12/schema")
    names = set(found["$defs"])
    wanted = {Manifest, Plan, Convert, Copy, Restore, SourceModule, Options, Refusal}
    assert {struct.__name__ for struct in wanted} <= names
    json.dumps(found)


# --- what is no manifest -------------------------------------------------------------------------


def signed(value: Any) -> bytes:
    """A manifest's bytes with the hash that belongs to them, whatever it says."""
    blank = value | {"manifest_sha256": "0" * 64}
    data = json.dumps(blank).replace('"HUGE"', "9" * 5000).encode()
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode())


def refused(data: bytes) -> str:
    """The one line that says what is wrong."""
    with pytest.raises(VerificationError) as error:
        Manifest.parse(data, "/out/ctconvert.json")
    text = str(error.value)
    assert text.startswith("/out/ctconvert.json: ") and "\n" not in text
    return text


def test_a_sound_one_is_accepted(manifest: dict[str, Any]) -> None:
    """Or else the tests below would prove nothing."""
    Manifest.parse(signed(manifest), "here")


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    0.5,
    1e308,
    2**63,
    10**30,
    "HUGE",
    "",
    "x",
    "\ud800",
    "\x1b[2J\n",
    "../../etc/passwd",
    [],
    {},
    [[]],
    {"x": 1},
    [2**62] * 70,
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*at, index))


def with_place(value: Any, place: tuple[Any, ...], what: Any, remove: bool = False) -> Any:
    made = copy.deepcopy(value)
    *way, last = place
    holder = made
    for key in way:
        holder = holder[key]
    if remove:
        del holder[last]
    else:
        holder[last] = what
    return made


def test_any_value_in_any_place(out: Path, manifest: dict[str, Any]) -> None:
    """Refused in one line; or taken, where it fits, and then the files are checked with it."""
    files = files_of(LocalStore(out))
    taken = total = 0
    for place in places(manifest):
        if not place or place == ("manifest_sha256",):
            continue
        for what in [*ODD, "REMOVE"]:
            data = signed(with_place(manifest, place, what, what == "REMOVE"))
            total += 1
            try:
                Manifest.parse(data, "here")
            except VerificationError as error:
                assert str(error).startswith("here: "), place
                continue
            taken += 1
            try:
                output = Output(MemoryStore(files | {MANIFEST: data}))
                to_json(restore_plan(output.manifest, "out", 1000))
                verify_output(output, Inline(), Silent())
            except CtconvertError:
                continue
    assert total > 2000 and taken < total / 4


@pytest.mark.parametrize(
    ("place", "what", "says"),
    [
        (("plan", "items", 0, "type"), "x", r"plan\.items\[0\]"),
        (("plan", "options", "target"), 5, r"plan\.options\.target"),
        (("plan", "shards", 0, "size"), -1, r"plan\.shards\[0\]\.size"),
        (("plan", "config"), None, r"plan\.config"),
        (("files", 0, "sha256"), "0", r"files\[0\]\.sha256"),
        (("tool", "name"), "other", r"tool\.name"),
        (("tool", "version"), [], r"tool\.version"),
    ],
)
def test_the_field_that_is_wrong_is_named(
    manifest: dict[str, Any], place: tuple[Any, ...], what: Any, says: str
) -> None:
    assert re.search(says, refused(signed(with_place(manifest, place, what))))


def converted(manifest: dict[str, Any]) -> tuple[Any, ...]:
    """The place of the converted module."""
    (index,) = [
        index for index, item in enumerate(manifest["plan"]["items"]) if item["type"] == "convert"
    ]
    return "plan", "items", index


@pytest.mark.parametrize("text", ["a\nb", "\r", "\x1b[2J", "\u2028"])
def test_what_a_field_holds_is_told_in_one_line(manifest: dict[str, Any], text: str) -> None:
    for place in (("plan", "items", 0, "type"), ("plan", "kind"), ("tool", "name")):
        assert text not in refused(signed(with_place(manifest, place, text)))


def test_fields_that_do_not_fit_each_other(manifest: dict[str, Any]) -> None:
    tensors = dict(manifest["tensors"])
    name = next(iter(tensors))
    for changed, says in [
        (with_place(manifest, ("tensors", name), None, True), "tensors do not hold a hash"),
        (manifest | {"tensors": tensors | {"other": "0" * 63 + "1"}}, "tensors do not hold"),
        (with_place(manifest, ("files",), []), "files do not list"),
        (with_place(manifest, ("plan", "shards"), []), "shards do not list every tensor"),
        (
            with_place(manifest, ("plan", "shards"), manifest["plan"]["shards"] * 2),
            "shards do not list every tensor",
        ),
    ]:
        assert says in refused(signed(changed))


@pytest.mark.parametrize(
    ("local", "dtype", "shape"),
    [
        ("weight_scale", "BF16", [3, 7]),
        ("weight_scale", "F32", [64, 4]),
        ("weight_packed", "I32", [64, 8]),
        ("weight_packed", "I32", [16, 64]),
        ("weight_packed", "F32", [64, 16]),
        ("weight_shape", "I64", [1, 1]),
    ],
)
def test_a_source_that_cannot_hold_its_weight(
    manifest: dict[str, Any], local: str, dtype: str, shape: list[int]
) -> None:
    """Restored from it, it would be no tensor of the source's."""
    place = (*converted(manifest), "sources", 0, "tensors", local, "spec")
    changed = with_place(manifest, place, {"dtype": dtype, "shape": shape})
    assert local in refused(signed(changed))


def test_a_shape_that_is_not_its_weight_s(manifest: dict[str, Any]) -> None:
    place = (*converted(manifest), "sources", 0, "values", "weight_shape")
    value = b"".join(number.to_bytes(8, "little") for number in (64, 64)).hex()
    assert "weight_shape is [64, 64]" in refused(signed(with_place(manifest, place, value)))


@pytest.mark.parametrize(
    ("field", "what"), [("name", "x"), ("spec", {"dtype": "F32", "shape": [64, 0]})]
)
def test_a_copy_that_is_none(manifest: dict[str, Any], field: str, what: Any) -> None:
    items = manifest["plan"]["items"]
    (index, *_) = [index for index, item in enumerate(items) if item["type"] == "copy"]
    changed = with_place(manifest, ("plan", "items", index, "source", field), what)
    assert "is a copy of another" in refused(signed(changed))


def test_a_bias_that_is_not_its_sources(plans: dict[str, Plan], manifest: dict[str, Any]) -> None:
    (module, *_) = [module for module in plans["alone"].modules if module.beside]
    (source,) = module.sources
    bias = source.beside["bias"]
    for spec in (TensorSpec("F16", bias.spec.shape), TensorSpec("BF16", (3,))):
        wrong = msgspec.structs.replace(bias, spec=spec)
        wrong = msgspec.structs.replace(source, beside={"bias": wrong})
        wrong = msgspec.structs.replace(module, sources=(wrong,))
        assert wrong_module(wrong) == f"its bias, {bias.spec}, is not that of its sources"
    assert wrong_module(module) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "[" * 100_000, "{} {}"])
def test_a_config_that_is_none(manifest: dict[str, Any], text: str) -> None:
    """It would be restored as config.json."""
    for place in (("plan", "source", "config"), ("plan", "config")):
        says = f"{'.'.join(place)} is no JSON object"
        assert says in refused(signed(with_place(manifest, place, text)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b"{}",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe{}",
        b'{"format_version": ' + b"9" * 5000 + b"}",
        b'{"format_version": 4}',
        b'{"format_version": 4, "manifest_sha256": ""}',
        b'{"format_version": 4, "manifest_sha256": "a"}',
        b'{"format_version": 4, "manifest_sha256": "\\ud800"}',
        b'{"format_version": "2"}',
    ],
)
def test_what_is_no_manifest(data: bytes) -> None:
    refused(data)


def test_other_versions_are_named(manifest: dict[str, Any]) -> None:
    """Also where nothing else in them is as it is here."""
    for version in (0, 1, 2, 3, 5, 2**40):
        text = refused(signed({"format_version": version, "modules": {}, "files": {}}))
        assert f"format_version {version}, and this program reads 4" in text
        assert f"format_version {version}" in refused(
            signed(manifest | {"format_version": version})
        )


def test_what_is_cut_or_changed(out: Path) -> None:
    data = (out / MANIFEST).read_bytes()
    for length in range(0, len(data) - 1, 37):
        refused(data[:length])
    for at in range(0, len(data), 61):
        refused(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    refused(data + b" ")
    refused(data.replace(b"triton", b"xxxxxx"))


def test_nesting_that_is_too_deep(manifest: dict[str, Any]) -> None:
    tree: Any = {"type": "part", "source": 0}
    place = (*converted(manifest), "recipe", "assembly")
    deep = json.dumps(tree)
    for _ in range(5000):
        deep = f'{{"type":"concat","parts":[{deep}]}}'
    text = json.dumps(with_place(manifest, place, "TREE") | {"manifest_sha256": "0" * 64})
    data = text.replace('"TREE"', deep).encode()
    refused(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode()))
