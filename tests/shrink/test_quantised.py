"""Quantised storage: the codes by loops, the attention over them, what it costs in bytes and in error."""

from __future__ import annotations

import argparse
import csv
import difflib
import inspect
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optimum.quanto.library.extensions import get_extension
from recorder import feed, recording
from tiny_families import FAMILIES, prompt, shallow, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from manyheads.hosts.attend import Scoring, probabilities, with_bias
from manyheads.hosts.loading import load_model
from manyheads.hosts.visibility import Visibility
from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    Full,
    KeyNorm,
    LoCoCo,
    LongHeads,
    Policy,
    Quantised,
    Razor,
    SnapKV,
    StreamingLLM,
    TidalDecode,
)
from manyheads.shrink.coded import ROOM
from manyheads.shrink.group import Group
from manyheads.shrink.quantised import Codec
from manyheads.shrink.store import Store

ENDS = [14, 15, 16, 17, 21, 22, 26]
HALF = 2.0**-10


def padding_of(length: int, left: list[int]) -> Tensor:
    padding = torch.ones(len(left), length, dtype=torch.long)
    for row, count in enumerate(left):
        padding[row, :count] = 0
    return padding


def real(slots: Tensor) -> Tensor:
    return slots >= 0


def filled(how: Quantised, keys: Tensor, values: Tensor) -> tuple[Store, Codec, Group]:
    """A store after a first pass of these keys and values, nothing dropped."""
    codec = how.codec()
    store = Store(codec)
    store.adopt({"keys": keys, "values": values}, 0)
    codec.settle(store.groups, lambda length, heads: 3, real, 0)
    return store, codec, store.groups[0]


def outlying(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose third channel is 30 times the others, around 50."""
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[..., 2] = rows[..., 2] * 30 + 50
    return rows


# The codes.


def half(number: float) -> float:
    """The nearest number of 16 bits, by Python's own conversion."""
    return struct.unpack("e", struct.pack("e", number))[0]


def code_by_hand(entry: list[float], bits: int, width: int) -> tuple[list[int], list[float], list[float], list[float]]:
    """Codes, scales, zeros and decoded numbers of one entry."""
    codes, scales, zeros, decoded = [], [], [], []
    for start in range(0, len(entry), width):
        part = entry[start : start + width]
        zero = half(min(part) - abs(min(part)) * HALF - 2.0**-24)
        scale = half((max(part) - zero) / (2**bits - 1) * (1 + HALF) + 2.0**-24)
        own = [min(2**bits - 1, max(0, round((number - zero) / scale))) for number in part]
        codes, scales, zeros = codes + own, [*scales, scale], [*zeros, zero]
        decoded += [zero + scale * code for code in own]
    return codes, scales, zeros, decoded


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, 64), (4, 4), (8, 3)])
def test_codes_are_those_of_a_loop(bits: int, group_size: int) -> None:
    keys, values = outlying(2, 3, 7, 12), outlying(2, 3, 7, 6, seed=1)
    _, codec, group = filled(Quantised(bits=bits, group_size=group_size, residual=0), keys, values)
    decoded = {name: group.view(name) for name in ("keys", "values")}
    for row in range(2):
        for head in range(3):
            columns = keys[row, head].T.tolist()
            centre = [(min(column) + max(column)) / 2 for column in columns]
            size = [math.sqrt((max(column) - min(column)) / 2) for column in columns]
            for entry in range(7):
                evened = [(k - c) / s for k, c, s in zip(keys[row, head, entry].tolist(), centre, size, strict=True)]
                for name, numbers, shift, stretch in (
                    ("keys", evened, centre, size),
                    ("values", values[row, head, entry].tolist(), [0.0] * 6, [1.0] * 6),
                ):
                    width = max(w for w in range(1, group_size + 1) if len(numbers) % w == 0 and w <= len(numbers))
                    codes, scales, zeros, near = code_by_hand(numbers, bits, width)
                    here = (row, head, entry)
                    assert unpacked(group.rows[name][here], bits) == codes
                    assert group.rows[f"{name}_range"][here].tolist() == [scales, zeros]
                    wanted = [n * s + c for n, s, c in zip(near, stretch, shift, strict=True)]
                    torch.testing.assert_close(decoded[name][here], torch.tensor(wanted, dtype=torch.float64))
    assert codec.how.bits == bits


