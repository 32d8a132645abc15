"""Curves and rank correlations: on models where the answer is known, and against removal by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from test_attributions import classifier
from tiny_families import FAMILIES, prompt, tiny
from torch import Tensor, nn
from torch.testing import assert_close
from zoo import build, inputs

from manyheads import create_attention
from manyheads.explain.attributions import (
    METHODS,
    Rollout,
    base,
    compare_attributions,
    deletion_curve,
    faithfulness,
    insertion_curve,
    leave_one_out,
    rank_correlation,
)
from manyheads.explain.attributions.faithfulness import Curve
from manyheads.explain.attributions.feed import Feed


class Weighted(nn.Module):
    """Adds up its tokens' first numbers, token j with its weight; attention is there, and does nothing."""

    def __init__(self, weights: list[float]):
        super().__init__()
        self.attention = create_attention("softmax", 4, 2)
        self.weights = torch.tensor(weights)

    def forward(self, x: Tensor) -> Tensor:
        score = (x[..., 0] * self.weights).sum(-1) + 0 * self.attention(x).output.sum((1, 2))
        return torch.stack([score, torch.zeros_like(score)], -1)


WEIGHTS = [0.0, 1.0, 3.0, 2.0, 0.5]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_curves_of_a_sum_by_hand() -> None:
    """Token 0 is the row that is explained and stays. Deleted by weight, 6.5 falls to 3.5, 1.5, 0.5, 0."""
    model, x = Weighted(WEIGHTS), torch.ones(1, 5, 4)
    order = torch.tensor([WEIGHTS])
    down = deletion_curve(model, x, order, 0, steps=4)
    assert down.fractions == [0, 0.25, 0.5, 0.75, 1]
    assert_close(torch.tensor(down.values[0]), torch.tensor([sigmoid(s) for s in (6.5, 3.5, 1.5, 0.5, 0)]))
    up = insertion_curve(model, x, order, 0, steps=4)
    assert_close(torch.tensor(up.values[0]), torch.tensor([sigmoid(s) for s in (0, 3, 5, 6, 6.5)]))
    worst = deletion_curve(model, x, -order, 0, steps=4)
    assert down.auc[0] < worst.auc[0]
    coarse = deletion_curve(model, x, order, 0, steps=2)
    assert_close(torch.tensor(coarse.values[0]), torch.tensor([sigmoid(s) for s in (6.5, 1.5, 0)]))
    assert Curve([0, 0.5, 1], [[1, 0, 1]]).auc == [0.5]


def test_leave_one_out_of_a_sum_is_its_terms() -> None:
    model, x = Weighted(WEIGHTS), torch.ones(1, 5, 4)
    found = leave_one_out(model, x, 0)
    assert_close(found, torch.tensor([WEIGHTS], dtype=torch.float64), atol=1e-6, rtol=0)
    counted = torch.tensor([[False, True, True, True, True]])
    assert rank_correlation(torch.tensor([[9.0, 1, 30, 2, 0.1]]), found, counted) == [1.0]
    assert rank_correlation(-found, found, counted) == [-1.0]
    # Ranks 1 2 3 4 against 2 1 3 4: 1 - 6 * 2 / (4 * 15).
    assert_close(rank_correlation(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[2.0, 1, 3, 4]])), [0.8])
    assert math.isnan(rank_correlation(torch.ones(1, 5), found)[0])


@pytest.mark.parametrize("name", ["llama", "mistral", "bert", "bart"])
def test_removed_tokens_are_seen_by_nobody(name: str) -> None:
    """Leave-one-out is the model's own logit with that token masked, and does not depend on what the token was."""
    model, batch = (classifier("bert") if name == "bert" else build(name)), inputs(name)
    found = leave_one_out(model, batch, 2)
    logits = model(**batch).logits
    value = (logits if name == "bert" else logits[:, -1])[:, 2]
    for j in (4, 8):
        masked = {**batch, "attention_mask": batch["attention_mask"].clone()}
        masked["attention_mask"][:, j] = 0
        masked["input_ids"] = batch["input_ids"].clone()
        masked["input_ids"][:, j] = 60
        if name == "bart":  # the start of the decoder is given: nothing else changes with the text
            assert "decoder_input_ids" in masked
        gone = model(**masked).logits
        gone = (gone if name == "bert" else gone[:, -1])[:, 2]
        assert_close(found[:, j].float(), (value - gone).detach(), atol=2e-5, rtol=1e-4)
    padding = batch["attention_mask"] == 0
    assert float(found[padding].abs().sum()) == 0
    kept = {"bert": 0, "bart": 12}.get(name, 12)
    assert float(found[0, kept]) == 0
    assert float(found.abs().max()) > 1e-3


