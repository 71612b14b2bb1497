"""Plans made by hand: output modules of any assembly, which no rule of the planner makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ctconvert import layouts
from ctconvert.assembly import Assembly, Stack, assembled, units
from ctconvert.layouts import Layout
from ctconvert.planning.assemble import padded
from ctconvert.planning.describe import Description
from ctconvert.planning.place import place
from ctconvert.records import Convert, Copy, Options, Origin, Plan, Recipe, SourceFile, SourceModule
from ctconvert.specs import TensorSpec


@dataclass(frozen=True)
class Wanted:
    """An output module: its name, of what it is made, and the layout it shall have."""

    name: str
    sources: tuple[SourceModule, ...]
    assembly: Assembly
    layout: Layout


def supporting(assembly: Assembly, sources: Sequence[SourceModule]) -> list[Layout]:
    """Every layout that takes the weight of one unit."""
    spec = assembled(assembly, [source.weight for source in sources])
    return [layout for layout in layouts.LAYOUTS if layout.supports(spec)]


def hand_made(description: Description, wanted: Iterable[Wanted], limit: int = 20_000) -> Plan:
    """A plan whose modules are those; all that is not quantised is copied."""
    checkpoint = description.checkpoint
    recipes, groups = [], []
    for item in wanted:
        specs = [source.weight for source in item.sources]
        assembly, spec = item.assembly, assembled(item.assembly, specs)
        shape = item.layout.padded_shape(spec)
        if shape != (spec.n, spec.k):
            assembly = padded(assembly, *shape)
            spec = assembled(assembly, specs)
        recipe = Recipe(
            layout=item.layout.name,
            layout_version=item.layout.version,
            weight=spec,
            assembly=assembly,
            views=item.layout.views(spec),
        )
        leading = (len(units(assembly)),) if isinstance(assembly, Stack) else ()
        made = {
            f"{item.name}.{local}": TensorSpec(tensor.dtype, (*leading, *tensor.shape))
            for local, tensor in item.layout.output_specs(spec).items()
        }
        recipes.append((item, recipe, list(made)))
        groups.append(made)
    plain = list(description.plain.values())
    shards, placed = place([*groups, *({entry.name: entry.spec} for entry in plain)], limit, {}, {})
    sizes = checkpoint.store.sizes()
    return Plan(
        kind="converted",
        options=Options(target="cuda"),
        source=Origin(
            id=checkpoint.store.id,
            files=tuple(SourceFile(name, sizes[name]) for name in checkpoint.shards),
            config=checkpoint.config_text,
        ),
        items=(
            *(
                Convert(
                    name=item.name,
                    sources=item.sources,
                    recipe=recipe,
                    outputs=tuple(placed[name] for name in names),
                )
                for item, recipe, names in recipes
            ),
            *(Copy(entry, placed[entry.name]) for entry in plain),
        ),
        shards=shards,
        config="{}",
    )
