"""vLLM's CPU build runs converted checkpoints: as it runs the source, or the dense weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import DYNAMIC_INT8, group_config, weight_args

import ctconvert

pytest.importorskip("vllm", reason="vLLM is not installed (tests/integration/environment.sh)")

from integration.checkpoints import LLAMA, QWEN3_MOE, write_pair
from integration.engine import STRICT, Answer, reading, serve
from vllm.platforms import current_platform

SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16": group_config(weight_args(4, 64)),
    "w4a16 asym": group_config(weight_args(4, 32, False)),
    "w4a8": group_config(weight_args(4, 64), inputs=DYNAMIC_INT8),
    "w8a8": group_config(weight_args(8, None), format="int-quantized", inputs=DYNAMIC_INT8),
    "w8a16": group_config(weight_args(8, 128)),
}
#: In float16 sums are rounded eight times finer than in bfloat16, and routes seldom differ.
MODELS = {"llama": LLAMA, "experts": QWEN3_MOE | {"torch_dtype": "float16"}}
#: The largest difference of a log-probability from the dense model's, whose weights are the same
#: numbers: rounding of sums, and with activations of 8 bits what quantising them does.
SUMS = {"llama": 0.1, "experts": 0.03}
INT8_ACTIVATIONS = {"llama": 0.3, "experts": 0.15}


class Made:
    """Checkpoints, and what vLLM answers of them; each is made and asked once."""

    def __init__(self, new_folder: Callable[[str], Path]) -> None:
        self.new_folder = new_folder
        self.pair, self.dense, self.converted = map(
            cache, (self._pair, self._dense, self._converted)
        )

    def _pair(self, model: str, scheme: str) -> tuple[Path, Path]:
        return write_pair(self.new_folder("pair"), SCHEMES[scheme], MODELS[model])

    def _dense(self, model: str, scheme: str) -> Answer:
        return serve(self.pair(model, scheme)[1])[0]

    def _converted(
        self, model: str, scheme: str, target: str, fuse: bool = False
    ) -> tuple[Path, Answer]:
        out = self.new_folder("converted") / "out"
        ctconvert.repack(self.pair(model, scheme)[0], out, target=target, fuse=fuse, device="cpu")
        return out, serve(out, model_loader_extra_config=STRICT)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp)


def close(answer: Answer, dense: Answer, limit: float) -> None:
    apart = answer.distance(dense)
    print(f"{apart:.4f} from the dense model's, {limit} allowed")
    assert apart < limit
    assert dense.logprobs.std() > 5 * apart  # a wrong weight would be seen


def allowed(model: str, scheme: str) -> float:
    return (INT8_ACTIVATIONS if SCHEMES[scheme]["input_activations"] else SUMS)[model]


DENSE = [
    *(("w4a16", target, fuse) for target in ("cpu", "triton") for fuse in (False, True)),
    *(("w8a8", target, fuse) for target in ("cpu", "triton") for fuse in (False, True)),
    *((scheme, target, False) for scheme in ("w4a16 asym", "w4a8") for target in ("cpu", "triton")),
    ("w8a16", "triton", False),
    ("w4a16", "cuda-sm80", True),
]


@pytest.mark.parametrize("scheme, target, fuse", DENSE)
def test_dense_models(made: Made, scheme: str, target: str, fuse: bool) -> None:
    _, answer = made.converted("llama", scheme, target, fuse)
    close(answer, made.dense("llama", scheme), allowed("llama", scheme))


@pytest.mark.parametrize("fuse", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize(
    "scheme, target",
    [("w4a16", "cpu"), ("w4a16", "triton"), ("w4a16", "cuda-sm80"), ("w8a8", "cpu")],
)
def test_experts(made: Made, scheme: str, target: str, fuse: bool) -> None:
    _, answer = made.converted("experts", scheme, target, fuse)
    close(answer, made.dense("experts", scheme), allowed("experts", scheme))


def swapped(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Experts 0 and 1 of a layer, one for the other."""
    block, mark, rest = name.partition(".layers.1.mlp.experts.")
    return block + mark + {"0": "1", "1": "0"}.get(rest[:1], rest[:1]) + rest[1:], tensor


