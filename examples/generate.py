"""Text from a converted checkpoint, by transformers with ctconvert's kernels in place.

The import of the integration is what lets ``from_pretrained`` load it: without, transformers warns
of an unknown quantization type and returns random weights::

    pip install 'ctconvert[transformers]'
    ctconvert repack org/model OUT --target cuda
    python examples/generate.py OUT "The three laws of thermodynamics say that"
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ctconvert.integrations.transformers  # noqa: F401 (what lets from_pretrained load it)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a converted checkpoint: a directory or a Hub id")
    parser.add_argument("prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, device_map=args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)
    made = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=False)
    print(tokenizer.decode(made[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
