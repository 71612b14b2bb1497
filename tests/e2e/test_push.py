"""Converted checkpoints to the Hub and back, by the real client and a Hub on this machine."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants, lfs
from huggingface_hub.utils import _http
from support import cli
from support.builders import config_of, group_config, quantised, weight_args, write_checkpoint
from support.hub import Blob, Fault, Hub, hub_environment, use_hub

import ctconvert
from ctconvert.errors import ConversionError, UsageError, VerificationError
from ctconvert.integrations.vllm.served import Served
from ctconvert.publishing import upload
from ctconvert.runtime import load
from ctconvert.store import remote

TOKEN = "secret-of-nobody-4711"
CARD = """---
license: apache-2.0
language:
- en
---
# The source
"""


def source(folder: Path, seed: int = 0) -> Path:
    group = group_config(weight_args(4, 64))
    tensors = {"model.embed_tokens.weight": torch.ones(64, 32)}
    for index in range(3):
        made = quantised(128, 256, group, seed + index)
        tensors |= {f"model.layers.{index}.mlp.up_proj.{key}": value for key, value in made.items()}
    write_checkpoint(folder, tensors, config_of(group))
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint of three files of weights, its source beside it."""
    folder = tmp_path_factory.mktemp("push")
    source(folder / "source")
    ctconvert.repack(
        folder / "source", folder / "out", target="triton", device="cpu", max_shard_size=25_000
    )
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    served = Hub()
    served.tokens.add(TOKEN)
    use_hub(served, tmp_path / "home", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    yield served
    served.close()


def files(hub: Hub, repo: str = "org/new", revision: str = "main") -> dict[str, bytes]:
    return {name: blob.data for name, blob in hub.repos[repo].files(revision).items()}


def test_a_push_and_the_way_back(hub: Hub, out: Path, tmp_path: Path) -> None:
    found = ctconvert.push(out, "org/new", private=True)
    repo = hub.repos["org/new"]
    assert repo.private and found.created and found.commit == repo.refs["main"]
    sent = files(hub)
    for path in out.rglob("*"):
        if path.name != "README.md":
            assert sent.pop(path.name) == path.read_bytes()
    assert sent.keys() == {"README.md", ".gitattributes"}
    assert (out / "README.md").read_text() == CARD  # the directory is as it was
    assert found.files == len(list(out.iterdir()))

    verified = ctconvert.verify("org/new")
    assert verified.modules == 3
    assert not (tmp_path / "home" / "hub").exists()  # ranges
    modules = load("org/new", "cpu")
    x = torch.ones(2, 256, dtype=torch.bfloat16)
    for name, module in load(out, "cpu").items():
        assert torch.equal(modules[name](x), module(x))
    assert ctconvert.restore("org/new", tmp_path / "back", device="cpu").modules == 3
    assert hub.leaks == []


def test_a_restored_push_is_its_source(hub: Hub, made: Path, tmp_path: Path) -> None:
    ctconvert.push(made, "org/new")
    ctconvert.restore("org/new", tmp_path / "back", device="cpu")
    found = ctconvert.verify(tmp_path / "back", against=made.parent / "source")
    assert found.against is not None and found.against.modules == 0


def test_a_second_push_sends_nothing(hub: Hub, out: Path) -> None:
    ctconvert.push(out, "org/new")
    hub.got.clear()
    commits = len(hub.repos["org/new"].commits)
    found = ctconvert.push(out, "org/new")
    assert found.uploaded == () and not found.created and hub.got == {}
    assert len(hub.repos["org/new"].commits) == commits


def test_a_dry_run_sends_nothing(hub: Hub, out: Path) -> None:
    found = ctconvert.push(out, "org/new", dry_run=True)
    assert found.created and "ctconvert.json" in found.uploaded and found.commit is None
    assert hub.repos == {} and not [line for line in hub.log if not line.startswith("GET")]


def test_what_an_earlier_push_had_is_removed(hub: Hub, out: Path, tmp_path: Path) -> None:
    ctconvert.push(out, "org/new")
    again = tmp_path / "again"
    ctconvert.repack(source(tmp_path / "other", 9), again, target="triton", device="cpu")
    found = ctconvert.push(again, "org/new")
    assert "model.safetensors.index.json" in found.removed
    assert len([name for name in files(hub) if name.endswith("safetensors")]) == 1
    assert ctconvert.verify("org/new").modules == 3


def test_files_of_others_are_left_alone(hub: Hub, out: Path) -> None:
    ctconvert.push(out, "org/new")
    repo = hub.repos["org/new"]
    repo.commit("main", repo.files() | {"pytorch_model.bin": Blob(b"theirs", True)})
    with pytest.raises(UsageError, match=r"pytorch_model\.bin, which no push"):
        ctconvert.push(out, "org/new")


@pytest.mark.parametrize("branch", [None, "next"])
def test_what_others_put_there_meanwhile_is_left_alone(
    hub: Hub, out: Path, branch: str | None
) -> None:
    """Between the look at what is there and the commit."""
    repo, theirs = hub.add("org/new"), Blob(b"theirs", False)

    def other() -> None:
        repo.commit(branch or "main", repo.files(branch or "main") | {"config.json": theirs})

    hub.faults = [Fault(r"POST .*/preupload/", "call", call=other)]
    with pytest.raises(ConversionError, match=r"org/new.*the upload failed.*push again"):
        ctconvert.push(out, "org/new", branch=branch)
    assert repo.files(branch or "main")["config.json"] == theirs


def test_files_of_others_by_the_names_of_ours_are_left_alone(hub: Hub, out: Path) -> None:
    """The repository's own checkpoint, and what came beside one that was pushed."""
    config = {"config.json": Blob(b"theirs", False)}
    hub.add("org/theirs").commit("main", config)
    with pytest.raises(UsageError, match=r"org/theirs holds config\.json, which no push"):
        ctconvert.push(out, "org/theirs")
    assert hub.repos["org/theirs"].files() == config
    ctconvert.push(out, "org/new")
    repo = hub.repos["org/new"]
    ours = repo.files()["ctconvert.json"]
    repo.commit("main", repo.files() | {"ctconvert.json": Blob(b"{}", False)} | config)
    with pytest.raises(UsageError, match=r"org/new holds config\.json, which no push"):
        ctconvert.push(out, "org/new")
    repo.commit("main", repo.files() | {"ctconvert.json": ours})
    assert ctconvert.push(out, "org/new").uploaded == ("config.json",)  # of an earlier push


def test_a_pull_request_and_a_branch(hub: Hub, out: Path) -> None:
    hub.repos.clear()
    ctconvert.push(out, "org/new", branch="v2")
    assert "ctconvert.json" in files(hub, revision="v2")
    assert files(hub).keys() == {".gitattributes"}
    found = ctconvert.push(out, "org/new", create_pr=True)
    assert found.revision == "refs/pr/1" and found.pull_request is not None
    assert files(hub).keys() == {".gitattributes"}
    assert ctconvert.verify("org/new@refs/pr/1").modules == 3
    with pytest.raises(UsageError, match="without branch"):
        ctconvert.push(out, "org/new", create_pr=True, branch="v2")


def test_damage_is_not_pushed(hub: Hub, out: Path) -> None:
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(VerificationError):
        ctconvert.push(out, "org/new")
    assert hub.log == []


def test_what_changes_once_it_was_verified_is_not_pushed(hub: Hub, out: Path) -> None:
    class Changing(ctconvert.Progress):
        def phase(self, label: str, total: int) -> None:
            if label == "hashing":
                (out / "config.json").write_text("{}")

    with pytest.raises(ConversionError, match=r"config\.json: changed"):
        ctconvert.push(out, "org/new", progress=Changing())
    assert hub.repos == {}


def test_a_hub_that_keeps_other_bytes(hub: Hub, out: Path) -> None:
    def spoil() -> None:
        repo = hub.repos["org/new"]
        repo.commits[repo.refs["main"]]["config.json"] = Blob(b"{}", False)

    hub.faults = [Fault("GET /api/models/org/new/revision/[0-9a-f]{40}", "call", call=spoil)]
    with pytest.raises(ConversionError, match=r"config\.json has other bytes there"):
        ctconvert.push(out, "org/new")


def test_a_killed_push_goes_on(hub: Hub, out: Path, tmp_path: Path) -> None:
    script = "import sys, ctconvert; ctconvert.push(sys.argv[1], 'org/new')"
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(out)],
        env=hub_environment(hub, tmp_path / "home", HF_TOKEN=TOKEN),
    )
    kill = Fault("POST /api/models/org/new/commit", "error")
    hub.faults = [
        kill,
        Fault("PUT", "call", skip=1, call=lambda: os.kill(child.pid, signal.SIGKILL)),
    ]
    assert child.wait(120) == -signal.SIGKILL
    time.sleep(0.2)
    assert files(hub).keys() == {".gitattributes"}
    stored = set(hub.objects)
    assert stored
    before = dict(hub.got)
    hub.faults.clear()
    ctconvert.push(out, "org/new")
    assert all(hub.got[oid] == before[oid] for oid in stored)
    assert ctconvert.verify("org/new").modules == 3


