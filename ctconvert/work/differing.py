"""Two checkpoints compared on what their weights decode to, however each of them stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from msgspec.structs import replace

from ctconvert import codec
from ctconvert.names import natural
from ctconvert.progress import Progress
from ctconvert.records import Difference, Differing, Restore
from ctconvert.specs import QuantizedWeight, WeightSpec
from ctconvert.store.base import CHUNK, Store
from ctconvert.store.safetensors import TensorEntry, total_bytes
from ctconvert.transforms import cuts
from ctconvert.transforms.dtypes import same_bits
from ctconvert.transforms.packed import unpack
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, Job
from ctconvert.work.sides import Held, Key, Side, components, side_of, take_over
from ctconvert.work.transforming import read_tensor

#: What weights must have in common to mean the same; how they are stored is another matter.
_MEANING = (
    *("kind", "bits", "n", "k", "strategy", "group_size", "block", "symmetric", "has_g_idx"),
    *("activations", "input_type", "input_symmetric", "side_zero_points"),
)
_SCALES = {torch.float16, torch.bfloat16, torch.float32}
#: Room to work on several weights at once.
_ROOM = 256 << 20
#: Elements that are looked at together where weights differ.
_BLOCK = 1 << 22
#: Makes elements of rows of a tensor.
View = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Found(Done):
    """What a comparison has found, in the order of the weights."""

    differences: tuple[Difference, ...] = ()


def diff(a: Store, b: Store, executor: Executor, progress: Progress) -> Differing:
    """Compares two checkpoints, source or converted each, weight by weight.

    Weights are compared as decoded: codes as integers or floats of their type, scales, zero points
    and static activation scales by value. Other tensors are compared byte for byte.

    Raises:
        BadInputError: a source is damaged.
        VerificationError: a converted checkpoint is damaged.
        ConversionError: one of them changed meanwhile.
    """
    with closing(a), closing(b):
        left, right = side_of(a), side_of(b)
        take_over(left, right)
        take_over(right, left)
        jobs: list[Job] = [WeightsJob(*sets) for sets in _paired(left, right)]
        both = [name for name in left.plain if name in right.plain]
        jobs += [BytesJob(left.plain[name], right.plain[name]) for name in both]
        total = total_bytes(left.plain[name] for name in both)
        total += sum(job.nbytes for job in jobs if isinstance(job, WeightsJob))
        progress.phase("comparing", total)
        largest = max((job.nbytes for job in jobs if isinstance(job, WeightsJob)), default=0)
        context = Context(a, against=b, memory=_ROOM + largest, progress=progress)
        found = list(_alone(left, right, a.where, b.where))
        for done in executor.run(jobs, context):
            assert isinstance(done, Found)
            found += done.differences
        left.check_unchanged()
        right.check_unchanged()
    return Differing(
        a=a.where,
        b=b.where,
        modules=len(left.sources.keys() & right.sources.keys()),
        tensors=len(both),
        differences=tuple(_by_module(found, left.sources.keys() | right.sources.keys())),
    )


def _paired(left: Side, right: Side) -> Iterator[tuple[tuple[Held, ...], tuple[Held, ...]]]:
    for a, b in components(left, right):
        if a and b:
            yield tuple(a), tuple(b)


def _alone(left: Side, right: Side, a: str, b: str) -> Iterator[Difference]:
    """What one side has alone: quantised modules, experts of them and other tensors."""
    for have, lack, where, other in ((left, right, a, b), (right, left, b, a)):
        for name, expert in have.weights.keys() - lack.weights.keys():
            which = "" if expert is None else f"expert {expert} "
            text = f"{which}quantised in {where}, not in {other}"
            yield Difference(module=name, what="weight", first=text)
        for name in have.plain.keys() - lack.plain.keys():
            module = _module_of(name)
            if (module in lack.sources) and module not in have.sources:
                continue  # said above: there it is quantised
            text = f"{have.plain[name].spec} in {where}, not in {other}"
            yield Difference(module=module, what=name, first=text)


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _by_module(found: list[Difference], quantised: Set[str]) -> Iterator[Difference]:
    """One difference a module, with the sums of its elements and weights; quantised ones first."""
    found.sort(key=lambda one: (one.module not in quantised, natural(one.module)))
    merged: dict[str, Difference] = {}
    for one in found:
        first = merged.get(one.module)
        if first is not None:
            elements = first.elements + (one.elements if one.what == first.what else 0)
            one = replace(first, elements=elements, weights=first.weights + one.weights)
        merged[one.module] = one
    yield from merged.values()


@dataclass(frozen=True)
class WeightsJob(Job):
    """Weights of one checkpoint beside the same of another; reads ``source`` and ``against``."""

    left: tuple[Held, ...]
    right: tuple[Held, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.left[0].keys[0][0]

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in (*self.left, *self.right))

    def run(self, context: Context) -> Found:
        assert context.against is not None
        context.check_running()
        with context.budget.hold(self.nbytes):
            a = _decoded(self.left, context.source)
            b = _decoded(self.right, context.against)
            found = [(key, difference(a.pop(key), b.pop(key))) for key in list(a) if key in b]
        context.progress.advance(self.nbytes)
        return Found(self, differences=tuple(_named(key, one) for key, one in found if one))


def _named(key: Key, found: Difference) -> Difference:
    name, expert = key
    first = found.first if expert is None else f"expert {expert}: {found.first}"
    return replace(found, module=name, first=first)


def _decoded(sets: tuple[Held, ...], store: Store) -> dict[Key, QuantizedWeight]:
    read, cpu = partial(read_tensor, store), torch.device("cpu")
    found: dict[Key, QuantizedWeight] = {}
    for held in sets:
        if isinstance(held.item, Restore):
            for source, expert, weight in codec.decoded(held.item, held.unit, read, cpu):
                found[source.name, expert] = weight
        else:
            ((name, expert),) = held.keys
            found[name, expert] = codec.source_weight(held.item, expert, read, cpu)
    return found


def difference(a: QuantizedWeight, b: QuantizedWeight) -> Difference | None:
    """The first property or tensor in which two weights differ, of a module without a name."""
    for what in _MEANING:
        left, right = getattr(a.spec, what), getattr(b.spec, what)
        if left != right:
            return Difference(module="", what=what, first=f"{left} and {right}")
    a, b = (cuts.expand(cuts.with_zeros(weight)) for weight in (a, b))
    mine, theirs = a.tensors(), b.tensors()
    for what in dict.fromkeys([*mine, *theirs]):
        if what not in mine or what not in theirs:
            text = "in the first alone" if what in mine else "in the second alone"
            return Difference(module="", what=what, first=text)
        left, right = mine[what], theirs[what]
        if same_bits(left, right) and (what != "codes" or _stored_alike(a.spec, b.spec)):
            continue
        codes = what == "codes"
        views = [partial(codes_of, w.spec) if codes else _as_it_is for w in (a, b)]
        if found := _elements(what, (left, right), views):
            return found
    return None


def _stored_alike(a: WeightSpec, b: WeightSpec) -> bool:
    return (a.storage, a.packing, a.element) == (b.storage, b.packing, b.element)


def _as_it_is(rows: torch.Tensor) -> torch.Tensor:
    return rows


def codes_of(spec: WeightSpec, rows: torch.Tensor) -> torch.Tensor:
    """Rows of codes, one an element: integers as i8, floats in their type or as its codes."""
    if spec.storage == "plain":
        return rows
    codes = unpack(rows, spec.bits, spec.k, spec.packing)
    if spec.kind == "float":
        return codes
    return (codes.to(torch.int16) - (1 << (spec.bits - 1))).to(torch.int8)


def _elements(
    what: str, pair: tuple[torch.Tensor, torch.Tensor], views: Sequence[View]
) -> Difference | None:
    """How two tensors differ, by the bits of their elements; scales of two dtypes by value.

    A few rows at a time, so that nothing of the size of a weight is unpacked.
    """
    text, count = "", 0
    rows = max(len(tensor) for tensor in pair)
    step = max(1, _BLOCK // max(1, pair[0][:1].numel() * 32))
    for first in range(0, rows, step):
        a, b = (view(t[first : first + step]) for t, view in zip(pair, views, strict=True))
        if a.dtype != b.dtype and {a.dtype, b.dtype} <= _SCALES:
            a, b = a.float(), b.float()  # exact
        if a.dtype != b.dtype or a.shape != b.shape:
            text = " and ".join(f"{_short(tensor)} {list(tensor.shape)}" for tensor in pair)
            return Difference(module="", what=what, first=text)
        other = _bits(a) != _bits(b)
        count += int(other.sum())
        if count and not text:
            place = torch.unravel_index(other.reshape(-1).int().argmax(), other.shape)
            at = tuple(map(int, place))
            have, want = (_value(tensor[at]) for tensor in (a, b))
            text = f"[{', '.join(map(str, (at[0] + first, *at[1:])))}] is {have} and {want}"
    return Difference(module="", what=what, first=text, elements=count) if count else None


def _short(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def _value(element: torch.Tensor) -> str:
    """An element for people; where two print alike, they differ in bits alone (-0.0, NaN)."""
    value = element.to(torch.float32) if element.is_floating_point() else element
    return f"{value.item()!r}"


@dataclass(frozen=True)
class BytesJob(Job):
    """A tensor of one checkpoint beside the same of another, byte for byte."""

    left: TensorEntry
    right: TensorEntry

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.left.name

    def run(self, context: Context) -> Found:
        assert context.against is not None
        a, b = self.left, self.right
        if a.spec != b.spec:
            return self._found(f"{a.spec} and {b.spec}")
        first, count, done = None, 0, 0
        with context.budget.hold(4 * min(CHUNK, a.nbytes)):
            left = context.source.pieces(a.file, a.offset, a.nbytes)
            right = context.against.pieces(b.file, b.offset, b.nbytes)
            for have, want in zip(left, right, strict=True):
                context.check_running()
                if have != want:
                    other = torch.frombuffer(bytearray(have), dtype=torch.uint8) != (
                        torch.frombuffer(bytearray(want), dtype=torch.uint8)
                    )
                    first = done + int(other.int().argmax()) if first is None else first
                    count += int(other.sum())
                done += len(have)
                context.progress.advance(len(have))
        return Found(self) if first is None else self._found(f"byte {first}", count)

    def _found(self, text: str, count: int = 0) -> Found:
        name = self.left.name
        one = Difference(module=_module_of(name), what=name, first=text, elements=count)
        return Found(self, differences=(one,))
