"""Path patching against hand-made passes, on a planted circuit of two layers, and overlap of circuits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from torch.testing import assert_close
from written_heads import planted
from zoo import build

from manyheads import create_attention
from manyheads.explain.detectors import (
    PathPatching,
    circuit,
    circuit_overlap,
    logit_difference,
    path_patching,
)
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.taps import record, tap


def formula(
    model: Any, clean: Tensor, changed: Tensor, sender: tuple[int, int], receiver: tuple[int, int], kinds: str
) -> Tensor:
    """Logits of a Llama by its own formula, written apart: receiver's q, k or v from a pass in which only the sender is
    as on the changed input."""
    kept = {}
    for name, ids in (("clean", clean), ("changed", changed)):
        with torch.no_grad(), record(model) as calls:
            model(ids)
        kept[name] = [call.output.clone() for call in calls]

    def freeze(call: Any) -> Tensor:
        output = kept["clean"][call.layer].clone()
        if call.layer == sender[0]:
            output[:, sender[1]] = kept["changed"][call.layer][:, sender[1]]
        return output

    with torch.no_grad(), tap(model, freeze), record(model) as frozen:
        model(clean)
    source = frozen[receiver[0]]

    def receive(call: Any) -> Tensor:
        head, group = receiver[1], receiver[1] // (call.heads // call.key.shape[1])
        query, key, value = ((source if name in kinds else call, name) for name in "qkv")
        q = query[0].query[0, head].double()
        k = key[0].key[0, group].double()
        v = value[0].value[0, group].double()
        output = call.output.clone()
        for i in range(q.shape[0]):
            scores = torch.stack([q[i] @ k[j] * call.scale for j in range(i + 1)]).softmax(0)
            output[0, head, i] = sum(scores[j] * v[j] for j in range(i + 1)).float()
        return output

    with torch.no_grad(), tap(model, receive, layers=[receiver[0]]):
        return model(clean).logits


@pytest.mark.parametrize("kinds", ["q", "k", "v", "qkv"])
def test_effects_equal_passes_by_hand(kinds: str) -> None:
    """GQA: the receiver's group has another head, which must stay as it is."""
    model, clean, changed = tiny("llama"), prompt(1, 11), prompt(1, 11, seed=4)
    metric = logit_difference(7, 9)
    names = [name for name in ("query", "key", "value") if name[0] in kinds]
    patching = PathPatching(model, clean, changed, metric)
    with torch.no_grad():
        whole = float(metric(model(clean)))
    assert patching.clean == pytest.approx(whole, abs=1e-5)
    found = patching.effects([(2, 1)], inputs=names, senders=[(0, 2), (1, 3)])
    for sender in ((0, 2), (1, 3)):
        logits = formula(model, clean, changed, sender, (2, 1), kinds)[0, -1]
        assert float(found.effects[sender]) == pytest.approx(float(logits[7] - logits[9]) - whole, abs=1e-4)
    assert float(found.effects.abs().sum()) == pytest.approx(
        float(found.effects[0, 2].abs() + found.effects[1, 3].abs())
    )


def test_the_direct_effect_skips_other_heads() -> None:
    model, clean, changed = tiny("llama"), prompt(1, 11), prompt(1, 11, seed=4)
    kept = {}
    for name, ids in (("clean", clean), ("changed", changed)):
        with torch.no_grad(), record(model) as calls:
            model(ids)
        kept[name] = [call.output.clone() for call in calls]

    def freeze(call: Any) -> Tensor:
        output = kept["clean"][call.layer].clone()
        if call.layer == 0:
            output[:, 3] = kept["changed"][0][:, 3]
        return output

    with torch.no_grad(), tap(model, freeze):
        logits = model(clean).logits[0, -1]
    found = path_patching(model, clean, changed, logit_difference(7, 9))
    assert float(found.effects[0, 3]) == pytest.approx(float(logits[7] - logits[9]) - found.clean, abs=1e-5)
    assert_close(found.share, found.effects / (found.corrupted - found.clean))
    assert found.top(12)[0] == divmod(int(found.effects.abs().argmax()), 4)


