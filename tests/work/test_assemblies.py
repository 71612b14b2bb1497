"""Output weights made of parts of source weights: cut, joined, padded and stacked, and back.

Plans are made by hand here, of every format, built, and what the output holds is put together
again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.builders import (
    DYNAMIC_INT8,
    config_of,
    group_config,
    quantised,
    sparse24,
    weight_args,
    write_checkpoint,
)
from support.executors import Inline
from support.folders import quick_folder
from support.plans import Wanted, hand_made, supporting

from ctconvert import codec
from ctconvert.assembly import (
    Assembly,
    Axis,
    Concat,
    Pad,
    Part,
    Stack,
    assembled,
    can_join,
    expanded,
    leaves,
    unpadded,
)
from ctconvert.errors import VerificationError
from ctconvert.output import Output
from ctconvert.planning.describe import Description, describe
from ctconvert.planning.make import restore_plan
from ctconvert.progress import Silent
from ctconvert.records import Convert, Plan, SourceModule
from ctconvert.specs import QuantizedWeight
from ctconvert.store.checkpoint import Checkpoint
from ctconvert.store.local import LocalStore
from ctconvert.transforms.dtypes import same_bits
from ctconvert.work.build import Settings, build
from ctconvert.work.transforming import read_tensor
from ctconvert.work.verify import verify_against

CPU = torch.device("cpu")
N, K = 128, 256
FP8 = DYNAMIC_INT8 | {"type": "float"}

#: A scheme of every format and scale strategy, by name.
SCHEMES: dict[str, dict[str, Any]] = {
    "int4 group": group_config(weight_args(4, 32)),
    "int4 group asym": group_config(weight_args(4, 64, False)),
    "int4 channel": group_config(weight_args(4, None)),
    "int8 group": group_config(weight_args(8, 32)),
    "int8 channel asym": group_config(weight_args(8, None, False)),
    "int3 group": group_config(weight_args(3, 32)),
    "w4a8": group_config(weight_args(4, 32), inputs=DYNAMIC_INT8),
    "w8a8 channel": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
    "w8a8 channel asym": group_config(
        weight_args(8, None, False), format="int-quantized", inputs=DYNAMIC_INT8
    ),
    "w8a8 tensor": group_config(
        weight_args(8, strategy="tensor"), format="int-quantized", inputs=DYNAMIC_INT8
    ),
    "fp8 channel": group_config(
        weight_args(8, None, kind="float"), format="float-quantized", inputs=FP8
    ),
    "fp8 tensor": group_config(
        weight_args(8, kind="float", strategy="tensor"), format="float-quantized", inputs=FP8
    ),
    "fp8 block": group_config(
        weight_args(8, kind="float", strategy="block", block_structure=[64, 128]),
        format="float-quantized",
        inputs=FP8,
    ),
    "mxfp4": group_config(weight_args(4, 32, kind="float"), format="mxfp4-pack-quantized"),
    "naive int8": group_config(weight_args(8, None), format="naive-quantized", inputs=DYNAMIC_INT8),
    "2:4 fp8": group_config(
        weight_args(8, None, kind="float"), format="sparse-24-bitmask", inputs=FP8
    ),
    "2:4 bf16": group_config(None, format="sparse-24-bitmask"),
}
#: Those that a layout takes.
CONVERTED = [scheme for scheme in SCHEMES if scheme not in ("int3 group", "fp8 block")]
NAMES = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")


def tensors_of(scheme: str, n: int, seed: int) -> dict[str, torch.Tensor]:
    group = SCHEMES[scheme]
    if group["format"] == "sparse-24-bitmask":
        return sparse24(n, K, group, seed)
    return quantised(n, K, group, seed)


def write(folder: Path, scheme: str, rows: tuple[int, ...] = (N, N + 64)) -> Description:
    """Two modules of a scheme, and a norm."""
    group = SCHEMES[scheme]
    tensors = {"model.norm.weight": torch.ones(K)}
    for seed, (name, n) in enumerate(zip(NAMES, rows, strict=False)):
        made = tensors_of(scheme, n, seed)
        tensors |= {f"{name}.{local}": tensor for local, tensor in made.items()}
    config = config_of(group)
    if group["format"] == "sparse-24-bitmask":
        config |= {
            "format": "sparse-24-bitmask" if group["weights"] is None else "float-quantized",
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "targets": ["Linear"],
                "ignore": ["lm_head"],
                "sparsity_structure": "2:4",
            },
        }
        if group["weights"] is None:
            config["config_groups"] = {}
        else:
            config["config_groups"] = {"group_0": group | {"format": "float-quantized"}}
    write_checkpoint(folder, tensors, config, 2)
    return describe(Checkpoint(LocalStore(folder)))


@pytest.fixture(scope="module")
def sources() -> Iterator[dict[str, Description]]:
    with quick_folder() as folder:
        yield {scheme: write(folder / scheme.replace(" ", "-"), scheme) for scheme in SCHEMES}


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


def modules(description: Description) -> list[SourceModule]:
    found = [description.modules[name].source for name in NAMES if name in description.modules]
    assert all(found)
    return [source for source in found if source is not None]


def weight_of(source: SourceModule, description: Description) -> QuantizedWeight:
    def read(entry: Any) -> torch.Tensor:
        return read_tensor(description.checkpoint.store, entry)

    return codec.source_weight(source, None, read, CPU)


def built(plan: Plan, description: Description, out: Path) -> Output:
    build(plan, description.checkpoint.store, out, Settings(Inline(), Silent()))
    return Output.open(out)


def put_together(output: Output, items: list[Convert], source: SourceModule) -> QuantizedWeight:
    """A source weight, of all that some output modules hold of it."""
    fragments = []
    for item in items:
        for unit in range(len(item.units)):
            made = codec.decode(item, unit, lambda e: read_tensor(output.store, e), CPU)
            fragments += [f for f in made if item.sources[f.part.source].name == source.name]
    return codec.joined(fragments, source)


def check_all(output: Output, description: Description, back: Path) -> None:
    """The output is its source, by three ways: put together, compared, restored."""
    for source in modules(description):
        found = put_together(output, output.plan.modules, source)
        assert codec.first_difference(weight_of(source, description), found) is None
    check_files(output, description, back)


def check_files(output: Output, description: Description, back: Path) -> None:
    """The output compares equal with its source, and restores it."""
    items = output.plan.modules
    compared = verify_against(output, description.checkpoint, Inline(), Silent())
    assert compared.modules == len(items)
    plan = restore_plan(output.manifest, "out", 20_000)
    build(plan, output.store, back, Settings(Inline(), Silent()))
    if items[0].sources[0].weight.sparse:
        return  # which zero is kept may differ
    before, after = ({}, {})
    for found, where in ((before, description.checkpoint.store.root), (after, back)):  # type: ignore[attr-defined]
        for path in where.glob("*.safetensors"):
            found |= load_file(path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert same_bits(tensor, after[name]), name


# --- ranks ---------------------------------------------------------------------------------------


def part_of(source: int, axis: Axis, some: tuple[int, int], expert: int | None = None) -> Part:
    if axis == "n":
        return Part(source, expert, rows=some)
    return Part(source, expert, columns=some)


def ranks_of(axis: Axis, ranks: int, source: SourceModule, index: int = 0) -> list[Assembly]:
    size = source.weight.n if axis == "n" else source.weight.k
    share = size // ranks
    return [part_of(index, axis, (rank * share, (rank + 1) * share)) for rank in range(ranks)]


def check_ranks(description: Description, axis: Axis, ranks: int, folder: Path) -> None:
    """The first module in ranks, in every layout that takes them; the second as it is."""
    source, other = modules(description)
    cuts = ranks_of(axis, ranks, source)
    layouts = supporting(cuts[0], [source])
    assert layouts
    for layout in layouts:
        wanted = [
            Wanted(f"{source.name}.rank{rank}", (source,), cut, layout)
            for rank, cut in enumerate(cuts)
        ]
        (whole, *_) = supporting(Part(0), [other])
        wanted.append(Wanted(other.name, (other,), Part(0), whole))
        output = built(hand_made(description, wanted), description, folder / layout.name)
        first = output.plan.modules[0].logical
        assert (first.n, first.k) == ((N // ranks, K) if axis == "n" else (N, K // ranks))
        check_all(output, description, folder / f"{layout.name} back")


@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("scheme", CONVERTED)
def test_ranks_put_together_are_the_whole(
    sources: dict[str, Description], folder: Path, scheme: str, axis: Axis
) -> None:
    check_ranks(sources[scheme], axis, 2, folder)


@pytest.mark.parametrize("axis", ["n", "k"])
def test_more_ranks(sources: dict[str, Description], folder: Path, axis: Axis) -> None:
    """Down to ranks that fewer layouts take, by rows of one word and columns of one group."""
    check_ranks(sources["int8 group"], axis, 8, folder)


def three_experts(folder: Path) -> Description:
    """A module of 3-D tensors."""
    made = [quantised(N, K, SCHEMES["int4 group"], seed) for seed in range(3)]
    tensors = {"model.norm.weight": torch.ones(K)}
    for local, first in made[0].items():
        stacked = torch.stack([part[local] for part in made])
        whole = first if local == "weight_shape" else stacked
        tensors[f"model.layers.0.mlp.experts.up_proj.{local}"] = whole
    write_checkpoint(folder / "model", tensors, config_of(SCHEMES["int4 group"]))
    return describe(Checkpoint(LocalStore(folder / "model")))


def test_ranks_of_experts(folder: Path) -> None:
    """A source's 3-D tensors: each rank is a module of its own that stacks every expert's part."""
    description = three_experts(folder)
    (module,) = description.modules.values()
    source = module.source
    assert source is not None and source.experts == 3
    axes: tuple[tuple[Axis, int], ...] = (("n", N), ("k", K))
    for axis, size in axes:
        trees = [
            Stack(
                tuple(
                    part_of(0, axis, (rank * size // 2, (rank + 1) * size // 2), expert)
                    for expert in range(3)
                )
            )
            for rank in range(2)
        ]
        (layout, *_) = supporting(trees[0], [source])
        wanted = [
            Wanted(f"experts.rank{rank}", (source,), tree, layout)
            for rank, tree in enumerate(trees)
        ]
        output = built(hand_made(description, wanted), description, folder / axis)
        assert [item.experts for item in output.plan.modules] == [3, 3]
        check_files(output, description, folder / f"{axis} back")


@pytest.mark.parametrize(
    "trees",
    [
        [Stack(tuple(Part(0, expert) for expert in (2, 1, 0)))],
        [Stack((Part(0, 0), Part(0, 1)))],
        [Stack((Part(0, 0), Part(0, 1), Part(0, 1), Part(0, 2)))],
        [Part(0, 0), Part(0, 1), Part(0, 2)],
        [Stack((Part(0, 0), Part(0, 1))), Part(0, 2)],
    ],
    ids=["another order", "one too few", "one twice", "one by one", "two and one"],
)
def test_experts_that_do_not_lie_in_their_own_units_are_refused(
    folder: Path, trees: list[Assembly]
) -> None:
    """Restoration writes unit after unit: it would put experts in the places of others."""
    description = three_experts(folder)
    (module,) = description.modules.values()
    source = module.source
    assert source is not None
    (layout, *_) = supporting(trees[0], [source])
    wanted = [
        Wanted(f"experts.{number}", (source,), tree, layout) for number, tree in enumerate(trees)
    ]
    with pytest.raises(VerificationError, match=rf"experts\.\d: {source.name} lies in other units"):
        built(hand_made(description, wanted), description, folder / "out")


@pytest.mark.parametrize("where", ["one module", "two modules"])
def test_parts_of_a_weight_in_several_units_are_refused(
    sources: dict[str, Description], folder: Path, where: str
) -> None:
    description = sources["int4 group"]
    source, other = modules(description)
    halves = tuple(ranks_of("n", 2, source))
    trees: list[Assembly] = [Stack(halves)]
    if where == "two modules":
        trees = [Stack((halves[0], Part(1, rows=(0, N // 2)))), halves[1]]
    (layout, *_) = supporting(halves[0], [source])
    wanted = [
        Wanted(
            f"m{at}", (source, other)[: 1 + max(leaf.source for leaf in leaves(tree))], tree, layout
        )
        for at, tree in enumerate(trees)
    ]
    with pytest.raises(VerificationError, match=r"module m\d: .* lies in other units"):
        built(hand_made(description, wanted), description, folder / "out")


@pytest.mark.parametrize(
    "ranks",
    [
        [0],
        [0, 0],
        [0, 1, 1],
        [0, 0, 1],
    ],
)
def test_a_rank_that_is_missing_or_too_many_is_seen(
    sources: dict[str, Description], folder: Path, ranks: list[int]
) -> None:
    description = sources["int4 group"]
    source, other = modules(description)
    halves = ranks_of("n", 2, source)
    (layout, *_) = supporting(halves[0], [source])
    wanted = [
        Wanted(f"{source.name}.{number}", (source,), halves[rank], layout)
        for number, rank in enumerate(ranks)
    ]
    wanted.append(Wanted(other.name, (other,), Part(0), layout))
    with pytest.raises(VerificationError, match=rf"{source.name}.*do not hold all of it once"):
        built(hand_made(description, wanted), description, folder / "out")


# --- trees ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", ["n", "k"])
@pytest.mark.parametrize("scheme", CONVERTED)
def test_ranks_of_a_joined_weight(
    sources: dict[str, Description], folder: Path, scheme: str, axis: Axis
) -> None:
    """The join of ranks, as kernels want it."""
    description = sources[scheme]
    parts = tuple(modules(description))
    if not can_join([expanded(part.weight) for part in parts]):
        pytest.fail(f"{scheme} cannot be joined")
    each = [ranks_of(axis, 2, part, index) for index, part in enumerate(parts)]
    cuts = [Concat(tuple(cuts[rank] for cuts in each)) for rank in range(2)]
    (layout, *_) = supporting(cuts[0], parts)
    wanted = [Wanted(f"fused.rank{rank}", parts, cut, layout) for rank, cut in enumerate(cuts)]
    output = built(hand_made(description, wanted), description, folder / "out")
    check_all(output, description, folder / "back")


def test_a_stack_of_what_was_two_modules(folder: Path) -> None:
    """Experts that a source holds one by one, stacked for a kernel."""
    with quick_folder() as other:
        description = write(other / "model", "int4 group", (N, N))
        parts = tuple(modules(description))
        for name, tree in {
            "whole": Stack((Part(0), Part(1))),
            "padded": Stack(tuple(Pad(Part(index), N + 64, K + 128) for index in range(2))),
        }.items():
            (layout, *_) = supporting(tree, parts)
            plan = hand_made(description, [Wanted("experts", parts, tree, layout)])
            output = built(plan, description, folder / name)
            (item,) = output.plan.modules
            assert item.experts == len(tree.parts)
            assert all(entry.spec.shape[0] == item.experts for entry in item.outputs)
            check_all(output, description, folder / f"{name} back")


@pytest.mark.parametrize("scheme", ["int4 group", "int4 group asym", "int8 group", "fp8 channel"])
def test_padding_is_added_and_taken_away(
    sources: dict[str, Description], folder: Path, scheme: str
) -> None:
    description = sources[scheme]
    source, other = modules(description)
    tree = Pad(Part(0), N + 64, K + 64)
    (layout, *_) = supporting(tree, [source])
    wanted = [
        Wanted(source.name, (source,), tree, layout),
        Wanted(other.name, (other,), Pad(Part(0), other.weight.n, K + 128), layout),
    ]
    output = built(hand_made(description, wanted), description, folder / "out")
    assert output.plan.modules[0].recipe.weight.n == N + 64
    assert (output.plan.modules[0].logical.n, output.plan.modules[0].logical.k) == (N, K)
    check_all(output, description, folder / "back")


def test_padding_that_is_not_zero_is_no_padding(
    sources: dict[str, Description], folder: Path
) -> None:
    description = sources["int4 group"]
    source, other = modules(description)
    tree = Pad(Part(0), N + 64, K)
    (layout, *_) = supporting(tree, [source])
    wanted = [
        Wanted(source.name, (source,), tree, layout),
        Wanted(other.name, (other,), Part(0), layout),
    ]
    output = built(hand_made(description, wanted), description, folder / "out")
    item = output.plan.modules[0]

    def read(entry: Any) -> torch.Tensor:
        tensor = read_tensor(output.store, entry)
        if entry.spec.dtype == "BF16":
            tensor = torch.where(tensor == 0, torch.ones_like(tensor), tensor)
        return tensor

    with pytest.raises(VerificationError, match="padding of the scales is not 0"):
        codec.decode(item, 0, read, CPU)


# --- any tree ------------------------------------------------------------------------------------


def random_tree(chance: random.Random, parts: list[SourceModule], depth: int) -> Assembly:
    """A tree without a stack; not every one can be assembled."""
    kind = chance.choice(["part", "concat", "slice", "slice", "pad"] if depth else ["part"])
    index = chance.randrange(len(parts))
    if kind == "part":
        return Part(index)
    if kind == "slice":
        weight = parts[index].weight
        return Part(index, rows=some(chance, weight.n), columns=some(chance, weight.k))
    if kind == "concat":
        count = chance.randint(1, 3)
        return Concat(tuple(random_tree(chance, parts, depth - 1) for _ in range(count)))
    inner = random_tree(chance, parts, depth - 1)
    spec = assembled(inner, [part.weight for part in parts])
    if depth < 3 or spec.bits == 3:
        return inner  # what is joined is not padded, nor are codes of 3 bits
    return Pad(inner, spec.n + 64 * chance.randrange(3), spec.k + 128 * chance.randrange(2))


def some(chance: random.Random, size: int) -> tuple[int, int] | None:
    """Whole 32nds of rows or columns, wherever they begin and end; all where None."""
    first, last = sorted(chance.sample(range(0, size + 1, 32), 2))
    return chance.choice([None, (first, last)])


def inside(tree: Assembly) -> Iterator[Assembly]:
    yield tree
    for child in tree.parts if isinstance(tree, Concat | Stack) else ():
        yield from inside(child)
    if isinstance(tree, Pad):
        yield from inside(tree.part)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_decoded_is_what_was_encoded(sources: dict[str, Description], scheme: str) -> None:
    """For any tree: its spec is its weight's, and each fragment is that part of its source."""
    description = sources[scheme]
    parts = modules(description)
    specs = [part.weight for part in parts]
    store = description.checkpoint.store
    chance = random.Random(scheme)
    tried = done = cuts = 0
    kinds: set[str] = set()
    while tried < 200 and done < 25:
        tried += 1
        try:
            tree = random_tree(chance, parts, 3)
            spec = assembled(tree, specs)
        except ValueError:
            continue
        weight = codec.assemble(tree, parts, lambda entry: read_tensor(store, entry), CPU)
        assert weight.spec == spec
        if weight.scale is not None:
            assert tuple(weight.scale.shape) == spec.scale_shape
        done += 1
        kinds |= {type(node).__name__ for node in inside(tree)}
        cuts += sum(bool(leaf.rows or leaf.columns) for leaf in leaves(tree))
        held = 0
        for fragment in codec._fragments(tree, specs, weight):
            source = parts[fragment.part.source]
            whole = codec.cuts.expand(weight_of(source, description))
            row, column, n, k = fragment.place
            want = codec.cuts.columns(codec.cuts.rows(whole, row, row + n), column, column + k)
            assert codec.first_difference(want, fragment.weight) is None, tree
            held += n * k
        if not any(isinstance(node, Pad) for node in inside(tree)):
            assert held == spec.n * spec.k, tree
        for layout in supporting(tree, parts):
            shape = layout.padded_shape(spec)
            if shape == (spec.n, spec.k):
                decoded = layout.decode(layout.encode(weight), spec)
                assert codec.first_difference(weight, decoded) is None, (tree, layout.name)
        assert all(leaf.source < len(parts) for leaf in leaves(tree))
        assert unpadded(tree, specs).n <= spec.n
    assert done == 25 and {"Part", "Concat"} <= kinds and cuts