# --- the card -------------------------------------------------------------------------------------


def card(hub: Hub) -> ModelCard:
    return ModelCard(files(hub)["README.md"].decode())


def test_the_card(hub: Hub, made: Path, tmp_path: Path) -> None:
    hub.add("org/base", made.parent / "source")
    ctconvert.repack("org/base", tmp_path / "out", target="triton", device="cpu", push_to="org/new")
    found = card(hub)
    assert found.data.to_dict() == {
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "library_name": "ctconvert",
        "tags": ["ctconvert", "compressed-tensors", "triton", "triton-wna16"],
    }
    commit = hub.repos["org/base"].refs["main"]
    assert f"ctconvert verify org/new --against org/base@{commit}" in found.text
    assert "| 3 | pack-quantized int4 sym g64 | `triton-wna16` |" in found.text
    assert "Plain transformers cannot read it" in found.text
    assert "# The source" not in found.text
    against = f"org/base@{commit}"
    assert ctconvert.verify("org/new", against=against).against is not None


def test_the_card_of_ranks(hub: Hub, made: Path, tmp_path: Path) -> None:
    """Which transformers does not load, and vLLM with as many ranks alone."""
    options = {"target": "triton", "device": "cpu", "tensor_parallel": 2}
    ctconvert.repack(made.parent / "source", tmp_path / "out", **options, push_to="org/new")
    text = card(hub).text
    assert "vllm serve org/new --tensor-parallel-size 2\n" in text and "AutoModel" not in text


