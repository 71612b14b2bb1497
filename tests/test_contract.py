"""Every format with every layout: refused with a reason, or round-trips bit for bit.

The parameters come from the registries, so a new format or layout is covered by being listed;
a format without an example here fails :func:`test_every_format_has_examples`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    group_config,
    quantised,
    sparse24,
    weight_args,
)

from ctconvert.dtypes import same_bits, spec_of
from ctconvert.formats import FORMATS, Format
from ctconvert.formats.base import METADATA_NAMES, ModuleTensors
from ctconvert.formats.quantization import ModuleScheme
from ctconvert.formats.quantization.reading import read_group
from ctconvert.layouts import LAYOUTS, TARGETS, Layout
from ctconvert.specs import QuantizedWeight, TensorSpec
from ctconvert.stacking import can_stack, stack, stacked_spec, unstack


def weights(*args: Any, **more: Any) -> dict[str, Any]:
    return {"weights": weight_args(*args, **more)}


#: Config groups by format; each is made with N x K of :data:`SHAPES`.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "pack-quantized": [
        weights(bits, group, symmetric)
        for bits in (2, 3, 4, 5, 6, 7, 8)
        for group in (32, None)
        for symmetric in (True, False)
    ]
    + [
        weights(4, 32) | {"inputs": DYNAMIC_INT8},
        weights(4, 32) | {"inputs": STATIC_INT8, "outputs": STATIC_INT8},
        weights(8, None) | {"inputs": DYNAMIC_INT8},
    ],
    "int-quantized": [
        weights(8, None) | {"inputs": DYNAMIC_INT8},
        weights(8, None, False) | {"inputs": DYNAMIC_INT8},
        weights(8, strategy="tensor") | {"inputs": STATIC_INT8},
        weights(8, None) | {"inputs": STATIC_INT8, "outputs": STATIC_INT8},
        weights(4, 32) | {"inputs": DYNAMIC_INT8},
        weights(2, 32) | {"inputs": STATIC_INT8},
    ],
    "float-quantized": [
        weights(8, None, kind="float"),
        weights(8, None, kind="float") | {"inputs": DYNAMIC_INT8 | {"type": "float"}},
        weights(8, kind="float", strategy="tensor") | {"inputs": STATIC_INT8 | {"type": "float"}},
        weights(8, kind="float", strategy="block", block_structure=[128, 128]),
    ],
    "mxfp4-pack-quantized": [
        weights(4, 32, kind="float"),
        weights(4, 32, kind="float") | {"inputs": weight_args(4, 32, kind="float", dynamic=True)},
    ],
    "sparse-24-bitmask": [
        {"weights": None},
        weights(8, None, kind="float") | {"inputs": DYNAMIC_INT8 | {"type": "float"}},
        weights(8, None, kind="float"),
        weights(8, kind="float", strategy="tensor") | {"inputs": STATIC_INT8 | {"type": "float"}},
        weights(8, None) | {"inputs": DYNAMIC_INT8},
        weights(8, strategy="tensor") | {"inputs": STATIC_INT8},
    ],
    "naive-quantized": [
        weights(8, None) | {"inputs": DYNAMIC_INT8},
        weights(8, None, kind="float") | {"inputs": DYNAMIC_INT8 | {"type": "float"}},
    ],
}
SHAPES = ((192, 256), (72, 160), (128, 384))


def cases() -> list[Any]:
    found = []
    for handler in FORMATS:
        for index, example in enumerate(EXAMPLES.get(handler.name, [])):
            for n, k in SHAPES:
                for embedding in (False, True):
                    name = f"{handler.name}-{index}-{n}x{k}" + "-embedding" * embedding
                    found.append(pytest.param(handler, example, n, k, embedding, id=name))
    return found


def make(
    handler: Format, example: dict[str, Any], n: int, k: int, embedding: bool, seed: int
) -> tuple[QuantizedWeight, dict[str, torch.Tensor]]:
    """A weight decoded from tensors that compressed-tensors' own compressor made."""
    group = group_config(format=handler.name, **example)
    if handler.name == "sparse-24-bitmask":
        tensors = sparse24(n, k, group, seed)
    else:
        tensors = quantised(n, k, group, seed)
    values = {
        name: tensor.double().flatten().tolist()
        for name, tensor in tensors.items()
        if name in METADATA_NAMES
    }
    described = ModuleTensors(
        "m", {name: spec_of(t) for name, t in tensors.items()}, embedding, (0, 20), values
    )
    sparse = handler.name == "sparse-24-bitmask"
    parsed = read_group("group_0", group) if group["weights"] else None
    scheme = ModuleScheme(handler.name, parsed, "Linear", sparse=sparse)
    spec = handler.spec(described, scheme)
    return handler.decode(tensors, spec), tensors


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(same_bits(left[x], right[x]) for x in left)


def test_every_format_has_examples() -> None:
    assert {handler.name for handler in FORMATS} == set(EXAMPLES)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("handler", "example", "n", "k", "embedding"), cases())
def test_refuses_or_round_trips(
    handler: Format, example: dict[str, Any], n: int, k: int, embedding: bool, layout: Layout
) -> None:
    parts, sources = zip(
        *(make(handler, example, rows, k, embedding, rows) for rows in (n, n + 64)), strict=True
    )
    parts[1].side = parts[0].side  # a plan fuses only parts whose activation scales are equal
    for count in (1, 2):
        chosen = parts[:count]
        specs = [part.spec for part in chosen]
        if not can_stack(specs):
            continue
        spec = stacked_spec(specs)
        support = layout.supports(spec)
        if not support:
            assert support.reason
            assert "\n" not in support.reason
            continue
        whole = stack(chosen)
        encoded = layout.encode(whole)
        assert {name: spec_of(t) for name, t in encoded.items()} == layout.output_specs(spec)
        assert all(tensor.is_contiguous() for tensor in encoded.values())
        decoded = layout.decode(encoded, spec)
        assert same(decoded, whole)
        for part, source, found in zip(chosen, sources, unstack(decoded, specs), strict=False):
            assert same(part, found)
            again = handler.encode(found)
            if handler.name == "sparse-24-bitmask":  # which zero is kept may differ
                again |= {name: source[name] for name in METADATA_NAMES & source.keys()}
                once_more = handler.decode(source | again, part.spec)
                once_more.side = part.side
                assert same(part, once_more)
                continue
            for name, tensor in again.items():
                assert same_bits(tensor.reshape(source[name].shape), source[name]), name


def test_every_layout_takes_something() -> None:
    """A layout that refuses every example would pass the test above without doing anything."""
    for layout in LAYOUTS:
        taken = 0
        for case in cases():
            handler, example, n, k, embedding = case.values
            weight, _ = make(handler, example, n, k, embedding, 0)
            taken += bool(layout.supports(stacked_spec([weight.spec])))
        assert taken, layout.name


def test_the_targets_name_layouts() -> None:
    known = {layout.name for layout in LAYOUTS}
    assert known == {name for names in TARGETS.values() for name in names}


def test_specs_know_their_size() -> None:
    assert TensorSpec("BF16", (3, 5)).nbytes == 30
    assert TensorSpec("F4", (3, 4)).nbytes == 6
