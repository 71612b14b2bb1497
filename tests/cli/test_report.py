"""``inspect --html`` and ``--plot``: what is drawn, and that no name is markup."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, EXAMPLE
from msgspec.structs import replace
from support.cli import run

import ctconvert
from ctconvert.cli.report.grid import REFUSED, Stack, grid_of
from ctconvert.cli.report.page import page
from ctconvert.planning.inspection import InspectedModule, Inspection, OtherTensor

LAYERS, EXPERTS = 200, 384
EVIL = "</span><script>alert('1')</script>&amp;\"' onload=x \x1b[31m"


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def titles(self) -> list[str]:
        return [str(attributes["title"]) for _, attributes in self.tags if "title" in attributes]


def module(name: str, weights: str = "int4 sym g32", **more: Any) -> InspectedModule:
    more = {"layout": "marlin", "becomes_bytes": 9} | more
    return InspectedModule(
        name=name,
        format="pack-quantized",
        weights=weights,
        bytes=10,
        tensors={},
        shape=(32, 64),
        **more,
    )


def inspected(modules: Iterator[InspectedModule] | list[InspectedModule]) -> Inspection:
    listed = list(modules)
    quantised = sum(one.bytes for one in listed)
    return Inspection(
        model="org/model",
        revision=None,
        architectures=["X"],
        format="pack-quantized",
        compressed_tensors_version=None,
        shards=[],
        bytes=quantised + 80,
        quantised_bytes=quantised,
        tensors=0,
        unquantised_tensors=2,
        modules=listed,
        others=[
            OtherTensor("model.embed_tokens.weight", "BF16", (4, 8), 64),
            OtherTensor("model.norm.weight", "BF16", (8,), 16),
        ],
        target="cuda",
        oddities=[],
    )


def experts() -> Iterator[InspectedModule]:
    """The last layer first, as shards may lie; one expert of layer 150 has no layout."""
    for layer in reversed(range(LAYERS)):
        if layer < 3:
            yield module(f"model.layers.{layer}.mlp.up_proj", "int8 sym channel")
            continue
        for expert in range(EXPERTS):
            refused = {"layout": None, "becomes_bytes": None, "refused": "odd"}
            more = refused if (layer, expert) == (150, 7) else {}
            yield module(f"model.layers.{layer}.mlp.experts.{expert}.up_proj", **more)


def test_layers_are_in_order_and_experts_are_folded() -> None:
    grid = grid_of(inspected(experts()))
    stack, outside = grid.stacks
    assert (stack.name, stack.layers) == ("model.layers", tuple(range(LAYERS)))
    assert isinstance(outside, Stack) and [row.name for row in outside.rows] == [
        "model.embed_tokens"
    ]
    folded, dense = stack.rows
    assert (folded.name, dense.name) == ("mlp.experts.*.up_proj", "mlp.up_proj")
    assert folded.modules == (LAYERS - 3) * EXPERTS
    assert [(run.count, run.label) for run in folded.before] == [(3, None), (197, "int4 sym g32")]
    assert [(run.count, run.label) for run in folded.after] == [
        *((3, None), (147, "marlin"), (1, REFUSED), (49, "marlin")),
    ]
    assert folded.after[2].title.startswith("layer 150: marlin + no layout, 384 x 32x64, ")
    assert (folded.before_bytes, folded.after_bytes) == (756480, 9 * 75648 + 1)
    assert [(run.count, run.label) for run in dense.before] == [
        (3, "int8 sym channel"),
        (197, None),
    ]
    assert len(set(grid.colours.values())) == len(grid.colours) == 5


def test_a_page_of_many_experts_is_small() -> None:
    found = inspected(experts())
    began = time.process_time()
    text = page(found)
    assert len(text) < 20_000 and time.process_time() - began < 20
    assert "756.48 kB" in text and "odd" in text


def test_names_are_no_markup() -> None:
    """Neither in the page's texts nor in its attributes."""
    shown = EVIL.replace("\x1b", "\\x1b")
    found = inspected([module(f"model.layers.{i}.{EVIL}", EVIL, layout=EVIL) for i in range(2)])
    refused = module(EVIL, EVIL, layout=None, refused=EVIL)
    found = replace(found, model=EVIL, architectures=[EVIL], oddities=[EVIL], format=EVIL)
    found = replace(found, modules=[*found.modules, refused], target=EVIL)
    clean = Page(page(replace(found, modules=[], oddities=[], target="cuda")))
    read = Page(page(found))
    assert {tag for tag, _ in read.tags} - {tag for tag, _ in clean.tags} <= {"td"}
    assert not any("onload" in attributes for _, attributes in read.tags)
    assert read.texts.count(shown) >= 4  # the title, a row, a note, a refusal
    assert any(shown in title for title in read.titles)
    assert "\x1b" not in page(found)


