"""Two ranks on a CPU, in processes of their own: ``python parallel.py OUT`` prints the answer."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from integration.engine import serve

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    answer, _ = serve(Path(sys.argv[1]), tensor_parallel_size=2)
    print(json.dumps([answer.tokens, answer.logprobs.tolist()]))
