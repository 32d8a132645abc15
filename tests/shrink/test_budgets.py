"""Bytes, budgets, taking back, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder import feed
from tiny_families import prompt, tiny
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CompileConfig,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from manyheads.shrink import H2O, TOVA, AdaKV, Duo, Full, KeyNorm, Policy, PyramidKV, SnapKV, StreamingLLM, release

ONES = torch.ones(1, 600, dtype=torch.long)


def filled(policy: Policy, length: int, singles: int = 3, rows: int = 1) -> Any:
    model = tiny("llama", max_position_embeddings=1024)
    cache = policy.make_cache(model)
    padding = ONES[:, :length].expand(rows, -1)
    ends = [length - singles, *range(length - singles + 1, length + 1)]
    feed(model, cache, prompt(rows, length), padding, ends)
    return cache


def tensors(cache: Any) -> list[torch.Tensor]:
    return [row for layer in cache.layers for group in layer.store.groups for row in group.rows.values()]


def test_nbytes_are_those_of_the_tensors_held() -> None:
    for policy in (
        Full(),
        TOVA(budget_tokens=50),
        Duo(gates=[[1, 0]] * 3, sink_size=2, recent_size=9, compression_ratio=0.5),
    ):
        cache = filled(policy, 200)
        assert cache.nbytes == sum(own.untyped_storage().nbytes() for own in tensors(cache))
    assert len({own.untyped_storage().data_ptr() for own in tensors(cache)}) == len(tensors(cache))


def test_full_holds_little_more_than_it_needs() -> None:
    cache = filled(Full(), 600)
    exact = 600 * 3 * 2 * 2 * 8 * 4
    assert exact <= cache.nbytes <= 1.06 * exact


def test_a_budget_saves_what_it_says() -> None:
    exact = 600 * 3 * 2 * 2 * 8 * 4
    # 8 numbers a key, 8 a value and a slot: four bytes in 68.
    assert filled(StreamingLLM(budget_tokens=150), 600).nbytes <= exact / 4 * 68 / 64 * 1.02
    assert filled(KeyNorm(compression_ratio=0.5), 600).nbytes <= exact / 2 * 68 / 64 * 1.2


@pytest.mark.parametrize("per", [None, "layer", "head"])
@pytest.mark.parametrize("rows", [1, 2])
def test_bytes_are_never_exceeded(per: str | None, rows: int) -> None:
    share = {None: 1, "layer": 3, "head": 6}[per]
    for policy in (
        TOVA(budget_bytes=60000 // share, budget_per=per),
        H2O(budget_bytes=60000 // share, budget_per=per, interval=4),
        KeyNorm(budget_bytes=60000 // share, budget_per=per, allocation=AdaKV()),
    ):
        cache = filled(policy, 400, rows=rows)
        assert 0.9 * 60000 <= cache.nbytes <= 60000


def test_tokens_per_head_layer_and_model() -> None:
    for per, tokens in (("head", 10), ("layer", 20), ("model", 60)):
        assert filled(KeyNorm(budget_tokens=tokens, budget_per=per), 40).lengths() == [[10, 10]] * 3


def test_prefill_only_and_decode_only() -> None:
    assert filled(KeyNorm(budget_tokens=10, when="prefill"), 40, singles=5).lengths() == [[15, 15]] * 3
    model = tiny("llama")
    cache = KeyNorm(budget_tokens=10, when="decode").make_cache(model)
    feed(model, cache, prompt(1, 30), ONES[:, :30], [30])
    assert cache.lengths() == [[30, 30]] * 3
    assert filled(KeyNorm(budget_tokens=10, when="decode"), 40).lengths() == [[10, 10]] * 3


def test_streaming_is_flat() -> None:
    model = tiny("llama", max_position_embeddings=1024)
    cache = StreamingLLM(budget_tokens=32).make_cache(model)
    feed(model, cache, prompt(1, 300), ONES[:, :300], [64, *range(65, 101)])
    early = cache.nbytes
    at = [own.data_ptr() for own in tensors(cache)]
    out = model.generate(prompt(1, 101), past_key_values=cache, max_new_tokens=50, eos_token_id=None, do_sample=False)
    assert out.shape[1] == 151
    # Not one buffer was made anew.
    assert [own.data_ptr() for own in tensors(cache)] == at
    assert cache.nbytes == early
    assert cache.lengths() == [[32, 32]] * 3


def test_speculation_is_taken_back_before_anything_is_dropped() -> None:
    model = tiny("llama")
    tokens = prompt(1, 30)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    for policy in (TOVA(budget_tokens=9), H2O(budget_tokens=9), KeyNorm(budget_tokens=9, allocation=AdaKV())):
        cache = policy.make_cache(model)
        model.generate(tokens.repeat(1, 2), past_key_values=cache, prompt_lookup_num_tokens=3, **settings)
        assert max(max(own) for own in cache.lengths()) <= 18


def test_notes_count_what_was_accepted_and_nothing_else() -> None:
    model = tiny("llama")
    tokens, padding = prompt(1, 20), ONES[:, :20]
    plain, guessed = (H2O(budget_tokens=64).make_cache(model) for _ in range(2))
    feed(model, plain, tokens, padding, [10, 13, 16])
    guessed.activate_past_recording()
    feed(model, guessed, tokens, padding, [10, 13, 18])
    guessed.crop(-2)
    for ours, theirs in zip(guessed.layers, plain.layers, strict=True):
        mass = [layer.store.groups[0].view("mass") for layer in (ours, theirs)]
        torch.testing.assert_close(mass[0], mass[1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mass[0].sum(), torch.tensor(2 * 2 * 16.0))


def test_crop() -> None:
    model = tiny("llama")
    tokens, padding = prompt(1, 20), ONES[:, :20]
    cache, dense = Full().make_cache(model), DynamicCache(config=model.config)
    feed(model, cache, tokens, padding, [15, 16])
    cache.crop(-4)
    assert cache.get_seq_length() == 12
    release(model)
    feed(model, dense, tokens, padding, [12])
    Full().make_cache(model)
    given = model(tokens[:, 12:], past_key_values=cache).logits
    release(model)
    torch.testing.assert_close(given, model(tokens[:, 12:], past_key_values=dense).logits, atol=1e-5, rtol=1e-5)
    shrunk = filled(KeyNorm(budget_tokens=10), 40)
    with pytest.raises(ValueError, match="dropped entries"):
        shrunk.crop(-1)
    with pytest.raises(ValueError, match="seen 40 tokens"):
        shrunk.crop(-41)


def test_batches_are_repeated_selected_and_reset() -> None:
    model = tiny("llama")
    tokens = prompt(2, 20)
    cache = H2O(budget_tokens=8).make_cache(model)
    feed(model, cache, tokens, ONES[:, :20].expand(2, -1), [18])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = model(tokens[[1, 0], 18:], past_key_values=cache).logits
    plain = H2O(budget_tokens=8).make_cache(model)
    feed(model, plain, tokens, ONES[:, :20].expand(2, -1), [18])
    torch.testing.assert_close(
        swapped, model(tokens[:, 18:], past_key_values=plain).logits[[1, 0]], atol=1e-5, rtol=1e-5
    )
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0
    again = model(tokens, past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens, use_cache=False).logits, atol=1e-5, rtol=1e-5)


BAD: list[tuple[Any, str]] = [
    (lambda: StreamingLLM(budget_tokens=4), "budget_tokens=4 is below the 5"),
    (lambda: StreamingLLM(budget_tokens=9, sink_size=-1), "sink_size"),
    (lambda: StreamingLLM(budget_tokens=9, positions="mine"), "'cache' or 'text'"),
    (lambda: KeyNorm(compression_ratio=1.0), "from 0 to below 1; got 1.0"),
    (lambda: KeyNorm(compression_ratio=-0.1), "from 0 to below 1"),
    (lambda: KeyNorm(compression_ratio=float("nan")), "no number"),
    (lambda: KeyNorm(compression_ratio=0.5, budget_tokens=9), "one budget"),
    (lambda: KeyNorm(budget_tokens=0), "at least 1"),
    (lambda: KeyNorm(budget_tokens=2.5), "whole number"),
    (lambda: KeyNorm(budget_bytes=-1), "at least 1"),
    (lambda: KeyNorm(budget_tokens=9, budget_per="row"), "head, layer, model"),
    (lambda: KeyNorm(budget_per="head"), "give one of them"),
    (lambda: KeyNorm(budget_tokens=9, when="never"), "prefill, passes, decode, both"),
    (lambda: KeyNorm(budget_tokens=9, interval=0), "interval"),
    (lambda: Full(budget_tokens=9), "takes no budget"),
    (lambda: SnapKV(budget_tokens=9, window_size=9), "always keeps"),
    (lambda: SnapKV(budget_tokens=99, kernel_size=4), "odd"),
    (lambda: H2O(budget_tokens=9, recent_size=9), "always keeps"),
    (lambda: AdaKV(floor=2.0), "0 to 1"),
    (lambda: PyramidKV(beta=0.5), "at least 1"),
    (lambda: Duo(compression_ratio=0.5), "read_gates"),
    (lambda: Duo(gates=[[1.0], [1.0, 0.0]]), "read_gates"),
    (lambda: Duo(gates=[[1.0]], budget_bytes=1000), "budget_tokens or compression_ratio"),
    (lambda: Duo(gates=[[1.0]], streaming=1.5), "share of the heads"),
    (lambda: Duo(gates=[[1.0]], streaming=0.5, compression_ratio=0.0), "share of streaming heads itself"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_budgets_that_turn_out_too_small() -> None:
    with pytest.raises(ValueError, match=r"budget_bytes=900 comes to 1 entries per head; it always keeps 5"):
        filled(StreamingLLM(budget_bytes=900), 20)
    with pytest.raises(ValueError, match=r"budget_tokens=12 comes to 2 entries per head"):
        filled(StreamingLLM(budget_tokens=12, budget_per="model"), 20)


def test_a_profile_of_another_model(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"gates are for \(2, 2\) .* the model has \(3, 2\)"):
        filled(Duo(gates=[[1.0, 0.0]] * 2, compression_ratio=0.5), 20)
    for text in ("a\tb\n", "1\t2\n3\n", "", "\x00"):
        (tmp_path / "bad.tsv").write_text(text)
        with pytest.raises(ValueError, match="not a table of gates"):
            Duo.read_gates(tmp_path / "bad.tsv")
    with pytest.raises(ValueError, match="not a table of gates"):
        Duo.read_gates(tmp_path / "missing.tsv")


def test_positions_that_cannot_be_moved() -> None:
    with pytest.raises(ValueError, match="positions='text'"):
        StreamingLLM(budget_tokens=9).make_cache(tiny("gpt2"))
    StreamingLLM(budget_tokens=9, positions="text").make_cache(tiny("gpt2"))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def test_models_without_a_cache_to_shrink() -> None:
    with pytest.raises(ValueError, match="not a causal language model"):
        Full().make_cache(BertModel(BertConfig(**SMALL)))
    with pytest.raises(ValueError, match="not a causal language model"):
        Full().make_cache(BertLMHeadModel(BertConfig(**SMALL)))
    seq2seq = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16, vocab_size=50)
    )
    with pytest.raises(ValueError, match="not a causal language model"):
        Full().make_cache(seq2seq)
    with pytest.raises(ValueError, match="not a transformers model"):
        Full().make_cache(torch.nn.Linear(2, 2))


def other(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **settings})).eval()


def test_models_by_the_generic_route() -> None:
    model = other("stablelm", num_key_value_heads=2, max_position_embeddings=64)
    config = model.config
    tokens = torch.arange(3, 15)[None]
    wanted = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with Full()(model):
        given = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.testing.assert_close(given, wanted)
    assert model.config is config
    alibi = other("bloom", n_layer=2, n_head=2)
    before = alibi.config
    with pytest.raises(ValueError, match=r"attention interface|probe"):
        Full().make_cache(alibi)
    assert alibi.config is before
    with pytest.raises(ValueError, match="layers of kind"):
        Full().make_cache(other("qwen3_next", num_key_value_heads=2, num_experts=2, moe_intermediate_size=8))


def test_other_caches_are_refused_inside() -> None:
    model = tiny("llama")
    tokens = prompt(1, 6)
    policy = StreamingLLM(budget_tokens=8)
    with policy(model):
        for cache in (StaticCache(config=model.config, max_cache_len=32), DynamicCache(config=model.config)):
            with pytest.raises(ValueError, match=f"{type(cache).__name__}, which StreamingLLM cannot shrink"):
                model.generate(tokens, past_key_values=cache)
            with pytest.raises(ValueError, match="cannot shrink"):
                model(tokens, past_key_values=cache)
        with pytest.raises(ValueError, match="cache_implementation='static'"):
            model.generate(tokens, cache_implementation="static")
        with pytest.raises(ValueError, match=r"compile_config=.* asks for a static graph"):
            model.generate(tokens, compile_config=CompileConfig())
        cache = model(tokens).past_key_values
    with pytest.raises(ValueError, match="no longer attends"):
        model(tokens, past_key_values=cache)


def test_budgets_of_each_layer() -> None:
    assert filled(KeyNorm(budget_tokens=[5, 10, 20]), 40, singles=3).lengths() == [[5] * 2, [10] * 2, [20] * 2]
    assert filled(KeyNorm(compression_ratio=[0.5, 0.0, 0.75]), 40).lengths() == [[20] * 2, [40] * 2, [10] * 2]
    layers = filled(SnapKV(budget_tokens=[20, 30, 40], window_size=3, budget_per="layer", allocation=AdaKV()), 40)
    assert [sum(own) for own in layers.lengths()] == [20 + 6, 30 + 6, 40 + 6]
    assert filled(StreamingLLM(budget_tokens=(6, 7, 8)), 40, singles=3).lengths() == [[6] * 2, [7] * 2, [8] * 2]
    assert KeyNorm(compression_ratio=[0.0, 0.0]).is_full
    for bad, said in (
        ({"budget_tokens": [4, 0, 4]}, "at least 1; got 0"),
        ({"compression_ratio": [0.5, 1.5, 0.1]}, "got 1.5"),
        ({"budget_tokens": [9, 9, 9], "budget_per": "model"}, "is for layers"),
        ({"budget_tokens": [9, 9, 9], "allocation": PyramidKV()}, "PyramidKV shares one budget"),
    ):
        with pytest.raises(ValueError, match=said):
            KeyNorm(**bad)
    with pytest.raises(ValueError, match="2 numbers, and the model 3 layers"):
        KeyNorm(budget_tokens=[4, 5]).make_cache(tiny("llama"))
    with pytest.raises(ValueError, match="as one number"):
        Duo(gates=[[0.5, 0.2]], budget_tokens=[9])
