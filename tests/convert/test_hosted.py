"""A checkpoint in our own model: the same logits, and other mechanisms that begin where the host's attention was."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads import list_attentions, mechanism_class
from manyheads.convert.hosted import FAMILIES, hosted, transfer

ROWS = [list(range(1, 31)), list(range(30, 0, -1))]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 2,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


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


@pytest.mark.parametrize("more", [{}, {"head_dim": 6}, {"tie_word_embeddings": True}, {"rope_parameters": LLAMA3}])
@pytest.mark.parametrize("kind", FAMILIES)
def test_with_softmax_everywhere_it_is_the_host(kind: str, more: dict[str, Any]) -> None:
    if kind == "llama" and "head_dim" in more:
        more = {"head_dim": 4, "attention_bias": True}
    model = tiny(kind, **more)
    ours = hosted(model)
    torch.testing.assert_close(logits(ours), logits(model), rtol=1e-5, atol=1e-5)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :9] = 0
    padded = [
        logits(m, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))[1, 9:] for m in (ours, model)
    ]
    torch.testing.assert_close(*padded, rtol=1e-5, atol=1e-5)
    told = [m.generate(torch.tensor(ROWS)[:, :12], max_new_tokens=6, do_sample=False) for m in (ours, model)]
    torch.testing.assert_close(*told)


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


def test_what_cannot_be_hosted_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be hosted yet"):
        hosted(tiny("gemma"))
    with pytest.raises(ValueError, match="sliding window"):
        hosted(tiny("mistral", sliding_window=8))
    with pytest.raises(ValueError, match="MLP with biases"):
        hosted(tiny(mlp_bias=True))
    with pytest.raises(ValueError, match="no causal form"):
        hosted(tiny(), {"name": "linformer"}, [0])
    with pytest.raises(ValueError, match="has layers 0 to 1, not 2"):
        hosted(tiny(), {"name": "aaren"}, [2])
    with pytest.raises(ValueError, match="angles change with the length"):
        hosted(tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}))
    with pytest.raises(ValueError, match="needs text"):
        transfer(hosted(tiny(), {"name": "aaren"}, [0]), tiny(), [0], [], steps=1)
