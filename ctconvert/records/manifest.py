"""``ctconvert.json``: a plan, and the hashes of what came of it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, Literal

import msgspec
from msgspec import Struct

from ctconvert.assembly import assembled, leaves
from ctconvert.errors import NoManifestError, VerificationError
from ctconvert.records.border import Blake3, Sha256, from_json, to_json
from ctconvert.records.plan import Convert, Plan, Restore
from ctconvert.records.sources import wrong_source, wrong_tiles, wrong_units
from ctconvert.specs import Size, WeightSpec
from ctconvert.store.base import Store
from ctconvert.store.checkpoint import MANIFEST
from ctconvert.store.safetensors import build_header, total_bytes

FORMAT_VERSION: Literal[4] = 4
_BLANK = "0" * 64
#: Bytes of the largest manifest that is read; a model of 200 000 tensors has a quarter of it.
LARGEST_MANIFEST = 500_000_000


class Tool(Struct, frozen=True):
    """The program that wrote a manifest."""

    name: Literal["ctconvert"]
    version: str


class FileRecord(Struct, frozen=True):
    """A file and its SHA-256; of a safetensors file of the output, that of its header."""

    name: str
    size: Size
    sha256: Sha256


class SourceRecord(Struct, frozen=True):
    """A file of the source and its BLAKE3 hash."""

    name: str
    size: Size
    blake3: Blake3


class Manifest(Struct, frozen=True, kw_only=True, dict=True):
    """``ctconvert.json``: what was made from what, with a hash of every tensor and file.

    ``tensors`` are hashes by full name, of the kind ``tensor_hash``, ``files`` every file of the
    output but this one, ``sources`` the source's files. Nothing in it depends on time or place: one
    source and one set of options give one manifest. ``manifest_sha256`` is the hash of the file
    with this value replaced by 64 zeros.
    """

    format_version: Literal[4]
    tool: Tool
    plan: Plan
    tensor_hash: Literal["blake3"]
    tensors: dict[str, Blake3]
    files: tuple[FileRecord, ...]
    sources: tuple[SourceRecord, ...]
    manifest_sha256: Sha256 = _BLANK

    @classmethod
    def load(cls, store: Store) -> Manifest:
        """Reads and checks the manifest of an output.

        Raises:
            NoManifestError: there is none.
            VerificationError: it is damaged, or of a version this program does not read.
        """
        if MANIFEST not in store.sizes():
            if reason := store.left_out().get(MANIFEST):
                raise VerificationError(
                    f"{store.path(MANIFEST)}: {reason}", file=store.path(MANIFEST)
                )
            raise NoManifestError(
                f"{store.where}: no {MANIFEST}, so this is no checkpoint that ctconvert made; name "
                "the OUT of a repack or restore",
                file=store.path(MANIFEST),
            )
        if store.sizes()[MANIFEST] > LARGEST_MANIFEST:
            raise VerificationError(
                f"{store.path(MANIFEST)}: too large for a manifest", file=store.path(MANIFEST)
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
                f"{FORMAT_VERSION}; use the ctconvert that wrote it, or convert the source again",
                file=where,
            )
        digest = head.manifest_sha256
        if len(digest) != 64 or _own_hash(data, digest) != digest:
            raise VerificationError(
                f"{where}: damaged: its contents do not match its own hash", file=where
            )
        manifest = from_json(data, cls, where)
        if wrong := _contradiction(manifest):
            raise VerificationError(f"{where}: damaged: {wrong}", file=where)
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


def _own_hash(data: bytes, digest: str) -> str:
    """The hash of a manifest's bytes with its own hash left blank."""
    return hashlib.sha256(data.replace(digest.encode(), _BLANK.encode())).hexdigest()