def unpacked(codes: Tensor, bits: int) -> list[int]:
    numbers = codes.tolist()
    return numbers if bits == 8 else [code % 16 for code in numbers] + [code // 16 for code in numbers]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows,
        lambda rows: rows * 1e-5,
        lambda rows: rows * 300,
        lambda rows: rows + 700,
        lambda rows: rows * 0,
        lambda rows: rows.clamp(0, 1).round(),
        lambda rows: rows[:, :, :1].expand_as(rows),
        lambda rows: rows * (torch.arange(9)[:, None] > 4),
    ],
    ids=["plain", "small", "large", "shifted", "zero", "coarse", "constant", "late"],
)
def test_no_number_is_off_by_more_than_half_a_scale(change: Callable[[Tensor], Tensor], bits: int) -> None:
    keys, values = change(outlying(2, 2, 9, 8).float()).contiguous(), change(outlying(2, 2, 9, 8, seed=1).float())
    store, _, group = filled(Quantised(bits=bits, residual=0), keys, values)
    # Also what comes after the channels were measured.
    more = {"keys": keys.roll(1, 3) * 3, "values": values * 3}
    store.append(more, 9, lambda length, heads: 5)
    store.codec.settle(store.groups, lambda length, heads: 5, real, 0)  # type: ignore[union-attr]
    error_bounds(store, group, "keys", torch.cat([keys, more["keys"]], 2))
    error_bounds(store, group, "values", torch.cat([values, more["values"]], 2))


def error_bounds(store: Store, group: Group, name: str, numbers: Tensor) -> None:
    scale = group.rows[f"{name}_range"][:, :, : group.length, 0].double()
    codec = store.codec
    assert codec is not None
    size = codec.kept["size"].double() if name == "keys" else torch.ones(1)  # type: ignore[union-attr]
    off = (group.view(name).double() - numbers.double()).abs()
    # A last place of float32, on the way there and back.
    assert bool((off <= scale / 2 * size + 4e-7 * numbers.abs().amax()).all())


def test_the_square_root_helps_where_channels_stand_out() -> None:
    keys = outlying(1, 2, 200, 32).float()
    _, _, group = filled(Quantised(bits=4, residual=0), keys, keys)
    off = {name: (group.view(name) - keys).square().mean().sqrt() for name in ("keys", "values")}
    assert off["keys"] < off["values"] / 3


# Attention over the codes.


