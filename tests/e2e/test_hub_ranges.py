"""Conversions of a Hub model by ranges: what is fetched, kept, checked, and taken over."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from huggingface_hub import constants
from safetensors.torch import save_file
from support import cli
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.hub import Blob, Fault, Hub, hub_environment, use_hub

import ctconvert
from ctconvert.errors import BadInputError, ConversionError, UsageError
from ctconvert.planning.place import disk_bytes, spool_bytes
from ctconvert.records import Manifest, Report
from ctconvert.store import remote, spool
from ctconvert.store.hub import HubStore, local_copy
from ctconvert.store.local import LocalStore
from ctconvert.work import staging

LAYERS = 6
WEIGHTS = r"GET /objects/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer a file, of 0.3 MB each."""
    group = group_config(weight_args(4, 64))
    folder = tmp_path_factory.mktemp("source") / "model"
    head = {"model.embed_tokens.weight": torch.arange(96 * 64.0).reshape(96, 64)}
    write_checkpoint(folder, head, config_of(group))
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(LAYERS):
        made = quantised(384, 1024, group, index) if index else head
        prefix = f"model.layers.{index}.mlp.up_proj." if index else ""
        file = f"model-{index + 1:05}-of-{LAYERS:05}.safetensors"
        save_file({prefix + name: value for name, value in made.items()}, folder / file)
        weight_map |= {prefix + name: file for name in made}
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    (folder / "tokenizer.model").write_bytes(os.urandom(3000))
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "extra").mkdir()
    (folder / "extra" / "notes.txt").write_text("side")
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    served.add("org/name", folder)
    use_hub(served, tmp_path / "home", monkeypatch)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    monkeypatch.setattr(spool, "SEGMENT", 100_000)
    yield served
    served.close()


def repack(out: Path, **options: Any) -> Report:
    options = {"target": "triton", "device": "cpu", "max_shard_size": 300_000} | options
    return ctconvert.repack("org/name", out, **options)


