"""Which layout takes a module, by the target's preference or the user's own choice."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from msgspec.structs import replace

from ctconvert import layouts
from ctconvert.assembly import Assembly, Concat, Pad, Part, Stack, assembled, units
from ctconvert.errors import UsageError
from ctconvert.formats.patterns import Pattern, PatternError
from ctconvert.formats.quantization.config import value_at
from ctconvert.layouts import Layout
from ctconvert.names import meant
from ctconvert.planning.assemble import Candidate, padded
from ctconvert.planning.describe import as_text
from ctconvert.records import Options, Recipe
from ctconvert.specs import Dtype, Support, TensorSpec, WeightSpec

#: The dtypes of activations that layouts are made for.
DTYPES: Mapping[Literal["bfloat16", "float16"], Dtype] = {"bfloat16": "BF16", "float16": "F16"}


def matches(pattern: str, module: str, option: str = "--layout") -> bool:
    """Whether a module's name fits a glob, or ``re:`` and a regular expression.

    Raises:
        UsageError: the regular expression of this option is none, or takes too long.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(module, pattern)
    try:
        return _compiled(pattern[3:]).match(module)
    except PatternError as error:
        raise UsageError(f"{option}: {error}") from None


def left_out(modules: Iterable[str], options: Options) -> dict[str, str]:
    """The modules that ``include`` and ``exclude`` leave as they are, each with the reason.

    Raises:
        UsageError: a pattern means no quantised module, or nothing is left to convert.
    """
    names = list(modules)
    found: dict[str, str] = {}
    if options.include:
        chosen: set[str] = set()
        for pattern in options.include:
            chosen |= _meant(names, pattern, "--include")
        found = {name: "no --include means it" for name in names if name not in chosen}
    for pattern in options.exclude:
        for name in _meant(names, pattern, "--exclude"):
            found.setdefault(name, f"--exclude {pattern} means it")
    if found and len(found) == len(names):
        raise UsageError("--include and --exclude leave no quantised module to convert")
    return found


#: More than any engine has: names and plans grow with them.
MOST_RANKS = 1024


def _meant(names: Iterable[str], pattern: str, option: str) -> set[str]:
    found = {name for name in names if matches(pattern, name, option)}
    if not found:
        raise UsageError(f"{option} {pattern}: no quantised module has such a name")
    return found


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
            f"{meant(str(options.target), layouts.TARGETS)}"
        )
    for pattern, name in options.overrides:
        if layouts.get(name) is None:
            known = [layout.name for layout in layouts.LAYOUTS]
            raise UsageError(
                f"--layout {pattern}={name}: no such layout; the layouts are {', '.join(known)}"
                f"{meant(name, known)}"
            )
        matches(pattern, "")
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude)):
        for pattern in patterns:
            matches(pattern, "", option)
    if options.max_shard_size < 1:
        raise UsageError("--max-shard-size must be positive")
    if not 1 <= options.tensor_parallel <= MOST_RANKS:
        raise UsageError(f"--tensor-parallel: 1 to {MOST_RANKS} ranks")
    if options.expert_parallel and options.tensor_parallel == 1:
        raise UsageError("--expert-parallel needs the number of ranks: give --tensor-parallel too")