def test_nothing_changes_where_inputs_are_the_same() -> None:
    model, ids = tiny("gemma2"), prompt(2, 9)
    found = path_patching(model, ids, ids, logit_difference(7, 9), receivers=[(1, 0), (2, 3)])
    assert_close(found.effects, torch.zeros_like(found.effects), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no way to have a share of"):
        assert found.share is None


def induction_task(answer: int, before: int, wrong: int) -> tuple[Tensor, Tensor]:
    """... before answer ... before: the token after an earlier copy. Changed: the earlier copy is another token, which
    nothing follows."""
    filler = torch.tensor([65, 66, 67, 68, 69, 70, 71, 72, 73, 74])
    clean = torch.cat([filler[:4], torch.tensor([before, answer]), filler[4:], torch.tensor([before])])
    changed = clean.clone()
    changed[4] = wrong
    return clean[None], changed[None]


def circuit_model() -> Loaded:
    """The written model, whose head 1.0 also writes the token that it attends to, where the answer is read."""
    from written_heads import CODE, TOKEN, carry

    loaded = planted()
    second = loaded.model.transformer.h[1].attn
    with torch.no_grad():
        carry(second, 0, TOKEN, slice(400, 400 + CODE), 6.0)
        head = torch.zeros_like(loaded.model.transformer.wte.weight)
        head[:, 400 : 400 + CODE] = loaded.model.transformer.wte.weight[:, TOKEN]
        loaded.model.lm_head.weight = torch.nn.Parameter(head)
    return loaded


def test_a_planted_circuit_is_found_and_nothing_else() -> None:
    loaded = circuit_model()
    clean, changed = induction_task(90, 100, 101)
    with torch.no_grad():
        assert int(loaded.model(clean).logits[0, -1].argmax()) == 90
    patching = PathPatching(loaded, clean, changed, logit_difference(90, 67))
    direct = patching.effects().share
    assert direct[1, 0] == pytest.approx(1.0, abs=0.02)
    assert float(direct.abs().sum() - direct[1, 0].abs()) < 0.02
    into = patching.effects([(1, 0)]).share
    assert into[0, 0] == pytest.approx(1.0, abs=0.05)
    assert float(into.abs().sum() - into[0, 0].abs()) < 0.02
    # The sender reaches the receiver's keys, neither its queries nor its values.
    keys, others = (patching.effects([(1, 0)], inputs=names).share[0, 0] for names in (["key"], ["query", "value"]))
    assert keys == pytest.approx(float(into[0, 0]), abs=0.02)
    assert abs(float(others)) < 0.02
    assert circuit(patching, stages=3, share=0.25, least=0.05) == [[(1, 0)], [(0, 0)]]


def test_two_tasks_of_one_circuit_overlap() -> None:
    loaded = circuit_model()
    metrics = {}
    for answer, before in ((90, 100), (95, 110)):
        patching = PathPatching(loaded, *induction_task(answer, before, 112), logit_difference(answer, 67))
        metrics[answer] = circuit(patching, share=0.25, least=0.05)
    found = circuit_overlap(metrics[90], metrics[95])
    assert (found.shared, found.jaccard, found.share) == ([(0, 0), (1, 0)], 1.0, 1.0)


def test_overlap_by_hand() -> None:
    found = circuit_overlap([[(0, 1), (2, 3)], [(1, 1)]], [(2, 3), (1, 1), (3, 3), (0, 0)])
    assert found.shared == [(1, 1), (2, 3)]
    assert (found.jaccard, found.share) == (pytest.approx(2 / 5), pytest.approx(2 / 3))
    with pytest.raises(ValueError, match="without heads"):
        circuit_overlap([], [(0, 0)])


def test_the_packaged_models_induction_goes_from_layer_0_to_layer_1() -> None:
    loaded = load_model()
    clean = torch.tensor([loaded.encode("the key qz7 is here, and so on and on: the key qz")])
    changed = torch.tensor([loaded.encode("the key kw7 is here, and so on and on: the key qz")])
    with torch.no_grad():
        assert int(loaded.model(clean).logits[0, -1].argmax()) == ord("7")
    patching = PathPatching(loaded, clean, changed, logit_difference(ord("7"), ord("e")))
    assert {(1, 2), (1, 3)} <= set(patching.effects().top(4))
    # What the previous-token head writes is their keys; their values come from the head that maps tokens to themselves.
    receivers = [(1, head) for head in range(4)]
    assert patching.effects(receivers, inputs=["key"]).top(1) == [(0, 0)]
    assert patching.effects(receivers, inputs=["value"]).top(1) == [(0, 6)]


def test_what_cannot_be_done_is_told() -> None:
    model, ids, metric = tiny("llama"), prompt(1, 8), logit_difference(1, 2)
    patching = PathPatching(model, ids, prompt(1, 8, seed=2), metric)
    mechanism = create_attention("hedgehog", 16, 4, causal=True)
    for call, words in (
        (lambda: PathPatching(model, ids, prompt(1, 9), metric), "the same length"),
        (lambda: patching.effects([(9, 0)]), "no head"),
        (lambda: patching.effects([(1, 0)], senders=[(0, 4)]), "no head"),
        (lambda: patching.effects([(1, 0)], inputs=["keys"]), "query, key, value"),
        (lambda: patching.effects([]), "of some heads"),
        (lambda: circuit(patching, share=0), "at least one stage"),
        (lambda: PathPatching(model, ids, ids, lambda out: out.logits * torch.nan), "NaN"),
        (lambda: PathPatching(mechanism, torch.randn(1, 4, 16), torch.randn(1, 4, 16), metric), "hedgehog offers"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_encoders_and_batches() -> None:
    """A metric of the embedding, over a batch: the mean over rows of each row's effect."""
    model = build("bert")
    metric = lambda out: out.last_hidden_state[:, 0, 0]  # noqa: E731
    clean, changed = prompt(2, 9), prompt(2, 9, seed=3)
    found = path_patching(model, clean, changed, metric, receivers=[(1, 2)], senders=[(0, 1)])
    rows = [
        path_patching(model, clean[i : i + 1], changed[i : i + 1], metric, receivers=[(1, 2)], senders=[(0, 1)])
        for i in range(2)
    ]
    assert_close(found.effects, (rows[0].effects + rows[1].effects) / 2, atol=1e-6, rtol=1e-4)
    assert float(found.effects[0, 1].abs()) > 0
