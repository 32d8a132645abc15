"""Fewer heads: what is cut adds nothing, importance in loops, and shapes that stock classes load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyheads.convert.damage import Judge, Sizes, calibration_rows
from manyheads.convert.importance import head_scores
from manyheads.convert.layout import FAMILIES, attentions, cache_numbers
from manyheads.convert.methods import Pruned
from manyheads.convert.pruned import cut, kept_heads, per_layer, pruned, zeroed
from manyheads.hosts.loading import load_model
from manyheads.hosts.questions import Questions, library_text

ROWS = [list(range(1, 31)), list(range(30, 0, -1))]
SIZES = {
    "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "num_hidden_layers": 4,
    "intermediate_size": 24, "vocab_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def tiny(kind: str = "llama", **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(ROWS)).logits


# Whole groups and heads of each group in every family; all heads, and one for each key/value head, in two.
CUTS = [(heads, kind) for heads in (24, 16) for kind in FAMILIES]
CUTS += [(heads, kind) for heads in (32, 8) for kind in ("llama", "gemma3_text")]


@pytest.mark.parametrize(("heads", "kind"), CUTS)
def test_cut_heads_are_those_that_add_nothing(kind: str, heads: int) -> None:
    model = tiny(kind)
    if kind == "gemma2" and heads == 24:
        with pytest.raises(ValueError, match="divide its hidden size 32"):
            pruned(model, heads, by="random")
        return
    kept = kept_heads(model, heads, head_scores(model, (), "random"))
    small = cut(model, kept)
    # Norms are float32 in every family.
    torch.testing.assert_close(logits(small), logits(zeroed(model, kept)), rtol=1e-5, atol=1e-5)
    assert all(layer.heads == heads // 4 for layer in attentions(small))
    assert len({tuple(row) for row in kept}) > (heads < 32)  # each layer has its own
    if heads == 24:
        assert cache_numbers(small) * 4 == cache_numbers(model) * 3  # whole groups are gone
        assert type(small).__name__ == ("MistralForCausalLM" if kind == "llama" else type(model).__name__)


def test_importance_and_ablation_in_loops() -> None:
    model = tiny()
    layers = attentions(model)
    gradient, ablation = (head_scores(model, ROWS, by) for by in ("importance", "ablation"))

    def loss(layer: int, head: int, gate: float, row: list[int]) -> float:
        weight = layers[layer].module.o_proj.weight
        held = weight.detach().clone()
        with torch.no_grad():
            weight[:, 4 * head : 4 * head + 4] *= gate
            out = model(torch.tensor([row])).logits[0].log_softmax(-1)
            weight.copy_(held)
        return -sum(float(out[i, row[i + 1]]) for i in range(len(row) - 1)) / (len(row) - 1)

    for layer, head in ((0, 0), (1, 5), (3, 7)):
        slopes = [(loss(layer, head, 1 + 1e-2, row) - loss(layer, head, 1 - 1e-2, row)) / 2e-2 for row in ROWS]
        assert float(gradient[layer, head]) == pytest.approx(sum(map(abs, slopes)) / 2, rel=1e-2)
        gone = [loss(layer, head, 0.0, row) - loss(layer, head, 1.0, row) for row in ROWS]
        assert float(ablation[layer, head]) == pytest.approx(sum(gone) / 2, rel=1e-3, abs=1e-5)


def loss_with(model: Any, gone: Any, rows: Any = ROWS) -> float:
    """The mean over rows of the loss without some (layer, head)."""
    held = {name: value.clone() for name, value in model.state_dict().items()}
    total = 0.0
    with torch.no_grad():
        for layer, head in gone:
            attentions(model)[layer].module.o_proj.weight[:, 4 * head : 4 * head + 4] = 0.0
        for row in rows:
            out = model(torch.tensor([row])).logits[0].log_softmax(-1)
            total -= sum(float(out[i, row[i + 1]]) for i in range(len(row) - 1)) / (len(row) - 1)
    model.load_state_dict(held)
    return total / len(rows)


def test_all_but_one_and_greedy_in_loops() -> None:
    model = tiny(num_hidden_layers=2, num_attention_heads=4, head_dim=4)
    places = [(layer, head) for layer in range(2) for head in range(4)]
    alone, greedy = (head_scores(model, ROWS, by) for by in ("alone", "greedy"))
    whole = loss_with(model, [])
    for layer, head in places:
        others = [(layer, h) for h in range(4) if h != head]
        assert float(alone[layer, head]) == pytest.approx(whole - loss_with(model, others), abs=1e-6)
    gone: list[tuple[int, int]] = []
    while len(gone) < 8:
        left = [place for place in places if place not in gone]
        least = min(left, key=lambda place: loss_with(model, [*gone, place]))
        assert int(greedy[least]) == len(gone)
        gone.append(least)


def test_normalised_importance_weighs_layers_alike() -> None:
    model = tiny()
    plain, normalised = (head_scores(model, ROWS, by) for by in ("importance", "normalised"))
    for one, other in zip(plain, normalised, strict=True):
        torch.testing.assert_close(other, one / sum(float(v) ** 2 for v in one) ** 0.5)


def test_all_layers_compete_and_each_keeps_one() -> None:
    scores = torch.tensor([[9.0, 1.0, 0.0, 0.5], [8.0, 7.0, 6.0, 5.0], [0.0, 0.0, 0.2, 0.1]])
    model = tiny(num_hidden_layers=3, num_attention_heads=4)
    assert kept_heads(model, 6, scores, uniform=False) == [[0], [0, 1, 2, 3], [2]]
    # Two heads on each key/value head go together.
    model = tiny(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    assert kept_heads(model, 8, scores, uniform=False) == [[0, 1], [0, 1, 2, 3], [2, 3]]
    with pytest.raises(ValueError, match="over all layers it can keep 6 to 12, a multiple of 2"):
        kept_heads(model, 7, scores, uniform=False)
    # All share one: each goes alone.
    model = tiny(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1)
    assert kept_heads(model, 5, scores, uniform=False) == [[0], [0, 1, 2], [2]]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_layers_of_different_numbers_of_heads_add_what_is_left(kind: str, kv_heads: int, tmp_path: Path) -> None:
    model = tiny(kind, num_key_value_heads=kv_heads)
    kept = kept_heads(model, 18, head_scores(model, (), "random", seed=1), uniform=False)
    assert len({len(row) for row in kept}) > 1
    small = cut(model, kept)
    torch.testing.assert_close(logits(small), logits(zeroed(model, kept)), rtol=1e-5, atol=1e-5)
    assert [layer.self_attn.mechanism.heads for layer in small.model.stack.layers] == [len(row) for row in kept]
    if kv_heads > 1:
        groups = [layer.self_attn.mechanism.kv_heads for layer in small.model.stack.layers]
        assert groups == [len(row) * kv_heads // 8 for row in kept]
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=0)


def test_a_budget_is_met_by_whole_groups() -> None:
    model = tiny()  # 4 layers of 8 heads on 4 key/value heads: 128 numbers, 8 for each
    assert Pruned().within(model, 100) == 4 * 3 * 2
    assert Pruned().within(model, 127) == 4 * 3 * 2  # 15 groups are not as many in every layer
    assert Pruned(uniform=False).within(model, 100) == 12 * 2
    assert Pruned(uniform=False).within(model, 127) == 15 * 2
    small = pruned(model, 30, by="random", uniform=False)
    assert sum(8 * layer.self_attn.mechanism.kv_heads for layer in small.model.stack.layers) == 120
    with pytest.raises(ValueError, match="the smallest cache here takes 32"):
        Pruned(uniform=False).within(model, 31)
    with pytest.raises(ValueError, match="all heads at once"):
        pruned(tiny("olmo2"), 30, by="random", uniform=False)


def test_the_best_of_each_group_stay_or_the_best_groups() -> None:
    model = tiny(num_hidden_layers=1)
    scores = torch.tensor([[5.0, 1.0, 0.0, 2.0, 9.0, 8.0, 3.0, 4.0]])
    assert per_layer(model, 4) == (4, 4)
    assert kept_heads(model, 4, scores) == [[0, 3, 4, 7]]
    assert per_layer(model, 6) == (6, 3)
    assert kept_heads(model, 6, scores) == [[0, 1, 4, 5, 6, 7]]


def test_what_cannot_be_pruned_is_refused() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"alike in every layer it can keep 8, 16, 24, 32"):
        pruned(model, 20)
    with pytest.raises(ValueError, match="takes calibration text"):
        pruned(model, 16)
    with pytest.raises(ValueError, match="--by 'size'"):
        pruned(model, 16, by="size", calibration=ROWS)
    with pytest.raises(ValueError, match="keep a number of heads that divides the hidden size 32"):
        pruned(tiny(attention_bias=True), 24, by="random")


def test_measured_heads_beat_chance_on_the_packaged_model() -> None:
    """At three quarters of the heads; at a half, one head for each key/value head, only ablation does."""
    loaded = load_model()
    rows = calibration_rows(Questions(loaded, text=library_text(), seed=1), 512, 256)
    judge = Judge(loaded, Questions(loaded), Sizes(windows=2, length=256, keys=1, key_length=192))

    def lost(heads: int, by: str, seed: int = 0) -> float:
        scores = head_scores(loaded.model, rows, by, seed=seed)
        return judge.distance(cut(loaded.model, kept_heads(loaded.model, heads, scores)))["kl_bits"]

    assert lost(24, "importance") < min(lost(24, "random", seed) for seed in range(3))
    assert lost(16, "ablation") < min(lost(16, "random", seed) for seed in range(3))
