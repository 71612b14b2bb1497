"""What CONTRIBUTING promises: a format, a layout, a store and an executor are one class each.

Every class here is all that its kind needs; each is put in its place in one line and goes all the
way: converted, verified against its source, restored to the same bits.
"""

from __future__ import annotations

import zipfile
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.models import options, repack, restore, tree, write_model

from ctconvert import api, formats, layouts
from ctconvert.formats import Format, ModuleTensors
from ctconvert.formats.base import scale_spec, weight_spec, weights_of
from ctconvert.formats.quantization import ModuleScheme
from ctconvert.layouts import Layout
from ctconvert.output import Output
from ctconvert.progress import Silent
from ctconvert.specs import QuantizedWeight, Support, TensorSpec, WeightSpec
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.transforms.dtypes import same_bits
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, Job
from ctconvert.work.verify import verify_against, verify_output

NAME = "model.layers.0.mlp.up_proj"


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    left, right = ({}, {})
    for found, folder in ((left, a), (right, b)):
        for path in folder.glob("*.safetensors"):
            found |= load_file(path)
    return left.keys() == right.keys() and all(same_bits(left[n], right[n]) for n in left)


# --- a layout ------------------------------------------------------------------------------------


class Inverted(Layout):
    """INT codes with every bit turned over, and scales by groups before rows."""

    name = "inverted"
    takes = "packed INT codes"
    writes = "codes, scales"
    read_by = "no kernel"

    def supports(self, spec: WeightSpec) -> Support:
        return Support("" if spec.storage == "packed" and spec.symmetric else "no packed codes")

    def output_specs(self, spec: WeightSpec) -> dict[str, TensorSpec]:
        assert spec.scale_shape and spec.scale_dtype
        rows, groups = spec.scale_shape
        return {
            "codes": TensorSpec("I32", (spec.n, spec.k * spec.bits // 32)),
            "scales": TensorSpec(spec.scale_dtype, (groups, rows)),
        }

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        assert weight.scale is not None
        return {"codes": ~weight.codes, "scales": weight.scale.T.contiguous()}

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        return QuantizedWeight(spec, ~tensors["codes"], tensors["scales"].T.contiguous())


def test_a_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "LAYOUTS", (*layouts.LAYOUTS, Inverted()))
    monkeypatch.setattr(layouts, "TARGETS", {**layouts.TARGETS, "toy": ("inverted",)})
    model = write_model(tmp_path / "model")
    report = api.repack(model, tmp_path / "out", target="toy")
    assert report.layouts == {"inverted": 6}
    packed = load_file(model / "model-00001-of-00002.safetensors")[f"{NAME}.weight_packed"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{NAME}.codes"], ~packed)
    assert api.verify(tmp_path / "out", against=model).against is not None
    api.restore(tmp_path / "out", tmp_path / "back")
    assert same_tensors(model, tmp_path / "back")


# --- a format ------------------------------------------------------------------------------------


class Mirrored(Format):
    """INT8 with its columns in the opposite order, under a name that no format here has."""

    name = "marlin-24"
    weight_name = "weight_mirrored"

    def spec(self, tensors: ModuleTensors, scheme: ModuleScheme) -> WeightSpec:
        n, k = tensors.check(self.weight_name, ("I8",), rank=2).shape
        scale = scale_spec(tensors, weights_of(scheme, tensors), n, k)
        return weight_spec(scheme, tensors, n=n, k=k, storage="plain", scale=scale, element="I8")

    def parameter_names(self, spec: WeightSpec) -> tuple[str, ...]:
        return self.weight_name, "weight_scale"

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec) -> QuantizedWeight:
        codes = tensors[self.weight_name].flip(1)
        return QuantizedWeight(spec, codes, tensors["weight_scale"])

    def encode(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        assert weight.scale is not None
        return {self.weight_name: weight.codes.flip(1), "weight_scale": weight.scale}


def test_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, Mirrored()))
    group = group_config(weight_args(8, None), format="int-quantized")
    made = quantised(64, 128, group, 0)
    plain = {f"{NAME}.{local}": tensor for local, tensor in made.items()}
    mirrored = dict(plain)
    mirrored[f"{NAME}.weight_mirrored"] = mirrored.pop(f"{NAME}.weight").flip(1).contiguous()
    write_checkpoint(tmp_path / "plain", plain, config_of(group))
    group = group | {"format": Mirrored.name}
    model = write_checkpoint(tmp_path / "model", mirrored, config_of(group))
    for name in ("plain", "model"):
        api.repack(tmp_path / name, tmp_path / f"{name}-out", target="cuda")
    assert same_tensors(tmp_path / "plain-out", tmp_path / "model-out")
    assert api.verify(tmp_path / "model-out", against=model).against is not None
    api.restore(tmp_path / "model-out", tmp_path / "back")
    assert same_tensors(model, tmp_path / "back")


# --- a store -------------------------------------------------------------------------------------


class ZipStore(Store):
    """A checkpoint in an archive."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.id = path.stem
        self.infos = {info.filename: info for info in zipfile.ZipFile(path).infolist()}

    def sizes(self) -> Mapping[str, int]:
        return {name: info.file_size for name, info in self.infos.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        with zipfile.ZipFile(self.where) as archive, archive.open(name) as file:
            file.seek(offset)
            buffer[:] = file.read(len(buffer))

    def fingerprint(self, name: str) -> str:
        return str(self.infos[name].CRC)


def test_a_store(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in model.rglob("*"):
            if path.is_file():
                archive.write(path, path.relative_to(model))
    store = ZipStore(tmp_path / "model.zip")
    repack(store, tmp_path / "out")
    repack(model, tmp_path / "plain")
    made, plain = tree(tmp_path / "out"), tree(tmp_path / "plain")
    assert made is not None and plain is not None
    # the files of an archive are listed in its own order
    assert {n for n in made if made[n] != plain[n]} <= {"ctconvert.json"} and len(made) == 8
    output = Output.open(tmp_path / "out")
    compared = verify_against(output, Checkpoint(store), Batches(), Silent())
    assert compared.source == str(tmp_path / "model.zip") and compared.modules == 6


# --- an executor ---------------------------------------------------------------------------------


class Batches(Executor):
    """A few jobs at a time, the last one first, as no queue would."""

    def run(self, jobs: Iterable[Job], context: Context) -> Generator[Done, None, None]:
        batch: list[Job] = []
        for job in jobs:
            batch.append(job)
            if len(batch) == 4:
                yield from (item.run(context) for item in reversed(batch))
                batch = []
        yield from (item.run(context) for item in reversed(batch))


def test_an_executor(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    repack(model, tmp_path / "plain")
    repack(model, tmp_path / "out", executor=Batches(), asked=options())
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")
    output = Output.open(tmp_path / "out")
    assert verify_output(output, Batches(), Silent()).modules == 6
    restore(tmp_path / "out", tmp_path / "back", executor=Batches())
    assert same_tensors(model, tmp_path / "back")
