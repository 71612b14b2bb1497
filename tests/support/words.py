"""A tokenizer for checkpoints that have none: a word is a token, and others are the last one."""

from __future__ import annotations

import sys
from pathlib import Path

#: Of the pages' prompts.
WORDS = ["The", "three", "laws", "of", "thermodynamics", "say", "that"]


def add_tokenizer(folder: Path, size: int = 1024) -> None:
    """Writes the tokenizer's files beside a checkpoint whose vocabulary has ``size`` words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*WORDS, *(f"word{number}" for number in range(size - len(WORDS) - 1)), "other"]
    made = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="other")
    )
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="other", eos_token="other")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    add_tokenizer(Path(sys.argv[1]))
