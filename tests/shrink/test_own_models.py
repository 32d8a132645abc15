"""Policies on our own models: what they keep and answer is what they do on the same model of transformers' own."""

from functools import cache
from typing import Any

import pytest
import torch
from tiny_families import VOCAB, prompt, shallow
from torch import Tensor

from manyheads.convert import hosted
from manyheads.hosts.taps import record
from manyheads.models import ManyheadsConfig, ManyheadsForCausalLM
from manyheads.shrink import (
    CUR,
    H2O,
    TOVA,
    AdaKV,
    ChunkKV,
    Compactor,
    CriticalKV,
    Duo,
    ExpectedAttention,
    Finch,
    Full,
    KeyDiff,
    KeyNorm,
    KVzip,
    LagKV,
    Leverage,
    LongHeads,
    NonCausal,
    Policy,
    SimLayerKV,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    release,
)

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "snapkv": SnapKV(budget_tokens=9, window_size=3, kernel_size=3),
    "adakv": SnapKV(budget_tokens=9, window_size=3, kernel_size=3, allocation=AdaKV()),
    "streaming": StreamingLLM(budget_tokens=9),
    "streaming-text": StreamingLLM(budget_tokens=9, positions="text"),
    "moved": KeyNorm(budget_tokens=9, positions="cache"),
    "h2o": H2O(budget_tokens=9),
    "tova": TOVA(budget_tokens=9),
    "expected": ExpectedAttention(budget_tokens=9),
    "critical": CriticalKV(budget_tokens=9, base=SnapKV(window_size=3)),
    "chunk": ChunkKV(budget_tokens=9, base=KeyNorm(), chunk_length=4),
    "compactor": Compactor(budget_tokens=15),
    "cur": CUR(budget_tokens=9),
    "keydiff": KeyDiff(budget_tokens=9),
    "lagkv": LagKV(budget_tokens=9, lag_size=4),
    "leverage": Leverage(budget_tokens=15),
    "noncausal": NonCausal(budget_tokens=15),
    "simlayer": SimLayerKV(lazy_threshold=0.1, sink_size=2, recent_size=6),
    "finch": Finch(budget_tokens=9, window_size=3),
    "duo": Duo(gates=[[1.0, 0.0]] * 2, compression_ratio=0.5, sink_size=2, recent_size=4),
    "longheads": LongHeads(budget_tokens=12, chunk_size=4),
    "tidal": TidalDecode(top_k=6, sparse_layer_start=0),
}


def close(found: Tensor, wanted: Tensor) -> None:
    """As far as transformers, which turns by angles in float32, says."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-6)


def pair(family: str = "llama") -> tuple[Any, Any]:
    """A model of transformers' own, and ours with the same weights."""
    model = shallow(family).double().eval()
    return model, hosted(model)


def passes(model: Any, policy: Policy, ids: Tensor, mask: Tensor, cuts: list[int]) -> tuple[Any, Tensor]:
    """Logits of a prompt and what follows, cut into passes, and the cache."""
    cache, logits, start = policy.make_cache(model), [], 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for end in (*cuts, ids.shape[1]):
        out = model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache
        )
        assert out.past_key_values is cache
        logits.append(out.logits)
        start = end
    return cache, torch.cat(logits, 1)


lasting = cache(pair)  # for tests that leave both as they were


def without_repeats(rows: int, length: int) -> Tensor:
    """Ids, each once in its row: before rotation two copies of a token have the same key in the first layer, and which
    of them a policy keeps is for rounding to say, on each processor in its way."""
    draw = torch.Generator().manual_seed(0)
    return torch.stack([3 + torch.randperm(VOCAB - 3, generator=draw)[:length] for _ in range(rows)])


def same(family: str, policy: Policy) -> None:
    theirs, ours = lasting(family)
    ids, mask = without_repeats(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[0, :4] = 0
    cuts = [20, 21, 23]
    wanted_cache, wanted = passes(theirs, policy, ids, mask, cuts)
    cache, found = passes(ours, policy, ids, mask, cuts)
    assert cache.lengths() == wanted_cache.lengths()
    for mine, other in zip(cache.layers, wanted_cache.layers, strict=True):
        for group, like in zip(mine.store.groups, other.store.groups, strict=True):
            assert torch.equal(group.slots(), like.slots())
    real = mask.bool()
    close(found[real], wanted[real])
    release(theirs)
    release(ours)


@pytest.mark.parametrize("name", POLICIES)
def test_as_on_llama(name: str) -> None:
    same("llama", POLICIES[name])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2"])
def test_as_in_every_family(family: str) -> None:
    same(family, TOVA(budget_tokens=5))


def test_kvzip_asks_for_the_text_again() -> None:
    texts, held = [], []
    for model in pair():
        with KVzip(budget_tokens=8)(model) as active:
            texts.append(model.generate(prompt(1, 20), max_new_tokens=6, do_sample=False))
        held.append(active.cache.lengths())
    assert torch.equal(*texts)
    assert held[0] == held[1]
    assert max(map(max, held[1])) < 25


@pytest.mark.parametrize("how", ["greedy", "beams", "chunks", "guesses"])
def test_generate_as_the_model_alone(how: str) -> None:
    """Nothing to drop: the text is the text, however it is generated."""
    _, model = pair()
    ids, mask = prompt(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[1, :6] = 0
    more: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "chunks": {"prefill_chunk_size": 4},
        "guesses": {"prompt_lookup_num_tokens": 3},
    }[how]
    if how == "guesses":
        ids, mask = ids[:1], mask[:1]
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **more)
    for policy in (Full(), KeyNorm(budget_tokens=60)):
        with policy(model) as active:
            found = model.generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **more)
        assert torch.equal(found, wanted)
        assert active.cache.lengths()[0][0] >= wanted.shape[1] - 1
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3).shape[1] == 18