def test_what_a_person_wrote_stays(hub: Hub, out: Path) -> None:
    ctconvert.push(out, "org/new")
    text = files(hub)["README.md"].decode()
    text = text.replace("license: apache-2.0", "license: mit  # a word\nmine: [1, 2]")
    text = text.replace("tags:\n", "tags:\n- theirs\n") + "\n## Words of a person\n"
    repo = hub.repos["org/new"]
    repo.commit("main", repo.files() | {"README.md": Blob(text.encode(), False)})
    ctconvert.push(out, "org/new")
    assert files(hub)["README.md"].decode() == text
    (out / "README.md").write_text("# Another card")
    found = ctconvert.push(out, "org/new")
    assert files(hub)["README.md"].decode() == text
    assert len(found.notes) == 1 and "is not pushed" in found.notes[0]


def test_a_card_beside_the_output(hub: Hub, out: Path) -> None:
    (out / "README.md").write_text("# My words\n")
    ctconvert.push(out, "org/new")
    assert card(hub).text.rstrip().endswith("# My words")
    assert "ctconvert verify org/new" in card(hub).text
    (out / "README.md").write_text("---\n- no\n- mapping\n---\n")
    with pytest.raises(UsageError, match="metadata cannot be read"):
        ctconvert.push(out, "org/other")


# --- failures -------------------------------------------------------------------------------------


def push(out: Path, *options: str) -> cli.Outcome:
    return cli.run("push", out, "org/new", *options)


