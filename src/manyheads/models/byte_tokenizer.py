"""A tokenizer for models that read bytes, for programs that know tokenizers only."""

from __future__ import annotations

from typing import Any


def byte_tokenizer(max_length: int) -> Any:
    """Token i is byte i of the UTF-8 text: `encode(text) == list(text.encode())`, with no special token. Saved, it
    opens with AutoTokenizer. max_length: tokens that the model has positions for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(_letters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=max_length
    )


def _letters() -> list[str]:
    """How GPT-2's byte-level tokenizers, and so tokenizers' ByteLevel, write each byte: itself where it is a printing
    character of Latin-1, else the next from U+0100 on."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printing)
    moved = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]
