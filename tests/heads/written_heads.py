"""Models for head tests: a GPT-2 whose heads were written by hand, and small random ones; all read bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from manyheads.hosts.loading import Loaded

CODE, PLACES, HEADS = 48, 96, 4
SIZE = CODE + PLACES
WIDTH = HEADS * SIZE
# Where the residual stream holds the token, its position, and the token before.
TOKEN, PLACE, BEFORE = slice(0, CODE), slice(CODE, SIZE), slice(SIZE, SIZE + CODE)


def random_llama(**changes: int) -> Loaded:
    settings = {
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        **changes,
    }
    torch.manual_seed(3)
    return Loaded(LlamaForCausalLM(LlamaConfig(**settings)).eval(), None, "random")


def planted() -> Loaded:
    """Layer 0: 0 the token before, 1 the first position, 2 earlier equal tokens, 3 itself. Layer 1: 0 the token after
    an earlier equal one, 1 earlier equal tokens; the rest look everywhere alike."""
    config = GPT2Config(vocab_size=256, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=PLACES, n_inner=8)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wte.weight[:, TOKEN] = torch.randn(256, CODE).sign() / CODE**0.5
        model.transformer.wpe.weight[:, PLACE] = torch.eye(PLACES)
        first, second = (block.attn for block in model.transformer.h)
        back = torch.diag(torch.ones(PLACES - 1), -1)
        look(first, 0, PLACE, PLACE, back)
        carry(first, 0, TOKEN, BEFORE, 0.5)
        look(first, 1, PLACE, PLACE, torch.nn.functional.one_hot(torch.zeros(PLACES).long(), PLACES).float())
        look(first, 2, TOKEN, TOKEN, torch.eye(CODE), other=2.0)
        look(first, 3, PLACE, PLACE, torch.eye(PLACES))
        look(second, 0, TOKEN, BEFORE, torch.eye(CODE), strength=40.0)
        look(second, 1, TOKEN, TOKEN, torch.eye(CODE), other=2.0)
    return Loaded(model, None, "planted")


def look(
    attention: torch.nn.Module, head: int, of: slice, at: slice, turn: Tensor, strength: float = 20.0, other: float = 0
) -> None:
    """The head's score is about `strength` where the query's part `of`, turned, equals the key's part `at`, less
    `other` times that where query and key stand at the same position."""
    weight = attention.c_attn.weight
    size = turn.shape[0]
    per = 2 / WIDTH * SIZE**0.5 * strength
    q, k = head * SIZE, WIDTH + head * SIZE
    weight[of, q : q + size] = turn * per
    weight[at, k : k + size] = torch.eye(size)
    if other:
        weight[PLACE, q + size : q + SIZE] = -other * per * torch.eye(PLACES)[:, : SIZE - size]
        weight[PLACE, k + size : k + SIZE] = torch.eye(PLACES)[:, : SIZE - size]


def carry(attention: torch.nn.Module, head: int, source: slice, target: slice, scale: float) -> None:
    """Writes the attended part `source` into the residual's part `target`."""
    v = 2 * WIDTH + head * SIZE
    attention.c_attn.weight[source, v : v + CODE] = torch.eye(CODE)
    attention.c_proj.weight[head * SIZE : head * SIZE + CODE, target] = torch.eye(CODE) * scale / WIDTH**0.5