@pytest.mark.parametrize("how", ["beams", "guesses"])
def test_generate_as_on_llama(how: str) -> None:
    theirs, ours = pair()
    ids = prompt(1, 24)
    more: dict[str, Any] = {"num_beams": 3} if how == "beams" else {"prompt_lookup_num_tokens": 3}
    texts = []
    for model in (theirs, ours):
        with StreamingLLM(budget_tokens=10)(model):
            texts.append(model.generate(ids, max_new_tokens=8, do_sample=False, **more))
    assert torch.equal(*texts)


def test_a_second_turn_hides_earlier_tokens() -> None:
    theirs, ours = pair()
    ids = prompt(2, 19)
    rows = []
    for model in (theirs, ours):
        cache = Full().make_cache(model)
        model(ids[:, :14], attention_mask=torch.ones(2, 14, dtype=torch.long), past_key_values=cache)
        mask = torch.ones(2, 19, dtype=torch.long)
        mask[1, 10:14] = 0
        places = (mask.cumsum(1) - 1)[:, 14:]
        rows.append(model(ids[:, 14:], attention_mask=mask, position_ids=places, past_key_values=cache).logits)
    close(rows[1], rows[0])
    alone = torch.cat([ids[1:, :10], ids[1:, 14:]], 1)
    close(rows[1][1], ours(alone).logits[0, 10:])


def test_a_mask_of_the_callers_own() -> None:
    theirs, ours = pair()
    ids, seen = prompt(2, 12), torch.ones(12, 12, dtype=torch.bool).tril()
    seen[6:, 2] = False
    for policy in (Full(), KeyNorm(budget_tokens=6)):
        rows = []
        for model in (theirs, ours):
            cache = policy.make_cache(model)
            first = model(ids[:, :9], attention_mask=seen[None, None, :9, :9].expand(2, 1, 9, 9), past_key_values=cache)
            last = model(ids[:, 9:], attention_mask=seen[None, None, 9:].expand(2, 1, 3, 12), past_key_values=cache)
            rows.append(torch.cat([first.logits, last.logits], 1))
        close(rows[1], rows[0])


def test_no_number_stays_no_number_and_padding_is_not_read() -> None:
    _, model = pair()
    embeds = model.get_input_embeddings()(prompt(2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    embeds = embeds.detach().clone()
    embeds[0, 1] = torch.nan
    embeds[1, 7] = torch.nan
    cache = Full().make_cache(model)
    first = model(inputs_embeds=embeds[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits
    last = model(inputs_embeds=embeds[:, 9:], attention_mask=mask, past_key_values=cache).logits
    release(model)
    whole = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    found = torch.cat([first, last], 1)
    assert bool(found[1, 7:].isnan().all())
    assert bool(found[0, 3:].isfinite().all())
    torch.testing.assert_close(found[:, 3:], whole[:, 3:], equal_nan=True, rtol=1e-9, atol=1e-9)


def test_rows_are_reordered_with_what_is_known_of_them() -> None:
    theirs, ours = pair()
    ids, mask = prompt(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[0, :4] = 0
    order, rows = torch.tensor([2, 0, 0]), []
    for model in (theirs, ours):
        cache = KeyNorm(budget_tokens=5).make_cache(model)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cache.reorder_cache(order)
        told = torch.cat([mask[order], torch.ones(3, 1, dtype=torch.long)], 1)
        places = positions[order, -1:] + 1
        rows.append(model(ids[:, :1], attention_mask=told, position_ids=places, past_key_values=cache).logits)
        cache.reset()
        assert cache.get_seq_length() == 0
        model(ids, past_key_values=cache)
    close(rows[1], rows[0])


def own(*layers: Any, **more: Any) -> ManyheadsForCausalLM:
    torch.manual_seed(0)
    config = ManyheadsConfig(
        layers=list(layers), num_hidden_layers=len(layers), hidden_size=32, num_attention_heads=4, vocab_size=61,
        intermediate_size=32, **more,
    )  # fmt: skip
    return ManyheadsForCausalLM(config).double().eval()


def test_mechanisms_that_change_what_is_projected_or_given_out() -> None:
    model = own({"name": "gqa", "kv_heads": 2}, {"name": "moh", "shared_heads": 1, "active_heads": 2}, "softmax")
    ids = prompt(2, 14)
    wanted = model(ids).logits
    cache = Full().make_cache(model)
    found = torch.cat([model(ids[:, i : i + 7], past_key_values=cache).logits for i in (0, 7)], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with KeyNorm(budget_tokens=6)(model) as active:
        model.generate(ids, max_new_tokens=4, do_sample=False)
    assert active.cache.lengths()[0] == [6, 6]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: own("softmax", "based"), r"layer 1 \(based\) keeps a state in a form of its own"),
        (lambda: own("entmax"), r"layer 0 \(entmax\) has a rule of its own .*normalise"),
        (lambda: own("softmax", short_conv=3), "layer 0 .*short convolution"),
        (lambda: own("mla"), r"layer 0 \(mla\)"),
    ],
)
def test_layers_of_which_nobody_could_choose(model: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Full().make_cache(model())


def test_weights_and_taps_are_refused_inside() -> None:
    _, model = pair()
    with KeyNorm(budget_tokens=6)(model):
        with pytest.raises(ValueError, match="outside the policy"):
            model(prompt(1, 8), output_attentions=True)
        with pytest.raises(ValueError, match="outside the policy"), record(model):
            model(prompt(1, 8))
    assert model(prompt(1, 8), output_attentions=True).attentions[0] is not None
