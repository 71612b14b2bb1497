"""With ``--json`` stdout ends in one document, on failure too; exit codes tell failures apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import CHECKPOINTS, EXAMPLE
from support.cli import run

from ctconvert.errors import BadInputError
from ctconvert.records import Failure

OPTIONS = ("-t", "triton", "--device", "cpu")


def failed(code: int, kind: str, *args: object) -> dict[str, Any]:
    """The document of a command line that fails, and is checked to be one record and one line."""
    outcome = run(*args, "--json")
    assert outcome.code == code, outcome
    found: dict[str, Any] = json.loads(outcome.stdout)
    record = msgspec.convert(found, Failure)
    assert (record.ok, record.exit_code, record.error.kind) == (False, code, kind)
    assert outcome.stderr.split("\n")[0].removesuffix(":") == f"error: {record.error.message}"
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    assert run("repack", EXAMPLE, path, *OPTIONS).code == 0
    return path


@pytest.mark.parametrize(
    "args",
    [
        ["bogus"],
        ["repack"],
        ["repack", "x"],
        ["verify", "a", "b"],
        ["verify", "a", "--workers", "two"],
        ["layouts", "--bogus"],
        ["layouts", "--target", "tpu"],
        ["inspect", "/no/such/place"],
        ["bench", "x", "--m", "many"],
    ],
    ids=" ".join,
)
def test_bad_usage(args: list[str]) -> None:
    found = failed(2, "Usage", *args)
    assert found["refusals"] == [] and found["error"].keys() == {"kind", "message"}


def test_a_damaged_source_names_the_file(tmp_path: Path) -> None:
    model = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    (model / "model.safetensors").write_bytes(b"short")
    found = failed(2, "BadInput", "inspect", model)
    assert found["error"]["file"] == str(model / "model.safetensors")


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_refusals_are_records(more: tuple[str, ...]) -> None:
    found = failed(3, "Unsupported", "repack", CHECKPOINTS / "rand-w3a16-g128-sym", *OPTIONS, *more)
    assert [r["module"].rpartition(".")[2] for r in found["refusals"]] == ["k_proj", "v_proj"]
    assert "\n" not in found["error"]["message"]
    assert ("disk_bytes" in found) is bool(more)  # what the plan says all the same


def test_no_manifest_is_not_damage(out: Path, tmp_path: Path) -> None:
    for args in (["verify"], ["bench"]):
        failed(2, "NoManifest", *args, EXAMPLE)
    failed(2, "NoManifest", "restore", EXAMPLE, tmp_path / "back")
    manifest = out / "ctconvert.json"
    whole = manifest.read_bytes()
    for damaged in (b"", whole[:-100], whole.replace(b"triton", b"Triton", 1)):
        manifest.write_bytes(damaged)
        found = failed(1, "Verification", "verify", out)
        assert found["error"]["file"] == str(manifest)


def test_a_damaged_tensor_names_its_file_and_its_module(out: Path) -> None:
    shard = out / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert failed(1, "Verification", "verify", out)["error"]["file"] == str(shard)


def test_a_source_of_other_codes_names_the_module(out: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(EXAMPLE, tmp_path / "model"))
    data = bytearray((model / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("up_proj.weight_packed"))
    data[8 + length + header[name]["data_offsets"][0]] ^= 1
    (model / "model.safetensors").write_bytes(data)
    found = failed(1, "Verification", "verify", out, "--against", model)
    assert found["error"]["module"] == name.rpartition(".")[0]


def test_a_success_says_so(out: Path) -> None:
    for args in (["inspect", EXAMPLE], ["layouts"], ["verify", out]):
        found = json.loads(run(*args, "--json").stdout)
        assert next(iter(found.items())) == ("ok", True)


def test_a_mistake_of_this_program_ends_in_a_document_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: object, **options: object) -> None:
        raise KeyError("mistake")

    monkeypatch.setattr("ctconvert.api.inspect", wrong)
    from ctconvert import cli

    with pytest.raises(KeyError, match="mistake"):
        cli.run(["inspect", "x", "--json"])
    found = msgspec.json.decode(capsys.readouterr().out, type=Failure)
    assert (found.exit_code, found.error.kind) == (1, "Internal")


def test_a_name_of_two_lines_is_one_line_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: object, **options: object) -> None:
        raise BadInputError("module a\nb: wrong", module="a\nb", refusals=[])

    monkeypatch.setattr("ctconvert.api.inspect", refuses)
    code, stdout, stderr = run("inspect", "x", "--json")
    assert (code, stderr) == (2, "error: module a\\nb: wrong\n")
    assert json.loads(stdout)["error"]["message"] == "module a\nb: wrong"