def test_zeroed_patches_and_embeddings() -> None:
    model, batch = classifier("vit"), inputs("vit")
    found = leave_one_out(model, batch, 1)
    dark = batch["pixel_values"].clone()
    dark[:, :, 8:12, 12:16] = 0
    wanted = model(**batch).logits[:, 1] - model(dark).logits[:, 1]
    assert_close(found[:, 1 + 2 * 4 + 3].float(), wanted.detach(), atol=1e-5, rtol=1e-4)
    assert found[:, 0].tolist() == [0, 0]
    llama, tokens = tiny("llama"), prompt(1, 6)
    found = leave_one_out(llama, tokens, 3, remove="zero")
    embeds = llama.model.embed_tokens(tokens).clone()
    embeds[:, 2] = 0
    wanted = llama(tokens).logits[:, -1, 3] - llama(inputs_embeds=embeds).logits[:, -1, 3]
    assert_close(found[:, 2].float(), wanted.detach(), atol=1e-5, rtol=1e-4)


def test_all_methods_in_one_call() -> None:
    model, batch = tiny("llama"), inputs("llama", 2, 7)
    found = compare_attributions(model, batch, [3, 4], steps=3)
    assert [row.method for row in found.rows] == list(METHODS)
    assert found.refused == {}
    told = json.loads(json.dumps(found.to_dict()))
    assert set(told) == {"rows", "refused", "remove", "steps", "sample", "attributions", "leave_one_out"}
    assert told["remove"] == "attention"
    assert_close(found.attributions["rollout"], Rollout(model).attribute(batch))
    row = next(row for row in found.rows if row.method == "rollout")
    own = found.attributions["rollout"]
    assert_close(row.deletion, sum(deletion_curve(model, batch, own, [3, 4], steps=3).auc) / 2)
    assert_close(row.insertion, sum(insertion_curve(model, batch, own, [3, 4], steps=3).auc) / 2)


def passes(model: Any, *given: Any, **options: Any) -> tuple[int, Any]:
    """How often a comparison runs the model for its attributions, and the comparison; all curves are known already."""
    count = []
    model.register_forward_pre_hook(lambda *_: count.append(1))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(faithfulness.Removal, "values", lambda self, row, keep, logits=False: keep.sum(-1).double())
        found = compare_attributions(model, *given, **options)
    return len(count), found


def test_methods_that_ask_for_the_same_pass_share_it() -> None:
    """The first of each line runs the model, input-gradient once more; logit-flow and value-norm have own hooks. Other
    targets, inputs and models have other passes."""
    shared = ["raw-attention", "rollout", "flow", "relevance", "attention-gradient", "input-gradient", "random"]
    model, batch = tiny("llama"), inputs("llama", 2, 7)
    count, found = passes(model, batch, [3, 4], shared, steps=2)
    # For where tokens lie with raw-attention, rollout and flow; for relevance and attention-gradient; twice after.
    assert count == 1 + 1 + 2
    for name in shared[:-1]:
        alone = METHODS[name](model, None).attribute(batch, [3, 4])
        assert_close(found.attributions[name], alone, atol=0, rtol=0)
    assert passes(tiny("llama"), batch, [3, 4], ["rollout", "value-norm", "logit-flow"], steps=2)[0] == 3
    # A stack of its own is another pass of the same model.
    own = tiny("llama")
    methods = [Rollout(own), Rollout(own, fuse="max"), Rollout(own, stack="decoder")]
    assert passes(own, batch, [3, 4], methods, steps=2)[0] == 2
    with base.sharing():
        one, two = (
            Rollout(model).attribute({**batch, "input_ids": ids}) for ids in (prompt(2, 7), prompt(2, 7, seed=5))
        )
    assert float((one - two).abs().max()) > 1e-3


def test_what_a_model_cannot_have_is_told() -> None:
    model = classifier("bert")
    found = compare_attributions(model, inputs("bert"), 1, steps=2)
    assert list(found.refused) == ["logit-flow"]
    assert "no causal language model" in found.refused["logit-flow"]
    with pytest.raises(ValueError, match="no causal language model"):
        compare_attributions(model, inputs("bert"), 1, ["logit-flow"])
    embedded = compare_attributions(
        build("bert"), inputs("bert"), methods=["relevance", Rollout(build("bert")), Rollout(build("bert"))],
        score=lambda out: out.last_hidden_state[:, 0].sum(-1), steps=2,
    )  # fmt: skip
    assert [row.method for row in embedded.rows] == ["relevance", "Rollout", "Rollout 2"]