class _Head(Struct):
    """What tells a manifest's version and hash, whatever else it holds."""

    format_version: int = 0
    manifest_sha256: str = ""


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
    sizes = {record.name: record.size for record in manifest.files}
    for shard in plan.shards:
        specs = [(name, entries[name].spec) for name in shard.tensors]
        header, offsets = build_header(specs, shard.metadata)
        if [entries[name].offset for name in shard.tensors] != offsets:
            return f"the tensors of {shard.name} do not lie where its header says"
        end = len(header) + sum(entries[name].nbytes for name in shard.tensors)
        if not shard.size == sizes[shard.name] == end:
            return f"{shard.name} has {shard.size} bytes, and its tensors end at {end}"
    for entry in entries.values():
        if entry.file != place[entry.name]:
            return f"tensor {entry.name} lies in {entry.file}, and another shard lists it"
    for name, text in (("plan.config", plan.config), ("plan.source.config", plan.source.config)):
        if not _is_object(text):
            return f"{name} is no JSON object"
    modules: list[Convert] = []
    for copy in plan.copies:
        if (copy.source.name, copy.source.spec) != (copy.output.name, copy.output.spec):
            return f"tensor {copy.output.name} is a copy of another, {copy.source.spec}"
    for item in plan.items:
        if isinstance(item, Convert | Restore):
            modules += item.modules if isinstance(item, Restore) else (item,)
    for module in modules:
        if wrong := _wrong_module(module):
            return f"module {module.name}: {wrong}"
        if wrong := _wrong_rank(module, plan):
            return f"module {module.name}: {wrong}"
    return wrong_units(modules) or wrong_tiles(modules)


def _is_object(text: str) -> bool:
    """Whether it is what a config.json must be."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _wrong_weight(spec: WeightSpec) -> str | None:
    """The first place where the fields of a weight's spec do not fit each other."""
    rows, columns = spec.block or (1, 1)
    shapes = {
        None: None,
        "tensor": (1, 1),
        "channel": (spec.n, 1),
        "block": (-(-spec.n // rows), -(-spec.k // columns)),
    }
    if spec.strategy in ("group", "tensor_group"):
        if spec.group_size is None or spec.k % spec.group_size:
            return f"its group size is {spec.group_size} and K is {spec.k}"
        shapes[spec.strategy] = (spec.n, spec.k // spec.group_size)
    if spec.strategy not in shapes or spec.scale_shape != shapes[spec.strategy]:
        return f"its scale is {spec.scale_shape}, which strategy {spec.strategy} does not have"
    if (spec.scale_dtype is None) != (spec.scale_shape is None):
        return "it has a scale without a dtype, or a dtype without a scale"
    return None


def _wrong_rank(module: Convert, plan: Plan) -> str | None:
    ranks = plan.options.tensor_parallel
    if module.rank is None:
        return None
    if plan.kind == "converted" and module.rank >= ranks:
        return f"it is of rank {module.rank} of {ranks}"
    if module.place == module.name:
        return f"its name is none of rank {module.rank}"
    if module.beside:
        return "tensors beside the weight are a rank's, and all ranks have them whole"
    copied = {copy.name for copy in plan.copies}
    if plan.kind == "converted" and any(
        entry.name not in copied for source in module.sources for entry in source.beside.values()
    ):
        return "a tensor beside the weight has no place"
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
    for source in module.sources:
        if wrong := _wrong_weight(source.weight):
            return f"{source.name}: {wrong}"
    try:
        if assembled(module.recipe.assembly, module.specs) != module.recipe.weight:
            return "its assembly makes another weight than its recipe says"
    except ValueError as error:
        return str(error)
    for source in module.sources:
        for local, value in source.values.items():
            if local not in source.tensors or len(value) != 2 * source.tensors[local].nbytes:
                return f"{source.name}: {local} has a value that is not its own"
        if not {*source.zeros, *source.shared} <= source.tensors.keys():
            return f"{source.name} lacks tensors that it lists"
        if module.rank is None and source.beside.keys() != module.beside.keys():
            return f"{source.name} has other tensors beside the weight"
        for local in source.tensors:
            if not local or "." in local:
                return f"{source.name} holds a tensor {local!r}"
        if source.experts is not None and any(
            entry.spec.shape[:1] != (source.experts,)
            for local, entry in source.tensors.items()
            if local not in source.values and local not in source.shared
        ):
            return f"the tensors of {source.name} have no {source.experts} experts"
        if wrong := wrong_source(source):
            return f"{source.name}: {wrong}"
    for local, joined in module.beside.items():
        parts = [source.beside[local] for source in module.sources]
        alike = {part.spec.dtype for part in parts} == {joined.spec.dtype}
        if not alike or total_bytes(parts) != joined.nbytes:
            return f"its {local}, {joined.spec}, is not that of its sources"
    for entry in module.made:
        if not entry.name.startswith(module.prefix):
            return f"tensor {entry.name} is not its own"
    if module.experts is not None and any(
        entry.spec.shape[:1] != (module.experts,) for entry in module.outputs
    ):
        return f"its tensors have no {module.experts} experts"
    return None
