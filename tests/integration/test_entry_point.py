"""vLLM finds the plugin by itself, and it may be registered again."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")


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
