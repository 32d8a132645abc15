"""A row that is padded on the left, in a batch, gives what the row alone gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tiny_families import prompt, tiny
from torch import Tensor, nn
from torch.testing import assert_close

from manyheads.explain.attributions import METHODS, compare_attributions, leave_one_out
from manyheads.explain.detectors import logit_difference, path_patching
from manyheads.hosts.positions import placed
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.steer import fit_offsets

PADDED, LENGTH, TARGET = 4, 10, 7
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
DECODERS = ["gpt2", "gpt_neox", "llama", "opt", "learned"]
ENCODERS = ["bert", "roberta"]


@cache
def built(name: str) -> Any:
    torch.manual_seed(3)
    if name in ("gpt2", "gpt_neox", "llama"):
        model = tiny(name).double()
        model.set_attn_implementation("sdpa")  # the library's eager softmax is float32: NaN where a row sees nothing
        return model
    if name == "learned":
        config = ManyheadsConfig(**SHAPE, positions="learned", max_position_embeddings=64, layers="softmax")
        return ManyheadsForCausalLM(config).double().eval()
    config = transformers.AutoConfig.for_model(
        name, **SHAPE, max_position_embeddings=64, pad_token_id=0, ffn_dim=48, word_embed_proj_dim=32,
        intermediate_size=48,
    )  # fmt: skip
    auto = transformers.AutoModelForMaskedLM if name in ENCODERS else transformers.AutoModelForCausalLM
    model = auto.from_config(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch whose second row is padded on the left, and that row alone."""
    tokens, mask = prompt(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    tokens[1, :PADDED], mask[1, :PADDED] = 0, 0
    alone = {"input_ids": tokens[1:, PADDED:], "attention_mask": mask[1:, PADDED:]}
    return {"input_ids": tokens, "attention_mask": mask}, alone


def places(family: str) -> tuple[Any, Any]:
    """The token that is asked about, in both rows of the batch and in the row alone; decoders know their own."""
    return ([1, PADDED + 1], 1) if family in ENCODERS else (None, None)


def close(wanted: Tensor) -> dict[str, Any]:
    """Rotations are float32 in a model of any type, and turn by other angles where padding stands before."""
    return {"atol": 1e-5 * float(wanted.abs().max()), "rtol": 1e-5, "check_dtype": False}


REFUSED = {(family, "logit-flow"): "more than one norm" for family in ENCODERS}
REFUSED["opt", "logit-flow"] = "does not add its attention"


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("method", METHODS)
def test_attributions_of_a_padded_row(method: str, family: str) -> None:
    model, (batch, alone) = built(family), both()
    own = METHODS[method](model, None)
    at, there = places(family)
    if (family, method) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family, method]):
            own.attribute(batch, TARGET, position=at)
        return
    found, wanted = own.attribute(batch, TARGET, position=at), own.attribute(alone, TARGET, position=there)
    assert float(wanted.abs().max()) > 1e-6 or method.endswith("grad-cam")  # what is negative is cut off there
    assert_close(found[1:, PADDED:], wanted, **close(wanted))
    assert float(found[1, :PADDED].abs().sum()) == 0


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_leave_one_out_of_a_padded_row(family: str) -> None:
    model, (batch, alone) = built(family), both()
    at, there = places(family)
    found, wanted = leave_one_out(model, batch, 3, position=at), leave_one_out(model, alone, 3, position=there)
    assert float(wanted.abs().max()) > 1e-4
    assert_close(found[1:, PADDED:], wanted, **close(wanted))


@pytest.mark.parametrize("family", DECODERS)
def test_a_removed_token_does_not_move_the_others(family: str) -> None:
    """Without it, every token is where it was: said by positions, to a model that would count over the mask."""
    model, tokens = built(family), prompt(1, 7)
    mask = torch.ones_like(tokens)
    mask[:, 2] = 0
    at = torch.arange(7)[None]
    with torch.no_grad():
        gone = model(tokens, attention_mask=mask, position_ids=at).logits[0, -1, 3]
        wanted = model(tokens).logits[0, -1, 3] - gone
    assert_close(leave_one_out(model, tokens, 3)[0, 2], wanted, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_positions_are_those_of_generate(family: str) -> None:
    model, (batch, _) = built(family), both()
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("position_ids"))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(**batch, max_new_tokens=1, do_sample=False, pad_token_id=0)
    hook.remove()
    assert_close(placed(model, batch)["position_ids"], seen[0])
    plain = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert "position_ids" not in placed(model, plain)
    assert "position_ids" not in placed(model, {**batch, "attention_mask": batch["attention_mask"].flip(1)})


def test_patching_a_padded_row() -> None:
    model, (batch, alone) = built("gpt2"), both()
    row = {name: own[1:] for name, own in batch.items()}
    other, short = dict(row), dict(alone)
    other["input_ids"], short["input_ids"] = row["input_ids"].clone(), alone["input_ids"].clone()
    other["input_ids"][:, PADDED + 1] = short["input_ids"][:, 1] = 9
    found = path_patching(model, row, other, logit_difference(3, 4))
    wanted = path_patching(model, alone, short, logit_difference(3, 4))
    assert float(wanted.effects.abs().max()) > 1e-5
    assert_close(found.effects, wanted.effects, atol=1e-9, rtol=1e-6)


def test_offsets_are_fitted_on_a_padded_row_as_on_the_row_alone() -> None:
    """The first real token, which padding would predict, has no label."""
    model, (batch, alone) = built("gpt2"), both()
    found = []
    for own in ({name: each[1:] for name, each in batch.items()}, alone):
        labels = own["input_ids"].clone()
        labels[:, : labels.shape[1] - LENGTH + PADDED + 1] = -100
        mask = own["attention_mask"]
        found.append(fit_offsets(model, own["input_ids"], labels, [(1, 2)], steps=20, lr=0.05, attention_mask=mask))
    assert_close(found[0][1, 2], found[1][1, 2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_families_without_taps_are_refused_before_they_are_fed(family: str) -> None:
    settings = {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 4} if family == "gpt_neo" else {}
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, "n_layer": 2, "n_head": 4, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match="no attention that can be tapped"):
        compare_attributions(model, both()[0], 3, ["saliency"])
