"""The pages: their code runs, their links lead somewhere, and the README stays short."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages import RUN_BY, block, blocks, commands_here, pages, session, shell
from readme import README
from support.hub import Hub, hub_environment
from support.paths import EXAMPLE, ROOT
from support.words import add_tokenizer

import ctconvert

#: Appended to the pages' Python: it is the converted model that ran.
PROOF = """
kinds = {type(module).__name__ for module in model.modules()}
assert "KernelLinear" in kinds, kinds
"""


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 1000


def test_every_block_is_run_by_somebody() -> None:
    known = dict.fromkeys(RUN_BY, 0)
    for one in blocks():
        mine = [key for key in RUN_BY if key[0] == one.page and one.first.startswith(key[1])]
        assert len(mine) == 1, (one.page, one.first, mine)
        known[mine[0]] += 1
    assert set(known.values()) == {1}, known


def test_whoever_runs_them_does() -> None:
    """CI by name; the others' tests ask for the blocks by the same keys."""
    ci = (ROOT / ".ci" / "run").read_text()
    for words in (
        "readme.py run",
        "readme.py test",
        "ruff check .",
        "mypy",
        "examples/stranger.sh",
    ):
        assert words in ci, words
    for (page, start), by in RUN_BY.items():
        if by.endswith(".py"):
            asked = {
                (found[0], found[1])
                for found in re.findall(
                    r'block\(\s*"([^"]+)",\s*"([^"]+)",?\s*\)', (ROOT / by).read_text()
                )
            }
            assert any(p == page and start.startswith(s) for p, s in asked), (page, start, by)


def test_what_is_run_by_hand_is_there() -> None:
    text = block("CONTRIBUTING.md", "CTCONVERT_FUZZ=").text
    named = re.findall(r"tests/[\w/.]+", text)
    assert len(named) > 5
    for path in named:
        assert (ROOT / path).exists(), path
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for variable in re.findall(r"CTCONVERT_\w+", text):
        assert f'"{variable}"' in sources, variable


def test_links_lead_to_what_is_there() -> None:
    for page in pages():
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            path, _, heading = link.partition("#")
            if path.startswith("http"):
                continue
            to = page if not path else page.parent / path
            assert to.exists(), (page, link)
            titles = re.findall(r"^#+ (.*)", to.read_text(), re.MULTILINE) if heading else []
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert not heading or heading in slugs, (page, link)


def test_the_session(tmp_path: Path) -> None:
    """The same to the letter, but for times."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = commands_here(tmp_path / "bin")
    for command, expected in session(block("examples/README.md", "$ ctconvert inspect").text):
        found = shell(command, tmp_path, environment)
        found, expected = (re.sub(r"in \d+\.\d s", "in T s", text) for text in (found, expected))
        assert sorted(found.splitlines()) == sorted(expected.splitlines()), command


def test_the_python_of_the_pages(tmp_path: Path) -> None:
    """In one process, the README's first: its import is what the others' models need too."""
    pytest.importorskip("transformers")
    source = tmp_path / "source"
    source.mkdir()
    for path in EXAMPLE.iterdir():
        (source / path.name).symlink_to(path)
    add_tokenizer(source)
    (tmp_path / "build").mkdir()
    (tmp_path / "OUT").symlink_to("build/smollm2-triton")
    out = tmp_path / "build" / "smollm2-triton"
    ctconvert.repack(source, out, target="triton", device="cpu")
    taken = [
        block("README.md", "import ctconvert.integrations.transformers"),
        block("ctconvert/layouts/README.md", "from ctconvert.runtime import"),
        block("ctconvert/integrations/transformers/README.md", "# pip install"),
    ]
    program = "\n".join(one.text + PROOF for one in taken)
    program += "\nassert text.shape[1] > 3, text\n"
    if not torch.cuda.is_available():
        program = program.replace('"cuda"', '"cpu"')
    try:
        import accelerate  # noqa: F401 (device_map is its)
    except ImportError:
        program = program.replace(', device_map="cpu"', "")
    shell(f"python -c {shlex.quote(program)}", tmp_path, commands_here(tmp_path / "bin"))


def test_the_pipeline(tmp_path: Path) -> None:
    line = block("examples/README.md", "python examples/pipeline.py").text.strip()
    hub = Hub()
    hub.tokens.add("a-token")
    hub.add("org/model", EXAMPLE)
    environment = hub_environment(hub, tmp_path, HF_TOKEN="a-token")
    command = [sys.executable, *line.split()[1:]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    made = hub.repos.get("you/model-triton")
    broken = subprocess.run(
        [*command[:2], "org/nothing", "you/nothing"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    hub.close()
    assert done.returncode == 0, done.stderr
    assert "ok: " in done.stdout and "{'triton-wna16': 14}" in done.stdout
    assert made is not None and {"ctconvert.json", "model.safetensors"} <= made.files().keys()
    assert broken.returncode == 1 and "you/nothing" not in hub.repos
    assert broken.stderr.startswith("error: ") and broken.stderr.count("\n") == 1


def test_the_job_of_the_examples() -> None:
    """Steps that are there, variables that are set; CI checks it by GitHub's schema."""
    yaml = pytest.importorskip("yaml")
    (job,) = yaml.safe_load((ROOT / "examples/github-actions.yml").read_text())["jobs"].values()
    script = "\n".join(step.get("run", "") for step in job["steps"])
    assert set(re.findall(r"\$(\w+)", script)) <= job["env"].keys()
    for verb in ("doctor", "repack", "verify", "push"):
        assert f"ctconvert {verb} " in script
