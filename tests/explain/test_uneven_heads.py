"""Checkpoints whose layers have different numbers of heads, as pruning over all layers leaves them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import prompt, tiny
from torch.testing import assert_close

from manyheads.convert.pruned import cut
from manyheads.explain.attributions import LogitFlow
from manyheads.explain.explanation import explain_text
from manyheads.explain.views import AttentionStore, read_store
from manyheads.heads.influence import of_sequence
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.taps import record


def uneven() -> Any:
    """Two, four and two heads."""
    return cut(tiny("llama"), [[0, 1], [0, 1, 2, 3], [2, 3]])


def counts(model: Any) -> list[int]:
    with torch.no_grad(), record(model) as calls:
        model(prompt(1, 5))
    return [call.heads for call in calls]


def test_the_store_holds_the_heads_of_the_widest_layer_and_nothing_for_those_that_are_gone() -> None:
    model, ids = uneven(), prompt(1, 9)
    heads = counts(model)
    assert len(set(heads)) > 1
    store = read_store(model, {"input_ids": ids})
    assert list(store.heads) == list(range(max(heads)))
    with torch.no_grad(), record(model) as calls:
        model(ids)
    assert AttentionStore.from_calls(calls).key == store.key
    for layer, call in enumerate(calls):
        for head in range(max(heads)):
            own = call.weights()[0, head] if head < call.heads else torch.zeros(9, 9)
            assert_close(torch.from_numpy(store.matrix(layer, head)), own, atol=2e-2, rtol=0)


def test_logit_flow_adds_up_over_layers_of_different_widths() -> None:
    model, ids = uneven(), prompt(2, 9)
    parts = LogitFlow(model).decompose(ids, [3, 5])
    assert_close(parts.total, parts.logit, atol=1e-4, rtol=1e-4)
    for layer, own in enumerate(counts(model)):
        assert parts.heads[:, layer, own:].abs().sum() == 0


def test_a_profile_of_them_is_refused_by_name() -> None:
    model, ids = uneven(), prompt(1, 9)[0]
    with pytest.raises(ValueError, match="heads, and a profile is a table of layers with the same number"):
        of_sequence(model, ids, torch.ones(9, dtype=torch.bool).index_fill(0, torch.tensor([8]), False), [2], 1)


def test_explain_takes_what_prune_wrote() -> None:
    """The packaged model: a page with all that does not compare heads of different layers feature by feature."""
    small = cut(load_model().model, [list(range(2 * layer, 8)) for layer in range(4)])
    found = explain_text(Loaded(small, None, "small"), "x = 1\ny = ", methods=["rollout", "logit-flow"], heads=False)
    assert len({len(row) for row in found.report["entropy"]}) == 1
    assert found.report["attributions"]
