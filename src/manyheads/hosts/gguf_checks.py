"""What a GGUF file says against what transformers makes of it: every figure is in the model, or the file is refused."""

from __future__ import annotations

from math import isclose
from typing import Any

from manyheads.hosts.gguf_header import Header

# The attributes, any of them, in which a config holds what a file says under this name.
_HELD: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "block_count": ("num_hidden_layers",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size", "n_inner", "feed_forward_length", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
}
# How byte-level vocabularies cut text before they merge (llama.cpp's llm_tokenizer_bpe): as GPT-2 does, which is what
# transformers takes for a name that it does not know; or digit by digit first, which it leaves out.
_AS_GPT2 = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe", "trillion", "modern-bert")
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


# Without one of each a default of transformers would stand in, of some other model.
_NEEDED = (("context_length",), ("embedding_length",), ("attention.head_count",),
           ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"))  # fmt: skip


def check_config(header: Header, config: Any) -> None:
    """ValueError for a figure of the architecture that is not in the config, or is another one there."""
    layers = header.own.get("block_count")
    if not isinstance(layers, int) or not 1 <= layers <= len(header.tensors):
        raise ValueError(f"it announces {layers!r} layers and has {len(header.tensors)} tensors")
    for names in _NEEDED:
        if not set(names) & set(header.own):
            raise ValueError(f"it does not say {header.architecture}.{names[0]}")
    for name, value in header.own.items():
        found = _found(name, config, value)
        if not found:
            raise ValueError(f"it says {header.architecture}.{name} is {value!r}, which transformers does not read")
        if not any(_same(value, own) for own in found):
            shown = " or ".join(repr(own) for own in found)
            raise ValueError(f"it says {header.architecture}.{name} is {value!r}, where transformers takes {shown}")


def _found(name: str, config: Any, value: Any) -> list[Any]:
    """What the config holds of it; empty: nothing."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if name == "rope.freq_base":
        return _given(rope.get("rope_theta"))
    if name == "rope.dimension_count":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return [int(width * (rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1))]
    if name == "rope.scaling.type":
        kind = rope.get("rope_type", "default")
        return ["none", "default"] if kind == "default" else [kind]
    if name == "rope.scaling.factor":
        return [rope.get("factor", 1.0)]
    if name == "attention.head_count_kv" and getattr(config, "num_key_value_heads", None) is None:
        return [config.num_attention_heads]
    return [own for key in _HELD.get(name, ()) for own in _given(getattr(config, key, None))]


def _given(value: Any) -> list[Any]:
    return [] if value is None else [value]


def _same(given: Any, held: Any) -> bool:
    if isinstance(given, float):
        return isinstance(held, int | float) and isclose(given, held, rel_tol=1e-5)
    return bool(given == held)


def check_weights(header: Header, empty: Any) -> None:
    """ValueError unless the model's parameters are as many numbers as the file holds. empty: on no device."""
    wanted = sum(own.numel() for own in empty.parameters())
    if wanted == header.elements:
        return
    what = "tensors such as rope_freqs or biases would be left out" if wanted < header.elements else "some are missing"
    raise ValueError(f"it holds {header.elements:,} weights for a model of {wanted:,}: {what}")


def check_splits(header: Header, tokenizer: Any) -> None:
    """Cuts text as the file names it. ValueError for a way that neither transformers nor this knows."""
    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    name, backend = header.values.get("tokenizer.ggml.pre", "gpt-2"), tokenizer.backend_tokenizer
    if name in _DIGITS_FIRST:
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif name not in _AS_GPT2 and isinstance(backend.pre_tokenizer, ByteLevel):
        raise ValueError(f"its vocabulary cuts text as {name!r} does, which transformers does not know")
