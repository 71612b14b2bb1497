"""The command line: what it prints where, its exit codes, and that the README tells the same."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, EXAMPLE
from readme import README, commands, layouts_table
from typer.testing import CliRunner

import ctconvert
from ctconvert.cli import app, parse_layouts, parse_size
from ctconvert.console import collapse
from ctconvert.errors import UsageError
from ctconvert.layouts import LAYOUTS

VERBS = ("inspect", "repack", "verify", "restore", "layouts")


def run(*args: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.stdout, result.stderr


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        begin = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "ctconvert", "--help"], check=True, capture_output=True
        )
        times.append(time.monotonic() - begin)
    assert min(times) < 0.5, times


def test_help_names_every_verb_and_exit_code() -> None:
    code, out, _ = run("--help")
    assert code == 0
    for word in (*VERBS, "130"):
        assert word in out


def test_version() -> None:
    assert run("--version") == (0, f"ctconvert {ctconvert.__version__}\n", "")


def test_inspect_as_json() -> None:
    code, out, _ = run("inspect", EXAMPLE, "--target", "triton", "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["modules"]) == 14
    module = found["modules"][0]
    assert (module["scheme"], module["layout"]) == ("wna16", "triton-wna16")


def test_inspect_says_why_not() -> None:
    code, out, _ = run("inspect", CHECKPOINTS / "rand-w3a16-g128-sym", "--target", "triton")
    assert code == 0
    assert "3-bit codes" in out


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    code, out, _ = run("repack", EXAMPLE, tmp_path / "out", "-t", "triton", "--dry-run")
    assert code == 0
    assert "disk needed" in out
    assert not list(tmp_path.iterdir())
    code, out, _ = run("repack", EXAMPLE, tmp_path / "out", "-t", "triton", "--dry-run", "--json")
    found = json.loads(out)
    assert found["shards"][0]["name"] == "model.safetensors"
    assert found["output_bytes"] > 4_000_000
    assert found["peak_memory_bytes"] > 0
    assert not list(tmp_path.iterdir())


def test_repack_and_verify_as_json(tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    code, out, err = run("repack", EXAMPLE, out_dir, "-t", "triton", "--json", "--device", "cpu")
    assert (code, err) == (0, "")
    assert json.loads(out)["layouts"] == {"triton-wna16": 14}
    code, out, err = run("verify", out_dir, "--against", EXAMPLE, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["ok"] is True


def test_no_kernel_to_run_is_said(tmp_path: Path) -> None:
    """Nothing converted is not the same as every kernel right."""
    source, out_dir = CHECKPOINTS / "rand-w3a16-g128-sym", tmp_path / "out"
    options = ("--keep-unsupported", "--device", "cpu", "-t", "triton")
    assert run("repack", source, out_dir, *options)[0] == 0
    line = f"{out_dir}: holds no converted module, so there is no kernel to run\n"
    code, out, _ = run("verify", out_dir, "--kernels", "--device", "cpu")
    assert (code, line in out) == (0, True)
    assert line not in run("verify", out_dir)[1]
    found = json.loads(run("verify", out_dir, "--kernels", "--device", "cpu", "--json")[1])
    assert found["kernels"] == {}


def test_results_go_to_stdout_and_progress_to_stderr(tmp_path: Path) -> None:
    code, out, err = run("repack", EXAMPLE, tmp_path / "out", "-t", "triton", "--device", "cpu")
    assert code == 0
    assert "14 x triton-wna16" in out
    assert "verified" in out
    assert "converting: 4.95 MB" in err


def test_out_defaults_to_a_sibling(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.symlink_to(EXAMPLE)
    assert run("repack", tmp_path / "model" / ".", "-t", "triton", "--dry-run")[0] == 0
    from ctconvert.api import default_out

    assert default_out(EXAMPLE, "cuda") == EXAMPLE.with_name("smollm2-w4a16-g64-cuda")
    assert default_out("org/name@v1", "xpu") == Path("name-xpu")


def test_layouts_lists_the_registry() -> None:
    code, out, _ = run("layouts", "--json")
    assert code == 0
    assert [row["name"] for row in json.loads(out)["layouts"]] == [item.name for item in LAYOUTS]
    assert all(layout.name in run("layouts")[1] for layout in LAYOUTS)


def test_the_readme_holds_the_layouts_and_the_commands() -> None:
    text = README.read_text()
    assert layouts_table() in text
    assert set(commands()) == {"run", "test"}
    assert "pytest" in commands()["test"]
    assert "ctconvert repack examples/" in commands()["run"]
    assert all("\n" not in command for command in commands().values())
    for verb in VERBS:
        assert f"`{verb}" in text


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5_000_000_000), ("500MB", 500_000_000), ("2GiB", 2 << 30), ("7", 7), ("1.5kb", 1500)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "5iB", "-1GB", "0", "5 apples"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"size|shard"):
        parse_size(text)


def test_layout_options_keep_their_order() -> None:
    texts = ["re:a=b$=marlin", "*.q=triton-wna16"]
    assert list(parse_layouts(texts).items()) == [("re:a=b$", "marlin"), ("*.q", "triton-wna16")]
    with pytest.raises(UsageError, match="PATTERN=LAYOUT"):
        parse_layouts(["marlin"])


def test_rows_fold_over_layer_numbers() -> None:
    rows = [(f"layers.{i}.experts.{j}.up", ("x",)) for i in (0, 1, 2) for j in (3, 5)]
    assert collapse([*rows, ("layers.0.q", ("y",))]) == [
        ("layers.{0-2}.experts.{3,5}.up", "x", "6"),
        ("layers.0.q", "y", "1"),
    ]