def weights(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


def fetched(hub: Hub, folder: Path) -> dict[str, int]:
    return {name: hub.sent.get(name, 0) for name in weights(folder)}


def same(a: Path, b: Path) -> None:
    files = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_every_byte_is_fetched_about_once(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """And the output is that of a copy, to the byte."""
    assert repack(tmp_path / "out").modules == LAYERS - 1
    assert not (tmp_path / "home").exists()
    for name, size in weights(folder).items():
        assert size <= hub.sent[name] < size + 2000, name  # a header is read to plan
    assert hub.leaks == []
    assert not [name for name in hub.sent if ".gitattributes" in name]
    repack(tmp_path / "copied", local_copy=True)
    same(tmp_path / "out", tmp_path / "copied")
    manifest = Manifest.load(LocalStore(tmp_path / "out"))
    assert manifest.plan.source.revision == hub.repos["org/name"].refs["main"]
    for file in manifest.sources:
        assert file.blake3 == blake3((folder / file.name).read_bytes()).hexdigest()
    assert (tmp_path / "out/extra/notes.txt").read_text() == "side"


def test_source_files_are_kept_no_longer_than_needed(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    most = 0

    def look() -> None:
        nonlocal most
        kept = (tmp_path / "out.partial/source").rglob("0*")
        most = max(most, sum(path.stat().st_size for path in kept if path.is_file()))

    hub.faults = [Fault(WEIGHTS, "call", times=1000, call=look)]
    planned = ctconvert.plan("org/name", target="triton", max_shard_size=300_000)
    assert len(planned.shards) == LAYERS - 1
    bound = spool_bytes(planned)
    total = sum(weights(folder).values())
    assert total / 3 < bound < total * 2 / 3
    repack(tmp_path / "out", workers=1)
    assert 0 < most <= bound
    assert not (tmp_path / "out.partial").exists()


def test_the_local_cache_is_used(hub: Hub, folder: Path, tmp_path: Path) -> None:
    local_copy("org/name")
    hub.sent.clear()
    repack(tmp_path / "out")
    assert sum(fetched(hub, folder).values()) == 0
    assert hub.sent.get("tokenizer.json", 0) == 0


def test_a_damaged_cache_is_found(hub: Hub, tmp_path: Path) -> None:
    root = local_copy("org/name").root
    blob = (root / f"model-00003-of-{LAYERS:05}.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(BadInputError, match=r"model-00003.*in the local cache.*remove it"):
        repack(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("model-00004", r"GET /objects/.*"),
        ("config.json", r"resolve/.*/config\.json"),
        ("tokenizer.json", r"resolve/.*/tokenizer\.json"),
        ("tokenizer.model", ""),
    ],
)
def test_a_damaged_answer_is_found(hub: Hub, tmp_path: Path, file: str, pattern: str) -> None:
    """Of weights, of a file git stores, and of an LFS file beside the weights."""
    blob = next(b for n, b in hub.repos["org/name"].files().items() if n.startswith(file))
    pattern = f"GET /objects/{blob.sha256}" if blob.lfs else pattern
    # the header of a weight file is read by two requests
    hub.faults = [Fault(pattern, "damage", skip=3 if file.startswith("model") else 0)]
    with pytest.raises(BadInputError, match=f"{file}.*hash the Hub states"):
        repack(tmp_path / "out")
    assert hub.faults[0].times == 0
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_planning_read_is_compared(hub: Hub, tmp_path: Path) -> None:
    """A header that came otherwise than the file has it."""
    blob = hub.repos["org/name"].files()[f"model-00002-of-{LAYERS:05}.safetensors"]
    store = HubStore.open("org/name", None)
    name = f"model-00002-of-{LAYERS:05}.safetensors"
    hub.faults = [Fault(f"GET /objects/{blob.sha256}", "damage")]
    store.read(name, 0, 8)
    store.keep_in(tmp_path / "kept")
    assert hashlib.sha256(store.read(name)).hexdigest() == blob.sha256
    with pytest.raises(BadInputError, match="model-00002"):
        store.check_sha256(name, blob.sha256)
    store.close()


@pytest.mark.parametrize("how", ["error", "cut", "hang"])
def test_what_fails_now_and_then_is_asked_for_again(
    hub: Hub, folder: Path, tmp_path: Path, how: Any
) -> None:
    hub.faults = [Fault(WEIGHTS, how, skip=14), Fault(r"resolve/.*model-", how, skip=20, times=2)]
    repack(tmp_path / "out")
    assert not any(fault.times for fault in hub.faults)
    again = sum(fetched(hub, folder).values()) - sum(weights(folder).values())
    assert again < 20_000  # what was cut off goes on where it ended


@pytest.mark.parametrize(("how", "says"), [("error", "503"), ("hang", "no answer in time")])
def test_what_fails_for_good_ends_soon(hub: Hub, tmp_path: Path, how: Any, says: str) -> None:
    hub.faults = [Fault(WEIGHTS, how, skip=14, times=1000)]
    begin = time.monotonic()
    with pytest.raises(ConversionError, match=f"model-0.*{says}.*resume=True"):
        repack(tmp_path / "out")
    assert time.monotonic() - begin < 10
    tries = sum(line.startswith("GET /objects/") for line in hub.log)
    assert tries <= 14 + remote.TRIES * spool.AT_ONCE
    hub.faults.clear()
    assert repack(tmp_path / "out", resume=True).modules == LAYERS - 1


@pytest.mark.parametrize("asks", [{"RateLimit": '"resolvers";r=0;t=1'}, {"Retry-After": "1"}])
def test_a_limit_on_requests_is_waited_for(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks: dict[str, str]
) -> None:
    """However short the patience with a Hub that does not answer."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.faults = [Fault(r"resolve/.*model-", "error", skip=20, times=3, status=429, headers=asks)]
    begin = time.monotonic()
    assert repack(tmp_path / "out").modules == LAYERS - 1
    assert hub.faults[0].times == 0 and time.monotonic() - begin > 2


def test_a_stream_that_is_stopped_asks_for_nothing(hub: Hub) -> None:
    store = HubStore.open("org/name", None)
    stream = store._remote.stream("tokenizer.model", 0, 3000)
    store._remote.stop.set()
    hub.log.clear()
    with pytest.raises(ConversionError, match="stopped"):
        next(stream)
    assert hub.log == []


def test_a_killed_run_fetches_nothing_twice(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """SIGKILL at a request in the middle; what lies there then is taken over."""
    script = (
        "import ctconvert\nfrom ctconvert.store import spool\nspool.SEGMENT = 100_000\n"
        "ctconvert.repack('org/name', 'out', target='triton', device='cpu', "
        "max_shard_size=300_000, workers=1)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=hub_environment(hub, tmp_path), cwd=tmp_path
    )
    kill = Fault(WEIGHTS, "call", skip=22, call=lambda: os.kill(child.pid, signal.SIGKILL))
    hub.faults = [kill]
    assert child.wait(120) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    begun = sum(fetched(hub, folder).values())
    total = sum(weights(folder).values())
    assert 0.3 * total < begun < total
    repack(tmp_path / "out", resume=True, workers=1)
    # what a killed client had not taken from its sockets was sent all the same
    assert sum(fetched(hub, folder).values()) < total + spool.AT_ONCE * spool.SEGMENT
    repack(tmp_path / "fresh")
    same(tmp_path / "out", tmp_path / "fresh")


def test_what_was_kept_is_compared_again(hub: Hub, tmp_path: Path) -> None:
    """What a disk lost under it was hashed before, and had not all been read by then."""
    blob = hub.repos["org/name"].files()[f"model-{LAYERS:05}-of-{LAYERS:05}.safetensors"]
    # planning has what it needs, and the last segments never come
    hub.faults = [Fault(f"GET /objects/{blob.sha256}", "error", skip=4, times=1000)]
    options = {"max_shard_size": 10**9, "workers": 1}
    with pytest.raises(ConversionError, match="503"):
        repack(tmp_path / "out", **options)
    root = tmp_path / "out.partial"
    journal = next(path for path in root.iterdir() if path.is_file())
    lines = journal.read_text().splitlines(keepends=True)
    name = f"model-00003-of-{LAYERS:05}.safetensors"
    assert any('"source"' in line and name in line for line in lines)
    journal.write_text("".join(line for line in lines if '"type":"part"' not in line))
    segment = max((root / "source" / name).iterdir())
    data = segment.read_bytes()
    segment.write_bytes(bytes(len(data)))
    hub.faults.clear()
    with pytest.raises(BadInputError, match=f"{name}: what came is not the file whose hash"):
        repack(tmp_path / "out", resume=True, **options)
    assert not (tmp_path / "out").exists() and not root.exists()


def test_a_complete_output_is_not_fetched_again(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repack(tmp_path / "out")
    hub.sent.clear()
    assert repack(tmp_path / "out", resume=True).resumed_shards == LAYERS - 1
    assert sum(fetched(hub, folder).values()) < 10_000


def test_verify_reads_ranges(hub: Hub, folder: Path, tmp_path: Path) -> None:
    repack(tmp_path / "out")
    hub.sent.clear()
    found = ctconvert.verify(tmp_path / "out", against="org/name")
    assert found.against is not None and found.against.modules == LAYERS - 1
    assert sum(fetched(hub, folder).values()) < 1.1 * sum(weights(folder).values())
    judged = ctconvert.verify(tmp_path / "out", against="org/name", independent=True).independent
    assert judged is not None and judged.agree == LAYERS - 1
    assert not (tmp_path / "home").exists()


def test_doctor_and_diff_read_ranges(hub: Hub, folder: Path, tmp_path: Path) -> None:
    found = ctconvert.doctor("org/name", target="triton")
    here = ctconvert.doctor(folder, target="triton")
    assert found.data and found.findings == here.findings
    assert 0 < sum(fetched(hub, folder).values()) < 1.1 * sum(weights(folder).values())
    repack(tmp_path / "out")
    hub.sent.clear()
    assert ctconvert.diff("org/name", tmp_path / "out").differences == ()
    assert 0 < sum(fetched(hub, folder).values()) < 1.1 * sum(weights(folder).values())
    assert not (tmp_path / "home").exists()


def test_no_space(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept meanwhile counts."""
    planned = ctconvert.plan("org/name", target="triton", max_shard_size=300_000)
    free = (0, 0, disk_bytes(planned) + 1000)
    usage = staging.shutil._ntuple_diskusage(*free)  # type: ignore[attr-defined]
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="needs"):
        repack(tmp_path / "out")


def test_an_endpoint_that_never_answers(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault(".", "hang", times=1000)]
    begin = time.monotonic()
    with pytest.raises(UsageError, match=r"org/name: .*cannot be reached"):
        repack(tmp_path / "out")
    assert time.monotonic() - begin < 5


def test_a_cached_copy_is_told_of(hub: Hub) -> None:
    """Which may be old, and lack what nobody had asked for."""
    commit = local_copy("org/name").revision
    hub.faults = [Fault(".", "hang", times=1000)]
    ended = cli.run("inspect", "org/name")
    assert ended.code == 0
    assert ended.stderr == (
        f"org/name: the Hub cannot be reached: taking what the local cache has of commit {commit}\n"
    )


def test_a_store_goes_to_another_process(hub: Hub) -> None:
    store = HubStore.open("org/name", "main")
    other = pickle.loads(pickle.dumps(store))
    assert (other.where, other.revision, dict(other.sizes())) == (
        "org/name@main",
        store.revision,
        dict(store.sizes()),
    )
    assert other.read("extra/notes.txt") == b"side"


def test_a_dry_run_says_what_is_fetched(hub: Hub, folder: Path) -> None:
    """Bytes to download, less what the cache holds, and the disk they take meanwhile."""
    args = ("repack", "org/name", "-t", "triton", "--max-shard-size", "300KB", "--dry-run")
    found = json.loads(cli.run(*args, "--json").stdout)
    planned_with = {".gitattributes", "config.json", "model.safetensors.index.json"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files if path.name not in planned_with)
    assert found["download_bytes"] == total
    planned = ctconvert.plan("org/name", target="triton", max_shard_size=300_000)
    assert found["disk_bytes"] == disk_bytes(planned) + spool_bytes(planned)
    assert "to download: 1.07 MB; disk needed: " in cli.run(*args).stdout
    copied = json.loads(cli.run(*args, "--json", "--local-copy").stdout)
    assert copied["disk_bytes"] == disk_bytes(planned) + total
    local_copy("org/name")
    assert json.loads(cli.run(*args, "--json").stdout)["download_bytes"] == 0


def test_loading_is_timed_against_a_hub_id(hub: Hub, tmp_path: Path) -> None:
    repack(tmp_path / "out")
    ended = cli.run(
        "bench", tmp_path / "out", "--load", "--against", "org/name", "--device", "cpu", "--json"
    )
    assert ended.code == 0, ended.stderr
    assert json.loads(ended.stdout)["modules"] == {"triton-wna16": LAYERS - 1}


def test_revision(hub: Hub, folder: Path, tmp_path: Path) -> None:
    oid = hub.add("org/name", folder, "v2").refs["v2"]
    out = tmp_path / "out"
    args = ("repack", "org/name", out, "-t", "triton", "--device", "cpu", "--revision")
    assert cli.run(*args, "v2").code == 0
    assert Manifest.load(LocalStore(out)).plan.source.revision == oid
    for model in ("org/name@main", folder):
        ended = cli.run("repack", model, "-t", "triton", "--revision", "v2")
        assert ended.code == 2 and "name one revision" in ended.stderr


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt", "a\\b", "a//b"])
def test_names_that_lead_out(hub: Hub, tmp_path: Path, name: str) -> None:
    repo = hub.repos["org/name"]
    repo.commit("main", repo.files() | {name: Blob(b"evil", False)})
    with pytest.raises(BadInputError, match="no place in it"):
        repack(tmp_path / "out")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_names_of_no_file(hub: Hub, tmp_path: Path, name: str) -> None:
    repo = hub.repos["org/name"]
    repo.commit("main", repo.files() | {name: Blob(b"evil", False)})
    with pytest.raises(BadInputError, match="no place in it"):
        repack(tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda info: "<html>log in here</html>",
        lambda info: [info],
        lambda info: {"sha": info["sha"]},
        lambda info: info | {"sha": None},
        lambda info: info | {"sha": "../../.."},
        lambda info: info | {"siblings": {"a": 1}},
        lambda info: info | {"siblings": [{"rfilename": 7, "size": 1, "blobId": "0" * 40}]},
        lambda info: info | {"siblings": [info["siblings"][0] | {"size": "12"}]},
        lambda info: info | {"siblings": [info["siblings"][0] | {"size": -1}]},
        lambda info: info | {"siblings": [info["siblings"][0] | {"size": None}]},
    ],
)
def test_an_answer_that_is_no_hubs(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: Any
) -> None:
    """Of a portal that answers whatever was asked, of a mirror that is none."""
    as_always = Hub._json
    monkeypatch.setattr(Hub, "_json", lambda self, value: as_always(self, change(value)))
    ended = cli.run("repack", "org/name", tmp_path / "out", "--target", "triton")
    assert ended.code == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: org/name: what came is no description of a repository")
    assert "HF_ENDPOINT" in ended.stderr
