"""Which layout takes a module, by the target's preference or the user's own choice."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from msgspec.structs import replace

from ctconvert import layouts
from ctconvert.assembly import Assembly
from ctconvert.errors import UsageError
from ctconvert.formats.patterns import Pattern, PatternError
from ctconvert.layouts import Layout
from ctconvert.planning.assemble import Candidate, padded
from ctconvert.planning.describe import as_text
from ctconvert.records import Options, Recipe
from ctconvert.specs import Dtype, Support, TensorSpec, WeightSpec

#: The dtypes of activations that layouts are made for.
DTYPES: Mapping[Literal["bfloat16", "float16"], Dtype] = {"bfloat16": "BF16", "float16": "F16"}


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


def dtype_named(name: str | None) -> Literal["bfloat16", "float16"] | None:
    """The dtype that a user names.

    Raises:
        UsageError: no layout is made for such activations.
    """
    found = next((dtype for dtype in DTYPES if dtype == name), None)
    if found is None and name is not None:
        raise UsageError(f"--dtype {name!r}: it must be {' or '.join(DTYPES)}")
    return found


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype of a model's activations as its config.json says it, None where it does not."""
    for part in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, Mapping) and part.get(key) is not None:
                return as_text(part[key]).removeprefix("torch.")
    return None


@dataclass(frozen=True)
class Choice:
    """How a module is made, and the tensors its layout makes, by local name."""

    recipe: Recipe
    outputs: dict[str, TensorSpec]


class Chooser:
    """Chooses layouts for one set of options, the verdict on each kind of weight kept.

    ``options`` are those given, with the dtype that the model's ``config`` says.
    """

    def __init__(self, options: Options, config: Mapping[str, Any]) -> None:
        stated = stated_dtype(config)
        found = next((name for name in DTYPES if name == (stated or "bfloat16")), None)
        self.options = replace(options, dtype=options.dtype or found)
        self.stated = stated
        self._assumed = options.dtype is None and stated is None
        self._verdicts: dict[tuple[tuple[str, ...], WeightSpec], Layout | str] = {}
        self._recipes: dict[tuple[str, WeightSpec, Assembly], Choice] = {}

    @property
    def notes(self) -> list[str]:
        """What the user should know of the choices so far."""
        made = {name for name, _, _ in self._recipes}
        depend = [layout.name for layout in layouts.LAYOUTS if layout.dtype and layout.name in made]
        if not depend or not self._assumed:
            return []
        return [
            f"{', '.join(depend)}: made for bfloat16 activations, since config.json names no dtype "
            "(--dtype does)"
        ]

    def _preference(self, module: str) -> tuple[str, ...]:
        """The layouts to try for a module, in order: an override alone, or the target's."""
        for pattern, name in self.options.overrides:
            if matches(pattern, module):
                return (name,)
        assert self.options.target is not None
        return layouts.TARGETS[self.options.target]

    def _suits(self, layout: Layout, weight: WeightSpec) -> Support:
        """Whether a layout that a target prefers takes the weight, for these activations."""
        support = layout.supports(weight)
        if not support:
            return support
        if layout.dtype is not None and self.options.dtype is None:
            return Support(
                f"it is made for bfloat16 or float16 activations, and config.json says "
                f"{self.stated} (--dtype chooses one)"
            )
        if self.options.dtype is not None and layout.dtype not in (
            None,
            DTYPES[self.options.dtype],
        ):
            return Support(f"the activations are {self.options.dtype}", other_kind=True)
        needy = layouts.QUANTISED_ACTIVATIONS.get(self.options.target or "", ())
        if layout.name in needy and weight.input_type is None:
            return Support("16-bit activations, which its kernel would quantise", other_kind=True)
        return support

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
        preferred = names == layouts.TARGETS[self.options.target or ""]
        for name in names:
            layout = layouts.get(name)
            assert layout is not None
            support = self._suits(layout, weight) if preferred else layout.supports(weight)
            if support:
                return layout
            (others if support.other_kind else reasons).append(f"{name}: {support.reason}")
        if not reasons and len(others) > 1:
            what = "weights" if weight.family == "other" else f"{weight.family} weights"
            what = "embedding tables" if weight.embedding else what
            reasons = [
                f"no layout of target {self.options.target} is for {what} such as this "
                f"({weight.label})"
            ]
        text = "; ".join(reasons or others)
        elsewhere = [
            layout.name
            for layout in layouts.LAYOUTS
            if layout.name not in names and layout.supports(weight)
        ]
        if preferred and elsewhere:
            text += f"; layouts of other targets that take it: {', '.join(elsewhere)}"
        return text
