"""``bench --load``: a source and an engine's transforms of it, beside the converted one."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from msgspec import Struct
from safetensors import safe_open

from ctconvert.assembly import leaves
from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.output import Output
from ctconvert.records import Convert
from ctconvert.runtime.benchmark import device_name
from ctconvert.runtime.engine import Transform, transform_of
from ctconvert.runtime.loading import Loader
from ctconvert.store.base import Store
from ctconvert.store.hub import local_copy
from ctconvert.store.safetensors import TensorEntry, total_bytes
from ctconvert.transforms import device as devices
from ctconvert.transforms.dtypes import same_bits, spec_of

#: How often each side is loaded.
ROUNDS = 5


class LoadReport(Struct, frozen=True):
    """Medians, in seconds, of what is timed in turns, the files being in the page cache.

    ``read_seconds`` of the source's tensors to the device and ``transform_seconds`` of what an
    engine then does, in plain torch; ``source_seconds`` of both. ``seconds`` of loading the
    converted modules. ``modules`` of each layout were loaded on both sides, and every tensor of
    theirs that an engine makes was equal; ``left_out`` are those of which it makes others.
    """

    device: str
    rounds: int
    source_bytes: int
    bytes: int
    read_seconds: float
    transform_seconds: float
    source_seconds: float
    seconds: float
    modules: dict[str, int]
    left_out: dict[str, int]


def bench_load(out: str | Path, model: str | Path, device: str, rounds: int = ROUNDS) -> LoadReport:
    """Times loading a converted checkpoint against loading what it was made from.

    Args:
        out: a converted checkpoint.
        model: the one it was made from, a directory or a Hub id.
        device: where modules are loaded to.
        rounds: how often each is timed.

    Raises:
        UsageError: there is no such checkpoint or device, or no module of it can be compared.
        VerificationError: ``model`` is not what it was made from, or a tensor differs from what
            the transforms make.
        ConversionError: the device has no memory for it.
    """
    where = devices.resolve(device)
    output = Output.open(out)
    if output.plan.options.tensor_parallel > 1:
        raise UsageError(f"{out}: cut for ranks; --load compares whole modules")
    chosen = {m.name: t for m in output.plan.modules if (t := transform_of(m)) is not None}
    counts = Counter(m.recipe.layout for m in output.plan.modules if m.name in chosen)
    others = Counter(m.recipe.layout for m in output.plan.modules if m.name not in chosen)
    if not chosen:
        raise UsageError(
            f"{out}: holds no module whose transforms at load are known here"
            + (f": {', '.join(sorted(others))}" if others else "")
        )
    source = _Source(local_copy(str(model)), output, chosen, where)
    with _enough_memory(where):
        source.check(out)
        reads, transforms, loads = [], [], []
        for _ in range(rounds):
            read, transformed = source.time()
            reads.append(read)
            transforms.append(transformed)
            loads.append(_time_load(out, where, list(chosen)))
    modules = source.modules
    return LoadReport(
        device=device_name(where),
        rounds=rounds,
        source_bytes=total_bytes(source.entries.values()),
        bytes=sum(total_bytes(module.made) for module in modules),
        read_seconds=statistics.median(reads),
        transform_seconds=statistics.median(transforms),
        source_seconds=statistics.median(map(sum, zip(reads, transforms, strict=True))),
        seconds=statistics.median(loads),
        modules=dict(sorted(counts.items())),
        left_out=dict(sorted(others.items())),
    )


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise ConversionError(
            f"out of memory on {device}; bench --load holds a checkpoint and what a transform of "
            "its largest module takes: free the device, or name a smaller OUT"
        ) from None


def _time_load(out: str | Path, device: torch.device, names: list[str]) -> float:
    devices.synchronize(device)
    begun = time.perf_counter()
    with Loader(out, str(device)) as loader:
        found = loader.load(names)
    devices.synchronize(device)
    seconds = time.perf_counter() - begun
    del found
    return seconds


class _Source:
    """The source as an engine loads it: from mapped files to the device, then transforms."""

    def __init__(
        self,
        store: Store,
        output: Output,
        transforms: Mapping[str, Transform],
        device: torch.device,
    ) -> None:
        self.store, self.device, self.transforms = store, device, transforms
        self.modules: list[Convert] = [m for m in output.plan.modules if m.name in transforms]
        self.entries: dict[str, TensorEntry] = {
            entry.name: entry
            for module in self.modules
            for source in module.sources
            for local, entry in (*source.tensors.items(), *source.beside.items())
            if local not in source.values and local not in source.zeros
        }
        for file in {entry.file for entry in self.entries.values()}:
            if file not in store.sizes():
                raise self._other(f"it has no {file}")

    def _other(self, reason: str) -> VerificationError:
        return VerificationError(f"{self.store.where}: not what OUT was made from: {reason}")

    def read(self) -> dict[str, torch.Tensor]:
        """Every tensor in memory of its own on the device, as an engine's parameters are."""
        found = {}
        with ExitStack() as stack:
            files = {
                name: stack.enter_context(safe_open(Path(self.store.where) / name, "pt"))
                for name in dict.fromkeys(entry.file for entry in self.entries.values())
            }
            names = {file: set(opened.keys()) for file, opened in files.items()}
            for name, entry in self.entries.items():
                if name not in names[entry.file]:
                    raise self._other(f"it has no tensor {name}")
                mapped = files[entry.file].get_tensor(name)
                if spec_of(mapped) != entry.spec:
                    raise self._other(f"its tensor {name} is {spec_of(mapped)}, not {entry.spec}")
                found[name] = torch.empty_like(mapped, device=self.device).copy_(mapped)
        return found

    def transformed(
        self, module: Convert, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The layout's tensors, by local name, of the source's by full name."""
        made = []
        for unit in module.units:
            parts: dict[str, list[torch.Tensor]] = {}
            for part in leaves(unit):
                source = module.sources[part.source]
                for local, entry in source.tensors.items():
                    if local in source.values or local in source.zeros:
                        continue
                    whole = tensors[entry.name]
                    one = whole if part.expert is None else whole[part.expert]
                    parts.setdefault(local, []).append(one)
            joined = {name: p[0] if len(p) == 1 else torch.cat(p) for name, p in parts.items()}
            made.append(self.transforms[module.name](joined, module.recipe.weight))
        if module.experts is None:
            return made[0]
        return {local: torch.stack([one[local] for one in made]) for local in made[0]}

    def check(self, out: str | Path) -> None:
        """Raises VerificationError unless the checkpoint holds what the transforms make."""
        tensors = self.read()
        with Loader(out, str(self.device)) as loader:
            for module in self.modules:
                have = loader.read(module.outputs)
                for local, want in self.transformed(module, tensors).items():
                    if not same_bits(have[module.prefix + local], want):
                        raise VerificationError(
                            f"tensor {module.prefix}{local} is not what loading "
                            f"{self.store.where} makes of it",
                            module=module.name,
                        )

    def time(self) -> tuple[float, float]:
        """Seconds of reading and of transforming, everything held at the end."""
        devices.synchronize(self.device)
        begun = time.perf_counter()
        tensors = self.read()
        devices.synchronize(self.device)
        read = time.perf_counter()
        held = []
        for module in self.modules:
            held.append(self.transformed(module, tensors))
            for source in module.sources:
                if module.experts is None:  # a stack's are shared by its two modules
                    for entry in source.tensors.values():
                        tensors.pop(entry.name, None)
        devices.synchronize(self.device)
        done = time.perf_counter()
        return read - begun, done - read