@contextmanager
def checked(tolerance: float = 1e-5) -> Iterator[list[float]]:
    """Every attention over codes is compared to plain matrices over what the group's view says; keeps the largest
    difference."""
    attend, found = Codec.attend, []

    def watched(self: Codec, group: Group, queries: Tensor, scoring: Scoring, seen: Visibility) -> Tensor:
        out = attend(self, group, queries, scoring, seen)
        mask = with_bias(seen.allowed(slice(0, queries.shape[3]), group.slots()), group.bias())
        weights = probabilities(queries, group.view("keys"), scoring, mask)
        wanted = (weights @ group.view("values")[:, :, None].to(weights.dtype)).to(out.dtype)
        torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
        found.append(float((out - wanted).abs().max()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codec, "attend", watched)
        # Blocks of few entries, and few queries to each, so that there are several.
        patch.setattr("manyheads.shrink.coded.QUERIES", 3)
        patch.setattr("manyheads.shrink.coded.BLOCK", 1)
        yield found


# In the fewer bits those whose scores are plain, capped, and beside sinks.
@pytest.mark.parametrize(
    ("family", "bits"), [*((family, 8) for family in FAMILIES), ("llama", 4), ("gemma2", 4), ("gpt_oss", 4)]
)
def test_every_family(family: str, bits: int) -> None:
    model, tokens, padding = shallow(family), prompt(2, 26), padding_of(26, [0, 5])
    exact = feed(model, DynamicCache(config=model.config), tokens, padding, ENDS)
    with checked() as found:
        given = feed(model, Full(storage=Quantised(bits=bits, residual=2)).make_cache(model), tokens, padding, ENDS)
    assert found
    error = (given - exact).abs().max()
    assert error > 1e-5
    assert error < (0.1 if bits == 8 else 2.0)


POLICIES: list[Policy] = [
    StreamingLLM(budget_tokens=9, sink_size=2),
    KeyNorm(compression_ratio=0.5),
    TOVA(budget_tokens=8, interval=3),
    H2O(budget_tokens=8, allocation=AdaKV()),
    SnapKV(compression_ratio=0.6, window_size=2, kernel_size=3, allocation=AdaKV(floor=0.1)),
    LoCoCo(budget_tokens=8, mem_compress=3, recent_size=2),
    Razor(retrieval=[[1, 0], [0, 0], [0, 1]], sink_size=2, recent_floor=3, compression=100),
]


# Nothing exact is the codes' own matter: two policies are asked of it, by shares of the heads and with a summary.
ON_CODES = [(policy, residual) for policy in POLICIES for residual in (4, 64)]
ON_CODES += [(policy, 0) for policy in POLICIES if isinstance(policy, H2O | Razor)]


@pytest.mark.parametrize(
    ("policy", "residual"), ON_CODES, ids=[f"{residual}-{type(own).__name__}" for own, residual in ON_CODES]
)
def test_any_policy_on_codes(policy: Policy, residual: int) -> None:
    model, tokens, padding = shallow("llama"), prompt(2, 26), padding_of(26, [0, 5])
    policy.storage = None
    with recording() as plain:
        exact = feed(model, policy.make_cache(model), tokens, padding, ENDS)
    policy.storage = Quantised(bits=8, residual=residual)
    cache = policy.make_cache(model)
    with checked() as found, recording() as steps:
        given = feed(model, cache, tokens, padding, ENDS)
    assert found
    # What a first pass keeps is chosen by the numbers themselves.
    assert steps[0][0].after == plain[0][0].after
    alike = sum(own.after == other.after for own, other in zip(steps[0], plain[0], strict=True))
    assert alike >= len(ENDS) // 2
    if residual == 64:
        torch.testing.assert_close(given, exact, atol=1e-5, rtol=1e-5)
    # A choice between near equals may fall otherwise; the logits stay near on the whole.
    assert (given - exact).abs().median() < 0.02


@pytest.mark.parametrize(
    "policy",
    [TidalDecode(top_k=5, sparse_layer_start=1), LongHeads(budget_tokens=12, chunk_size=3)],
    ids=lambda own: type(own).__name__,
)
def test_policies_that_read_a_part(policy: Policy) -> None:
    model, tokens, padding = tiny("llama"), prompt(2, 26), padding_of(26, [0, 5])
    given = []
    for storage in (None, Quantised(bits=4, residual=64), Quantised(bits=8, residual=4)):
        policy.storage = storage
        given.append(feed(model, policy.make_cache(model), tokens, padding, ENDS))
    torch.testing.assert_close(given[1], given[0], atol=1e-5, rtol=1e-5)
    assert (given[2] - given[0]).abs().median() < 0.02


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_is_within_what_the_scales_allow(bits: int) -> None:
    """Scores are off by e = sum |q| scale size / 2 at most, so weights by a factor exp(2 e); values by scale / 2."""
    keys, values = torch.randn(1, 2, 50, 16).double(), torch.randn(1, 2, 50, 16).double()
    queries = torch.randn(1, 2, 3, 1, 16).double() * 0.2
    _, codec, group = filled(Quantised(bits=bits, residual=10), keys, values)
    seen, scoring = Visibility(None, None, 49), Scoring(0.25)
    given = codec.attend(group, queries, scoring, seen)
    exact = probabilities(queries, keys, scoring, None) @ values[:, :, None]
    scales = {name: group.rows[f"{name}_range"][:, :, :50, 0, 0].double() for name in ("keys", "values")}
    size = codec.kept["size"]
    assert size is not None
    off = (scales["keys"].amax(-1)[..., None, None, None] / 2 * size[:, :, None] * queries.abs()).sum(-1) * 0.25
    bound = (2 * off).exp_().sub_(1)[..., None] * values.abs().amax() + scales["values"].amax() / 2
    assert bool(((given - exact).abs() <= bound).all())
    assert float(bound.max()) < (0.1 if bits == 8 else 2.0)


def test_gradients_reach_the_queries() -> None:
    keys, values = torch.randn(1, 2, 90, 8).double(), torch.randn(1, 2, 90, 8).double()
    queries = torch.randn(1, 2, 2, 3, 8).double().requires_grad_()
    _, codec, group = filled(Quantised(bits=8, residual=4), keys, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyheads.shrink.coded.BLOCK", 1)
        seen = Visibility(None, None, 87)
        given = torch.autograd.grad(codec.attend(group, queries, Scoring(0.5), seen).square().sum(), queries)
    mask = seen.allowed(slice(0, 3), group.slots())
    plain = probabilities(queries, group.view("keys"), Scoring(0.5), mask) @ group.view("values")[:, :, None]
    torch.testing.assert_close(given, torch.autograd.grad(plain.square().sum(), queries))


# The exact ones.


def test_the_latest_tokens_are_exact() -> None:
    model, tokens, padding = tiny("llama"), prompt(2, 26), padding_of(26, [0, 5])
    exact = feed(model, DynamicCache(config=model.config), tokens, padding, ENDS)
    given = feed(model, Full(storage=Quantised(bits=4, residual=26)).make_cache(model), tokens, padding, ENDS)
    torch.testing.assert_close(given, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_from_the_first_token_on(dtype: torch.dtype) -> None:
    model, tokens = tiny("llama").to(dtype), prompt(2, 26)
    padding, ends = torch.ones_like(tokens), [1, 2, 3, 9, *range(10, 18), 26]
    exact = feed(model, DynamicCache(config=model.config), tokens, padding, ends)
    cache = Full(storage=Quantised(bits=8, residual=3)).make_cache(model)
    with checked(1e-5 if dtype == torch.float64 else 0.05):
        given = feed(model, cache, tokens, padding, ends)
        assert given.dtype == dtype
        assert (given - exact).abs().max() < 0.3
        cache.reset()
        torch.testing.assert_close(feed(model, cache, tokens, padding, ends), given, atol=0, rtol=0)


def test_what_is_exact_follows_the_tokens() -> None:
    keys, values = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    store, codec, group = filled(Quantised(bits=4, residual=5), keys[:, :, :3], values[:, :, :3])
    for slot in range(3, 40):
        store.append({"keys": keys[:, :, slot : slot + 1], "values": values[:, :, slot : slot + 1]}, slot)
        codec.settle(store.groups, lambda length, heads: 3, real, 0)
        for name, own in (("keys", keys), ("values", values)):
            off = (group.view(name) - own[:, :, : slot + 1]).abs().amax((0, 1, 3))
            assert (off == 0).tolist() == [place > slot - 5 for place in range(slot + 1)]
    assert codec._latest.capacity <= 5 + ROOM + 1


def test_an_overwritten_entry_is_coded_anew() -> None:
    keys, values = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    _, _, group = filled(Quantised(bits=8, residual=4), keys, values)
    before = {name: row.clone() for name, row in group.rows.items()}
    at = torch.tensor([2, 5, 18])[None, None].expand(2, 3, -1)
    new = torch.randn(2, 3, 3, 8)
    new[:, :, 1] = group.view("keys")[:, :, 5]
    group.put("keys", at, new)
    torch.testing.assert_close(group.pick("keys", at), group.view("keys")[:, :, [2, 5, 18]], atol=0, rtol=0)
    torch.testing.assert_close(group.view("keys")[:, :, 18], new[:, :, 2], atol=0, rtol=0)
    torch.testing.assert_close(group.view("keys")[:, :, 2], new[:, :, 0], atol=0.03, rtol=0)
    untouched = [place for place in range(20) if place not in (2, 18)]
    for name in ("keys", "keys_range", "values", "values_range"):
        torch.testing.assert_close(group.rows[name][:, :, untouched], before[name][:, :, untouched], atol=0, rtol=0)
    assert bool((group.rows["keys"][:, :, 18] != before["keys"][:, :, 18]).any())


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_ways_of_generating(family: str, settings: dict[str, Any]) -> None:
    """Exactly so while all is within the residual; on codes the scores of the same text stay near."""
    model = shallow(family)
    tokens = prompt(1, 5).repeat(1 if "prompt_lookup_num_tokens" in settings else 2, 3)
    padding = torch.ones_like(tokens)
    if len(tokens) > 1:
        padding[1, :4] = 0

    def text(cache: Any) -> Tensor:
        common = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(tokens, attention_mask=padding, past_key_values=cache, **common, **settings)

    wanted = text(DynamicCache(config=model.config))
    torch.testing.assert_close(text(Full(storage=Quantised(residual=32)).make_cache(model)), wanted)
    with checked() as found:
        given = text(Full(storage=Quantised(bits=8, residual=2)).make_cache(model))
    assert found
    assert (given == wanted).float().mean() > 0.8


def test_assisted_decoding() -> None:
    model, assistant = tiny("llama"), tiny("llama", num_hidden_layers=2)
    tokens = prompt(1, 20)
    common = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, "assistant_model": assistant}
    wanted = model.generate(tokens, **common)
    with checked() as found, Full(storage=Quantised(bits=8, residual=3))(model) as active:
        given = model.generate(tokens, **common)
    assert found
    assert active.cache is not None
    assert active.cache.get_seq_length() == given.shape[1] - 1
    assert (given == wanted).float().mean() > 0.8


@pytest.mark.parametrize("fed", [3, 9], ids=["few", "many"])
def test_tokens_taken_back_leave_nothing_behind(fed: int) -> None:
    model, tokens = tiny("llama"), prompt(2, 20)
    policy = Full(storage=Quantised(bits=4, residual=4))
    cache, other = policy.make_cache(model), policy.make_cache(model)
    with torch.no_grad():
        for own in (cache, other):
            model(tokens[:, :fed], past_key_values=own)
            own.activate_past_recording()
        model(tokens[:, 9:16], past_key_values=cache)
        cache.crop(-7)
        for step in range(fed, fed + 7):
            given, wanted = (model(tokens[:, step : step + 1], past_key_values=own).logits for own in (cache, other))
            torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
            for own in (cache, other):
                own.crop(0)
    assert cache.layers[0].store.codec._latest.length == 4 + 1


def test_rows_of_a_batch_move_with_their_codes() -> None:
    model, tokens = tiny("llama"), prompt(3, 20)
    cache = TOVA(budget_tokens=12, storage=Quantised(bits=4, residual=3)).make_cache(model)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    group = cache.layers[1].store.groups[0]
    before = group.view("keys")
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(group.view("keys"), before[[2, 0, 0]], atol=0, rtol=0)
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(group.view("keys"), before[[2, 2, 0, 0, 0, 0]], atol=0, rtol=0)
    cache.batch_select_indices(torch.tensor([1, 4]))
    torch.testing.assert_close(group.view("keys"), before[[2, 0]], atol=0, rtol=0)
    with torch.no_grad():
        given = model(tokens[[2, 0], :1], past_key_values=cache).logits
    assert bool(given.isfinite().all())


def test_padding_has_no_say_in_the_channels() -> None:
    model, tokens, padding = tiny("llama"), prompt(2, 26), padding_of(26, [0, 5])
    policy = Full(storage=Quantised(bits=4, residual=2))
    both, alone = policy.make_cache(model), policy.make_cache(model)
    feed(model, both, tokens, padding, [14, 15, 26])
    feed(model, alone, tokens[1:, 5:], padding[1:, 5:], [9, 10, 21])
    for own, other in zip(both.layers, alone.layers, strict=True):
        ours, theirs = own.store.groups[0].view("keys")[1:, :, 5:], other.store.groups[0].view("keys")
        # The same numbers up to rounding before they were coded; a code may then fall one off.
        assert (ours - theirs).abs().gt(1e-4).float().mean() < 0.01


# Bytes.


def test_bytes_with_scales_counted() -> None:
    keys = torch.randn(1, 4, 1000, 128)
    for bits, share in ((4, 0.2), (8, 0.32)):
        codec = Quantised(bits=bits, residual=0).codec()
        store = Store(codec)
        store.adopt({"keys": keys, "values": keys}, 0)
        codec.settle(store.groups, lambda length, heads: 0, real, 0)
        # Two half-sized halves of channels, each with a scale and a zero of two bytes, for keys and for values.
        assert codec.entry_nbytes() == 2 * (128 * bits // 8 + 2 * 4)
        exact = codec.nbytes - 2 * 4 * 4 * 128
        assert store.nbytes == 4 * 1000 * codec.entry_nbytes() + 2 * 4 * 4 * 128 + exact
        assert exact == 2 * 4 * ROOM * 128 * 4
        assert store.nbytes - exact < share * 2 * keys.nbytes
        held = [row for group in store.groups for row in group.rows.values()]
        assert store.nbytes - codec.nbytes == sum(row.untyped_storage().nbytes() for row in held)


def test_a_byte_budget_holds_more_codes_than_numbers() -> None:
    model, tokens, budget = tiny("llama", head_dim=32), prompt(2, 700), 400_000
    lengths = {}
    for storage in (None, Quantised(bits=8, residual=4), Quantised(bits=4, residual=4)):
        cache = TOVA(budget_bytes=budget, storage=storage).make_cache(model)
        with torch.no_grad():
            model(tokens, past_key_values=cache)
            for step in range(3):
                model(tokens[:, step : step + 1], past_key_values=cache)
        assert 0.8 * budget < cache.nbytes <= budget
        lengths[None if storage is None else storage.bits] = cache.lengths()[0][0]
    assert lengths[8] > 2 * lengths[None]
    assert lengths[4] > 1.4 * lengths[8]
    with pytest.raises(ValueError, match=r"TOVA: budget_bytes=9000 comes to 0 entries per head"):
        model(tokens, past_key_values=TOVA(budget_bytes=9000, storage=Quantised(residual=64)).make_cache(model))


class Largest(TorchDispatchMode):
    """Numbers of the largest float tensor that anything gives back."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for own in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(own, Tensor) and own.is_floating_point():
                self.size = max(self.size, own.numel())
        return out


def test_decoding_never_decodes_it_all_at_once() -> None:
    keys = torch.randn(1, 2, 20_000, 32)
    _, codec, group = filled(Quantised(bits=4), keys, keys)
    with Largest() as largest, torch.no_grad():
        codec.attend(group, torch.randn(1, 2, 4, 1, 32), Scoring(0.2), Visibility(None, None, 19_999))
    assert 0 < largest.size <= keys.numel() / 4


# Against the library that transformers uses, on the packaged model.


@pytest.fixture(scope="module")
def packaged() -> PreTrainedModel:
    return load_model().model


TEXTS = (argparse, csv, difflib)


def test_no_worse_than_quanto(packaged: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompts in 4 bits, then 64 tokens in one pass, their own keys exact in both: error of the keys, and KL.
    Heads have 32 channels, so that quanto's groups of 64 are two tokens'."""
    # Two codes to a byte, as quanto's extension in C++ reads them: it would be compiled first, which takes two minutes.
    nibbles = SimpleNamespace(unpack=lambda packed, bits: torch.cat([packed & 15, packed >> bits]))
    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", nibbles)
    caches: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
        str(size): (
            partial(QuantizedCache, "quanto", packaged.config, nbits=4, q_group_size=size),
            lambda layer: layer._dequantize(layer._quantized_keys),
        )
        for size in (32, 64)
    }
    ours = Full(storage=Quantised(bits=4, residual=0))
    caches["ours"] = (partial(ours.make_cache, packaged), lambda layer: layer.store.groups[0].view("keys"))
    found = {name: torch.zeros(2, dtype=torch.float64) for name in caches}
    for module in TEXTS:
        tokens = torch.tensor([list(inspect.getsource(module).encode()[1000:1384])])
        wanted, keys = answer(packaged, DynamicCache(config=packaged.config), tokens, lambda layer: layer.keys)
        for name, (make, held) in caches.items():
            given, near = answer(packaged, make(), tokens, held)
            off = (near - keys).norm() / keys.norm()
            found[name] += torch.stack([off, (wanted.exp() * (wanted - given)).sum(-1).mean()])
    assert bool((found["ours"] < found["32"]).all())
    assert bool((found["ours"] < found["64"]).all())


def answer(model: PreTrainedModel, cache: Any, tokens: Tensor, held: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the last 64 tokens' successors, and the keys that the cache holds of those before."""
    with torch.no_grad():
        model(tokens[:, :-64], past_key_values=cache)
        keys = torch.cat([held(layer) for layer in cache.layers])
        return model(tokens[:, -64:], past_key_values=cache).logits.double().log_softmax(-1), keys.clone()


def passkey(number: int) -> tuple[Tensor, list[int]]:
    text, key = inspect.getsource(argparse)[number * 700 :], str(71_243 + 1_739 * number)
    told = f"\nThe pass key is {key}. Remember it.\n"
    at = 80 + 150 * number
    filler = text[: 1024 - len(told) - 45]
    asked = filler[:at] + told + filler[at:] + "\nWhat is the pass key? The pass key is "
    return torch.tensor([list(asked.encode())]), list(key.encode())


def test_passkeys_are_still_found(packaged: PreTrainedModel) -> None:
    for number in (0, 4):
        asked, key = passkey(number)
        assert spoken(packaged, asked) == key
        for bits in (8, 4):
            with Full(storage=Quantised(bits=bits, residual=32))(packaged):
                assert spoken(packaged, asked) == key


def spoken(model: PreTrainedModel, asked: Tensor) -> list[int]:
    return model.generate(asked, max_new_tokens=5, do_sample=False)[0, -5:].tolist()


# Refused.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 2}, "bits is 4 or 8; got 2"),
        ({"bits": 16}, "bits is 4 or 8; got 16"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1; got 0"),
        ({"residual": -1}, "residual must be a whole number of at least 0; got -1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Quantised(**settings)


def test_what_is_no_storage() -> None:
    with pytest.raises(ValueError, match=r"Full: storage is Quantised\(bits=4\).*; got 4"):
        Full(storage=4)  # type: ignore[arg-type]


def test_odd_channels_are_not_packed() -> None:
    keys = torch.randn(1, 1, 4, 7)
    with pytest.raises(ValueError, match=r"Quantised\(bits=4\) packs channels in pairs; keys have 7: use bits=8"):
        filled(Quantised(bits=4), keys, keys)
    filled(Quantised(bits=8), keys, keys)