def test_a_page_needs_nothing_else() -> None:
    text = page(ctconvert.inspect(EXAMPLE, target="triton"))
    assert not {tag for tag, _ in Page(text).tags} & {"script", "link", "img", "iframe", "object"}
    assert "url(" not in text and "@import" not in text and "http:" not in text
    assert "default-src 'none'" in text


def test_before_and_after(tmp_path: Path) -> None:
    """A converted checkpoint tells what it was, as its source tells what it becomes."""
    assert run("repack", EXAMPLE, tmp_path / "out", "-t", "triton", "--device", "cpu").code == 0
    source, made = ctconvert.inspect(EXAMPLE, target="triton"), ctconvert.inspect(tmp_path / "out")
    assert made.converted and not source.converted and made.target == "triton"
    assert made.bytes != source.bytes  # no module keeps its weight_shape
    assert [m.name for m in made.modules] == [m.name for m in source.modules]
    for before, after in zip(source.modules, made.modules, strict=True):
        assert (after.was, after.was_bytes) == ((before.name,), before.bytes)
        assert (after.bytes, after.layout) == (before.becomes_bytes, before.layout)
    first, second = grid_of(source), grid_of(made)
    assert first == second
    assert "4.95 MB" in run("inspect", tmp_path / "out").stdout
    assert "kernel-ready for triton" in run("inspect", tmp_path / "out").stdout
    code, _, err = run("inspect", tmp_path / "out", "--target", "cuda")
    assert code == 2 and "kernel-ready already" in err


def test_joined_and_kept_modules(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ctconvert.repack(EXAMPLE, out, target="triton", fuse=True, device="cpu")
    joined = {module.name: module for module in ctconvert.inspect(out).modules}
    qkv = joined["model.layers.0.self_attn.qkv_proj"]
    assert [name.rpartition(".")[2] for name in qkv.was] == ["q_proj", "k_proj", "v_proj"]
    source = {module.name: module.bytes for module in ctconvert.inspect(EXAMPLE).modules}
    assert qkv.was_bytes == sum(source[name] for name in qkv.was)
    kept = CHECKPOINTS / "rand-w3a16-g128-sym"
    ctconvert.repack(kept, tmp_path / "k", target="triton", keep_unsupported=True, device="cpu")
    before, after = ctconvert.inspect(kept), ctconvert.inspect(tmp_path / "k")
    assert {m.name: m.bytes for m in after.modules} == {m.name: m.bytes for m in before.modules}
    assert all(module.refused and module.layout is None for module in after.modules)
    assert {tensor.name for tensor in after.others} == {tensor.name for tensor in before.others}
    assert after.bytes == before.bytes
    assert REFUSED in grid_of(after).colours


# --- the command line ----------------------------------------------------------------------------


def test_both_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    html, png = tmp_path / "r.html", tmp_path / "p.PNG"
    code, out, err = run("inspect", EXAMPLE, "-t", "triton", "--html", html, "--plot", png)
    assert (code, err) == (0, "") and out == run("inspect", EXAMPLE, "-t", "triton").stdout
    assert "mlp.down_proj" in html.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_odd_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from ctconvert.cli.report.picture import draw

    names = ["$\\frac{$", "模型" * 40, EVIL, "_x", "a" * 900]
    found = inspected([module(f"m.{n}.{name}") for n, name in enumerate(names)])
    draw(replace(found, model="$x_" * 99, oddities=names), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--html", "r.txt", "write a .html, .htm file"),
        ("--html", "folder.html", "a directory"),
        ("--html", "missing/r.html", "No such file or directory"),
        ("--plot", "r.jpg", "write a .png, .svg, .pdf file"),
    ],
)
def test_a_file_that_cannot_be_written(
    option: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctconvert.api.inspect", lambda *_, **__: pytest.fail("read"))
    (tmp_path / "folder.html").mkdir()
    code, out, err = run("inspect", EXAMPLE, option, tmp_path / name)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: {option} {tmp_path / name}: ") and message in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]


def test_a_picture_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("inspect", EXAMPLE, "--plot", tmp_path / "p.png")
    assert (code, out) == (2, "")
    assert err == "error: --plot needs matplotlib: pip install 'ctconvert[plot]'\n"
