"""DyVTE: a planted gate chooses the layer, and from there on the model is the whole one with the image hidden."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, grown, hidden, llava

from manyheads.steer.method import Prompt, method
from manyheads.steer.thinning.exit import ExitGates, fit_exits, gates_for, visual_exit

GIVEN = batch()


def image(length: int) -> Tensor:
    out = torch.zeros(2, length, dtype=torch.bool)
    out[:, :15] = GIVEN["input_ids"].eq(IMAGE)
    return out


def rows_that_leave(gates: ExitGates, states: list[Tensor]) -> list[list[int]]:
    """Layer by layer, row by row, by the equation: which rows leave before which layer."""
    found: list[list[int]] = [[], []]
    for b in range(2):
        words = [i for i in range(15) if i > int(image(15)[b].nonzero()[-1])]
        for layer in range(3):
            state = states[layer + 1][b]
            f = torch.cat([sum(state[i] for i in words[:-1]) / (len(words) - 1), state[words[-1]]])
            stay, leave = gates.out[layer].weight @ torch.nn.functional.gelu(gates.into[layer].weight @ f)
            if leave > stay:
                found[b].append(layer + 1)
                break
    return found


def test_gates_choose_by_their_equation_and_each_row_on_its_own() -> None:
    model = llava()
    chosen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        gates = gates_for(model, 8)
        with torch.no_grad():
            states = model(**GIVEN, output_hidden_states=True).hidden_states
            wanted = rows_that_leave(gates, list(states))
            with visual_exit(model, gates) as thinning:
                found = model(**GIVEN).logits
        left = [[layer for layer, seen in enumerate(thinning.image_tokens) if not seen[b]][:1] for b in range(2)]
        assert left == wanted
        chosen.add(str(wanted))
        gone = {
            layer: image(15) & torch.tensor([bool(w) and layer >= w[0] for w in wanted])[:, None] for layer in range(4)
        }
        with torch.no_grad(), hidden(model, gone, GIVEN["attention_mask"]):
            whole = model(**GIVEN).logits
        there = GIVEN["attention_mask"].bool() & ~image(15)
        assert_close(found[there], whole[there])
    assert len(chosen) > 1


def test_a_generation_keeps_the_exit_of_its_prompt() -> None:
    model = llava()
    given = {name: own for name, own in GIVEN.items() if name != "position_ids"}
    with torch.no_grad(), visual_exit(model, layer=2) as thinning:
        found = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert thinning.image_tokens == [[9, 9], [9, 9], [0, 0], [0, 0]]
    # The longest row has six words, and three of the four new tokens were fed.
    assert thinning.held_bytes == 2 * 2 * 2 * 8 * 8 * (18 + 18 + 9 + 9)
    for length in range(15, 19):
        whole = grown(GIVEN, found[:, 15:length])
        gone = {layer: image(length) if layer >= 2 else torch.zeros_like(image(length)) for layer in range(4)}
        with torch.no_grad(), hidden(model, gone, whole["attention_mask"]):
            told = model(**whole, use_cache=False).logits[:, -1].argmax(-1)
        assert_close(told, found[:, length])


def test_training_labels_by_agreement_and_teaches_the_gates_alone() -> None:
    model = llava()
    # From layer 2 on nothing is added to a token: the image may leave there without a trace, and not before.
    for layer in model.model.language_model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
    labels = torch.full((2, 15), -100)
    labels[:, 14] = GIVEN["input_ids"][:, 14]
    before = {name: own.clone() for name, own in model.state_dict().items()}
    gates = gates_for(model, 16)
    history = fit_exits(model, gates, [{**GIVEN, "labels": labels}] * 24, learning_rate=1e-2)
    told = {layer: {share for own, share, _ in history if own == layer} for layer in range(3)}
    assert told[1] == told[2] == {1.0}
    assert max(told[0]) < 1
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())
    assert all(own.grad is None for own in model.parameters())
    question = {name: own[:, :14] if name != "pixel_values" else own for name, own in GIVEN.items()}
    with torch.no_grad(), visual_exit(model, gates) as thinning:
        model(**question)
    assert thinning.image_tokens[1:] == [[9, 9], [0, 0], [0, 0]]


def test_the_command_opens_it_and_neutral_is_the_model(tmp_path: Path) -> None:
    model, own = llava(), method("visual_exit")
    with torch.no_grad():
        wanted = model(**GIVEN).logits
        with own.open(model, Prompt(GIVEN), **own.neutral):
            assert torch.equal(model(**GIVEN).logits, wanted)
        gates = gates_for(model, 8)
        with visual_exit(model, gates) as by_hand:
            wanted = model(**GIVEN).logits
        save_file(gates.state_dict(), tmp_path / "gates.safetensors")
        with own.open(model, Prompt(GIVEN), gates=str(tmp_path / "gates.safetensors")) as opened:
            assert torch.equal(model(**GIVEN).logits, wanted)
    assert opened.image_tokens == by_hand.image_tokens


def test_what_does_not_fit_is_refused() -> None:
    model = llava()
    for words, arguments in (
        ("one of the two", {"gates": gates_for(model, 4), "layer": 1}),
        ("for a model of 4", {"gates": ExitGates(32, 3, 4)}),
        ("layer 1 at the earliest", {"layer": 0}),
    ):
        with pytest.raises(ValueError, match=words), visual_exit(model, **arguments):
            pass
    with pytest.raises(ValueError, match="needs an answer"):
        fit_exits(model, gates_for(model, 4), [{**GIVEN, "labels": torch.full((2, 15), -100)}])
