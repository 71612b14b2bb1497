"""The records that plans, manifests and reports are made of, and JSON in and out.

Everything is decided in a :class:`Plan` before a byte of weight data is read; a :class:`Manifest`
is a plan and the hashes of what came of it. Both are all that a reader of an output needs: nothing
is worked out again from config.json. JSON is checked at this border and nowhere else: every type
and range, closed sets of names, and that the parts of a record fit each other.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from ctconvert.assembly import Assembly, leaves, units, unpadded, widths
from ctconvert.errors import VerificationError
from ctconvert.specs import Count, Size, TensorSpec, WeightSpec
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.safetensors import TensorEntry, build_header, total_bytes

FORMAT_VERSION: Literal[2] = 2
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Hex = Annotated[str, Meta(pattern="^([0-9a-f]{2})*$")]
_BLANK = "0" * 64


class Options(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the user asked for; all of it shapes the bytes of the output.

    ``target`` is None for a restored checkpoint, which is made for nothing but itself.
    ``overrides`` are (pattern, layout), the first that matches a module deciding.
    """

    target: str | None
    fuse: bool = False
    keep_unsupported: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    max_shard_size: Count = 5_000_000_000


class SourceModule(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A quantised module of the source.

    ``weight`` describes one 2-D weight, and ``experts`` counts them where tensors are 3-D (None
    where they are not). ``tensors`` are those that hold the weight, whole, by local name;
    ``values`` the contents of the few-element ones (``weight_shape``, static activation scales), in
    hexadecimal. ``beside`` are tensors of the module that are no part of the weight (``bias``).
    """

    name: str
    weight: WeightSpec
    tensors: dict[str, TensorEntry]
    experts: Count | None = None
    values: dict[str, Hex] = {}
    beside: dict[str, TensorEntry] = {}

    def entries(self, expert: int | None) -> dict[str, TensorEntry]:
        """The tensors of one expert, slices of the 3-D ones; all as they are where None."""
        if expert is None:
            return self.tensors
        return {
            local: entry if local in self.values else expert_entry(entry, expert)
            for local, entry in self.tensors.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that hold the weight."""
        return total_bytes(self.tensors.values())


def expert_entry(entry: TensorEntry, index: int) -> TensorEntry:
    """One item along a tensor's leading dimension."""
    spec = TensorSpec(entry.spec.dtype, entry.spec.shape[1:])
    return TensorEntry(entry.name, entry.file, entry.offset + index * spec.nbytes, spec)


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
    unchanged (a joined module's parts are joined along dimension 0), by local name.
    """

    name: str
    sources: tuple[SourceModule, ...]
    recipe: Recipe
    outputs: tuple[TensorEntry, ...]
    beside: dict[str, TensorEntry] = {}

    @cached_property
    def units(self) -> tuple[Assembly, ...]:
        """The assembly of each item along the outputs' leading dimension."""
        return units(self.recipe.assembly)

    @property
    def experts(self) -> int | None:
        """The outputs' leading dimension where their tensors are stacks, else None."""
        return None if self.units[0] is self.recipe.assembly else len(self.units)

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
        cut = len(self.name) + 1
        whole = {entry.name[cut:]: entry for entry in self.outputs}
        if self.experts is None:
            return whole
        return {local: expert_entry(entry, unit) for local, entry in whole.items()}

    @property
    def made(self) -> tuple[TensorEntry, ...]:
        """Every tensor of the output that this makes."""
        return (*self.outputs, *self.beside.values())

    @property
    def input_bytes(self) -> int:
        """Source bytes of one unit."""
        return sum(source.nbytes // (source.experts or 1) for source in self.sources)

    @property
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
    """A quantised module that gets no layout, with the reason."""

    module: str
    format: str
    scheme: str
    reason: str

    def __str__(self) -> str:
        text = f"{self.module} ({self.format}, {self.scheme}): {self.reason}"
        return text.replace("\n", "\\n")


class Shard(Struct, frozen=True):
    """An output file: its size, and its tensors by name in file order."""

    name: str
    size: Size
    tensors: tuple[str, ...]


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
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor of the output by name."""
        return {entry.name: entry for item in self.items for entry in item.made}

    def header(self, shard: Shard) -> bytes:
        """The leading bytes of a shard."""
        return build_header([(name, self.entries[name].spec) for name in shard.tensors])[0]

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


class Tool(Struct, frozen=True):
    """The program that wrote a manifest."""

    name: Literal["ctconvert"]
    version: str


class FileRecord(Struct, frozen=True):
    """A file and its SHA-256; of a safetensors file of the output, that of its header."""

    name: str
    size: Size
    sha256: Sha256


class Manifest(Struct, frozen=True, kw_only=True, dict=True):
    """``ctconvert.json``: what was made from what, with a hash of every tensor and file.

    ``tensors`` are SHA-256 by full name, ``files`` every file of the output but this one,
    ``sources`` the source's files. Nothing in it depends on time or place: one source and one set
    of options give one manifest. ``manifest_sha256`` is the hash of the file with this value
    replaced by 64 zeros.
    """

    format_version: Literal[2]
    tool: Tool
    plan: Plan
    tensors: dict[str, Sha256]
    files: tuple[FileRecord, ...]
    sources: tuple[FileRecord, ...]
    manifest_sha256: Sha256 = _BLANK

    @classmethod
    def load(cls, store: Store) -> Manifest:
        """Reads and checks the manifest of an output.

        Raises:
            VerificationError: it is missing, damaged, or of a version this program does not read.
        """
        if MANIFEST not in store.sizes():
            raise VerificationError(
                f"{store.where}: no {MANIFEST}, so this is no complete ctconvert checkpoint"
            )
        return cls.parse(store.read(MANIFEST), store.path(MANIFEST))

    @classmethod
    def parse(cls, data: bytes, where: str) -> Manifest:
        """A manifest from the bytes of its file; ``where`` names it in messages.

        Raises:
            VerificationError: as for :meth:`load`.
        """
        head = from_json(data, _Head, where)
        if head.format_version != FORMAT_VERSION:
            raise VerificationError(
                f"{where}: format_version {head.format_version}, and this program reads "
                f"{FORMAT_VERSION}; use the ctconvert that wrote it, or convert the source again"
            )
        digest = head.manifest_sha256
        blank = data.replace(digest.encode(), _BLANK.encode())
        if len(digest) != 64 or hashlib.sha256(blank).hexdigest() != digest:
            raise VerificationError(f"{where}: damaged: its contents do not match its own hash")
        manifest = from_json(data, cls, where)
        if wrong := _contradiction(manifest):
            raise VerificationError(f"{where}: damaged: {wrong}")
        return manifest

    def dump(self) -> bytes:
        """The file's bytes, its own hash filled in."""
        blank = to_json(msgspec.structs.replace(self, manifest_sha256=_BLANK), indent=1)
        digest = hashlib.sha256(blank).hexdigest()
        before, key, after = blank.rpartition(b'"manifest_sha256": "' + _BLANK.encode() + b'"')
        return before + key.replace(_BLANK.encode(), digest.encode()) + after

    @cached_property
    def file_records(self) -> dict[str, FileRecord]:
        return {record.name: record for record in self.files}


class _Head(Struct):
    """What tells a manifest's version and hash, whatever else it holds."""

    format_version: int = 0
    manifest_sha256: str = ""


class Report(Struct, frozen=True, kw_only=True):
    """What a conversion or restoration did: ``--json`` of both verbs."""

    out: str
    target: str | None
    layouts: dict[str, int]
    modules: int
    copied_tensors: int
    kept: tuple[Refusal, ...]
    shards: int
    resumed_shards: int
    source_bytes: int
    output_bytes: int
    side_files: tuple[str, ...]
    notes: tuple[str, ...]


class Compared(Struct, frozen=True, kw_only=True):
    """What a comparison with a source found equal."""

    checkpoint: str
    source: str
    modules: int
    copied_tensors: int
    source_bytes: int


class Verified(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a verification found to be as the manifest says: ``verify --json``.

    ``against`` is there where a source was compared, ``kernels`` (by layout) where they ran.
    """

    checkpoint: str
    tensors: int
    modules: int
    files: int
    bytes: int
    against: Compared | None = None
    kernels: dict[str, Any] | None = None


T = TypeVar("T")


def to_json(record: Struct, indent: int | None = None) -> bytes:
    """A record as JSON, with a final newline; ``indent`` spaces a level, or on one line."""
    data = msgspec.json.encode(record)
    return (data if indent is None else msgspec.json.format(data, indent=indent)) + b"\n"


def from_json(data: bytes, kind: type[T], where: str) -> T:
    """A record of JSON, every type and range checked; ``where`` names it in messages.

    Raises:
        VerificationError: it is no JSON, or a field is not what it should be; the field is named.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise VerificationError(f"{where}: damaged: {error}") from None
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{where}: damaged: not valid JSON ({error})") from None


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest."""
    found = msgspec.json.schema(Manifest)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _contradiction(manifest: Manifest) -> str | None:
    """The first place where the parts of a manifest do not fit each other."""
    plan = manifest.plan
    entries = plan.entries
    listed = [name for shard in plan.shards for name in shard.tensors]
    if len(listed) != len(set(listed)) or set(listed) != entries.keys():
        return "plan.shards do not list every tensor of plan.items once"
    if manifest.tensors.keys() != entries.keys():
        return "tensors do not hold a hash of every tensor of plan.items"
    place = {name: shard.name for shard in plan.shards for name in shard.tensors}
    files = {record.name for record in manifest.files}
    wanted = [*place.values(), *(file.name for file in plan.side_files), "config.json"]
    if missing := [name for name in wanted if name not in files]:
        return f"files do not list {missing[0]}"
    for entry in entries.values():
        if entry.file != place[entry.name]:
            return f"tensor {entry.name} lies in {entry.file}, and another shard lists it"
    for item in plan.items:
        modules = item.modules if isinstance(item, Restore) else (item,)
        for module in modules:
            if isinstance(module, Convert) and (wrong := _wrong_module(module)):
                return f"module {module.name}: {wrong}"
    return None


def _wrong_module(module: Convert) -> str | None:
    if not module.sources or not module.units:
        return "it is made of nothing"
    for part in leaves(module.recipe.assembly):
        if part.source >= len(module.sources):
            return f"its assembly names source {part.source} of {len(module.sources)}"
        count = module.sources[part.source].experts
        if (count is None) != (part.expert is None) or (part.expert or 0) >= (count or 1):
            return f"its assembly names expert {part.expert} of {count}"
    try:
        module.logical  # noqa: B018 (computed to see that it can be)
    except ValueError as error:
        return str(error)
    for source in module.sources:
        for local in source.tensors:
            if not local or "." in local:
                return f"{source.name} holds a tensor {local!r}"
        if source.experts is not None and any(
            entry.spec.shape[:1] != (source.experts,)
            for local, entry in source.tensors.items()
            if local not in source.values
        ):
            return f"the tensors of {source.name} have no {source.experts} experts"
    prefix = module.name + "."
    for entry in module.made:
        if not entry.name.startswith(prefix):
            return f"tensor {entry.name} is not its own"
    if module.experts is not None and any(
        entry.spec.shape[:1] != (module.experts,) for entry in module.outputs
    ):
        return f"its tensors have no {module.experts} experts"
    return None
