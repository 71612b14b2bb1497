"""Times vLLM's start on a GPU from a large W4A16 Llama, as quantised and as converted.

    python tests/integration/startup.py make FOLDER   # FOLDER/source and FOLDER/converted
    python tests/integration/startup.py time FOLDER   # both, each in a process of its own, in turn

Random weights of the sizes of Llama 3.1 8B, over 4 GB. Prints, for each, seconds to read and place
the weights, of work after loading, and from the first import to the first token.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, SIZE, LAYERS, VOCABULARY = 4096, 14336, 32, 128256
HEADS, PAIRS, HEAD, GROUP = 32, 8, 128, 128
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": PAIRS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "version": "0.17.0",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "dynamic": False,
                    "strategy": "group",
                    "group_size": GROUP,
                },
            }
        },
    },
}
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
    "self_attn.k_proj": (PAIRS * HEAD, HIDDEN),
    "self_attn.v_proj": (PAIRS * HEAD, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (SIZE, HIDDEN),
    "mlp.up_proj": (SIZE, HIDDEN),
    "mlp.down_proj": (HIDDEN, SIZE),
}


def make(folder: Path, device: str) -> None:
    """Writes the source, a shard a quarter of the layers, and converts it."""
    import ctconvert

    source = folder / "source"
    source.mkdir(parents=True)
    made = torch.Generator(device).manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=made, device=device) * 0.02).bfloat16().cpu()

    def linear(n: int, k: int) -> dict[str, torch.Tensor]:
        low, high = -(2**31), 2**31
        words = torch.randint(low, high, (n, k // 8), generator=made, device=device)
        scales = torch.rand((n, k // GROUP), generator=made, device=device) * 0.004 + 0.001
        return {
            "weight_packed": words.to(torch.int32).cpu(),
            "weight_scale": scales.bfloat16().cpu(),
            "weight_shape": torch.tensor([n, k]),
        }

    index: dict[str, str] = {}
    for shard in range(4):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(shard * LAYERS // 4, (shard + 1) * LAYERS // 4):
            prefix = f"model.layers.{layer}"
            for name, (n, k) in LINEARS.items():
                parts = linear(n, k)
                tensors |= {f"{prefix}.{name}.{local}": part for local, part in parts.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        if shard == 0:
            tensors["model.embed_tokens.weight"] = floats(VOCABULARY, HIDDEN)
        if shard == 3:
            tensors["lm_head.weight"] = floats(VOCABULARY, HIDDEN)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-{shard + 1:05}-of-00004.safetensors"
        save_file(tensors, source / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (source / "model.safetensors.index.json").write_text(text)
    (source / "config.json").write_text(json.dumps(CONFIG))
    start = time.perf_counter()
    report = ctconvert.repack(
        source, folder / "converted", target="cuda", fuse=True, device=device, verify=False
    )
    print(f"converted in {time.perf_counter() - start:.1f} s: {report.layouts}")


def compare(folder: Path, rounds: int = 3) -> None:
    """Both by ``examples/start_vllm.py``, in turn."""
    start = Path(__file__).parents[2] / "examples" / "start_vllm.py"
    options = {
        "max_model_len": 2048,
        "dtype": "bfloat16",
        "attention_config": {"backend": "TRITON_ATTN"},
        "gpu_memory_utilization": 0.3,
    }
    asked = ["[1, 17, 43, 5]", "--max-tokens", "8", "--options", json.dumps(options)]
    for name in ("source", "converted") * rounds:  # the first of each warms the page cache
        command = [sys.executable, str(start), str(folder / name), *asked]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(run.stdout[-2000:] + run.stderr[-4000:])
        found = json.loads(run.stdout[run.stdout.rindex('{"load"') :])
        parts = ("load", "after", "ready", "answered")
        seconds = ", ".join(f"{part} {found[part]:.2f} s" for part in parts)
        print(f"{name}: {seconds}, tokens {found['tokens']}", flush=True)


if __name__ == "__main__":
    verb, where = sys.argv[1], Path(sys.argv[2])
    if verb == "make":
        make(where, "cuda" if torch.cuda.is_available() else "cpu")
    else:
        compare(where)
