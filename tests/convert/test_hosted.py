"""A checkpoint in our own model: the same logits, and other mechanisms that begin where the host's attention was."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads import list_attentions, mechanism_class
from manyheads.convert import hosted, transfer, unhosted
from manyheads.convert.places import FAMILIES

ROWS = [list(range(1, 31)), list(range(30, 0, -1))]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0,
    "beta_slow": 1.0,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING = {"num_hidden_layers": 3, "layer_types": MIXED, "sliding_window": 8}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 9}
LOCAL = {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0}, "full_attention": LINEAR}
# Each family with all that it can have, and plain.
HOSTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    ("mistral", {"sliding_window": 8, "head_dim": 6, "rope_parameters": YARN}),
    ("mistral", {"head_dim": 6}),
    ("qwen2", {**SLIDING, "use_sliding_window": True, "rope_parameters": YARN}),
    ("qwen2", {}),
    ("qwen3", {**SLIDING, "use_sliding_window": True, "attention_bias": True, "rope_parameters": LINEAR}),
    ("qwen3", {"head_dim": 6, "tie_word_embeddings": True}),
    ("phi3", {"hidden_size": 64, "head_dim": 8, "sliding_window": 8, "rope_parameters": PARTIAL}),
    ("phi3", {"tie_word_embeddings": True}),
    ("smollm3", {**SLIDING, "use_sliding_window": True, "no_rope_layers": [1, 1, 0], "attention_bias": True,
                 "mlp_bias": True, "rope_parameters": LINEAR}),
    ("smollm3", {}),
    ("olmo2", {"attention_bias": True, "rope_parameters": YARN}),
    ("gemma", {"head_dim": 6}),
    ("gemma2", {**SLIDING, **CAPS, "attention_bias": True, "rope_parameters": LINEAR}),
    ("gemma2", {"layer_types": ["full_attention"] * 2, "sliding_window": 8, "attn_logit_softcapping": None,
                "final_logit_softcapping": None, "tie_word_embeddings": False}),
    ("gemma3_text", {**SLIDING, **CAPS, "rope_parameters": LOCAL}),
    ("gemma3_text", {**SLIDING, "layer_types": ["full_attention"] * 3, "final_logit_softcapping": None}),
]  # fmt: skip
IDS = [f"{kind}-{i}" for i, (kind, _) in enumerate(HOSTS)]


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def logits(model: Any, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ROWS), **more).logits


def test_every_family_is_among_those_that_are_tried() -> None:
    assert set(FAMILIES) == {kind for kind, _ in HOSTS}


@pytest.mark.parametrize(("kind", "more"), HOSTS, ids=IDS)
@torch.no_grad()
def test_with_softmax_everywhere_it_is_the_host(kind: str, more: dict[str, Any]) -> None:
    model = tiny(kind, **more)
    ours, ids = hosted(model), torch.tensor(ROWS)
    whole = logits(model)
    torch.testing.assert_close(logits(ours), whole, rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 36, dtype=torch.long)
    mask[:, :6] = 0
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.long), ids], 1)
    after = ours(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 6:]
    torch.testing.assert_close(after, whole, rtol=1e-5, atol=1e-5)
    first = ours(ids[:, :17], use_cache=True)
    second = ours(ids[:, 17:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=1e-5, atol=1e-5)
    told = [m.generate(ids[:, :12], max_new_tokens=6, do_sample=False) for m in (ours, model)]
    torch.testing.assert_close(*told)
    weights = ours(ids, output_attentions=True).attentions[0]
    windowed = hosted(model).config.encoder_specs()[0]["shell"].get("window")
    assert bool((weights[0, 0, 29, :22] == 0).all()) == (windowed == 8)


@pytest.mark.parametrize(("kind", "more"), HOSTS, ids=IDS)
def test_it_goes_back_to_the_host(kind: str, more: dict[str, Any], tmp_path: Any) -> None:
    model = tiny(kind, **more)
    hosted(model).save_pretrained(tmp_path)
    back = unhosted(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64"))
    assert type(back) is type(model)
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)


def test_what_is_another_mechanism_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="layer 1 holds hedgehog, and LlamaForCausalLM has a place only"):
        unhosted(hosted(tiny(), {"name": "hedgehog"}, [1]))
    with pytest.raises(ValueError, match="no class to go back to"):
        unhosted(AutoModelForCausalLM.from_config(AutoConfig.for_model("manyheads", num_hidden_layers=1)))


def test_gains_less_one_lose_no_digits_in_bfloat16() -> None:
    model = tiny("gemma3_text", **SLIDING).bfloat16()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.mul_(0.01)  # where 1 + weight has two digits left of it
    back = unhosted(hosted(model))
    torch.testing.assert_close(dict(back.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    assert float((logits(hosted(model)) - logits(model)).abs().max() / logits(model).abs().max()) < 0.05


def test_a_cache_of_the_hosts_own_is_not_asked_of_ours() -> None:
    model = tiny("gemma2", **SLIDING)
    model.generation_config.cache_implementation = "hybrid"
    assert hosted(model).generate(torch.tensor(ROWS)[:, :5], max_new_tokens=2, do_sample=False).shape == (2, 7)


def test_a_mechanism_without_the_hosts_scores_takes_neither_its_window_nor_its_cap() -> None:
    model, found = tiny("gemma2", **SLIDING, **CAPS), {}
    for name in ("multi-token", "moba", "entmax"):
        shell = hosted(model, {"name": name}, [0]).config.encoder_specs()[0]["shell"]
        found[name] = {"window", "softcap"} & set(shell)
    assert found == {"multi-token": set(), "moba": {"softcap"}, "entmax": {"window", "softcap"}}


def test_it_opens_again_as_it_was(tmp_path: Any) -> None:
    model = hosted(tiny("qwen3"), {"name": "mswa", "window": 8}, [1])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


def test_a_window_that_reaches_everything_is_softmax() -> None:
    model = tiny("qwen3")
    wide = hosted(model, {"name": "mswa", "window": 256}, [0, 1])
    torch.testing.assert_close(logits(wide), logits(model), rtol=1e-5, atol=1e-5)


# These read more than x, or take no host's sizes; each says which.
REFUSED = {"mqa", "back-attention", "layer-shortcuts", "mixture-of-transformers", "modality-gate", "skim"}


def specs() -> list[str]:
    return [name for name in list_attentions(pattern="causal-self") if name not in REFUSED]


@pytest.mark.parametrize("name", specs())
def test_every_causal_mechanism_finds_its_place(name: str) -> None:
    example = {k: v for k, v in mechanism_class(name).card.example.items() if k not in ("dim", "heads", "allocation")}
    model = hosted(tiny(), {"name": name, **example}, [1])
    assert logits(model).isfinite().all()
    mechanism = model.model.stack.layers[1].self_attn.mechanism
    host = tiny().model.layers[1].self_attn
    if getattr(getattr(mechanism, "q_proj", None), "out_features", 0) == host.q_proj.out_features:
        torch.testing.assert_close(mechanism.q_proj.weight, host.q_proj.weight)


def test_shared_heads_are_repeated_where_a_mechanism_shares_none() -> None:
    model = tiny()
    ours = hosted(model, {"name": "hedgehog"}, [1]).model.stack.layers[1].self_attn.mechanism
    keys = model.model.layers[1].self_attn.k_proj.weight.view(4, 4, 32)
    if ours.k_proj.weight.shape[0] == 32:
        torch.testing.assert_close(ours.k_proj.weight.view(8, 4, 32), keys.repeat_interleave(2, 0))
    else:
        torch.testing.assert_close(ours.k_proj.weight.view(4, 4, 32), keys)


def test_transfer_brings_a_mechanism_nearer_and_leaves_the_rest() -> None:
    model = tiny().float()
    made = hosted(model, {"name": "hedgehog"}, [1])
    before = {name: value.clone() for name, value in made.state_dict().items()}
    apart = (logits(made) - logits(model)).square().mean()
    losses = transfer(made, model, [1], ROWS, steps=40, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    assert (logits(made) - logits(model)).square().mean() < apart
    for name, value in made.state_dict().items():
        if "layers.1.self_attn.mechanism" not in name:
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "more", "why"),
    [
        ("gpt_neox", {}, "GPTNeoXForCausalLM cannot be hosted yet"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 8}, "use_bidirectional_attention"),
        ("qwen2", {"layer_types": ["chunked_attention", "full_attention"]}, "layers of kind chunked_attention"),
    ],
)
def test_what_a_host_has_and_ours_has_not_is_refused_by_name(kind: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        hosted(tiny(kind, **more))


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ValueError, match="no causal language model"):
        hosted(tiny().model)
    with pytest.raises(ValueError, match="no causal form"):
        hosted(tiny(), {"name": "linformer"}, [0])
    with pytest.raises(ValueError, match="has layers 0 to 1, not 2"):
        hosted(tiny(), {"name": "aaren"}, [2])
    with pytest.raises(ValueError, match="needs text"):
        transfer(hosted(tiny(), {"name": "aaren"}, [0]), tiny(), [0], [], steps=1)
