"""``--json-events`` and the schemas: what programs are told while a run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import CHECKPOINTS, EXAMPLE
from support.cli import program, run

from ctconvert.cli.schema import NAMES, schema_of
from ctconvert.records.events import Event

OPTIONS = ("-t", "cuda", "--device", "cpu")


def events(text: str) -> list[dict[str, Any]]:
    """The lines, each checked to be one of the records."""
    for line in text.splitlines():
        msgspec.json.decode(line, type=Event)
    return [json.loads(line) for line in text.splitlines()]


def of(kind: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in found if event["event"] == kind]


def test_a_conversion_and_the_way_back(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "events.jsonl"
    code, stdout, _ = run("repack", EXAMPLE, out, *OPTIONS, "--fuse", "--json-events", file)
    found = events(file.read_text())
    assert code == 0 and "8 x marlin" in stdout  # people are told as ever
    assert found[0]["event"] == "plan" and found[0]["layouts"] == {"marlin": 8}
    assert found[-1] == of("result", found)[0] and found[-1]["document"]["ok"] is True
    modules = [event["module"] for event in of("module", found)]
    assert len(set(modules)) == len(modules) == found[0]["modules"] == 8
    assert {event["layout"] for event in of("module", found)} == {"marlin"}
    assert [event["message"][:15] for event in of("warning", found)] == ["tied embeddings"]
    phases = [event["phase"] for event in of("progress", found) if not event["done"]]
    assert phases == ["converting", "verifying"]
    last = of("progress", found)[-1]
    assert last["done"] == last["total"] > 0
    run("restore", out, tmp_path / "back", "--device", "cpu", "--json-events", file)
    found = events(file.read_text())
    (plan,) = of("plan", found)
    assert len(of("module", found)) == plan["modules"] == 14


def test_stdout_holds_nothing_else(tmp_path: Path) -> None:
    source = CHECKPOINTS / "rand-w3a16-g128-sym"
    more = ("--keep-unsupported", "--json-events", "-")
    code, stdout, _ = run("repack", source, tmp_path / "out", *OPTIONS, *more)
    assert code == 0
    assert any(
        event["message"].startswith("kept unchanged: ") for event in of("warning", events(stdout))
    )
    for verb in (["verify", tmp_path / "out"], ["doctor", source], ["diff", source, source]):
        code, stdout, _ = run(*verb, "--json-events", "-")
        assert code == 0 and of("result", events(stdout))[0]["document"]["ok"] is True
    code, stdout, _ = run("repack", EXAMPLE, *OPTIONS, "--dry-run", "--json-events", "-")
    assert [event["event"] for event in events(stdout)] == ["plan", "warning", "result"]


@pytest.mark.parametrize("args", [["repack"], ["verify", "/no/such"], ["verify", "a", "--bogus"]])
def test_failures_are_results_too(args: list[str]) -> None:
    code, stdout, stderr = run(*args, "--json-events", "-")
    (event,) = events(stdout)
    assert code == 2 == event["document"]["exit_code"] and stderr.count("\n") == 1
    assert event["document"]["error"]["kind"] == "Usage"


def test_both_on_stdout_are_refused(tmp_path: Path) -> None:
    code, stdout, stderr = run("doctor", EXAMPLE, "--json", "--json-events", "-")
    assert code == 2 and json.loads(stdout)["error"]["kind"] == "Usage" and "name a file" in stderr
    file = tmp_path / "events"
    code, stdout, _ = run("doctor", EXAMPLE, "--json", "--json-events", file)
    document = json.loads(stdout)
    assert events(file.read_text())[-1]["document"] == document and document["ok"] is True


@pytest.mark.parametrize("path", ["/no/such/place/events", "/dev/full"])
def test_events_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    found = program("doctor", EXAMPLE, "--json", "--json-events", path)
    document = json.loads(found.stdout)
    assert found.returncode == 1 and document["error"]["kind"] == "System"
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1


# --- schemas -------------------------------------------------------------------------------------


def names_in(schema: dict[str, Any]) -> set[str]:
    """The properties of a document, resolved: of every alternative."""
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        one = waiting.pop()
        if "$ref" in one:
            waiting.append(schema["$defs"][one["$ref"].rpartition("/")[2]])
        found |= one.get("properties", {}).keys()
        for key in ("allOf", "oneOf", "anyOf"):
            waiting += one.get(key, [])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_schema_is_shown(name: str) -> None:
    code, stdout, stderr = run("schema", name)
    assert (code, stderr) == (0, "")
    assert json.loads(stdout) == json.loads(json.dumps(schema_of(name)))


def test_schemas_name_what_is_printed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs = {
        "inspect": ["inspect", EXAMPLE],
        "doctor": ["doctor", EXAMPLE, "--no-data"],
        "dry-run": ["repack", EXAMPLE, *OPTIONS, "--dry-run"],
        "repack": ["repack", EXAMPLE, out, *OPTIONS],
        "verify": ["verify", out],
        "diff": ["diff", EXAMPLE, out],
        "restore": ["restore", out, tmp_path / "back", "--device", "cpu"],
        "layouts": ["layouts"],
        "failure": ["verify", EXAMPLE],
    }
    for name, args in runs.items():
        printed = json.loads(run(*args, "--json").stdout)
        assert printed.keys() <= names_in(schema_of(name)), name


def test_no_such_schema() -> None:
    code, stdout, stderr = run("schema", "bogus")
    assert (code, stdout) == (2, "") and "dry-run" in stderr
