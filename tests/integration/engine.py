"""vLLM runs a small checkpoint: greedy tokens, and log-probabilities of the prompt."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

#: Small, in this process, and with the activations that the schemes say.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
}
#: A cache of a GiB is not needed, nor is a compiler for the one function that eager vLLM compiles.
SMALL: dict[str, Any] = {}
if not torch.cuda.is_available():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    SMALL["num_gpu_blocks_override"] = 8
PROMPT = [1, 17, 43, 5, 200, 99, 311, 64, 8, 250, 31, 77]
#: vLLM's own strict mode: every parameter of the model must be loaded.
STRICT = {"enable_weights_track": True}
Held = dict[str, tuple[int, torch.Tensor]]


class Answer(NamedTuple):
    """``logprobs`` [len(PROMPT) - 1, V] of the tokens of the prompt and all others."""

    tokens: list[int]
    logprobs: torch.Tensor

    def distance(self, other: Answer) -> float:
        """The largest difference of a log-probability."""
        return (self.logprobs - other.logprobs).abs().max().item()


@cache
def _prepare() -> None:
    """Has every load watched, and what need be done once in a process done once."""
    from vllm.model_executor.model_loader import base_loader
    from vllm.platforms import current_platform

    process = base_loader.process_weights_after_loading

    def watched(model: torch.nn.Module, *args: Any, **more: Any) -> None:
        before = _converted(model)
        process(model, *args, **more)
        after = _converted(model)
        assert before.keys() <= after.keys()
        for name, (place, data) in before.items():
            assert after[name][0] == place, f"{name} was moved after loading"
            assert torch.equal(after[name][1], data), f"{name} was changed after loading"

    base_loader.process_weights_after_loading = watched  # type: ignore[assignment]
    if current_platform.is_cpu():
        from vllm.platforms.cpu import CpuPlatform

        register = CpuPlatform.register_triton_kernel_overrides
        CpuPlatform.register_triton_kernel_overrides = staticmethod(cache(register))  # type: ignore[method-assign]


def _converted(model: torch.nn.Module) -> Held:
    """Storage and bytes of every parameter of the layers that are converted."""
    return {
        f"{name}.{local}": (
            parameter.untyped_storage().data_ptr(),
            parameter.detach().contiguous().flatten().view(torch.uint8).clone(),
        )
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__module__.startswith("ctconvert.")
        and type(module.quant_method).__name__ != "PlainLinear"
        for local, parameter in module.named_parameters(recurse=False)
    }


@contextmanager
def reading(
    change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None],
) -> Iterator[None]:
    """Has vLLM's reader lose tensors (None), or change them: what the files hold stays sound."""
    from vllm.model_executor.model_loader import default_loader

    read = default_loader.safetensors_weights_iterator

    def spoilt(*args: Any, **more: Any) -> Iterator[tuple[str, torch.Tensor]]:
        return filter(None, (change(*found) for found in read(*args, **more)))

    with patch.object(default_loader, "safetensors_weights_iterator", spoilt):
        yield


def serve(
    folder: Path, inspect: Callable[[torch.nn.Module], Any] | None = None, **options: Any
) -> tuple[Answer, Any]:
    """What vLLM answers, and what ``inspect`` finds in its model.

    Asserts that no converted tensor is moved or changed after it was loaded.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    _prepare()
    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_logprobs": -1,
        "disable_log_stats": True,
    }
    engine = None
    # vLLM collects again and again, all that torch and it have imported. It freezes its engine too,
    # which would never be collected then, nor the GPU's memory that it holds.
    gc.freeze()
    with patch("gc.freeze"), patch("gc.unfreeze"):
        try:
            engine = LLM(str(folder), **(settings | SMALL | options))
            found = engine.apply_model(inspect) if inspect else None
            asked = SamplingParams(
                temperature=0, max_tokens=8, detokenize=False, prompt_logprobs=-1
            )
            (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
        finally:
            del engine
            cleanup_dist_env_and_memory()
    rows = [
        [place[token].logprob for token in range(len(place))]
        for place in answer.prompt_logprobs[1:]
    ]
    return Answer(list(answer.outputs[0].token_ids), torch.tensor(rows)), found