@pytest.mark.parametrize("where", ["GET /api", "POST /api/repos", "preupload", "batch", "commit"])
def test_no_token_in_what_is_said(
    hub: Hub, out: Path, where: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a server whose every failure repeats it."""
    hub.faults = [Fault(where, "error", times=1000, status=418)]
    ended = push(out, "--json")
    written = capfd.readouterr()
    said = json.loads(ended.stdout)["error"]["message"]
    assert ended.code in (1, 2) and "org/new" in said and "\n" not in said
    for text in (*ended, *written, *(path.read_text("latin1") for path in out.iterdir())):
        assert TOKEN not in str(text)


def test_no_token_in_logs(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's words, which huggingface_hub shows as a warning."""
    log = io.StringIO()
    monkeypatch.setattr(logging.getLogger("huggingface_hub").handlers[0], "stream", log)
    with pytest.raises(UsageError):
        ctconvert.inspect("org/new")
    logging.getLogger("huggingface_hub.utils").warning("no luck with %s", f"Key {TOKEN}")
    assert "no luck with Key <token>" in log.getvalue()


def test_no_token_in_what_an_engine_says(hub: Hub, out: Path) -> None:
    """Of a manifest that the plugin fetches, and of a server that repeats the token."""
    ctconvert.push(out, "org/new")
    assert Served("org/new").modules.keys() == {f"model.layers.{i}.mlp.up_proj" for i in range(3)}
    hub.faults = [Fault(r"HEAD .*/resolve/v2/", "error", times=9, status=418)]
    with pytest.raises(UsageError, match="org/new@v2: ") as caught:
        Served("org/new", "v2")
    assert TOKEN not in str(caught.value)


def test_no_token(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    ended = push(out)
    assert ended.code == 2 and "hf auth login" in ended.stderr


def test_an_endpoint_that_never_answers(hub: Hub, out: Path) -> None:
    hub.faults = [Fault(".", "hang", times=1000)]
    begin = time.monotonic()
    ended = push(out)
    assert time.monotonic() - begin < 5
    assert ended.code == 2 and "org/new: the Hub gave: no answer in time" in ended.stderr


def test_storage_that_never_answers(hub: Hub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by the client that huggingface_hub makes after a connection that failed."""
    forget = partial(setattr, _http, "_GLOBAL_CLIENT", None)
    hub.faults = [Fault("batch", "call", call=forget), Fault("PUT", "hang", times=1000)]
    monkeypatch.setattr(lfs, "http_backoff", partial(lfs.http_backoff, max_retries=0))
    monkeypatch.setattr(upload, "_PATIENCE", 3)
    begin = time.monotonic()
    ended = push(out)
    assert time.monotonic() - begin < 20
    assert ended.code == 1 and "org/new: the upload failed: no answer in time" in ended.stderr


@pytest.mark.parametrize("repo", ["new", "org/new@v2", "a/b/c", "./new"])
def test_no_repository(hub: Hub, out: Path, repo: str) -> None:
    with pytest.raises(UsageError, match="no Hub id"):
        ctconvert.push(out, repo)


def test_public_and_private(hub: Hub, out: Path) -> None:
    ctconvert.push(out, "org/new")
    with pytest.raises(UsageError, match="is public"):
        ctconvert.push(out, "org/new", private=True)


@pytest.mark.parametrize("verb", ["verify", "restore"])
def test_verbs_of_what_is_not_there(hub: Hub, tmp_path: Path, verb: str) -> None:
    hub.add("org/plain", None)
    more = [tmp_path / "back"] if verb == "restore" else []
    for repo, says in {
        "org/nope": "no such repository",
        "org/plain@v3": "no revision 'v3'",
        "org/plain": "no ctconvert.json",
    }.items():
        ended = cli.run(verb, repo, *more)
        assert ended.code == 2 and says in ended.stderr, ended.stderr
        assert len(ended.stderr.splitlines()) == 1


def test_what_it_prints(hub: Hub, out: Path) -> None:
    found = push(out, "--dry-run").stdout
    assert (
        "org/new@main, which would be made: 9 of 9 files" in found and "send config.json" in found
    )
    found = push(out).stdout
    assert "org/new@main: 9 of 9 files" in found and f"{hub.url}/org/new/commit/" in found
    document: dict[str, Any] = json.loads(push(out, "--json").stdout)
    assert document["ok"] and document["uploaded"] == [] and document["commit"]


def test_repack_and_push(hub: Hub, made: Path, tmp_path: Path) -> None:
    args = ("repack", made.parent / "source", tmp_path / "new", "-t", "triton", "--device", "cpu")
    document = json.loads(cli.run(*args, "--push", "org/new", "--json").stdout)
    assert document["ok"] and document["pushed"]["commit"] == hub.repos["org/new"].refs["main"]
    ended = cli.run(*args, "--push", "no-id", "--overwrite")
    assert ended.code == 2 and "no Hub id" in ended.stderr and "converting" not in ended.stderr


def test_gated_and_offline(hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/locked", made, gated=True)
    ended = cli.run("verify", "org/locked")
    assert ended.code == 2 and ended.stderr.count("\n") == 1
    assert "gated: accept its terms and log in" in ended.stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for args in (("verify", "org/locked"), ("push", made, "org/new")):
        ended = cli.run(*args)
        assert ended.code == 2 and "cannot be reached" in ended.stderr.splitlines()[-1]
