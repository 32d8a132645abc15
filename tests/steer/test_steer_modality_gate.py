"""PILL's gate on the values of image tokens: neutral, loops, caches, uneven rows, training, errors."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pictures import IMAGE, clip, llava, row_of, shown
from torch import Tensor
from torch.testing import assert_close

from manyheads.hosts.taps import record, tap
from manyheads.steer.modality_gate import fit_gates, load_gates, modality_gate, save_gates

WORDS = [[7, 8, 9], [10, 11, 12, 13, 14]]


@pytest.fixture(scope="module")
def model() -> Any:
    return llava()


@pytest.fixture(scope="module")
def gates() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {layer: torch.randn(2, 32, generator=generator) * 0.3 for layer in range(4)}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def test_share_0_is_the_model_and_nothing_stays_after_an_error(model: Any, gates: dict[int, Tensor]) -> None:
    inputs = shown(WORDS[:1])
    wanted = logits(model, inputs)
    with modality_gate(model, gates, share=0.0):
        assert_close(logits(model, inputs), wanted, atol=0, rtol=0)
    with suppress(KeyError), modality_gate(model, gates):
        assert float((logits(model, inputs) - wanted)[:, -1].abs().max()) > 1e-3
        raise KeyError("inside")
    assert_close(logits(model, inputs), wanted, atol=0, rtol=0)


def test_values_are_those_of_loops(model: Any, gates: dict[int, Tensor]) -> None:
    inputs = shown(WORDS)
    states: list[Tensor] = []
    first = model.model.language_model.layers[0].self_attn
    hook = first.register_forward_pre_hook(lambda m, a, k: states.append(k["hidden_states"]), with_kwargs=True)
    with torch.no_grad(), record(model, layers=[0], stack="language") as plain:
        model(**inputs)
    hook.remove()
    with (
        torch.no_grad(),
        record(model, layers=[0], stack="language") as found,
        modality_gate(model, gates, share=0.75),
    ):
        model(**inputs)
    wanted = plain[0].value.clone()
    for row in range(2):
        for place in range(wanted.shape[2]):
            for head in range(2):
                if inputs["input_ids"][row, place] == IMAGE:
                    opened = torch.tanh((gates[0][head] * states[0][row, place]).sum())
                    wanted[row, head, place] *= 0.25 + 0.75 * opened
    assert_close(found[0].value, wanted)


def test_closed_gates_are_image_weights_of_zero(model: Any) -> None:
    inputs = shown(WORDS)
    image = (inputs["input_ids"] == IMAGE)[:, None, None]

    def reader(call: Any) -> Tensor:
        return call.mix(lambda weights, rows: weights.masked_fill(image, 0.0))

    with tap(model, reader, stack="language", kind="self"):
        wanted = logits(model, inputs)
    with modality_gate(model):
        assert_close(logits(model, inputs)[:, -1], wanted[:, -1], atol=1e-4, rtol=1e-4)


def test_uneven_rows_and_a_cache_read_what_each_row_alone_reads(model: Any, gates: dict[int, Tensor]) -> None:
    inputs = shown(WORDS)
    with modality_gate(model, gates), torch.no_grad():
        told = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
        for row in range(2):
            own = row_of(inputs, row)
            ids = own["input_ids"]
            for _ in range(4):
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=own["pixel_values"])
                scores = out.logits[:, -1].index_fill(1, torch.tensor([95]), -torch.inf)
                ids = torch.cat([ids, scores.argmax(-1)[:, None]], 1)
            assert told[row].tolist() == ids[0, -4:].tolist()


def test_fitted_gates_lower_the_loss_and_are_kept(model: Any, tmp_path: Path) -> None:
    inputs = shown(WORDS[1:])
    batch = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)}
    before = {name: own.clone() for name, own in model.named_parameters()}
    gates = fit_gates(model, [batch] * 12, lr=2e-3)
    with torch.no_grad():
        with modality_gate(model):
            closed = model(**batch).loss
        with modality_gate(model, gates):
            fitted = model(**batch).loss
    assert float(fitted) < float(closed) - 0.01
    assert all(torch.equal(own, before[name]) and own.grad is None for name, own in model.named_parameters())
    save_gates(gates, tmp_path / "gates.safetensors")
    assert_close(load_gates(tmp_path / "gates.safetensors"), gates)
    (tmp_path / "other").write_text("no gates")
    with pytest.raises(ValueError, match="holds no gates"):
        load_gates(tmp_path / "other")


def test_what_does_not_fit_is_refused_by_name(model: Any) -> None:
    with pytest.raises(ValueError, match="share must lie between 0 and 1"), modality_gate(model, share=1.5):
        pass
    with pytest.raises(ValueError, match="a gate for layer 9"), modality_gate(model, {9: torch.zeros(2, 32)}):
        pass
    with pytest.raises(ValueError, match=r"layer 1 is \[3, 32\]"), modality_gate(model, {1: torch.zeros(3, 32)}):
        pass
    with pytest.raises(ValueError), modality_gate(clip()):
        pass
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"), modality_gate(model.train()):
        pass
    model.eval().activation_checkpointing_disable()
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6]]))
    with pytest.raises(ValueError, match="give input_ids"), modality_gate(model):
        model(inputs_embeds=embeds)
