"""One start of vLLM, in a process of its own: what it costs, and what it answers greedily.

    python examples/start_vllm.py MODEL "The three laws of thermodynamics say that"

Prints vLLM's log and one line of JSON: seconds to read and place the weights (``load``), of its
work on them after that (``after``: ``process_weights_after_loading``), from the first import until
it can answer (``ready``) and until it has answered (``answered``), the tokens, the text, and the
log-probabilities of the likeliest tokens at each place.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

START = time.perf_counter()

import torch  # noqa: E402

#: In this process; on a CPU with a small cache, and no compiler for the one function that needs it.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
if not torch.cuda.is_available():
    os.environ["TORCH_COMPILE_DISABLE"] = "1"

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.model_executor.model_loader import base_loader, default_loader  # noqa: E402


def timed(owner: Any, name: str, seconds: dict[str, float], part: str) -> None:
    """Has every call of ``owner.name`` add its seconds to ``part``."""
    call = getattr(owner, name)
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def run(*args: Any, **more: Any) -> Any:
        wait()
        begun = time.perf_counter()
        result = call(*args, **more)
        wait()
        seconds[part] += time.perf_counter() - begun
        return result

    setattr(owner, name, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prompt", help="text, or JSON: a list of tokens")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for vllm.LLM")
    args = parser.parse_args()
    seconds = {"load": 0.0, "after": 0.0}
    timed(default_loader.DefaultModelLoader, "load_weights", seconds, "load")
    timed(base_loader, "process_weights_after_loading", seconds, "after")
    tokens = json.loads(args.prompt) if args.prompt.startswith("[") else None
    usual = {"enforce_eager": True, "max_model_len": 512, "skip_tokenizer_init": tokens is not None}
    engine = LLM(args.model, **(usual | args.options))
    seconds["ready"] = time.perf_counter() - START
    asked = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, detokenize=tokens is None, logprobs=10
    )
    prompt = args.prompt if tokens is None else {"prompt_token_ids": tokens}
    (answer,) = engine.generate([prompt], asked, use_tqdm=False)
    seconds["answered"] = time.perf_counter() - START
    (found,) = answer.outputs
    likeliest = [{token: one.logprob for token, one in place.items()} for place in found.logprobs]
    said = {"tokens": list(found.token_ids), "text": found.text, "logprobs": likeliest}
    print(json.dumps(seconds | said), flush=True)


if __name__ == "__main__":
    main()
