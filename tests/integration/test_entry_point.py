"""vLLM finds the plugin by itself, and it may be registered again."""

from __future__ import annotations

import pickle
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from support.builders import group_config, weight_args

import ctconvert

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from integration.checkpoints import write_pair


def test_the_entry_point_registers_again_and_again() -> None:
    from vllm.model_executor.layers.quantization import (
        QUANTIZATION_METHODS,
        get_quantization_config,
    )

    (found,) = entry_points(group="vllm.general_plugins", name="ctconvert")
    for _ in range(2):
        found.load()()
    assert QUANTIZATION_METHODS.count("ctconvert") == 1
    assert get_quantization_config("ctconvert").__name__ == "CtconvertConfig"


def test_an_untried_version_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from ctconvert.integrations.vllm.config import TESTED, CtconvertConfig, logger

    said: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *args, **more: said.append(text % args))
    for version in (*TESTED, "0.99.0", "0.99.0"):
        monkeypatch.setattr(vllm, "__version__", version)
        CtconvertConfig.from_config({})
    (only,) = said
    assert "0.99.0" in only and TESTED[0] in only


def test_the_config_goes_to_other_processes(tmp_path: Path) -> None:
    """vLLM sends it to its workers; they open the checkpoint again."""
    from ctconvert.integrations.vllm.config import CtconvertConfig

    source, _ = write_pair(tmp_path, group_config(weight_args(4, 64)))
    ctconvert.repack(source, tmp_path / "out", target="cpu", device="cpu")
    config = CtconvertConfig.from_config({})
    config.maybe_update_config(str(tmp_path / "out"))
    data = pickle.dumps(config)
    assert len(data) < 2000  # no manifest, which may be large
    sent = pickle.loads(data)
    assert sent.served.modules == config.served.modules
