"""Plans: every decision of a conversion or a restoration, made before weight data is read."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

from msgspec import Struct

from ctconvert.assembly import Assembly, Range, leaves, units, unpadded, widths, words_of
from ctconvert.records.border import Hex, Sha256, to_json
from ctconvert.specs import Count, Size, TensorSpec, WeightSpec
from ctconvert.store.safetensors import TensorEntry, build_header, total_bytes


class Options(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the user asked for; all of it shapes the bytes of the output.

    ``target`` is None for a restored checkpoint, which is made for nothing but itself.
    ``include`` and ``exclude`` are patterns of modules to convert, and of others to leave as they
    are. ``overrides`` are (pattern, layout), the first that matches a module deciding. ``dtype`` is
    that of the activations, for layouts whose bytes depend on it; a plan's is what config.json says
    where the user says nothing, None where that is neither of them. ``tensor_parallel`` is the
    number of ranks; with ``expert_parallel`` they have whole experts each.
    """

    target: str | None
    dtype: Literal["bfloat16", "float16"] | None = None
    fuse: bool = False
    keep_unsupported: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, str], ...] = ()
    max_shard_size: Count = 5_000_000_000
    tensor_parallel: Count = 1
    expert_parallel: bool = False


class SourceModule(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A quantised module of the source.

    ``weight`` describes one 2-D weight, and ``experts`` counts them where tensors are 3-D (None
    where they are not). ``tensors`` are those that hold the weight, whole, by local name;
    ``values`` the contents of the few-element ones (``weight_shape``, static activation scales), in
    hexadecimal. ``zeros`` are those of ``tensors`` that must hold nothing but zeros (zero points of
    a symmetric scheme), ``shared`` those that are all experts', not one's. ``beside`` are tensors
    of the module that are no part of the weight (``bias``).
    """

    name: str
    weight: WeightSpec
    tensors: dict[str, TensorEntry]
    experts: Count | None = None
    values: dict[str, Hex] = {}
    zeros: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    beside: dict[str, TensorEntry] = {}

    def entries(self, expert: int | None, rows: Range | None = None) -> dict[str, TensorEntry]:
        """The tensors of one expert, slices of the 3-D ones; all as they are where None.

        ``rows``, which can be cut, are those of the weight to have; of what is no row's, all.
        """
        found = self.tensors
        if expert is not None:
            whole = {*self.values, *self.shared}
            found = {
                local: entry if local in whole else expert_entry(entry, expert)
                for local, entry in found.items()
            }
        if rows is None:
            return found
        return {local: self._rows(local, entry, rows) for local, entry in found.items()}

    def _rows(self, local: str, entry: TensorEntry, rows: Range) -> TensorEntry:
        """What of a tensor belongs to some rows of the weight."""
        spec = self.weight
        if rows == (0, spec.n):
            return entry
        codes, words = 1, 1  # rows of the weight, and those of the tensor that hold them
        if local in ("weight_scale", "weight_zero_point"):
            if spec.strategy == "tensor" or local in self.zeros:
                return entry
            if local == "weight_zero_point" and spec.storage == "packed":
                codes, words = words_of(spec)
            elif spec.strategy == "block" and spec.block:
                codes = spec.block[0]
        elif local not in ("weight", "weight_packed", "compressed", "bitmask"):
            return entry
        first = rows[0] // codes * words
        last = entry.spec.shape[0] if rows[1] == spec.n else rows[1] // codes * words
        made = TensorSpec(entry.spec.dtype, (last - first, *entry.spec.shape[1:]))
        one = entry.nbytes // entry.spec.shape[0]
        return TensorEntry(entry.name, entry.file, entry.offset + first * one, made)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold the weight."""
        return total_bytes(self.tensors.values())

    def unit_bytes(self, rows: Range | None = None) -> int:
        """Bytes of one weight, or of some of its rows."""
        if rows is None:
            return self.nbytes // (self.experts or 1)
        return total_bytes(self.entries(None if self.experts is None else 0, rows).values())


def expert_entry(entry: TensorEntry, index: int) -> TensorEntry:
    """One item along a tensor's leading dimension; of a vector, a single element [1]."""
    spec = TensorSpec(entry.spec.dtype, entry.spec.shape[1:] or (1,))
    return TensorEntry(entry.name, entry.file, entry.offset + index * spec.nbytes, spec)


def rank_prefix(rank: int | None) -> str:
    """How the names of what one rank has begin in an output; of what all have, with nothing."""
    return "" if rank is None else f"rank{rank}."


class Recipe(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an output module is made: the layout, what it encodes, and of which source weights.

    ``weight`` is one unit as the layout encodes it: joined, padded, per-tensor scales expanded.
    ``views`` are the tensors a kernel takes another view of (``t``: transposed).
    """

    layout: str
    layout_version: Count
    weight: WeightSpec
    assembly: Assembly
    views: dict[str, str] = {}


class Convert(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="convert", dict=True):
    """An output module: source tensors through a layout.

    ``outputs`` are the layout's tensors where they lie in the output; ``beside`` those carried over
    unchanged (a joined module's parts are joined along dimension 0), by local
    name; of a rank's module they are copies, which all ranks have. ``joint`` stands between the
    module's name and theirs: an engine's stacked experts are parameters ``w13_weight`` of one
    module, not modules. ``rank`` is the one that has it, where not all have;
    the name then begins with :func:`rank_prefix`.
    """

    name: str
    sources: tuple[SourceModule, ...]
    recipe: Recipe
    outputs: tuple[TensorEntry, ...]
    beside: dict[str, TensorEntry] = {}
    joint: Literal[".", "_"] = "."
    rank: Size | None = None

    @property
    def prefix(self) -> str:
        """How the full name of every tensor of it begins; the local name follows."""
        return self.name + self.joint

    @property
    def place(self) -> str:
        """The name of the module that it is in the model, whatever the rank."""
        return self.name.removeprefix(rank_prefix(self.rank))

    @cached_property
    def units(self) -> tuple[Assembly, ...]:
        """The assembly of each item along the outputs' leading dimension."""
        return units(self.recipe.assembly)

    @property
    def experts(self) -> int | None:
        """The outputs' leading dimension where their tensors are stacks, else None."""
        return None if self.units[0] is self.recipe.assembly else len(self.units)

    @property
    def stacked(self) -> int | None:
        """:attr:`experts` where the source has them one by one, else None."""
        return self.experts if self.sources[0].experts is None else None

    @property
    def specs(self) -> list[WeightSpec]:
        """The spec of each source module's weight."""
        return [source.weight for source in self.sources]

    @property
    def logical(self) -> WeightSpec:
        """One unit as it was before padding."""
        return unpadded(self.recipe.assembly, self.specs)

    @property
    def widths(self) -> tuple[int, ...]:
        """Rows of each joined part of one unit, in order."""
        return widths(self.recipe.assembly, self.specs)

    def locals(self, unit: int) -> dict[str, TensorEntry]:
        """The layout's tensors of one unit by local name, where they lie in the output."""
        cut = len(self.prefix)
        whole = {entry.name[cut:]: entry for entry in self.outputs}
        if self.experts is None:
            return whole
        return {local: expert_entry(entry, unit) for local, entry in whole.items()}

    @property
    def made(self) -> tuple[TensorEntry, ...]:
        """Every tensor of the output that this makes."""
        return (*self.outputs, *self.beside.values())

    @cached_property
    def input_bytes(self) -> int:
        """Source bytes of one unit, the largest."""
        kinds = {tuple((part.source, part.rows) for part in leaves(unit)) for unit in self.units}
        return max(
            sum(self.sources[index].unit_bytes(rows) for index, rows in kind) for kind in kinds
        )

    @cached_property
    def output_bytes(self) -> int:
        """Output bytes of one unit."""
        return total_bytes(self.outputs) // len(self.units)


class Copy(Struct, frozen=True, tag="copy"):
    """A tensor that stays as it is: where it lies in the source, and in the output."""

    source: TensorEntry
    output: TensorEntry

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def made(self) -> tuple[TensorEntry, ...]:
        return (self.output,)


class Restore(Struct, frozen=True, tag="restore"):
    """Source modules made again from the converted modules that hold all of them.

    ``outputs`` are the source's tensors where they lie in the restored checkpoint.
    """

    modules: tuple[Convert, ...]
    outputs: tuple[TensorEntry, ...]

    @property
    def name(self) -> str:
        return self.modules[0].name

    @property
    def made(self) -> tuple[TensorEntry, ...]:
        return self.outputs


Item = Convert | Copy | Restore


class Refusal(Struct, frozen=True):
    """A quantised module that gets no layout, with the reason.

    ``fault`` says that the source contradicts itself there.
    """

    module: str
    format: str
    scheme: str
    reason: str
    fault: bool = False

    def __str__(self) -> str:
        text = f"{self.module} ({self.format}, {self.scheme}): {self.reason}"
        return text.replace("\n", "\\n")


class Shard(Struct, frozen=True, omit_defaults=True):
    """An output file: its size, and its tensors by name in file order.

    ``metadata`` is what its header holds under ``__metadata__``, beside ``format: pt``.
    """

    name: str
    size: Size
    tensors: tuple[str, ...]
    metadata: dict[str, str] = {}


class SourceFile(Struct, frozen=True):
    """A file of the source, with its size in bytes."""

    name: str
    size: Size


class Origin(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The checkpoint a plan reads: a directory's name or a Hub id, and a Hub commit.

    ``config`` is the text of its config.json, ``metadata`` the ``__metadata__`` of its headers.
    ``manifest`` is the hash of its manifest where it is an output, whose files need no other.
    """

    id: str
    files: tuple[SourceFile, ...]
    config: str
    revision: str | None = None
    metadata: dict[str, dict[str, str]] = {}
    manifest: Sha256 | None = None

    @property
    def hashed(self) -> tuple[SourceFile, ...]:
        """The files that a build hashes."""
        return self.files if self.manifest is None else ()


class Plan(Struct, frozen=True, kw_only=True, omit_defaults=True, dict=True):
    """What a conversion or a restoration will do: all that an executor needs.

    ``items`` are in output order; ``shards`` hold their tensors. ``config`` is the text of the
    output's config.json, ``side_files`` are copied unchanged. ``refusals`` stop a conversion;
    modules in ``kept`` are copied instead.
    """

    kind: Literal["converted", "restored"]
    options: Options
    source: Origin
    items: tuple[Item, ...]
    shards: tuple[Shard, ...]
    config: str
    side_files: tuple[SourceFile, ...] = ()
    kept: tuple[Refusal, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def modules(self) -> list[Convert]:
        return [item for item in self.items if isinstance(item, Convert)]

    @cached_property
    def copies(self) -> list[Copy]:
        return [item for item in self.items if isinstance(item, Copy)]

    @cached_property
    def restored(self) -> list[SourceModule]:
        """The source modules that a restored checkpoint holds again, each once."""
        items = [item for item in self.items if isinstance(item, Restore)]
        sources = [s for item in items for module in item.modules for s in module.sources]
        return list({source.name: source for source in sources}.values())

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor of the output by name."""
        return {entry.name: entry for item in self.items for entry in item.made}

    def header(self, shard: Shard) -> bytes:
        """The leading bytes of a shard."""
        specs = [(name, self.entries[name].spec) for name in shard.tensors]
        return build_header(specs, shard.metadata)[0]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the output's shards."""
        return sum(shard.size for shard in self.shards)

    def layouts(self) -> dict[str, int]:
        """How many modules have each layout."""
        counts: dict[str, int] = {}
        for module in self.modules:
            counts[module.recipe.layout] = counts.get(module.recipe.layout, 0) + 1
        return counts

    def digest(self) -> str:
        """A hash of the plan: of everything that decides the output's bytes but the data."""
        return hashlib.sha256(to_json(self)).hexdigest()
