"""Models named by a Hub id, from a Hub that is a small HTTP server on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.hub import Hub, hub_environment

from ctconvert.records import Manifest
from ctconvert.store.local import LocalStore

COMMIT = "0123456789abcdef0123456789abcdef01234567"
V2_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


#: Runs verbs in one process (imports are slow); between two of them it says so to the Hub.
DRIVER = """
import contextlib, io, json, sys, urllib.request
import ctconvert
from ctconvert.errors import CtconvertError
from ctconvert.records import to_json
found = []
for index, (verb, args, options) in enumerate(json.load(sys.stdin)):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            result = json.loads(to_json(getattr(ctconvert, verb)(*args, **options)))
            outcome = [0, result, ""]
        except CtconvertError as error:
            outcome = [error.exit_code, None, str(error)]
    found.append([*outcome, printed.getvalue()])
    if len(sys.argv) > 1:
        urllib.request.urlopen(f"{sys.argv[1]}/mark/{index}").read()
json.dump(found, sys.stdout)
"""
#: A verb, its arguments and its options.
Call = tuple[str, list[str], dict[str, Any]]


@dataclass
class Outcome:
    """How a verb ended, and what the Hub sent for it."""

    code: int
    result: Any
    error: str
    printed: str
    sent: dict[str, int]

    @property
    def made(self) -> Any:
        """The record of a verb that succeeded and printed nothing."""
        assert self.code == 0, self.error
        assert self.printed == ""
        return self.result

    def weight_bytes(self) -> int:
        return sum(count for name, count in self.sent.items() if name.endswith(".safetensors"))

    def fails(self, *says: str) -> None:
        """Bad usage, in one line that says all that, and nothing printed."""
        assert self.code == 2 and self.printed == ""
        assert "\n" not in self.error
        for text in says:
            assert text in self.error


def run(hub: Hub, home: Path, calls: list[Call], **more: str) -> list[Outcome]:
    """Verbs in a process whose Hub is ``hub``."""
    environment = hub_environment(hub, home, **more)
    up = [] if hub.closed else [hub.url]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *up],
        input=json.dumps(calls),
        env=environment,
        capture_output=True,
        text=True,
        cwd=home,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    sent = hub.marks if up else [{} for _ in calls]
    return [
        Outcome(*found, counts) for found, counts in zip(json.loads(done.stdout), sent, strict=True)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 MB of weights in two shards, so that what a range read fetches too much shows."""
    group = group_config(weight_args(4, 128))
    tensors = {name: torch.zeros(3000, 512) for name in ("model.embed_tokens.weight", "norm")}
    for index, (n, k) in enumerate([(1024, 512), (512, 1024)]):
        made = quantised(n, k, group, index)
        tensors |= {f"model.layers.{index}.mlp.up_proj.{key}": value for key, value in made.items()}
    return write_checkpoint(
        tmp_path_factory.mktemp("hub") / "model", tensors, config_of(group), shards=2
    )


TRITON = {"target": "triton"}
ON_CPU = {"target": "triton", "device": "cpu"}
LIVE: dict[str, Call] = {
    "inspect": ("inspect", ["org/name"], {}),
    "inspect for a target": ("inspect", ["org/name@v2"], TRITON),
    "plan": ("plan", ["org/name"], TRITON),
    "repack": ("repack", ["org/name@v2", "out"], ON_CPU | {"local_copy": True}),
    "repack, default place": ("repack", ["org/name"], ON_CPU),
    "verify": ("verify", ["out"], {"against": "org/name@v2"}),
    "inspect, no such repository": ("inspect", ["org/nope"], {}),
    "inspect, no such revision": ("inspect", ["org/name@nope"], {}),
    "inspect, gated": ("inspect", ["org/locked"], {}),
    "inspect, Hub in trouble": ("inspect", ["org/broken"], {}),
    "repack, no such repository": ("repack", ["org/nope"], ON_CPU),
    "repack, no such revision": ("repack", ["org/name@nope"], ON_CPU),
    "repack, gated": ("repack", ["org/locked", "x"], ON_CPU),
    "repack, Hub in trouble": ("repack", ["org/broken", "x"], ON_CPU),
    "verify, no such repository": ("verify", ["out"], {"against": "org/nope"}),
}
DOWN: dict[str, Call] = {
    "inspect": ("inspect", ["org/other"], {}),
    "plan": ("plan", ["org/other"], TRITON),
    "repack": ("repack", ["org/other"], ON_CPU),
    "inspect, cached": ("inspect", ["org/name@v2"], {}),
    "repack, cached": ("repack", ["org/name@v2", "again"], ON_CPU),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Hub]:
    server = Hub()
    server.add("org/name", folder, oid=COMMIT)
    server.add("org/name", folder, "v2", oid=V2_COMMIT)
    server.add("org/locked", folder, gated=True)
    server.add("org/broken", folder)
    server.broken = {"org/broken"}
    yield server
    server.close()


