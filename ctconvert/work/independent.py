"""``verify --independent``: an output's weights beside what compressed-tensors makes of the source.

Both ways of decoding meet only in the dense weight: the source's tensors go through
compressed-tensors' decompressors, the output's through the layout and the assembly, and neither
uses the code of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from ctconvert import codec, records
from ctconvert.errors import VerificationError
from ctconvert.formats.independent import NotJudgedError, dense_by_compressed_tensors, difference
from ctconvert.formats.quantization import Scheme
from ctconvert.planning.describe import Description
from ctconvert.planning.memory import dense_bytes
from ctconvert.records import Convert, Judged, SourceModule
from ctconvert.specs import QuantizedWeight
from ctconvert.transforms import cuts
from ctconvert.transforms.dense import dense_weight
from ctconvert.work.executors import Executor
from ctconvert.work.jobs import Context, Done, PartJob
from ctconvert.work.parts import ranges
from ctconvert.work.transforming import read_tensor


@dataclass(frozen=True)
class Verdict(Done):
    """How many weights agree, and why others were not judged."""

    agree: int = 0
    not_judged: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgeJob(PartJob):
    """A module of an output beside compressed-tensors' opinion of its sources.

    ``groups`` are the config groups of the sources, ``version`` that of the producer's
    compressed-tensors.
    """

    item: records.Convert
    groups: tuple[Scheme, ...] = ()
    version: tuple[int, ...] | None = None

    def run(self, context: Context) -> Done:
        agree, reasons = 0, dict[str, int]()
        for unit in self.units:
            context.check_running()
            with context.budget.hold(dense_bytes(self.item)):
                found = self._unit(context, unit)
            for reason in found:
                if reason:
                    reasons[reason] = reasons.get(reason, 0) + 1
                else:
                    agree += 1
        return Verdict(self, agree=agree, not_judged=reasons)

    def _unit(self, context: Context, unit: int) -> list[str]:
        """Why each part of a unit was not judged, or nothing where it agrees."""
        cpu = torch.device("cpu")
        assert context.against is not None
        made = partial(read_tensor, context.source)
        original = partial(read_tensor, context.against)
        found = []
        for fragment in codec.decode(self.item, unit, made, cpu):
            part = fragment.part
            source = self.item.sources[part.source]
            tensors = {
                local: original(entry) for local, entry in source.entries(part.expert).items()
            }
            try:
                theirs = dense_by_compressed_tensors(
                    source.name,
                    tensors,
                    self.groups[part.source],
                    source.weight.format,
                    self.version,
                )
            except NotJudgedError as error:
                found.append(str(error).partition(": ")[2])
                continue
            finally:
                context.progress.advance(source.nbytes // (source.experts or 1))
            ours = dense_weight(_whole(fragment.weight, source))
            place = fragment.place
            rows = slice(place.row, place.row + place.n)
            columns = slice(place.column, place.column + place.k)
            if wrong := difference(theirs[rows, columns], ours):
                raise VerificationError(f"module {source.name}: weight{wrong}", module=source.name)
            found.append("")
        return found


def _whole(weight: QuantizedWeight, source: SourceModule) -> QuantizedWeight:
    """A fragment that is all of its source as the source had it: a per-tensor scale is one."""
    if (weight.spec.n, weight.spec.k) == (source.weight.n, source.weight.k):
        return cuts.collapse(weight, source.weight)
    return weight


def judge(jobs: list[JudgeJob], context: Context, executor: Executor) -> Judged:
    """Runs comparisons and adds up their verdicts.

    Raises:
        VerificationError: a weight differs.
        UsageError: compressed-tensors is not installed.
    """
    agree, reasons = 0, dict[str, int]()
    for done in executor.run(jobs, context):
        assert isinstance(done, Verdict)
        agree += done.agree
        for reason, count in done.not_judged.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return Judged(agree=agree, not_judged=reasons)


def judge_jobs(items: list[Convert], description: Description) -> list[JudgeJob]:
    """The comparisons of an output's modules, their sources being those of the checkpoint."""
    jobs = []
    for item in items:
        schemes = [description.modules[source.name].scheme for source in item.sources]
        groups = tuple(
            (found and found.scheme) or Scheme(targets=())
            for found in schemes  # sparse alone
        )
        version = description.settings.version
        jobs += [JudgeJob(item, *units, groups, version) for units in ranges(item)]
    return jobs
