"""Two ranks on a CPU, in processes of their own: ``python parallel.py CASES`` prints the answers.

CASES is JSON, a list of [folder, options].
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from integration.engine import serve

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    # vLLM spawns its workers, each of which would import all of it again.
    import vllm.model_executor.models.llama
    import vllm.model_executor.models.qwen3_moe
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    for folder, options in json.loads(sys.argv[1]):
        answer, _ = serve(Path(folder), tensor_parallel_size=2, **options)
        print(json.dumps([answer.tokens, answer.logprobs.tolist()]), flush=True)
