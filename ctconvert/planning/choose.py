"""Which layout takes a module, by the target's preference or the user's own choice."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from functools import lru_cache

from ctconvert import layouts
from ctconvert.assembly import Assembly
from ctconvert.errors import UsageError
from ctconvert.formats.patterns import Pattern, PatternError
from ctconvert.layouts import Layout
from ctconvert.planning.assemble import Candidate, padded
from ctconvert.records import Options, Recipe
from ctconvert.specs import TensorSpec, WeightSpec


def matches(pattern: str, module: str) -> bool:
    """Whether a module's name fits a glob, or ``re:`` and a regular expression.

    Raises:
        UsageError: the regular expression is none, or takes too long.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(module, pattern)
    try:
        return _compiled(pattern[3:]).match(module)
    except PatternError as error:
        raise UsageError(f"--layout: {error}") from None


@lru_cache(maxsize=256)
def _compiled(text: str) -> Pattern:
    return Pattern(text)


def check_options(options: Options) -> None:
    """Refuses targets, layouts and patterns that do not exist.

    Raises:
        UsageError: with what does.
    """
    if options.target not in layouts.TARGETS:
        raise UsageError(
            f"unknown target {options.target!r}; the targets are {', '.join(layouts.TARGETS)}"
        )
    for pattern, name in options.overrides:
        if layouts.get(name) is None:
            known = ", ".join(layout.name for layout in layouts.LAYOUTS)
            raise UsageError(f"--layout {pattern}={name}: no such layout; the layouts are {known}")
        matches(pattern, "")
    if options.max_shard_size < 1:
        raise UsageError("--max-shard-size must be positive")


@dataclass(frozen=True)
class Choice:
    """How a module is made, and the tensors its layout makes, by local name."""

    recipe: Recipe
    outputs: dict[str, TensorSpec]


class Chooser:
    """Chooses layouts for one set of options, the verdict on each kind of weight kept."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._verdicts: dict[tuple[tuple[str, ...], WeightSpec], Layout | str] = {}
        self._recipes: dict[tuple[str, WeightSpec, Assembly], Choice] = {}

    def _preference(self, module: str) -> tuple[str, ...]:
        """The layouts to try for a module, in order: an override alone, or the target's."""
        for pattern, name in self.options.overrides:
            if matches(pattern, module):
                return (name,)
        assert self.options.target is not None
        return layouts.TARGETS[self.options.target]

    def choice(self, candidate: Candidate) -> Choice | str:
        """How a module is made, or the reasons why no layout takes it."""
        weight = candidate.weight
        names = self._preference(candidate.name)
        key = (names, weight)
        if key not in self._verdicts:
            self._verdicts[key] = self._choose(names, weight)
        layout = self._verdicts[key]
        if isinstance(layout, str):
            return layout
        known = (layout.name, weight, candidate.assembly)
        if known not in self._recipes:
            self._recipes[known] = self._recipe(layout, candidate, weight)
        return self._recipes[known]

    @staticmethod
    def _recipe(layout: Layout, candidate: Candidate, weight: WeightSpec) -> Choice:
        assembly = candidate.assembly
        shape = layout.padded_shape(weight)
        if shape != (weight.n, weight.k):
            assembly = padded(assembly, *shape)
            weight = Candidate(candidate.name, candidate.sources, assembly).weight
        recipe = Recipe(
            layout=layout.name,
            layout_version=layout.version,
            weight=weight,
            assembly=assembly,
            views=layout.views(weight),
        )
        experts = candidate.sources[0].experts
        leading = () if experts is None else (experts,)
        return Choice(
            recipe,
            {
                local: TensorSpec(spec.dtype, (*leading, *spec.shape))
                for local, spec in layout.output_specs(weight).items()
            },
        )

    def _choose(self, names: tuple[str, ...], weight: WeightSpec) -> Layout | str:
        """The first layout that supports the weight, or the reasons why none does."""
        reasons: list[str] = []
        others: list[str] = []
        for name in names:
            layout = layouts.get(name)
            assert layout is not None
            support = layout.supports(weight)
            if support:
                return layout
            (others if support.other_kind else reasons).append(f"{name}: {support.reason}")
        if not reasons and len(others) > 1:
            what = "embedding tables" if weight.embedding else f"{weight.family} weights"
            return (
                f"no layout of target {self.options.target} is for {what} such as this "
                f"({weight.label})"
            )
        return "; ".join(reasons or others)
