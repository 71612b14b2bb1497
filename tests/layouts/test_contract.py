"""Every format with every layout: refused with a reason, or round-trips bit for bit.

The cases come from the registries, so a new format or layout is covered by being listed; a format
without an example here fails :func:`test_every_format_has_examples`. Every example is made once for
each shape and given to every layout, alone and joined with another weight, as the plan would.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from support.block_floats import mxfp8, mxfp8_group, nvfp4, nvfp4_group
from support.builders import (
    DYNAMIC_INT8,
    STATIC_INT8,
    config_of,
    group_config,
    quantised,
    sparse24,
    weight_args,
)
from support.memory import described

from ctconvert import codec
from ctconvert.assembly import Assembly, Concat, Pad, Part, assembled, can_join
from ctconvert.formats import FORMATS
from ctconvert.formats.base import METADATA_NAMES
from ctconvert.layouts import LAYOUTS, TARGETS, Layout
from ctconvert.records import Convert, Recipe, Restore, SourceModule
from ctconvert.specs import TensorSpec
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms.dtypes import same_bits, spec_of

CPU = torch.device("cpu")


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
        weights(8, None) | {"inputs": DYNAMIC_INT8 | {"symmetric": False}},
    ],
    "int-quantized": [
        weights(8, None) | {"inputs": DYNAMIC_INT8},
        weights(8, None, False) | {"inputs": DYNAMIC_INT8},
        weights(8, None) | {"inputs": DYNAMIC_INT8 | {"symmetric": False}},
        weights(8, None, False) | {"inputs": DYNAMIC_INT8 | {"symmetric": False}},
        weights(8, strategy="tensor") | {"inputs": STATIC_INT8},
        weights(8, None) | {"inputs": STATIC_INT8, "outputs": STATIC_INT8},
        weights(4, 32) | {"inputs": DYNAMIC_INT8},
        weights(2, 32) | {"inputs": STATIC_INT8},
        weights(4, 128) | {"inputs": DYNAMIC_INT8 | {"type": "float"}},
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
    "nvfp4-pack-quantized": [
        {"weights": nvfp4_group()["weights"], "inputs": nvfp4_group()["input_activations"]},
        {"weights": nvfp4_group(inputs=False)["weights"]},
    ],
    "mxfp8-quantized": [
        {"weights": mxfp8_group()["weights"]},
        {"weights": mxfp8_group()["weights"], "inputs": mxfp8_group(True)["input_activations"]},
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
#: Only parts with equal ones are joined.
SHARED = ("input_scale", "output_scale", "weight_global_scale", "input_global_scale")
#: N x K: some fit every kernel's tiles, others none; each is joined with a weight of N + 64 rows.
SHAPES = ((192, 256), (72, 160), (128, 384))
#: An embedding table and a linear layer, by name: a checkpoint has no classes.
KINDS = {"linear": "down_proj", "embedding": "embed_tokens"}


def fits(example: dict[str, Any], k: int) -> bool:
    """Whether groups are whole."""
    size = (example["weights"] or {}).get("group_size")
    return not size or k % size == 0


CASES = [
    pytest.param(name, index, n, k, id=f"{name}-{index}-{n}x{k}")
    for name, examples in EXAMPLES.items()
    for index in range(len(examples))
    for n, k in SHAPES
    if fits(examples[index], k)
]


@cache
def made(
    name: str, index: int, n: int, k: int, kind: str
) -> tuple[tuple[SourceModule, ...], dict[str, torch.Tensor]]:
    """Two modules that differ in their rows, and their tensors by full name."""
    group = group_config(targets=["re:.*"], format=name, **EXAMPLES[name][index])
    sparse = name == "sparse-24-bitmask"
    tensors: dict[str, torch.Tensor] = {}
    for parent, rows in (("a", n), ("b", n + 64)):
        if name == "nvfp4-pack-quantized":
            found = nvfp4(rows, k, rows, inputs=bool(group["input_activations"]))
        elif name == "mxfp8-quantized":
            found = mxfp8(rows, k, rows)
        else:
            found = (sparse24 if sparse else quantised)(rows, k, group, rows)
        for local, tensor in found.items():
            tensors[f"{parent}.{KINDS[kind]}.{local}"] = tensor
    for local in SHARED:
        if f"a.{KINDS[kind]}.{local}" in tensors:
            tensors[f"b.{KINDS[kind]}.{local}"] = tensors[f"a.{KINDS[kind]}.{local}"].clone()
    config = config_of(*[group] * (group["weights"] is not None), ignore=[])
    if sparse:
        config["sparsity_config"] = {"format": name, "targets": ["re:.*"], "ignore": []}
    modules = described(tensors, config).modules
    assert all(module.source and not module.reason for module in modules.values())
    return tuple(module.source for module in modules.values() if module.source), tensors


def module_of(layout: Layout, sources: tuple[SourceModule, ...], assembly: Assembly) -> Convert:
    """The module that a plan would make with a layout that supports the weight."""
    specs = [source.weight for source in sources]
    weight = assembled(assembly, specs)
    shape = layout.padded_shape(weight)
    if shape != (weight.n, weight.k):
        assembly = Pad(assembly, *shape)
        weight = assembled(assembly, specs)
    return Convert(
        name="m",
        sources=sources,
        recipe=Recipe(
            layout=layout.name, layout_version=layout.version, weight=weight, assembly=assembly
        ),
        outputs=tuple(
            TensorEntry(f"m.{local}", "out", 0, spec)
            for local, spec in layout.output_specs(weight).items()
        ),
    )


def check(layout: Layout, item: Convert, tensors: dict[str, torch.Tensor]) -> None:
    """What a layout makes is as it said, holds the weight, and gives back the source's tensors."""

    def read(entry: TensorEntry) -> torch.Tensor:
        return tensors[entry.name]

    weight = codec.assemble(item.recipe.assembly, item.sources, read, CPU)
    encoded = codec.encode(item, 0, read, CPU)
    assert {name: spec_of(t) for name, t in encoded.items()} == {
        entry.name.removeprefix("m."): entry.spec for entry in item.outputs
    }
    assert all(tensor.is_contiguous() for tensor in encoded.values())
    decoded = layout.decode(encoded, item.recipe.weight).tensors()
    assert decoded.keys() == weight.tensors().keys()
    assert all(same_bits(decoded[name], tensor) for name, tensor in weight.tensors().items())

    restored = codec.restore(
        Restore((item,), ()), 0, lambda entry: encoded[entry.name.removeprefix("m.")], CPU
    )
    seen = []
    for source, expert, parts in restored:
        assert expert is None
        seen.append(source.name)
        assert parts.keys() == source.tensors.keys() - METADATA_NAMES
        if source.weight.sparse:  # which zero is kept may differ, the dense weight may not
            again = tensors | {f"{source.name}.{local}": t for local, t in parts.items()}
            before = codec.source_weight(source, None, read, CPU)
            after = codec.source_weight(source, None, lambda entry, t=again: t[entry.name], CPU)
            assert codec.first_difference(before, after) is None
            continue
        for local, tensor in parts.items():
            assert same_bits(tensor, tensors[f"{source.name}.{local}"]), local
    assert seen == [source.name for source in item.sources]


