"""``doctor``: what the weights themselves tell, read module by module, nothing written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial

import torch

from ctconvert import codec
from ctconvert.errors import BadInputError
from ctconvert.planning.describe import Description
from ctconvert.planning.make import make_plan
from ctconvert.planning.memory import item_bytes
from ctconvert.progress import Progress
from ctconvert.records import Convert, Finding, Options, SourceModule
from ctconvert.specs import QuantizedWeight, TensorSpec
from ctconvert.transforms.cuts import with_zeros
from ctconvert.work.differing import codes_of
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, Job
from ctconvert.work.transforming import read_tensor

_ROOM = 256 << 20
#: Elements that are looked at together.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Scanned(Done):
    findings: tuple[Finding, ...] = ()


def scan(
    description: Description, options: Options | None, executor: Executor, progress: Progress
) -> list[Finding]:
    """Decodes every weight; with a target encodes it too, which tells what no kernel can hold."""
    made: dict[str, Convert] = {}
    if options is not None:
        made = {item.sources[0].name: item for item in make_plan(description, options).modules}
    sources = [module.source for module in description.modules.values() if module.source]
    jobs = [ScanJob(source, made.get(source.name)) for source in sources]
    progress.phase("examining", sum(source.nbytes for source in sources))
    store = description.checkpoint.store
    memory = _ROOM + max((job.nbytes for job in jobs), default=0)
    context = Context(store, memory=memory, progress=progress)
    found: dict[str, tuple[Finding, ...]] = {}
    with closing(store):
        for done in executor.run(jobs, context):
            assert isinstance(done, Scanned)
            found[done.job.name] = done.findings
        description.checkpoint.check_unchanged()
    return [finding for job in jobs for finding in found[job.name]]


@dataclass(frozen=True)
class ScanJob(Job):
    """One module: its weights, and where a layout takes it what that makes of them."""

    source: SourceModule
    item: Convert | None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.source.name

    @property
    def nbytes(self) -> int:
        spec = self.source.weight
        own = self.source.nbytes // (self.source.experts or 1)
        own += TensorSpec(spec.element, (spec.n, spec.k)).nbytes if spec.storage == "plain" else 0
        return own + 16 * _BLOCK + (0 if self.item is None else item_bytes(self.item))

    def run(self, context: Context) -> Scanned:
        source, counts = self.source, _Counts()
        damage = ""
        power = None
        read = partial(read_tensor, context.source)
        once = cache(read)  # what decoding reads encoding reads too, and it may come from far away
        for expert in [None] if source.experts is None else range(source.experts):
            context.check_running()
            with context.budget.hold(self.nbytes):
                try:
                    weight = codec.source_weight(source, expert, once, torch.device("cpu"))
                    counts.add(weight)
                    del weight
                    if self.item is not None:
                        if expert == 0:
                            power = codec.common_power(self.item, read)
                        codec.encode(self.item, expert or 0, once, torch.device("cpu"), power)
                except BadInputError as error:  # any other is no finding
                    damage = damage or error.message
                once.cache_clear()
            context.progress.advance(source.nbytes // (source.experts or 1))
        findings = list(counts.findings(source.name))
        if damage:
            message = damage.removeprefix(f"module {source.name}").lstrip(": ")
            findings.append(_finding("error", "damaged", message, source.name))
        return Scanned(self, findings=tuple(findings))


def _finding(severity: str, kind: str, message: str, module: str) -> Finding:
    return Finding(severity=severity, kind=kind, message=message, module=module)  # type: ignore[arg-type]


@dataclass
class _Counts:
    """Of all weights of a module; ``scales`` and ``channels`` are how many there are.

    A scale that is not finite is damage, which decoding refuses.
    """

    scales: int = 0
    zero: int = 0
    subnormal: int = 0
    channels: int = 0
    empty: int = 0
    constant: int = 0

    def add(self, weight: QuantizedWeight) -> None:
        scale = weight.scale
        if scale is not None and scale.dtype.is_floating_point and _has_zero(scale.dtype):
            tiny, values = torch.finfo(scale.dtype).tiny, scale.float()
            self.scales += values.numel()
            self.zero += int((values == 0).sum())
            self.subnormal += int(((values != 0) & (values.abs() < tiny)).sum())
        self.channels += weight.spec.n
        for empty, constant in _channels(weight):
            self.empty += empty
            self.constant += constant

    def findings(self, module: str) -> Iterator[Finding]:
        for count, what, severity in (
            (self.zero, "0", "error"),
            (self.subnormal, "subnormal, which kernels may take for 0", "warning"),
        ):
            if count:
                text = f"{count} of {self.scales} scales {'is' if count == 1 else 'are'} {what}"
                yield _finding(severity, "scale", text, module)
        for count, what in ((self.empty, "zero"), (self.constant, "constant, of one code")):
            if count:
                verb = "is" if count == 1 else "are"
                text = f"{count} of {self.channels} output channels {verb} {what}"
                yield _finding("warning", "channel", text, module)


def _has_zero(dtype: torch.dtype) -> bool:
    return dtype != torch.float8_e8m0fnu  # powers of two alone


def _channels(weight: QuantizedWeight) -> Iterator[tuple[int, int]]:
    """How many rows are 0 throughout, and how many others have one code throughout."""
    spec, weight = weight.spec, with_zeros(weight)
    step = max(1, _BLOCK // spec.k)
    for first in range(0, spec.n, step):
        codes = codes_of(spec, weight.codes[first : first + step])
        zero = _is_zero(weight, codes, first).all(1)
        raw = codes.view(torch.int16 if codes.element_size() == 2 else torch.int8)
        constant = (raw == raw[:, :1]).all(1) & ~zero
        yield int(zero.sum()), int(constant.sum())


def _is_zero(weight: QuantizedWeight, codes: torch.Tensor, first: int) -> torch.Tensor:
    """Which of some rows' codes mean 0."""
    spec = weight.spec
    if spec.kind == "float":
        return (codes & 7) == 0 if spec.storage == "packed" else codes.to(torch.float16) == 0
    if weight.zero_point is None:
        return codes == 0
    zeros = weight.zero_point[first : first + len(codes)].to(torch.int16) - (1 << (spec.bits - 1))
    if weight.g_idx is not None:
        return codes == zeros[:, weight.g_idx.long()]
    if zeros.shape[0] == 1 < len(codes):
        zeros = zeros.expand(len(codes), -1)
    return codes == zeros.repeat_interleave(spec.k // zeros.shape[1], 1)
