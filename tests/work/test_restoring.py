"""What is restored has the dtypes and sizes of the source's tensors, every one of them, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.folders import quick_folder
from support.models import repack
from support.reference import load_tensors

from ctconvert import codec
from ctconvert.errors import ConversionError, VerificationError
from ctconvert.output import Output
from ctconvert.records import Convert, Restore
from ctconvert.specs import Dtype, TensorSpec
from ctconvert.transforms.dtypes import same_bits
from ctconvert.work.transforming import read_tensor

CPU = torch.device("cpu")
NAME = "model.layers.0.mlp.up_proj"
N, K = 64, 128
GROUP = group_config(weight_args(4, 32, False))


@pytest.fixture(scope="module")
def output() -> Iterator[Output]:
    with quick_folder() as folder:
        made = {f"{NAME}.{local}": value for local, value in quantised(N, K, GROUP, 1).items()}
        repack(write_checkpoint(folder / "model", made, config_of(GROUP)), folder / "out")
        yield Output.open(folder / "out")


def stored_as(module: Convert, specs: Mapping[str, TensorSpec | None]) -> Convert:
    """The module, its source said to have held other tensors (or none of that name)."""
    (source,) = module.sources
    tensors = dict(source.tensors)
    for local, spec in specs.items():
        old = tensors.pop(local, source.tensors["weight_packed"])
        if spec is not None:
            tensors[local] = replace(old, name=f"{NAME}.{local}", spec=spec)
    return replace(module, sources=(replace(source, tensors=tensors),))


def restored(output: Output, specs: Mapping[str, TensorSpec | None]) -> codec.Tensors:
    module = stored_as(output.plan.modules[0], specs)
    entries = tuple(module.sources[0].tensors.values())
    read = partial(read_tensor, output.store)
    ((_, _, tensors),) = codec.restore(Restore((module,), entries), 0, read, CPU)
    return tensors


def test_all_that_the_manifest_does_not_hold_is_restored(output: Output) -> None:
    source = load_tensors(Path(output.where).with_name("model"))
    found = restored(output, {})
    assert found.keys() == {"weight_packed", "weight_scale", "weight_zero_point"}
    for local, tensor in found.items():
        assert same_bits(tensor, source[f"{NAME}.{local}"])


@pytest.mark.parametrize("shape", [(N * K // GROUP["weights"]["group_size"],), (1, N, 1, K // 32)])
def test_another_shape_of_as_many_elements_is_the_source_s(
    output: Output, shape: tuple[int, ...]
) -> None:
    found = restored(output, {"weight_scale": TensorSpec("BF16", shape)})
    assert found["weight_scale"].shape == shape


@pytest.mark.parametrize(
    ("local", "dtype", "shape"),
    [
        ("weight_scale", "F32", (N, K // 32)),
        ("weight_scale", "F16", (N, K // 32)),
        ("weight_scale", "I16", (N, K // 32)),
        ("weight_scale", "BF16", (3, 7)),
        ("weight_scale", "BF16", (N, K // 16)),
        ("weight_packed", "F32", (N, K // 8)),
        ("weight_packed", "I16", (N, K // 8)),
        ("weight_packed", "I32", (N, K // 16)),
        ("weight_packed", "BOOL", (N, K // 8)),
        ("weight_zero_point", "I32", (N // 8,)),
    ],
)
def test_what_the_source_cannot_have_held_is_not_made(
    output: Output, local: str, dtype: Dtype, shape: tuple[int, ...]
) -> None:
    with pytest.raises(VerificationError, match=rf"^module {NAME}: .*{local}"):
        restored(output, {local: TensorSpec(dtype, shape)})


def test_integers_may_be_wider_in_the_source(output: Output) -> None:
    """As ``weight_g_idx``, i64 of some producers."""
    found = restored(output, {"weight_zero_point": TensorSpec("I64", (N // 8, K // 32))})
    assert found["weight_zero_point"].dtype == torch.int64
    assert torch.equal(
        found["weight_zero_point"], restored(output, {})["weight_zero_point"].to(torch.int64)
    )


def test_what_nothing_holds_is_named(output: Output) -> None:
    with pytest.raises(VerificationError, match=rf"module {NAME}: nothing holds weight_g_idx"):
        restored(output, {"weight_g_idx": TensorSpec("I32", (K,))})


def test_what_has_no_place_in_the_source_is_named(output: Output) -> None:
    with pytest.raises(VerificationError, match=rf"module {NAME}: .*no weight_zero_point"):
        restored(output, {"weight_zero_point": None})


def test_a_weight_that_is_not_what_was_planned_is_not_encoded(output: Output) -> None:
    """The layout would read its codes as others."""
    module = output.plan.modules[0]
    source = replace(module.sources[0], weight=replace(module.sources[0].weight, bits=8, k=K // 2))
    tensors = load_tensors(Path(output.where).with_name("model"))
    wrong = replace(module, sources=(source,))
    tensors[f"{NAME}.weight_zero_point"] = torch.zeros((N // 4, K // 32), dtype=torch.int32)
    with pytest.raises(ConversionError, match=rf"module {NAME}: .*bits"):
        codec.encode(wrong, 0, lambda entry: tensors[entry.name], CPU)