#: Where a config.json describes the language model.
_LANGUAGE_MODELS = (
    (),
    ("text_config",),
    ("llm_config",),
    ("language_config",),
    ("thinker_config", "text_config"),
)
#: Of what a layout may want the size between an expert's projections to be a multiple.
_LARGEST_MULTIPLE = 512


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
    for part in (value_at(config, path) for path in _LANGUAGE_MODELS):
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
        self._sizes: dict[tuple[str, WeightSpec, WeightSpec], int | None] = {}

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

    def _asked(self, candidate: Candidate) -> tuple[str, ...] | str:
        """The layouts to try for a candidate, or why there are none.

        What is asked for its parts holds for a joined module unless it is named itself.
        """
        parts = [source.name for source in candidate.sources]
        named = any(matches(pattern, candidate.name) for pattern, _ in self.options.overrides)
        if named or not self.options.overrides or parts == [candidate.name]:
            return self._preference(candidate.name)
        found = {self._preference(part) for part in parts}
        if len(found) > 1:
            return "--layout asks for different layouts of its parts"
        return found.pop()

    def choice(self, candidate: Candidate) -> Choice | str:
        """How a module is made, or the reasons why no layout takes it."""
        weight = candidate.weight
        layout = self._layout(candidate, weight)
        if isinstance(layout, str):
            return layout
        known = (layout.name, weight, candidate.assembly)
        if known not in self._recipes:
            self._recipes[known] = self._recipe(layout, candidate, candidate.assembly)
        return self._recipes[known]

    def stacks(self, up: Candidate, down: Candidate) -> tuple[Choice, Choice] | str:
        """How the stacks of a block's experts are made, or why they are not.

        Both have one layout. Where it pads the size between them, each of gate and up is padded by
        itself, and the columns of down as far.
        """
        weights = up.weight, down.weight
        made = [
            self._layout(stack, weight) for stack, weight in zip((up, down), weights, strict=True)
        ]
        for stack, layout in zip((up, down), made, strict=True):
            if isinstance(layout, str):
                return f"{stack.name}: {layout}"
        first, second = made
        assert isinstance(first, Layout) and isinstance(second, Layout)
        if first is not second:
            return f"{up.name} would be {first.name} and {down.name} {second.name}"
        key = (first.name, *weights)
        if key not in self._sizes:
            self._sizes[key] = _size_between(first, up, down)
        size = self._sizes[key]
        if size is None:
            return f"{first.name} cannot pad gate, up and down alike"
        if size == weights[1].k:
            wide, long = up.assembly, down.assembly
        elif up.sources[0].beside:
            return f"their biases would have to be padded to {size} for {first.name}"
        else:
            wide = Stack(tuple(map(partial(_with_rows, up, size), units(up.assembly))))
            long = padded(down.assembly, weights[1].n, size)
        return self._recipe(first, up, wide), self._recipe(first, down, long)

    def _layout(self, candidate: Candidate, weight: WeightSpec) -> Layout | str:
        """The layout of a candidate's weight, or the reasons why none takes it."""
        names = self._asked(candidate)
        if isinstance(names, str):
            return names
        key = (names, weight)
        if key not in self._verdicts:
            self._verdicts[key] = self._choose(*key)
        return self._verdicts[key]

    @staticmethod
    def _recipe(layout: Layout, candidate: Candidate, assembly: Assembly) -> Choice:
        specs = [source.weight for source in candidate.sources]
        weight = assembled(units(assembly)[0], specs)
        shape = layout.padded_shape(weight)
        if shape != (weight.n, weight.k):
            assembly = padded(assembly, *shape)
            weight = assembled(units(assembly)[0], specs)
        recipe = Recipe(
            layout=layout.name,
            layout_version=layout.version,
            weight=weight,
            assembly=assembly,
            views=layout.views(weight),
        )
        return Choice(
            recipe,
            {
                local: _stack_of(spec, candidate)
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


def _stack_of(spec: TensorSpec, candidate: Candidate) -> TensorSpec:
    """The tensor that holds one of ``spec`` for each expert of a candidate, if it has experts.

    Of modules that the source has one by one, single elements are a vector, as engines have them.
    """
    if candidate.experts is None:
        return spec
    rest = () if candidate.stacked and spec.shape == (1,) else spec.shape
    return TensorSpec(spec.dtype, (candidate.experts, *rest))


def _with_rows(candidate: Candidate, size: int, unit: Assembly) -> Assembly:
    """A unit, each of whose parts is padded to ``size`` rows."""
    if isinstance(unit, Concat):
        return Concat(tuple(_with_rows(candidate, size, part) for part in unit.parts))
    assert isinstance(unit, Part)
    specs = [source.weight for source in candidate.sources]
    return Pad(unit, size, assembled(unit, specs).k)


def _size_between(layout: Layout, up: Candidate, down: Candidate) -> int | None:
    """The least size that a layout pads neither as rows of gate and up nor as columns of down.

    One for which it does not pad their other side either comes first, as vLLM's has it.
    """
    ups, downs = ([source.weight for source in stack.sources] for stack in (up, down))
    gate_up, single = units(up.assembly)[0], units(down.assembly)[0]
    long = assembled(single, downs)
    possible = None
    for power in range(_LARGEST_MULTIPLE.bit_length()):
        multiple = math.lcm(1 << power, long.group_size or 1)
        size = -(-long.k // multiple) * multiple
        rows, columns = _with_rows(up, size, gate_up), padded(single, long.n, size)
        try:
            wide, tall = assembled(rows, ups), assembled(columns, downs)
        except ValueError:
            continue
        shapes = layout.padded_shape(wide), layout.padded_shape(tall)
        if shapes == ((wide.n, wide.k), (tall.n, size)):
            return size
        if possible is None and (shapes[0][0], shapes[1][1]) == (wide.n, size):
            possible = size
    return possible