def test_what_is_refused() -> None:
    model, tokens = tiny("llama"), prompt(1, 5)
    refusals = [
        ("no method 'lime'", {"methods": ["lime"]}),
        ("no methods", {"methods": []}),
        ("is no method", {"methods": [3]}),
        ("remove='erase'", {"remove": "erase"}),
        ("at least one", {"steps": 0, "methods": ["rollout"]}),
    ]
    for message, options in refusals:
        with pytest.raises(ValueError, match=message):
            compare_attributions(model, tokens, 3, **options)
    with pytest.raises(ValueError, match="target 99"):
        compare_attributions(model, tokens, 99)
    with pytest.raises(ValueError, match=r"the attribution is \[1, 4\]"):
        deletion_curve(model, tokens, torch.ones(1, 4), 3)
    with pytest.raises(ValueError, match="holds NaN"):
        deletion_curve(model, tokens, torch.full((1, 5), torch.nan), 3)
    with pytest.raises(ValueError, match="without logits"):
        leave_one_out(build("bert"), inputs("bert"), 3)


# -- masked tokens left out ------------------------------------------------------------------------------------------


def _separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithfulness.Omitted, "of", classmethod(lambda *_: None))


@pytest.mark.parametrize("name", [*FAMILIES, "bert", "bart"])
def test_leaving_masked_tokens_out_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and leave-one-out against passes over all tokens under the mask, with a padded row, of every family."""
    model, batch = (classifier("bert") if name == "bert" else build(name)), inputs(name)
    methods = ["raw-attention", "input-gradient"]
    short = compare_attributions(model, batch, 2, methods, steps=4)
    with monkeypatch.context() as patched:
        _separately(patched)
        whole = compare_attributions(model, batch, 2, methods, steps=4)
    assert_close(short.leave_one_out, whole.leave_one_out, atol=2e-5, rtol=1e-4)
    for one, other in zip(short.rows, whole.rows, strict=True):
        assert_close([one.deletion, one.insertion], [other.deletion, other.insertion], atol=1e-5, rtol=1e-4)


def test_ranks_over_a_sample_are_those_of_its_tokens() -> None:
    model, ids = build("llama"), prompt(2, 13)
    whole = compare_attributions(model, ids, 2, ["input-gradient"], steps=3)
    some = compare_attributions(model, ids, 2, ["input-gradient"], steps=3, sample=5)
    drawn = some.leave_one_out.isfinite() & (whole.leave_one_out != 0)
    assert drawn.sum(1).tolist() == [5, 5]
    assert_close(some.leave_one_out[drawn], whole.leave_one_out[drawn], atol=1e-5, rtol=1e-4)
    wanted = rank_correlation(some.attributions["input-gradient"], whole.leave_one_out, drawn)
    assert_close(some.rows[0].correlation, sum(wanted) / 2)
    assert some.rows[0].deletion == pytest.approx(whole.rows[0].deletion)
    assert (some.to_dict()["sample"], some.to_dict()["leave_one_out"][0].count(None)) == (5, 7)
    with pytest.raises(ValueError, match="sample=1: ranks"):
        compare_attributions(model, ids, 2, ["input-gradient"], sample=1)


def test_a_window_that_counts_tokens_is_left_alone() -> None:
    """Without the tokens in between, a layer with a window of 4 would see further back than it does."""
    model, tokens = tiny("mistral"), prompt(1, 13)
    assert model.config.sliding_window
    keep = torch.ones(1, 13, dtype=torch.bool)
    keep[:, 3:9] = False
    feed = Feed.of(model, tokens)
    removal = faithfulness.Removal(model, tokens, 2)
    assert faithfulness.Omitted.of(feed, 12, keep, lambda keep: model(tokens).logits[:, -1]) is None
    assert removal._omitting(feed, 0) is None


def test_a_pass_that_differs_is_not_trusted() -> None:
    model, tokens = tiny("llama"), prompt(1, 13)
    keep = torch.ones(1, 13, dtype=torch.bool)
    keep[:, 3:9] = False
    feed = Feed.of(model, tokens)
    right = model(tokens, attention_mask=keep.long()).logits[:, -1]
    with torch.no_grad():
        assert faithfulness.Omitted.of(feed, 12, keep, lambda keep: right) is not None
        assert faithfulness.Omitted.of(feed, 12, keep, lambda keep: right + 0.1) is None


def test_curves_of_all_methods_cost_half_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that go through the model, for three methods with curves of 10 steps over 40 tokens."""
    model, tokens = tiny("llama"), prompt(1, 40)
    seen: list[int] = []

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        seen.append(0 if given is None else given.numel())

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    methods = ["raw-attention", "rollout", "value-norm"]
    compare_attributions(model, tokens, 2, methods, steps=10)
    short = sum(seen)
    seen.clear()
    with monkeypatch.context() as patched:
        _separately(patched)
        compare_attributions(model, tokens, 2, methods, steps=10)
    hook.remove()
    assert sum(seen) < 40 * (40 + 3 * 2 * 9 + 8)  # the ends of the curves are computed once
    assert short < 40 * (40 + 3 * 2 * 9 * 2 / 3 + 10)  # half, and what shorter rows are padded with
