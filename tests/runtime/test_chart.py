"""``bench --plot``: the roofline chart, and how it fails."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from support.cli import run
from support.conversion import converted

from ctconvert.runtime import benchmark, chart
from ctconvert.runtime.benchmark import BenchReport, BenchRow


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib can be imported, and nothing may be timed."""
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())
    monkeypatch.setattr(benchmark, "bench", lambda *_: pytest.fail("timed"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("r.foo", "write a .png, .svg, .pdf file"),
        ("r", "write a .png, .svg, .pdf file"),
        ("folder", "a directory"),
        ("folder.png", "a directory"),
        ("missing/r.png", "No such file or directory"),
        ("file/r.png", "Not a directory"),
        ("x" * 300 + ".png", "File name too long"),
    ],
)
def test_a_chart_that_cannot_be_written(
    name: str, message: str, tmp_path: Path, drawn: None
) -> None:
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    before = set(tmp_path.rglob("*"))
    code, text, err = run("bench", tmp_path, "--plot", tmp_path / name)
    assert (code, text) == (2, "")
    assert err.startswith(f"error: --plot {tmp_path / name}: ")
    assert message in err
    assert err.count("\n") == 1
    assert set(tmp_path.rglob("*")) == before


def test_a_chart_needs_matplotlib(
    tmp_path: Path, drawn: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("bench", tmp_path, "--plot", tmp_path / "r.png")
    assert code == 2
    assert err == "error: --plot needs matplotlib: pip install 'ctconvert[plot]'\n"


def test_the_check_of_a_chart_leaves_no_trace(tmp_path: Path, drawn: None) -> None:
    new, old, link = tmp_path / "new.PNG", tmp_path / "old.svg", tmp_path / "link.pdf"
    old.write_bytes(b"kept")
    link.symlink_to(old)
    for path in (new, old, link):
        chart.check_plot(path)
    assert not new.exists()
    assert link.is_symlink()
    assert old.read_bytes() == b"kept"


def row(layout: str, product: str | None, limit: float | None) -> BenchRow:
    numbers = (None, None) if product is None else (5e13, 90.0)
    return BenchRow(
        layout, "int4", "m", 8, 8, 1, 1.0, 1.0, *numbers, product, limit, 1.0, dense_seconds=None
    )


@pytest.mark.parametrize("suffix", chart.CHARTS)
def test_a_chart_has_a_roof_for_each_type(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = BenchReport(
        "d",
        1e12,
        {"bf16": 1e14},
        [
            row("triton-wna16", "bf16", 1e14),
            row("scaled-mm", "int8", 3e14),
            row("cutlass-sparse24", "int8 2:4", 6e14),
            row("scaled-mm", "fp8", None),
            row("gather", None, None),
        ],
    )
    path = tmp_path / f"r{suffix}"
    chart.plot(report, path)
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        text = path.read_text()  # the labels stand in comments
        for label in ("bf16 limit, 100.00", "int8 limit, 300.00", "int8 2:4 limit, 600.00"):
            assert label in text
        assert "scaled-mm" in text
        assert "gather" not in text
    chart.plot(replace(report, rows=report.rows[-1:]), path)  # embeddings alone


@pytest.mark.parametrize("as_json", [False, True])
def test_the_table_is_printed_before_the_chart_is_drawn(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "r.png")

    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1e9, 4e9))
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace())
    monkeypatch.setattr(chart, "plot", full)
    args = ["--device", "cpu", "--m", "1", "--plot", tmp_path / "r.png", "--json"]
    code, text, err = run(
        "bench", converted("smol-w4a16-g64-sym", "triton", tmp_path), *args[: 6 + as_json]
    )
    assert (code, err) == (1, "error: r.png: No space left on device\n")
    assert "triton-wna16" in text


def test_bench_draws_a_roofline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "ceilings", lambda device: (1e9, 4e9))
    out = converted("smol-w4a16-g64-sym", "triton", tmp_path)
    assert run("bench", out, "--device", "cpu", "--m", "1", "--plot", tmp_path / "r.png")[0] == 0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
