"""vLLM runs a small checkpoint: greedy tokens, and log-probabilities of the prompt."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Small, in this process, and with the activations that the schemes say.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "HF_HUB_OFFLINE": "1",
}
PROMPT = [1, 17, 43, 5, 200, 99, 311, 64, 8, 250, 31, 77]


class Answer(NamedTuple):
    """``logprobs`` [len(PROMPT) - 1, V] of the tokens of the prompt and all others."""

    tokens: list[int]
    logprobs: torch.Tensor


def serve(
    folder: Path, inspect: Callable[[torch.nn.Module], Any] | None = None, **options: Any
) -> tuple[Answer, Any]:
    """What vLLM answers, and what ``inspect`` finds in its model."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_logprobs": -1,
        "dtype": "bfloat16",
        "disable_log_stats": True,
    }
    engine = None
    try:
        engine = LLM(str(folder), **(settings | options))
        found = engine.apply_model(inspect) if inspect else None
        asked = SamplingParams(temperature=0, max_tokens=8, detokenize=False, prompt_logprobs=-1)
        (answer,) = engine.generate([{"prompt_token_ids": PROMPT}], asked, use_tqdm=False)
    finally:
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    rows = []
    for place in answer.prompt_logprobs[1:]:
        rows.append([place[token].logprob for token in range(len(place))])
    return Answer(list(answer.outputs[0].token_ids), torch.tensor(rows)), found
