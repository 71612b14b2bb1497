"""Two ranks on a CPU, in processes of their own: ``python parallel.py OUT`` prints the answer.

After OUT may stand more of the engine's options, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from integration.engine import serve

    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    more = json.loads(sys.argv[2]) if sys.argv[2:] else {}
    answer, _ = serve(Path(sys.argv[1]), tensor_parallel_size=2, **more)
    print(json.dumps([answer.tokens, answer.logprobs.tolist()]))
