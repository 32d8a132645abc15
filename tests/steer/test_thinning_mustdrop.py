"""MustDrop against loops: windows, keys and thresholds; what is left is the whole model with the others hidden."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, grown, hidden, llava

from manyheads.hosts.taps import record
from manyheads.steer.method import Prompt, method
from manyheads.steer.thinning.mustdrop import alike_windows, must_drop
from manyheads.steer.thinning.patches import thinned_patches

GIVEN = batch()


def test_windows_are_alike_as_by_loops() -> None:
    torch.manual_seed(0)
    patches = torch.randn(2, 36, 5, dtype=torch.float64)
    windows, alike = alike_windows(patches, 3)
    for w, (top, left) in enumerate([(0, 0), (0, 3), (3, 0), (3, 3)]):
        own = [(top + i) * 6 + left + j for i in range(3) for j in range(3)]
        assert windows[w].tolist() == own
        for b in range(2):
            pairs = [cosine_similarity(patches[b, i], patches[b, j], dim=0) for i, j in combinations(own, 2)]
            assert_close(alike[b, w], sum(pairs, torch.zeros((), dtype=torch.float64)) / len(pairs))
    with pytest.raises(ValueError, match="square grid"):
        alike_windows(patches, 4)


@contextmanager
def tower_hidden(tower: Any, gone: Tensor, start: int) -> Iterator[None]:
    """gone [images, n]: keys that are hidden from every other patch from layer `start` on."""
    n = gone.shape[1]
    seen = ~gone[:, None, None].expand(-1, 1, n, -1) | torch.eye(n, dtype=torch.bool)
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: ((args[0], seen), kwargs), with_kwargs=True)
        for layer in tower.encoder.layers[start:]
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_patches_that_left_are_hidden_ones_and_hidden_states_are_as_long_as_ever() -> None:
    tower = llava().model.vision_tower
    gone = torch.zeros(2, 10, dtype=torch.bool)
    gone[0, [2, 3]], gone[1, [5, 6, 7, 9]] = True, True
    with torch.no_grad():
        with tower_hidden(tower, gone, 1):
            wanted = tower(GIVEN["pixel_values"], output_hidden_states=True).hidden_states
        with thinned_patches(tower, lambda layer, states, there: ~gone if layer == 1 else None):
            found = tower(GIVEN["pixel_values"], output_hidden_states=True).hidden_states
        whole = tower(GIVEN["pixel_values"], output_hidden_states=True).hidden_states
    assert [own.shape[1] for own in found] == [10, 10, 10]
    assert_close(found[2][~gone], wanted[2][~gone])
    assert_close(found[2][gone], whole[1][gone])


def attention(model: Any, gone: dict[int, Tensor], layer: int) -> Tensor:
    """[b, q, m] mean of heads of the whole model with keys hidden."""
    with torch.no_grad(), hidden(model, gone, GIVEN["attention_mask"]), record(model, stack="language") as calls:
        model(**GIVEN)
    return calls[layer].weights().mean(1)


def test_a_prompt_keeps_by_both_thresholds_and_keys_and_the_cache_settles() -> None:
    model, globally, individually = llava(layers=5), 0.1, 0.14
    settings: dict[str, Any] = {"layers": [1, 2], "similarity": 2.0, "key_share": 0.2}
    with torch.no_grad(), record(model, stack="vision") as calls:
        model(**GIVEN)
    to = calls[-1].weights().mean(1)[:, 0, 1:]
    keys = [set(own.topk(math.ceil(0.2 * 9)).indices.tolist()) for own in to]
    image = GIVEN["input_ids"].eq(IMAGE)
    gone = {layer: torch.zeros(2, 15, dtype=torch.bool) for layer in range(5)}
    for layer in (1, 2):
        weights = attention(model, gone, layer)
        for b in range(2):
            places = image[b].nonzero()[:, 0].tolist()
            words = [i for i in range(15) if i > places[-1]]
            live = [j for j in places if not gone[layer][b, j]]
            total = sum(float(weights[b, t, j]) for t in words for j in live)
            for number, j in enumerate(places):
                column = [float(weights[b, t, j]) for t in words]
                if sum(column) < globally * total and max(column) < individually and number not in keys[b]:
                    for later in range(layer + 1, 5):
                        gone[later][b, j] = True
    counts = [(image & ~gone[layer]).sum(1).tolist() for layer in range(5)]
    assert counts[2] == [6, 5]  # some by either threshold, each row its own
    words = torch.tensor([[12, 13], [22, 23]])
    with torch.no_grad():
        with must_drop(model, globally, individually, **settings) as thinning:
            out = model(**GIVEN)
            whole = grown(GIVEN, words)
            more = model(
                input_ids=words, attention_mask=whole["attention_mask"], position_ids=whole["position_ids"][:, 15:],
                past_key_values=out.past_key_values,
            ).logits  # fmt: skip
        with hidden(model, gone, GIVEN["attention_mask"]):
            wanted = model(**GIVEN).logits
    assert thinning.image_tokens == counts
    there = GIVEN["attention_mask"].bool() & ~gone[4]
    assert_close(out.logits[there], wanted[there])
    lengths = [int((there[b]).sum()) for b in range(2)]
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [17] + [max(lengths) + 2] * 4
    # What comes later sees at layers 1 and 2 what stayed to the end; the prompt saw more there.
    late = torch.zeros(2, 17, dtype=torch.bool)
    late[:, :15] = gone[4]
    assert_close(more, by_settled(model, whole, gone, late))


def by_settled(model: Any, whole: dict[str, Tensor], gone: dict[int, Tensor], late: Tensor) -> Tensor:
    """Logits of the last two tokens, without a cache: they see the settled keys, the prompt what it saw."""
    hooks = []

    def hide(index: int) -> Any:
        def before(module: Any, args: Any, kwargs: Any) -> Any:
            seen = torch.zeros(2, 1, 17, 17, dtype=torch.bool)
            for b in range(2):
                for i in range(17):
                    for j in range(i + 1):
                        out = late[b, j] if i > 14 and index > 0 else j < 15 and gone[index][b, j]
                        seen[b, 0, i, j] = i == j or (bool(whole["attention_mask"][b, j]) and not bool(out))
            return args, {**kwargs, "attention_mask": seen}

        return before

    for index, layer in enumerate(model.model.language_model.layers):
        hooks.append(layer.register_forward_pre_hook(hide(index), with_kwargs=True))
    with torch.no_grad():
        logits: Tensor = model(**whole, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits[:, 15:]


def test_alike_windows_become_one_token_each_image_by_its_own() -> None:
    model, flat = llava(), {**GIVEN, "pixel_values": GIVEN["pixel_values"].clone()}
    flat["pixel_values"][1] = 0.5
    model.model.vision_tower.embeddings.position_embedding.weight.data.zero_()
    with torch.no_grad(), must_drop(model, 0.0, 0.0, similarity=0.9) as thinning:
        found = model(**flat).logits
    assert thinning.image_tokens == [[9, 1]] * 4
    # All nine patches of the second picture are the same, so that their mean is one of them: the whole model on the
    # token that stands for them, the tower seeing it once.
    gone = torch.zeros(2, 10, dtype=torch.bool)
    gone[1, 1:9] = True
    hide = torch.zeros(2, 15, dtype=torch.bool)
    hide[1, GIVEN["input_ids"][1].eq(IMAGE).nonzero()[:-1, 0]] = True
    seen = hidden(model, dict.fromkeys(range(4), hide), GIVEN["attention_mask"])
    with torch.no_grad(), tower_hidden(model.model.vision_tower, gone, 1), seen:
        wanted = model(**flat).logits
    there = GIVEN["attention_mask"].bool() & ~hide
    assert_close(found[there], wanted[there])


def test_neutral_generation_and_what_is_refused() -> None:
    model, own = llava(), method("must_drop")
    given = {name: tensor for name, tensor in GIVEN.items() if name != "position_ids"}
    with torch.no_grad():
        wanted = model(**GIVEN).logits
        with own.open(model, Prompt(GIVEN), **own.neutral):
            assert torch.equal(model(**GIVEN).logits, wanted)
        with own.open(model, Prompt(GIVEN), globally=0.2, individually=0.2) as thinning:
            out = model.generate(**given, max_new_tokens=3, do_sample=False)
            assert out.shape == (2, 18)
            assert thinning.held_bytes < thinning.full_bytes
        features = model.get_image_features(GIVEN["pixel_values"])
        with must_drop(model), pytest.raises(ValueError, match="pixel_values"):
            model(input_ids=GIVEN["input_ids"], mm_encoder_outputs={"image": features})
    for words, arguments in (
        ("layers lie", {"layers": [3]}),
        ("shares", {"key_share": 2}),
        ("shares", {"globally": -1}),
    ):
        with pytest.raises(ValueError, match=words), must_drop(model, **arguments):
            pass
