"""A tiny random Llama as llama.cpp's converter writes it, and changed in one respect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
SPECIAL = ["<|end|>", "<|begin|>", "<|pad|>"]
MERGES = ["Ġ Ġ", "ĠĠ Ġ", "1 2"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), *("".join(pair.split()) for pair in MERGES)]
_LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def values() -> dict[str, Any]:
    """Metadata by key."""
    return {
        "general.name": "Some title / of a model",
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 5000.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": len(TOKENS),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def tensors() -> dict[str, numpy.ndarray]:
    """llama.cpp turns rotary pairs from halves into neighbours."""
    model, found = tiny_llama(), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        own = tensor.numpy()
        if name in _TOP:
            found[_TOP[name]] = own
            continue
        _, _, layer, leaf = name.split(".", 3)
        leaf = _LEAVES[leaf.removesuffix(".weight")]
        if leaf in ("attn_q", "attn_k"):
            heads = {"attn_q": 4, "attn_k": 2}[leaf]
            own = own.reshape(heads, 2, own.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(own.shape)
        found[f"blk.{layer}.{leaf}.weight"] = own
    return found


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    changes: dict[str, Any] | None = None,
    extra: dict[str, numpy.ndarray] | None = None,
    without: tuple[str, ...] = (),
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """changes: metadata that is otherwise; None leaves a key out. kind: of all matrices."""
    writer = GGUFWriter(path, architecture)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in {**values(), **(changes or {})}.items():
        if value is not None:
            add[type(value)](key, value)
    for name, own in {**tensors(), **(extra or {})}.items():
        if name not in without:
            plain = own.ndim < 2 or kind == GGMLQuantizationType.F32
            writer.add_tensor(name, own if plain else quantize(own, kind), raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