def rescaled(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """One expert's scales, doubled: of INT4 those of a single group of columns."""
    if ".layers.1.mlp.experts.2.up_proj." in name and "scale" in name:
        tensor = tensor.clone()
        tensor[: 1 if tensor.shape[0] < tensor.shape[-1] else None] *= 2
    return name, tensor


@pytest.mark.parametrize("wrong", [swapped, rescaled])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a8"])
def test_wrong_experts_are_seen(made: Made, scheme: str, wrong: Any) -> None:
    """So :func:`test_experts` would find them: nothing refuses what has the right names."""
    out, _ = made.converted("experts", scheme, "cpu")
    with reading(wrong):
        answer, _ = serve(out)
    apart = answer.distance(made.dense("experts", scheme))
    print(f"{wrong.__name__}, {scheme}: {apart:.3f}, {allowed('experts', scheme)} allowed")
    assert apart > 2 * allowed("experts", scheme)


def lacking(model: str, scheme: str) -> str:
    """What stock vLLM's own kernel for the source needs and this machine has not; or nothing."""
    current_platform.import_kernels()
    if (model == "experts" or scheme == "w4a8") and not torch.cpu._is_amx_tile_supported():
        return "AMX"
    if "w4a16" in scheme and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        return "AVX-512"
    return ""


@pytest.mark.parametrize(
    "model, scheme",
    [
        *(("llama", scheme) for scheme in ("w4a16", "w4a16 asym", "w4a8", "w8a8")),
        ("experts", "w4a16"),
    ],
)
def test_as_stock_runs_the_source(
    made: Made, model: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that stock vLLM runs on x86: it has no kernel for W8A16 and for INT8 experts there."""
    if lack := lacking(model, scheme):
        pytest.skip(f"vLLM's own kernel for {scheme} of {model} needs {lack}")
    if scheme == "w4a8":
        monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "1")
    stock, _ = serve(made.pair(model, scheme)[0])
    _, answer = made.converted(model, scheme, "cpu")
    apart = answer.distance(stock)
    print(f"{scheme} of {model}: {apart:.2g} from stock vLLM's")
    if model == "experts" or (scheme == "w8a8" and not torch.cpu._is_amx_tile_supported()):
        assert apart < INT8_ACTIVATIONS[model]  # another kernel, which rounds more often
        return
    assert answer.tokens == stock.tokens
    assert apart < 1e-6


#: A model, its target, whether it is fused, and what two ranks share.
SHARED: dict[str, tuple[str, str, bool, dict[str, Any]]] = {
    "llama": ("llama", "cpu", False, {}),
    "llama on Marlin's tiles": ("llama", "cuda-sm80", True, {}),
    "each a half of every expert": ("experts", "triton", True, {}),
    "each a half of the experts": ("experts", "triton", False, {"enable_expert_parallel": True}),
}


@pytest.fixture(scope="module")
def by_two(made: Made) -> dict[str, Answer]:
    """What two ranks answer, which are processes of their own."""
    cases = [
        [str(made.converted(model, "w4a16", target, fuse)[0]), more]
        for model, target, fuse, more in SHARED.values()
    ]
    command = [sys.executable, Path(__file__).parent / "parallel.py", json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("[[")]
    answers = [Answer(tokens, torch.tensor(logprobs)) for tokens, logprobs in lines]
    return dict(zip(SHARED, answers, strict=True))


@pytest.mark.parametrize("case", SHARED)
def test_two_ranks(made: Made, by_two: dict[str, Answer], case: str) -> None:
    model, target, fuse, _ = SHARED[case]
    close(by_two[case], made.converted(model, "w4a16", target, fuse)[1], SUMS[model])


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_quantised_vocabularies(tied: bool, tmp_path: Path) -> None:
    group = group_config(weight_args(4, 64), targets=["Linear", "Embedding"])
    source, reference = write_pair(
        tmp_path, group, LLAMA | {"tie_word_embeddings": tied}, vocabulary=True
    )
    ctconvert.repack(source, tmp_path / "out", target="triton", device="cpu")
    answer, _ = serve(tmp_path / "out", model_loader_extra_config=STRICT)
    close(answer, serve(reference)[0], SUMS["llama"])


@pytest.mark.parametrize("model", MODELS)
def test_weights_that_another_process_loaded(
    made: Made, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's weight cache, without its daemon and the GPU that they share."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.weight_cache import daemon, ipc_loader, protocol

    out, answer = made.converted(model, "w4a16", "triton")
    _, ((entries, aliases),) = serve(out, daemon.export_entries)
    state = protocol.WeightCacheState(entries=entries, aliases=aliases, attrs={})

    def mapped(
        self: DefaultModelLoader, vllm_config: Any, model_config: Any, prefix: str = ""
    ) -> Any:
        config = LoadConfig(load_format="ipc_cache", device="cpu:0")
        return ipc_loader.IpcModelLoader(config)._build_model(
            vllm_config, model_config, prefix, state
        )

    monkeypatch.setattr(DefaultModelLoader, "load_model", mapped)
    again, _ = serve(out)
    assert again.tokens == answer.tokens
    assert torch.equal(again.logprobs, answer.logprobs)
