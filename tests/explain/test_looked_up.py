"""Gradients of token ids are those of what the model itself looks up: scaled or not, by a last token found from ids."""

from __future__ import annotations

import pytest
import torch
from tiny_families import COMMON, prompt, tiny
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from zoo import BOTH

from manyheads.explain.attributions import METHODS, InputGradient, IntegratedGradients, leave_one_out

GRADIENTS = ["input-gradient", "saliency", "integrated-gradients"]


def made(auto: type, kind: str, **settings: object) -> nn.Module:
    torch.manual_seed(5)
    model: nn.Module = auto.from_config(AutoConfig.for_model(kind, **settings)).eval()  # type: ignore[attr-defined]
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def translator(kind: str) -> nn.Module:
    return made(AutoModelForSeq2SeqLM, kind, **BOTH, scale_embedding=True, max_position_embeddings=64)


@pytest.mark.parametrize("kind", ["marian", "pegasus"])
def test_embeddings_that_are_scaled_after_their_look_up(kind: str) -> None:
    model = translator(kind)
    ids, begun = prompt(2, 9), prompt(2, 5, seed=1)
    given = [model.get_input_embeddings()(own).detach().requires_grad_() for own in (ids, begun)]
    parts = model.model.encoder, model.model.decoder
    hidden = parts[0](inputs_embeds=given[0] * 32**0.5 if scales(parts[0], ids) else given[0])[0]
    scaled = given[1] * 32**0.5 if scales(parts[1], begun, encoder_hidden_states=hidden) else given[1]
    last = parts[1](inputs_embeds=scaled, encoder_hidden_states=hidden)[0]
    logit = (model.lm_head(last) + model.final_logits_bias)[:, -1, 3]
    batch = {"input_ids": ids, "decoder_input_ids": begun}
    assert_close(logit, model(**batch).logits[:, -1, 3], atol=1e-4, rtol=1e-4)
    slopes = torch.autograd.grad(logit.sum(), given)
    found = InputGradient(model).attribute(batch, 3)
    for name, x, slope in zip(("encoder", "decoder"), given, slopes, strict=True):
        assert_close(found[name], (x * slope).sum(-1), atol=1e-4, rtol=1e-3)


def scales(part: nn.Module, ids: Tensor, **beside: Tensor) -> bool:
    with torch.no_grad():
        given = part.embed_tokens(ids)
        return not torch.equal(part(input_ids=ids, **beside)[0], part(inputs_embeds=given, **beside)[0])


def test_what_encoder_and_decoder_read_is_told_apart_where_it_is_the_same() -> None:
    model, ids = translator("bart"), prompt(1, 6)
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    found = IntegratedGradients(model, steps=60).attribute(batch, 3)
    mean = model.get_input_embeddings().weight.detach().mean(0) * 32**0.5
    gone = {"inputs_embeds": mean.expand(1, 6, -1), "decoder_inputs_embeds": mean.expand(1, 6, -1)}
    with torch.no_grad():
        moved = model(**batch).logits[0, -1, 3] - model(**gone).logits[0, -1, 3]
    assert_close(found["encoder"].sum() + found["decoder"].sum(), moved, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_classifier_that_finds_its_last_token_from_ids(kind: str, method: str) -> None:
    """It takes the last of all where it is given vectors: a padded row then was explained at its padding."""
    common = {**COMMON, "num_hidden_layers": 2}
    model, ids = made(AutoModelForSequenceClassification, kind, **common, num_labels=3), prompt(2, 9)
    mask = torch.ones_like(ids)
    ids[1, 6:] = mask[1, 6:] = 0
    both = METHODS[method](model, None).attribute({"input_ids": ids, "attention_mask": mask}, 1)
    alone = METHODS[method](model, None).attribute({"input_ids": ids[1:, :6]}, 1)
    assert_close(both[1, :6], alone[0], atol=1e-5, rtol=1e-3)
    assert float(both[1, 6:].abs().max()) == 0


def test_tokens_are_zeroed_where_they_are_looked_up() -> None:
    model = translator("marian")
    batch = {"input_ids": prompt(1, 6), "decoder_input_ids": prompt(1, 4, seed=1)}
    found = leave_one_out(model, batch, 3, remove="zero")
    hook = model.model.encoder.embed_tokens.register_forward_hook(
        lambda module, args, output: output.index_fill(1, torch.tensor([2]), 0) if args[0].shape[1] == 6 else output
    )
    with torch.no_grad():
        without = model(**batch).logits[0, -1, 3]
        hook.remove()
        whole = model(**batch).logits[0, -1, 3]
    assert_close(found[0, 2], (whole - without).double(), atol=1e-4, rtol=1e-4)


def test_no_hook_is_left_when_a_pass_breaks_off() -> None:
    model, ids = tiny("llama"), prompt(1, 5)
    with torch.no_grad():
        wanted = model(ids).logits

    def broken(output: object) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        InputGradient(model, score=broken).attribute(ids)
    table = model.get_input_embeddings()
    assert not table._forward_hooks
    assert not table._forward_pre_hooks
    with torch.no_grad():
        assert_close(model(ids).logits, wanted, atol=0, rtol=0)