@pytest.fixture(scope="module")
def live(hub: Hub, home: Path) -> dict[str, Outcome]:
    return dict(zip(LIVE, run(hub, home, list(LIVE.values())), strict=True))


@pytest.fixture(scope="module")
def down(hub: Hub, home: Path, live: dict[str, Outcome]) -> dict[str, Outcome]:
    """After the Hub has gone; ``live`` has left v2 in the cache."""
    hub.close()
    return dict(zip(DOWN, run(hub, home, list(DOWN.values())), strict=True))


@pytest.mark.parametrize("case", ["inspect", "inspect for a target", "plan"])
def test_planning_downloads_headers_only(live: dict[str, Outcome], case: str) -> None:
    assert live[case].made
    assert 0 < live[case].weight_bytes() < 4096
    assert "tokenizer.json" not in live[case].sent


def test_inspect_shows_the_commit(live: dict[str, Outcome]) -> None:
    found = live["inspect"].made
    assert found["revision"] == COMMIT and len(found["modules"]) == 2
    assert live["inspect for a target"].made["revision"] == V2_COMMIT


def test_a_plan_without_a_download(live: dict[str, Outcome]) -> None:
    items = live["plan"].made["items"]
    chosen = [item["recipe"]["layout"] for item in items if item["type"] == "convert"]
    assert chosen == ["triton-wna16"] * 2


def test_repack_records_id_and_commit(live: dict[str, Outcome], home: Path, folder: Path) -> None:
    assert live["repack"].made["modules"] == 2
    manifest = Manifest.load(LocalStore(home / "out"))
    assert (manifest.plan.source.id, manifest.plan.source.revision) == ("org/name", V2_COMMIT)
    for file in manifest.sources:
        data = (folder / file.name).read_bytes()
        assert file.size == len(data) and file.blake3 == blake3(data).hexdigest()
    assert live["verify"].made["against"]["modules"] == 2


def test_default_place_of_a_hub_model(live: dict[str, Outcome], home: Path) -> None:
    assert live["repack, default place"].made["out"] == "name-triton"
    manifest = Manifest.load(LocalStore(home / "name-triton"))
    assert manifest.plan.source.revision == COMMIT


def test_only_what_was_converted_is_there(down: dict[str, Outcome], home: Path) -> None:
    assert sorted(path.name for path in home.iterdir()) == ["again", "hf", "name-triton", "out"]


@pytest.mark.parametrize("verb", ["inspect", "repack"])
def test_what_the_hub_refuses(live: dict[str, Outcome], verb: str) -> None:
    live[f"{verb}, no such repository"].fails("org/nope", "no such repository")
    live[f"{verb}, no such revision"].fails("org/name@nope", "no revision 'nope'")
    live[f"{verb}, gated"].fails("org/locked", "gated", "hf auth login")
    live[f"{verb}, Hub in trouble"].fails("org/broken", "Hub")


def test_verify_against_a_model_that_is_not_there(live: dict[str, Outcome]) -> None:
    live["verify, no such repository"].fails("org/nope: ")


@pytest.mark.parametrize("case", ["inspect", "plan", "repack"])
def test_the_hub_cannot_be_reached(down: dict[str, Outcome], case: str) -> None:
    down[case].fails("org/other", "cannot be reached")


def test_the_cache_serves_when_the_hub_does_not(down: dict[str, Outcome], home: Path) -> None:
    assert down["inspect, cached"].made["revision"] == V2_COMMIT
    assert down["repack, cached"].made["modules"] == 2
    for name in ("model.safetensors", "ctconvert.json", "config.json"):
        assert (home / "again" / name).read_bytes() == (home / "out" / name).read_bytes()
