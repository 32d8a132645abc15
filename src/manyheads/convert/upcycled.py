"""Several checkpoints of one shape as the experts of one model: BAM, Zhang et al., arXiv:2408.08274.

    attention: sum_e g_e Attn_e(x), g = softmax(W_g x): all experts run (the mechanism `bam`)
    MLP: sum over the best k of p_e MLP_e(x), p a softmax over the scores of these k
    all else (embeddings, norms, the head): the mean of the experts'; routers start at random

With one set of keys and values for all (share_kv), these are the mean of the experts' too; the paper's text was not at
hand for that, nor for k. Its seeds compute attention and MLP side by side; here a block stays as the host has it, one
after the other. Experts that are all the same are the model that they are, whatever the routers: what the mean leaves
alone, and shares that sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manyheads.convert.hosted import check_hosted, hosted
from manyheads.hosts.loading import Loaded

_ALIKE = (
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "hidden_act", "rms_norm_eps", "tie_word_embeddings", "attention_bias",
    "rope_parameters",
)  # fmt: skip


def check_upcycled(models: Sequence[Any], active: int | None = None) -> None:
    """ValueError where the models are not of one shape, or are not two at least."""
    if len(models) < 2:
        raise ValueError(f"--to bam mixes the attention of several checkpoints, and {len(models)} was given: name more")
    for model in models:
        check_hosted(model)
    first = models[0].config
    for number, other in enumerate((model.config for model in models[1:]), start=2):
        for key in _ALIKE:
            ours, theirs = (getattr(config, key, None) for config in (first, other))
            if ours != theirs:
                raise ValueError(
                    f"--to bam wants models of one shape, grown from one seed: {key} is {ours} in the first and "
                    f"{theirs} in model {number}"
                )
    if active is not None and not 1 <= active <= len(models):
        raise ValueError(f"--active {active}: want 1 to {len(models)}, the number of models")


def check_tokenizers(loaded: Sequence[Loaded]) -> None:
    """ValueError where two of the models do not read a text as the same ids."""
    vocabularies = [None if one.tokenizer is None else one.tokenizer.get_vocab() for one in loaded]
    for one, vocabulary in zip(loaded, vocabularies, strict=True):
        if vocabulary != vocabularies[0]:
            raise ValueError(
                f"the tokenizers of {loaded[0].name} and {one.name} differ, so that one id means two things: give "
                "models that read the same ids"
            )


@torch.no_grad()
def upcycled(models: Sequence[Any], *, share_kv: bool = False, active: int | None = None, seed: int = 0) -> Any:
    """A ManyheadsForCausalLM whose experts the given models are; they are left as they are.

    share_kv: one set of keys and values, the mean of theirs, for all experts, and a cache as large as one model's.
    active: MLPs that a token is sent to; 2 by default. seed: of the routers.
    """
    check_upcycled(models, active)
    from manyheads.models import ManyheadsForCausalLM

    bases = [hosted(model) for model in models]
    config = bases[0].config.to_diff_dict()
    config["layers"] = [_mixed(spec, bases[0].config, len(bases), share_kv) for spec in bases[0].config.layers]
    config["num_local_experts"], config["num_experts_per_tok"] = len(bases), 2 if active is None else active
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ManyheadsForCausalLM(type(bases[0].config)(**config)).to(bases[0].dtype)
    state, parts = made.state_dict(), [base.state_dict() for base in bases]
    for key in parts[0]:
        for name, value in _placed(key, [part[key] for part in parts], bases[0].config, share_kv):
            state[name].copy_(value)
    made.generation_config = bases[0].generation_config
    return made.to(bases[0].device).eval()


def _mixed(spec: Mapping[str, Any], config: Any, experts: int, share_kv: bool) -> dict[str, Any]:
    """A layer's softmax as a mixture of so many."""
    kv_heads = spec["shell"]["kv_heads"] * (1 if share_kv else experts)
    return {
        "name": "bam",
        "heads": config.num_attention_heads * experts,
        "experts": experts,
        "share_kv": share_kv,
        "shell": {**spec["shell"], "kv_heads": kv_heads},
        "rotary": spec["rotary"],
    }


def _placed(key: str, values: Sequence[Tensor], config: Any, share_kv: bool) -> list[tuple[str, Tensor]]:
    """Where one tensor of every expert goes, and what is made of them there."""
    owner, _, part = key.rpartition(".mechanism.")
    if ".mlp." in key and ".mlp.norm" not in key:
        return [(key.replace(".mlp.", f".mlp.experts.{e}."), value) for e, value in enumerate(values)]
    if part == "o_proj.bias":
        return [(f"{owner}.mechanism.o_bias", torch.stack(list(values)))]
    projection = part.split(".")[0]
    if projection in ("q_proj", "o_proj") or (projection in ("k_proj", "v_proj") and not share_kv):
        layer = int(key.split(".layers.")[1].split(".")[0])
        groups = config.layers[layer]["shell"]["kv_heads"] if share_kv else 1
        axis = 1 if part == "o_proj.weight" else 0
        heads = [value.unflatten(axis, (groups, -1)) for value in values]
        return [(key, torch.stack(heads, axis + 1).flatten(axis, axis + 2))]
    # In float64, so that the mean of equal values is that value.
    return [(key, torch.stack(list(values)).double().mean(0))]
