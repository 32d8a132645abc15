"""A tiny random llama whose tokens are words, for what needs names that are one token."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyheads.explain.detectors import circuit_tasks as tasks
from manyheads.hosts.loading import Loaded

WORDS = [
    *[
        "Then",
        "and",
        "had",
        "a",
        "lot",
        "of",
        "fun",
        "at",
        "the",
        "gave",
        "to",
        "On",
        "table",
        "I",
        "see",
        "The",
        "color",
        "is",
        ".",
        ",",
    ],
    *(word for words in (tasks.PEOPLE, tasks.PLACES, tasks.COLOURS) for word in words),
    *sorted({*tasks.GIFTS, *tasks.THINGS}),
]


def words_llama(layers: int = 3, dtype: torch.dtype = torch.float64) -> Loaded:
    table = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    own = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(table),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    return Loaded(model, PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]"), "words")
