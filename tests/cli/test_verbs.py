"""What each verb prints for people and for programs, and that the README tells the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, EXAMPLE, ROOT
from readme import README, WRITTEN, commands, written
from support.cli import program, run

import ctconvert
from ctconvert import api, records
from ctconvert.layouts import LAYOUTS, MACHINES, QUANTISED_ACTIVATIONS, TARGETS
from ctconvert.planning.outline import outline
from ctconvert.records import to_json

VERBS = ("inspect", "doctor", "repack", "verify", "diff", "restore", "bench", "layouts", "schema")
OPTIONS = ("-t", "triton", "--device", "cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    assert run("repack", EXAMPLE, out, *OPTIONS).code == 0
    return out


def test_help_names_every_verb_and_exit_code() -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    for word in (*VERBS, "129", "130", "143"):
        assert word in out
    assert "..." not in out.split("Commands:")[1]  # each verb's line is whole


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str) -> None:
    code, out, err = run(verb, "--help")
    assert (code, err) == (0, "")
    assert all(line == line.rstrip() for line in out.splitlines())
    if verb in ("inspect", "repack"):
        assert "org/name[@revision]" in out


def test_help_names_every_target() -> None:
    told = "".join(run("repack", "-h").stdout.split())  # where lines break, there too
    assert f"runon:{','.join(TARGETS)}." in told


def test_no_arguments_show_the_help_and_fail() -> None:
    assert run() == (2, run("--help").stdout, "")


def test_version() -> None:
    assert run("--version") == (0, f"ctconvert {ctconvert.__version__}\n", "")


def test_the_module_and_the_program_are_the_same() -> None:
    found = program("layouts", "--json")
    assert (found.returncode, found.stdout, found.stderr) == run("layouts", "--json")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["bogus"], "No such command 'bogus'; see ctconvert --help"),
        (["repack", "x"], "--target"),
        (["repack"], "MODEL"),
        (["verify", "a", "b"], "(b); see ctconvert verify --help"),
        (["verify", "a", "--workers", "two"], "--workers"),
        (["verify", "a", "--bogus"], "--bogus"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(args: list[str], says: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_inspect_as_json() -> None:
    code, out, err = run("inspect", EXAMPLE, "--target", "triton", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert len(found["modules"]) == 14
    module = found["modules"][0]
    assert (module["scheme"], module["layout"]) == ("wna16", "triton-wna16")
    assert found["shards"] == [{"name": "model.safetensors", "bytes": 4950920}]


def test_inspect_says_why_not() -> None:
    code, out, _ = run("inspect", CHECKPOINTS / "rand-w3a16-g128-sym", "--target", "triton")
    assert code == 0
    assert "3-bit codes" in out


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    code, out, err = run("repack", EXAMPLE, tmp_path / "out", "-t", "triton", "--dry-run")
    assert (code, err) == (0, "")
    assert "disk needed" in out and "peak memory" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_as_json(tmp_path: Path) -> None:
    code, out, err = run("repack", EXAMPLE, tmp_path, "-t", "triton", "--dry-run", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == {
        *("ok", "target", "modules", "copied", "kept", "refused", "shards", "side_files", "notes"),
        *("source_bytes", "output_bytes", "disk_bytes", "peak_memory_bytes", "download_bytes"),
    }
    assert found["shards"][0]["name"] == "model.safetensors"
    assert found["shards"][0]["bytes"] == found["output_bytes"] > 4_000_000
    assert found["disk_bytes"] > found["output_bytes"]
    assert found["side_files"] and found["peak_memory_bytes"] > 0
    module = found["modules"][0]
    assert module["source"] == [module["name"]] and module["shape"] == [576, 1536]
    assert module["tensors"][f"{module['name']}.qweight"] == {"dtype": "I32", "shape": [1536, 72]}


def test_a_dry_run_counts_the_workers(tmp_path: Path) -> None:
    found = {}
    for workers in (2, 8):
        given = ("-t", "triton", "--dry-run", "--json", "--workers", workers)
        found[workers] = json.loads(run("repack", EXAMPLE, tmp_path, *given)[1])
    more = found[8]["peak_memory_bytes"] - found[2]["peak_memory_bytes"]
    assert more == 6 * (192 << 20)


def test_an_outline_is_no_longer_than_the_lists_of_tensors() -> None:
    """Fused or not: every module, source and tensor is in it once or twice, nothing more often."""
    for fuse in (False, True):
        plan = api.plan(EXAMPLE, target="triton", fuse=fuse)
        found = to_json(outline(plan, 2))
        for module in plan.modules:
            for entry in module.outputs:
                assert found.count(f'"{entry.name}"'.encode()) == 2
            for source in module.sources:
                assert found.count(f'"{source.name}"'.encode()) <= 2


def test_a_refused_plan_is_shown_and_fails() -> None:
    code, out, err = run(
        "repack", CHECKPOINTS / "rand-w3a16-g128-sym", "-t", "triton", "--dry-run", "--json"
    )
    assert code == 3 and err.startswith("error: target triton has no layout for ")
    refused = json.loads(out)["refused"]
    assert len(refused) == len(err.splitlines()) - 1
    assert all("3-bit" in refusal["reason"] for refusal in refused)


def test_results_go_to_stdout_and_progress_to_stderr(tmp_path: Path) -> None:
    code, out, err = run("repack", EXAMPLE, tmp_path / "out", *OPTIONS)
    assert code == 0
    assert "14 x triton-wna16" in out
    assert "verified" in out
    assert "converting: 4.95 MB" in err
    code, out, err = run("restore", tmp_path / "out", tmp_path / "back", "--device", "cpu")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'back'}: 14 modules restored, 6 tensors copied")
    assert "restoring: 4.95 MB" in err


def test_repack_and_restore_as_json(tmp_path: Path) -> None:
    code, out, err = run("repack", EXAMPLE, tmp_path / "out", *OPTIONS, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["layouts"] == {"triton-wna16": 14}
    code, out, err = run(
        "restore", tmp_path / "out", tmp_path / "back", "--device", "cpu", "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["modules"] == 14


def test_verify(converted: Path) -> None:
    code, out, err = run("verify", converted, "--against", EXAMPLE, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["ok"] is True and found["against"]["modules"] == 14
    assert "kernels" not in found
    code, out, _ = run("verify", converted, "--against", EXAMPLE)
    assert code == 0
    assert out.splitlines()[0].startswith(f"{converted}: ok, 34 tensors and 4 files, ")
    assert f"hold the codes and scales of {EXAMPLE} bit for bit" in out.splitlines()[1]


def test_independent_needs_a_source(converted: Path) -> None:
    code, out, err = run("verify", converted, "--independent")
    assert (code, out) == (2, "")
    assert err == "error: --independent compares with a source; name it by --against MODEL\n"


def test_no_kernel_to_run_is_said(tmp_path: Path) -> None:
    """Nothing converted is not the same as every kernel right."""
    source, out_dir = CHECKPOINTS / "rand-w3a16-g128-sym", tmp_path / "out"
    assert run("repack", source, out_dir, "--keep-unsupported", *OPTIONS).code == 0
    line = f"{out_dir}: holds no converted module, so there is no kernel to run\n"
    code, out, _ = run("verify", out_dir, "--kernels", "--device", "cpu")
    assert (code, line in out) == (0, True)
    assert line not in run("verify", out_dir).stdout
    found = json.loads(run("verify", out_dir, "--kernels", "--device", "cpu", "--json").stdout)
    assert found["kernels"] == {}


def test_out_defaults_to_a_sibling(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.symlink_to(EXAMPLE)
    assert run("repack", tmp_path / "model" / ".", "-t", "triton", "--dry-run").code == 0
    assert api.default_out(EXAMPLE, "cuda") == EXAMPLE.with_name("smollm2-w4a16-g64-cuda")
    assert api.default_out("org/name@v1", "xpu") == Path("name-xpu")


def test_layouts_lists_the_registry() -> None:
    code, out, _ = run("layouts", "--json")
    found = json.loads(out)
    assert code == 0
    assert [row["name"] for row in found["layouts"]] == [item.name for item in LAYOUTS]
    assert found["targets"] == {name: list(order) for name, order in TARGETS.items()}
    assert all(layout.name in run("layouts").stdout for layout in LAYOUTS)
    assert TARGETS.keys() == MACHINES.keys() > QUANTISED_ACTIVATIONS.keys()
    for target, names in QUANTISED_ACTIVATIONS.items():
        assert set(names) <= set(TARGETS[target])


@pytest.mark.parametrize("target", TARGETS)
def test_layouts_of_a_target_are_in_its_order(target: str) -> None:
    found = json.loads(run("layouts", "--target", target, "--json").stdout)
    assert tuple(row["name"] for row in found["layouts"]) == TARGETS[target]
    lines = run("layouts", "-t", target).stdout.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [
        [str(place), name] for place, name in enumerate(TARGETS[target], 1)
    ]
    only = {line.split()[1] for line in lines if "only with quantised activations" in line}
    assert only == set(QUANTISED_ACTIVATIONS.get(target, ()))


def test_layouts_of_no_target() -> None:
    code, out, err = run("layouts", "--target", "tpu")
    assert (code, out) == (2, "") and "'tpu'" in err and "cuda-sm90" in err


def test_the_schema_is_the_one_in_the_package() -> None:
    code, out, err = run("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(records.schema()))
    kept = (ROOT / "ctconvert" / "manifest.schema.json").read_text()
    indented = re.compile(r"\\n +")  # older releases of msgspec leave docstrings as they are
    assert indented.sub(r"\\n", kept) == indented.sub(r"\\n", out), (
        "ctconvert schema > ctconvert/manifest.schema.json"
    )


def test_the_pages_hold_the_layouts_and_the_commands() -> None:
    for page in WRITTEN:
        assert written(page) == page.read_text(), "python tests/readme.py write"
    assert set(commands()) == {"run", "test"}
    assert "pytest" in commands()["test"]
    assert "ctconvert repack examples/" in commands()["run"]
    assert all("\n" not in command for command in commands().values())
    for verb in VERBS:
        assert f"`{verb}" in README.read_text()
