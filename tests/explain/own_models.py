"""Models of our own mechanisms, and a Llama of the same weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads import card, mechanism_class
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM

VOCAB = 29


def own(*layers: Any, **settings: Any) -> Any:
    """A causal language model of these layers in float64, with noise on every parameter."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": max(2, len(layers)), "num_attention_heads": 4,
        "intermediate_size": 24, "layers": list(layers) or ["softmax"], "initializer_range": 1.0,
        "tie_word_embeddings": False, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(3)
    model = ManyheadsForCausalLM(ManyheadsConfig(**{**values, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


def pair(kv_heads: int = 2) -> tuple[Any, Any]:
    """Ours and transformers', of the same weights."""
    ours = own({"name": "gqa", "kv_heads": kv_heads})
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=24, max_position_embeddings=64, rms_norm_eps=ours.config.rms_norm_eps, rope_theta=10000.0,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).double().eval()
    state, found = ours.state_dict(), {}
    for name in theirs.state_dict():
        mine = name.replace("self_attn.", "self_attn.mechanism.")
        mine = mine.replace("input_layernorm", "self_attn.norm").replace("post_attention_layernorm", "mlp.norm")
        found[name] = state[mine if mine in state else f"model.stack{mine.removeprefix('model')}"]
    theirs.load_state_dict(found)
    return ours, theirs


def tokens(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


def spec(name: str) -> dict[str, Any]:
    return {"name": name, **{k: v for k, v in card(name).example.items() if k != "dim"}}


def built(name: str, causal: bool, dim: int = 16) -> Any:
    example = {"dim": dim, "heads": 4, **card(name).example, "causal": causal}
    module = mechanism_class(name)(**example)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double().eval()