def test_every_format_has_examples() -> None:
    assert {handler.name for handler in FORMATS} == set(EXAMPLES)


@pytest.mark.parametrize(("name", "index", "n", "k"), CASES)
def test_refuses_or_round_trips(name: str, index: int, n: int, k: int) -> None:
    for kind in KINDS:
        modules, tensors = made(name, index, n, k, kind)
        assert all(module.weight.embedding == (kind == "embedding") for module in modules)
        for count in (1, 2):
            sources = modules[:count]
            parts = tuple(Part(position) for position in range(count))
            assembly: Assembly = Concat(parts) if count > 1 else parts[0]
            specs = [source.weight for source in sources]
            if not can_join(specs):
                assert name == "float-quantized" and specs[0].strategy == "block"
                continue
            weight = assembled(assembly, specs)
            for layout in LAYOUTS:
                support = layout.supports(weight)
                if support:
                    check(layout, module_of(layout, sources, assembly), tensors)
                else:
                    assert support.reason and "\n" not in support.reason


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_takes_something(layout: Layout) -> None:
    """A layout that refuses every example would pass the test above without doing anything."""
    assert any(
        layout.supports(assembled(Part(0), [made(name, index, *shape, kind)[0][0].weight]))
        for name, examples in EXAMPLES.items()
        for index in range(len(examples))
        for kind in KINDS
        for shape in SHAPES
        if fits(examples[index], shape[1])
    )


def test_the_targets_name_layouts() -> None:
    known = {layout.name for layout in LAYOUTS}
    assert known >= {name for names in TARGETS.values() for name in names}


def test_specs_know_their_size() -> None:
    assert TensorSpec("BF16", (3, 5)).nbytes == 30
    assert TensorSpec("F4", (3, 4)).nbytes == 6
