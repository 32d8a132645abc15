"""AIM against loops: which tokens are merged into which, where attention flows, and how many are left per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, hidden, llava

from manyheads.hosts.taps import record
from manyheads.steer.method import Prompt, method
from manyheads.steer.thinning.aim import merge_and_prune, merge_pairs, page_rank, top

GIVEN = batch()


def by_loops(tokens: Tensor, count: int) -> Tensor:
    a, b = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
    best = {}
    for i in a:
        scores = [float(cosine_similarity(tokens[i], tokens[j], dim=0)) for j in b]
        best[i] = (max(scores), b[scores.index(max(scores))])
    order = sorted(a, key=lambda i: -best[i][0])
    out = [tokens[i] for i in order[count:]]
    for j in b:
        own = [tokens[j], *(tokens[i] for i in order[:count] if best[i][1] == j)]
        out.append(sum(own[1:], own[0]) / len(own))
    return torch.stack(out)


@pytest.mark.parametrize(("n", "count"), [(8, 4), (9, 4), (9, 5), (9, 2), (7, 1), (2, 1)])
def test_pairs_are_merged_as_by_loops(n: int, count: int) -> None:
    torch.manual_seed(n + count)
    tokens = torch.randn(n, 5, dtype=torch.float64)
    found, made = merge_pairs(tokens, count)
    assert_close(found, by_loops(tokens, count))
    assert sorted(number for numbers in made for number in numbers) == list(range(n))
    assert_close(torch.stack([tokens[numbers].mean(0) for numbers in made]), found)


def test_doubles_merge_exactly_and_nothing_asked_is_nothing_done() -> None:
    tokens = torch.randn(4, 3, dtype=torch.float64).repeat_interleave(2, 0)
    assert_close(merge_pairs(tokens, 4)[0], tokens[1::2])
    assert merge_pairs(tokens, 0)[0] is tokens
    assert merge_pairs(tokens[:1], 1)[0].shape == (1, 3)
    assert merge_pairs(tokens, 100)[0].shape == (4, 3)


def test_attention_flows_as_by_loops() -> None:
    model = llava()
    live = GIVEN["attention_mask"].bool()
    with torch.no_grad(), record(model, stack="language") as calls:
        model(**GIVEN)
    call = calls[1]
    found = page_rank(call, live)
    scores = call.query @ call.key.repeat_interleave(2, 1).transpose(2, 3) * call.scale
    for b in range(2):
        first = int(live[b].nonzero()[0])
        squares = torch.zeros(15, dtype=torch.float64)
        for h in range(4):
            m = torch.zeros(15, 15, dtype=torch.float64)
            for i in range(first, 15):
                m[i, first : i + 1] = (scores[b, h, i, first : i + 1] / 0.1).softmax(0)
            p = live[b].double() / live[b].sum()
            for _ in range(5):
                p = torch.stack([sum(p[i] * m[i, j] for i in range(15)) for j in range(15)])
            squares += p**2
        assert_close(found[b], (squares / 4).sqrt())


def test_the_best_of_each_row_stay() -> None:
    image = torch.tensor([[False, True, True, True], [True, True, False, True]])
    scores = torch.tensor([[9.0, 1, 3, 2], [5, 6, 0, 7]])
    assert_close(
        top(image, scores, torch.tensor([1, 2])), torch.tensor([[True, False, True, False], [False, True, True, True]])
    )


def test_a_model_prunes_by_the_schedule_what_is_ranked_least() -> None:
    model = llava(layers=6)
    with torch.no_grad(), merge_and_prune(model, 0, start=2, fall=3) as thinning:
        found = model(**GIVEN).logits
    assert thinning.image_tokens == [[9, 9]] * 3 + [[6, 6], [3, 3], [0, 0]]
    gone = {layer: torch.zeros(2, 15, dtype=torch.bool) for layer in range(6)}
    image, live = GIVEN["input_ids"].eq(IMAGE), GIVEN["attention_mask"].bool()
    for layer, keep in ((2, 6), (3, 3), (4, 0)):
        # What is hidden so far decides what this layer attends to; hidden tokens start with nothing.
        with torch.no_grad(), hidden(model, gone, live), record(model, stack="language") as calls:
            model(**GIVEN)
        rank = page_rank(calls[layer], live & ~gone[layer])
        stay = top(image & ~gone[layer], rank, torch.tensor([keep, keep]))
        for later in range(layer + 1, 6):
            gone[later] = gone[later] | ~stay
    with torch.no_grad(), hidden(model, gone, live):
        wanted = model(**GIVEN).logits
    there = live & ~gone[5]
    assert_close(found[there], wanted[there])


def test_merged_tokens_go_through_the_model_in_the_place_of_theirs() -> None:
    model, seen = llava(), []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        with merge_and_prune(model, 2, start=4) as thinning:
            model(**GIVEN)
        model(**GIVEN)
    hook.remove()
    merged, whole = seen
    # Of nine tokens four go, then two.
    assert thinning.image_tokens == [[3, 3]] * 4
    tokens, first = merge_pairs(whole[0, 3:12], 4)
    tokens, second = merge_pairs(tokens, 2)
    places = [first[numbers[0]][0] for numbers in second]
    order = sorted(range(3), key=lambda i: places[i])
    assert_close(merged[0], torch.cat([whole[0, :3], tokens[order], whole[0, 12:]]))


def test_neutral_is_the_model_and_odd_settings_are_refused() -> None:
    model, own = llava(), method("merge_and_prune")
    with torch.no_grad():
        wanted = model(**GIVEN).logits
        with own.open(model, Prompt(GIVEN), **own.neutral):
            assert torch.equal(model(**GIVEN).logits, wanted)
    bad: list[Any] = [{"merges": -1}, {"start": -1}, {"fall": 0}]
    for arguments in bad:
        with pytest.raises(ValueError, match="merge_and_prune"), merge_and_prune(model, **arguments):
            pass


def test_generation_with_pruned_and_merged_tokens() -> None:
    model = llava(layers=6)
    given = {name: own for name, own in GIVEN.items() if name != "position_ids"}
    with torch.no_grad(), merge_and_prune(model) as thinning:
        both = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert thinning.held_bytes < 0.7 * thinning.full_bytes
        for row in range(2):
            own = slice(int(given["attention_mask"][row].argmax()), None)
            one = {
                "input_ids": given["input_ids"][row : row + 1, own],
                "attention_mask": given["attention_mask"][row : row + 1, own],
                "pixel_values": given["pixel_values"][row : row + 1],
            }
            alone = model.generate(**one, max_new_tokens=4, do_sample=False)
            assert_close(alone[0, -4:], both[row, -4:])
