"""What a person at a shell expects: help, completion, logs, hints, lists in order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer.main
from conftest import CHECKPOINTS, EXAMPLE
from support.cli import program, run
from support.models import write_model

import ctconvert
from ctconvert.cli import app
from ctconvert.layouts import TARGETS
from ctconvert.names import natural, nearest_directory

GROUP: dict[str, object] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


# --- help ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", GROUP)
def test_no_bracket_of_a_help_is_lost(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    code, shown, err = run(verb, "--help")
    assert (code, err) == (0, "")
    words = " ".join(shown.split())
    for parameter in GROUP[verb].params:  # type: ignore[attr-defined]
        if text := getattr(parameter, "help", None):
            assert "".join(text.split()) in words.replace(" ", "")  # a line may end at a hyphen
    for line in shown.splitlines():
        assert line == line.rstrip() and len(line) <= 100
    if "MODEL" in shown and verb != "verify":
        assert "org/name[@revision]" in words
    assert {"--quiet", "--verbose", "--log-file"} <= set(re.findall(r"--[a-z-]+", shown))


# --- completion ----------------------------------------------------------------------------------


def completed(tmp_path: Path, *words: str) -> list[str]:
    """What bash is told for the last of these words."""
    line = {"COMP_WORDS": " ".join(["ctconvert", *words]), "COMP_CWORD": str(len(words))}
    found = program(more={"_CTCONVERT_COMPLETE": "complete_bash", **line}, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout.split()


def test_completion(tmp_path: Path) -> None:
    for name in ("model-a", "model-b", ".hidden"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "model.txt").touch()
    assert completed(tmp_path, "inspect", "mo") == ["model-a/", "model-b/"]
    assert completed(tmp_path, "inspect", "model-a/") == ["model-a/inner/"]
    expected = [name for name in TARGETS if name.startswith("cuda")]
    assert completed(tmp_path, "repack", "x", "--target", "cuda") == expected
    layouts = completed(tmp_path, "repack", "x", "--layout", "*.q_proj=marlin-n")
    assert layouts == ["*.q_proj=marlin-nvfp4", "*.q_proj=marlin-nvfp4-f16"]
    assert completed(tmp_path, "sch") == ["schema"]


def test_a_completion_can_be_shown_and_installed(tmp_path: Path) -> None:
    more = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = program("--show-completion", "bash", more=more)
    assert shown.returncode == 0 and "_CTCONVERT_COMPLETE=complete_bash" in shown.stdout
    installed = program("--install-completion", "bash", more=more)
    assert installed.returncode == 0 and str(tmp_path) in installed.stdout


# --- logging -------------------------------------------------------------------------------------


def test_quiet_verbose_and_a_log(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    args = ("repack", EXAMPLE, out, "-t", "triton", "--device", "cpu", "--overwrite")
    plain, quiet = run(*args), run(*args, "-q")
    assert plain.stderr.startswith("converting: ") and quiet.stderr == ""
    assert quiet.code == 0 and quiet.stdout == plain.stdout
    told = run(*args, "-v", "--log-file", log)
    assert told.stdout == plain.stdout
    module = "model.layers.0.mlp.down_proj: triton-wna16"
    assert f"module {module}\n" in told.stderr
    silent = run(*args, "--json", "--log-file", log)
    assert (silent.code, silent.stderr) == (0, "") and json.loads(silent.stdout)["ok"]
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO) ", ln) for ln in lines)
    assert sum(line.endswith(module) for line in lines) == 2
    assert sum(" repack " in line for line in lines) == 2
    assert run(*args).stderr.count("\n") == plain.stderr.count("\n")  # nothing has stayed


def test_errors_are_shown_and_logged(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = CHECKPOINTS / "rand-w3a16-g128-sym"
    args = ("repack", source, "-t", "triton", "--dry-run", "--quiet", "--log-file", log)
    code, _, err = run(*args)
    assert code == 3 and err.startswith("error: target triton has no layout")
    lines = [line.partition(" ERROR ")[2] for line in log.read_text().splitlines()]
    assert [line for line in lines if line] == err.removeprefix("error: ").splitlines()


@pytest.mark.parametrize("verb", ["layouts", "schema", "inspect"])
def test_a_log_that_cannot_be_written(verb: str, tmp_path: Path) -> None:
    model = [EXAMPLE] if verb == "inspect" else []
    code, out, err = run(verb, *model, "--log-file", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: --log-file {tmp_path}: Is a directory\n"


# --- hints ---------------------------------------------------------------------------------------


def test_what_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for args, hint in (
        (("inspect", EXAMPLE, "-t", "cud"), "; did you mean 'cuda'?"),
        (("layouts", "-t", "tritn"), "; did you mean 'triton'?"),
        (("doctor", EXAMPLE, "-t", "cuda-90", "--no-data"), "; did you mean 'cuda-sm90'?"),
        (("repack", EXAMPLE, "-t", "cuda", "--layout", "*=marln"), "; did you mean 'marlin'?"),
        (("schema", "manifst"), "; did you mean 'manifest'?"),
        (("inspct",), "'inspect'; see ctconvert --help"),
        (("inspect", EXAMPLE, "--targt", "x"), "--target"),
    ):
        code, out, err = run(*args)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert hint in err
    assert "did you mean" not in run("layouts", "-t", "zzz").stderr


def test_the_nearest_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models.txt").touch()
    line = f"; the nearest is {tmp_path / 'models' / 'smollm2'}\n"
    for wrong in ("models/smollm", "modles/smollm2"):
        for verb in ("inspect", "verify"):
            assert run(verb, tmp_path / wrong).stderr.endswith(line)
    assert nearest_directory(tmp_path / "modles" / "q") == f"; the nearest is {tmp_path / 'models'}"
    assert nearest_directory(tmp_path / "qqq") == ""
    assert nearest_directory(Path("/")) == ""
    monkeypatch.chdir(tmp_path)
    assert nearest_directory(Path("modles")) == "; the nearest is models"


# --- order ---------------------------------------------------------------------------------------


def test_natural_order() -> None:
    names = ["m.10.x", "m.9.x", "m.x", "a", "m.010.x", "m.2", "m.2.a"]
    assert sorted(names, key=natural) == ["a", "m.2", "m.2.a", "m.9.x", "m.10.x", "m.010.x", "m.x"]


def test_lists_are_in_natural_order(tmp_path: Path) -> None:
    """Where the file has them as names sort: 0, 1, 10, 11, 2."""
    model = write_model(tmp_path / "model", modules=12)
    expected = [f"model.layers.{index}.mlp.up_proj" for index in range(12)]
    found = [module.name for module in ctconvert.inspect(model).modules]
    file = (model / "model-00001-of-00002.safetensors").read_bytes()
    assert file.index(b"layers.10.") < file.index(b"layers.2.")
    assert found == expected
    dry = run("repack", model, "-t", "triton", "--dry-run", "--json").stdout
    assert [module["name"] for module in json.loads(dry)["modules"]] == expected
    config = json.loads((model / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"]["num_bits"] = 3
    (model / "config.json").write_text(json.dumps(config))
    refused = json.loads(run("repack", model, "-t", "triton", "--dry-run", "--json").stdout)
    assert [one["module"] for one in refused["refusals"]] == expected
