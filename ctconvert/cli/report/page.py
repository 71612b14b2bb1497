"""``inspect --html``: a page that needs nothing but itself, no script and no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from ctconvert.cli.report.grid import REFUSED, Grid, Row, Run, Stack, Swatch, grid_of
from ctconvert.cli.text import collapse, printable, shape_text, size
from ctconvert.planning.inspection import Inspection

#: Layers up to which a line parts each from the next.
_LINES = 130
#: The most rows of the table of modules, and of files.
_MOST = 1000

_STYLE = """
body{font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 color:#1b1f24;background:#fff;margin:0 auto;padding:1.5rem 1.25rem 3rem;max-width:80rem}
h1{font-size:1.5rem;margin:0 0 .15rem;overflow-wrap:anywhere}
h2{font-size:1.1rem;margin:2.2rem 0 .6rem;overflow-wrap:anywhere}
p{margin:.2rem 0}small,.quiet{color:#5a6270;font-weight:400}
.row .name,td.name{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
 font-size:.82rem;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:.6rem 2.4rem;margin:1.1rem 0 0}
.facts b{display:block;font-size:1.25rem;font-weight:600}
.sides{display:grid;grid-template-columns:1fr;gap:1rem 2rem}
.two .sides{grid-template-columns:1fr 1fr}
.whole{display:flex;height:1.1rem;border-radius:3px;overflow:hidden;background:#f2f3f5}
.whole i,.bar i{display:block;min-width:0}
ul.legend{list-style:none;margin:.5rem 0 0;padding:0}
.legend li{display:grid;grid-template-columns:1rem 1fr auto auto;gap:0 .6rem;align-items:center;
 padding:.1rem 0}
.legend i{width:.85rem;height:.85rem;border-radius:2px}
.legend span+span{min-width:5.5rem;text-align:right;font-variant-numeric:tabular-nums}
.row{display:grid;grid-template-columns:minmax(9rem,22rem) minmax(8rem,1fr) 6rem;gap:0 1rem;
 align-items:center;padding:.12rem 0}
.two .row{grid-template-columns:minmax(9rem,22rem) minmax(6rem,1fr) minmax(6rem,1fr) 10.5rem}
.row:hover{background:#f4f6f8}
.row .size{font-size:.85rem;text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.head{color:#5a6270;font-size:.85rem}.head:hover{background:none}
.bar{display:flex;position:relative;height:1.05rem;background:#f2f3f5;border-radius:2px;
 overflow:hidden}
.lines::after{content:"";position:absolute;inset:0;pointer-events:none;
 background:linear-gradient(90deg,#ffffffb0 1px,transparent 1px) 0 0/var(--w) 100%}
.ticks{position:relative;height:1.1rem}
.ticks span{position:absolute;transform:translateX(-50%);font-size:.72rem;
 font-variant-numeric:tabular-nums}
.refused{background-image:repeating-linear-gradient(45deg,#ffffff59 0 3px,transparent 3px 7px)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%}
th{text-align:left;color:#5a6270;font-weight:500;font-size:.85rem;white-space:nowrap}
td,th{padding:.22rem 1.1rem .22rem 0;border-bottom:1px solid #eceef1;vertical-align:top}
td.name{min-width:14rem}td.number,th.number{text-align:right;padding-right:0}
summary{cursor:pointer;font-size:1.1rem;font-weight:600;margin:2.2rem 0 .6rem}
.bad{color:#a11a20}
@media(max-width:52rem){
 body{padding:1rem .8rem 2rem}
 .two .sides{grid-template-columns:1fr}
 .row,.two .row{grid-template-columns:1fr auto;padding:.3rem 0}
 .row .bar,.row .ticks{grid-column:1/-1;margin-top:.15rem}
 .row .name{grid-row:1;grid-column:1}.row .size{grid-row:1;grid-column:2}
 .head{display:none}
}
@media print{.whole,.bar,.legend i{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(found: Inspection) -> str:
    """An inspection as HTML."""
    grid = grid_of(found)
    classes = {label: f"c{place}" for place, label in enumerate(grid.colours)}
    colours = "".join(f".{classes[one]}{{background-color:{c}}}" for one, c in grid.colours.items())
    both = " class=two" if grid.after else ""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width,initial-scale=1'>",
        "<meta http-equiv=Content-Security-Policy "
        "content=\"default-src 'none';style-src 'unsafe-inline'\">",
        f"<title>{_text(found.model)} - ctconvert</title><style>{_STYLE}{colours}</style></head>",
        f"<body{both}>",
        *_head(found),
        *_legends(found, grid, classes),
        *_refusals(found),
        *(line for stack in grid.stacks for line in _stack(found, stack, grid, classes)),
    ]
    if grid.left_out:
        parts.append(f"<p class=quiet>{grid.left_out} more rows are not drawn.</p>")
    parts += _notes(found)
    parts += _modules(found)
    parts += _files(found)
    return "\n".join([*parts, "</body></html>", ""])


def _text(text: object) -> str:
    """What a name holds, as text that is no markup."""
    return escape(printable(str(text)))


def sides_of(found: Inspection) -> tuple[str, str]:
    """What the two halves of the picture show."""
    if found.target is not None:
        return "before: scheme", f"after: layout for {found.target}"
    return "scheme", ""


def _head(found: Inspection) -> Iterator[str]:
    what = ", ".join(found.architectures) or "unknown architecture"
    version = found.compressed_tensors_version
    kind = "kernel-ready" if found.converted else str(found.format)
    made = f"for {found.target}, " if found.converted else ""
    ours = f" (compressed-tensors {version})" if version else ""
    revision = f", revision {found.revision}" if found.revision else ""
    yield f"<h1>{_text(found.model)}</h1>"
    yield f"<p class=quiet>{_text(f'{what}, {made}{kind}{ours}{revision}')}</p>"
    before, after = bytes_of(found)
    facts = [(f"{len(found.modules):,}", "quantised modules")]
    if found.target is None:
        facts += [(size(found.bytes), f"in {_count(len(found.shards), 'file')}")]
    else:
        facts += [(change(before, after), "before and after")]
    facts += [(size(found.quantised_bytes), "in quantised modules")]
    refused = len(refusals(found))
    if refused:
        facts += [(f"<span class=bad>{refused:,}</span>", "modules that no layout takes")]
    yield "<div class=facts>"
    yield from (f"<div><b>{value}</b>{_text(what)}</div>" for value, what in facts)
    yield "</div>"


def bytes_of(found: Inspection) -> tuple[int, int]:
    """Bytes of all tensors before and after; those of modules that nothing takes stay."""
    others = found.bytes - found.quantised_bytes
    if found.converted:
        return others + sum(module.was_bytes or 0 for module in found.modules), found.bytes
    after = sum(
        module.bytes if module.becomes_bytes is None else module.becomes_bytes
        for module in found.modules
    )
    return found.bytes, others + after


def change(before: int, after: int) -> str:
    """Two sizes, or one where people would read the same twice."""
    first, second = size(before), size(after)
    return first if first == second else f"{first} → {second}"


def refusals(found: Inspection) -> list[tuple[str, tuple[str, ...]]]:
    """The modules that no layout takes, each with the reason."""
    return [
        (module.name, (module.refused or module.unsupported or "",))
        for module in found.modules
        if module.layout is None and (module.refused or module.unsupported)
    ]


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _legends(found: Inspection, grid: Grid, classes: dict[str, str]) -> Iterator[str]:
    yield "<h2>Bytes of matrices</h2><div class=sides>"
    for name, swatches in zip(sides_of(found), (grid.before, grid.after), strict=True):
        if swatches:
            yield from _legend(name, swatches, classes)
    yield "</div>"


def _legend(name: str, swatches: Sequence[Swatch], classes: dict[str, str]) -> Iterator[str]:
    total = max(sum(swatch.bytes for swatch in swatches), 1)
    yield f"<div><p class=quiet>{_text(name)}</p><div class=whole>"
    for swatch in swatches:
        share = 100 * swatch.bytes / total
        title = f"{swatch.label}: {size(swatch.bytes)}"
        yield f"{_block(classes, swatch.label, f'width:{share:.3f}%', title)}"
    yield "</div><ul class=legend>"
    for swatch in swatches:
        share = 100 * swatch.bytes / total
        yield (
            f"<li>{_block(classes, swatch.label)}<span>{_text(swatch.label)} "
            f"<small>{_count(swatch.modules, 'matrix' if swatch.modules == 1 else 'matrice')}"
            f"</small></span><span>{size(swatch.bytes)}</span><span>{share:.1f} %</span></li>"
        )
    yield "</ul></div>"


def _block(classes: dict[str, str], label: str, style: str = "", title: str = "") -> str:
    refused = " refused" if label == REFUSED else ""
    styled = f" style='{style}'" if style else ""
    titled = f' title="{_text(title)}"' if title else ""
    return f"<i class='{classes[label]}{refused}'{styled}{titled}></i>"


def _stack(found: Inspection, stack: Stack, grid: Grid, classes: dict[str, str]) -> Iterator[str]:
    count = len(stack.layers)
    if stack.name:
        span = f"{stack.layers[0]} to {stack.layers[-1]}" if count > 1 else f"{stack.layers[0]}"
        yield f"<h2>{_text(stack.name)} <small>{_count(count, 'layer')}, {span}</small></h2>"
    else:
        yield "<h2>Outside of layers</h2>"
    sides = [name for name in sides_of(found) if name]
    if count > 1:
        ticks = "".join(_ticks(stack.layers, name) for name in sides)
        yield f"<div class='row head'><span></span>{ticks}<span></span></div>"
    for row in stack.rows:
        yield from _row(row, count, bool(grid.after), classes)


def _ticks(layers: Sequence[int], caption: str) -> str:
    step = max(1, -(-len(layers) // 9))
    places = range(0, len(layers), step)
    spans = (
        f"<span style='left:{100 * (place + 0.5) / len(layers):.2f}%'>{layers[place]}</span>"
        for place in places
    )
    return f"<div>{_text(caption)}<div class=ticks>{''.join(spans)}</div></div>"


def _row(row: Row, layers: int, both: bool, classes: dict[str, str]) -> Iterator[str]:
    many = f" <small>{row.modules:,} x {_text(row.shapes)}</small>"
    yield f"<div class=row><span class=name>{_text(row.name)}{many}</span>"
    yield _bar(row.before, layers, classes)
    sizes = size(row.before_bytes)
    if both:
        yield _bar(row.after, layers, classes)
        sizes = change(row.before_bytes, row.after_bytes)
    yield f"<span class=size>{sizes}</span></div>"


def _bar(runs: Sequence[Run], layers: int, classes: dict[str, str]) -> str:
    lines = f" lines' style='--w:{100 / layers:.4f}%" if 1 < layers <= _LINES else ""
    blocks = (
        _block(classes, run.label, f"flex:{run.count}", run.title)
        if run.label is not None
        else f"<i style='flex:{run.count}'></i>"
        for run in runs
    )
    return f"<div class='bar{lines}'>{''.join(blocks)}</div>"


def _refusals(found: Inspection) -> Iterator[str]:
    rows = collapse(refusals(found))
    if rows:
        yield "<h2 class=bad>No layout takes</h2>"
        yield from _table(["module", "why", "count"], rows)


def _notes(found: Inspection) -> Iterator[str]:
    if found.oddities:
        yield "<h2>Notes</h2><ul>"
        for note, count in collapse((note, ()) for note in found.oddities):
            yield f"<li>{_text(note)}{f' ({count} times)' if count != '1' else ''}</li>"
        yield "</ul>"


def _modules(found: Inspection) -> Iterator[str]:
    rows = collapse(
        (
            module.name,
            (
                module.format,
                module.weights,
                shape_text(module.shape, module.experts),
                *((module.layout or "none",) if found.target is not None else ()),
            ),
        )
        for module in found.modules
    )
    layout = ["layout"] if found.target is not None else []
    yield f"<details><summary>Modules <small>{_count(len(rows), 'kind')}</small></summary>"
    yield from _table(["module", "format", "weights", "N x K", *layout, "count"], rows)
    yield "</details>"


def _files(found: Inspection) -> Iterator[str]:
    files = [(file.name, size(file.bytes)) for file in found.shards]
    yield f"<details><summary>Files <small>{_count(len(files), 'file')}</small></summary>"
    yield from _table(["file", "size"], files)
    yield "</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    number = {"count", "size"}
    classes = ["name", *("number" if column in number else "" for column in columns[1:])]
    yield "<div class=scroll><table>"
    yield _cells("th", classes, columns)
    yield from (_cells("td", classes, row) for row in rows[:_MOST])
    yield "</table></div>"
    if len(rows) > _MOST:
        yield f"<p class=quiet>and {len(rows) - _MOST:,} more</p>"


def _cells(tag: str, classes: Sequence[str], row: Sequence[str]) -> str:
    pairs = zip(classes, row, strict=True)
    return f"<tr>{''.join(f'<{tag} class={c!r}>{_text(cell)}</{tag}>' for c, cell in pairs)}</tr>"
