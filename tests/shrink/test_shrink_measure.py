"""What `manyheads shrink` measures: questions of the right size, and figures against plain loops over such calls."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.probes import NAMES
from manyheads.hosts.questions import Questions, Trial, held_out, keys_in, split
from manyheads.shrink import Full, Policy, SnapKV, StreamingLLM, measure, release
from manyheads.shrink.measure import (
    agreed,
    batches,
    continuation,
    follow,
    follow_and_go_on,
    measure_answers,
    measure_cost,
    measure_text,
    take_reference,
    windows_cut,
)
from manyheads.shrink.variants import known_policies

SIZES = {"layers": 2, "kv_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def packaged() -> Loaded:
    return load_model(None)


@pytest.fixture(scope="module")
def small() -> Loaded:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=SIZES["layers"],
        num_attention_heads=4,
        num_key_value_heads=SIZES["kv_heads"],
        head_dim=SIZES["head_dim"],
        initializer_range=0.3,
    )
    return Loaded(LlamaForCausalLM(config).eval(), None, "small")


class Joined:
    """A tokenizer of words that keeps the space before a word in the word, and has a first token."""

    bos_token_id = 0

    def __init__(self) -> None:
        self.known: dict[str, int] = {"<s>": 0}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        words = text.replace(" ", "\0 ").replace("\n", "\0\n").split("\0")
        return [self.known.setdefault(word, len(self.known)) for word in words if word]

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *self.encode(text)]}

    def decode(self, ids: list[int]) -> str:
        names = {number: word for word, number in self.known.items()}
        return "".join(names[i] for i in ids)


# -- questions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [256, 701])
@pytest.mark.parametrize("words", [False, True])
def test_trials_have_their_length_and_hold_their_answers(small: Loaded, length: int, words: bool) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    of_words = LlamaConfig(vocab_size=2**16, **sizes)
    loaded = Loaded(LlamaForCausalLM(of_words), Joined(), "words") if words else small
    questions = Questions(loaded)
    made = [questions.passkey(length, depth, 0) for depth in (0.0, 0.5, 1.0)]
    made += [questions.needle(length, 0.25, 4), questions.recall(length, 1)]
    for trial in made:
        assert len(trial.prefix) + len(trial.tail) == length
        prompt = loaded.decode(trial.prefix)
        assert prompt.startswith("<s>") == words
        for start, stop in trial.answers:
            key = loaded.decode(trial.tail[start:stop]).strip()
            assert key.isdigit()
            assert key in prompt
            # The question ends where the answer begins.
            assert loaded.decode(trial.tail[:start]).rstrip().endswith("is")
    assert len(made[-1].answers) == keys_in(length)
    assert trial == Questions(loaded).recall(length, 1)
    assert trial != questions.recall(length, 2)


def test_depth_is_the_share_of_filler_before_the_key(small: Loaded) -> None:
    questions = Questions(small, text="ab" * 4000)
    for depth in (0.0, 0.25, 1.0):
        prompt = small.decode(questions.passkey(1000, depth, 0).prefix)
        before, after = prompt.split("\nThe pass key is ")
        filler = len(after.split("Remember it.\n")[1])
        assert abs(len(before) - depth * (len(before) + filler)) <= 0.5


def test_recall_rows_fit_into_one_batch(small: Loaded) -> None:
    questions = Questions(small)
    trials = [questions.recall(512, number) for number in range(6)]
    assert [len(batch) for batch in batches(trials)] == [6]
    asked = {name for trial in trials for name in NAMES if name in small.decode(trial.tail)}
    assert len(asked) > 6


def test_batches_stay_within_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "TOKENS_AT_ONCE", 25)
    trials = [Trial([1] * 8, [2] * 2, ()) for _ in range(5)] + [Trial([1] * 7, [2] * 3, ())]
    assert [len(batch) for batch in batches(trials)] == [2, 2, 1, 1]


def test_questions_within_the_prompt(small: Loaded) -> None:
    trial = Questions(small).recall(512, 0)
    own = trial.within()
    assert len(own) == keys_in(512)
    for one, (start, stop) in zip(own, trial.answers, strict=True):
        assert one.prefix + one.tail == trial.prefix + trial.tail[:stop]
        assert one.tail == trial.tail[start:stop]
        assert one.answers == ((0, stop - start),)


def test_an_answer_is_cut_where_the_tokenizer_cuts(small: Loaded) -> None:
    loaded = Loaded(small.model, Joined(), "words")
    asking, answer = split(loaded, "The key is ", "123")
    assert (loaded.decode(asking), loaded.decode(answer)) == ("The key is", " 123")
    assert split(small, "is ", "12") == (list(b"is "), list(b"12"))


def test_what_text_is_refused(small: Loaded) -> None:
    with pytest.raises(ValueError, match=r"notes.txt is empty"):
        Questions(small, text=" \n", where="notes.txt")
    with pytest.raises(ValueError, match="notes has 5 tokens"):
        Questions(small, text="short", where="notes").windows(128, 2)
    with pytest.raises(ValueError, match="too short"):
        Questions(small).passkey(60, 0.5, 0)


def test_windows_spread_over_the_text(small: Loaded) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    found = Questions(small, text=text).windows(100, 4)
    assert [small.decode(ids) for ids in found] == [text[i : i + 100] for i in (0, 300, 600, 900)]
    assert len(held_out()) > 200_000


# -- figures -----------------------------------------------------------------------------------------------------------


def expectations(model: Any, cache: Any, ids: list[int], start: int) -> list[Tensor]:
    """Log-probabilities of ids[start:], one call for the prompt and one for every token, float64."""
    with torch.no_grad():
        fed = [ids[:start], *([token] for token in ids[start:-1])]
        out = [model(torch.tensor([part]), past_key_values=cache, use_cache=True).logits[0, -1] for part in fed]
    return [logits.double() - logits.double().logsumexp(0) for logits in out]


def test_text_against_loops(small: Loaded) -> None:
    model, tail, count = small.model, 12, 5
    trials = windows_cut(Questions(small).windows(60, 3), tail)
    dense = take_reference(model, trials, count)
    policy = StreamingLLM(budget_tokens=16)
    found = measure_text(model, policy, trials, dense)
    plain = measure_text(model, None, trials, dense)
    nats = kl = same = dense_nats = alike = 0.0
    for trial in trials:
        ids = trial.prefix + trial.tail
        wanted = expectations(model, DynamicCache(config=model.config), ids, 60 - tail)
        cache = policy.make_cache(model)
        given = expectations(model, cache, ids, 60 - tail)
        release(model)
        for token, p, q in zip(trial.tail, wanted, given, strict=True):
            dense_nats -= float(p[token])
            nats -= float(q[token])
            kl += sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            same += int(p.argmax()) == int(q.argmax())
        texts = []
        for own in (None, policy):
            ids = list(trial.prefix)
            texts.append(continuation(model, own, torch.tensor([ids]), count)[0].tolist())
        first = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), count)
        alike += first / count
    total = 3 * tail
    torch.testing.assert_close(plain["bits_per_token"], dense_nats / total / math.log(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["bits_per_token"], nats / total / math.log(2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["kl_bits"], kl / total / math.log(2), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["perplexity"], 2 ** found["bits_per_token"])
    assert found["top_agreement"] == pytest.approx(same / total)
    assert found["greedy_agreement"] == pytest.approx(alike / 3)
    assert found["kl_bits"] > 0
    assert found["tokens"] == total


def test_greedy_texts_agree_up_to_the_first_other_token() -> None:
    wanted = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    given = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [9, 2, 3, 4]])
    torch.testing.assert_close(agreed(given, wanted), torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64))


def test_a_continuation_is_what_generate_gives(small: Loaded) -> None:
    prompt = torch.tensor(Questions(small).windows(50, 2))
    wanted = small.model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.testing.assert_close(continuation(small.model, None, prompt, 6), wanted[:, 50:])
    policy = SnapKV(budget_tokens=12, window_size=4)
    with policy(small.model):
        wanted = small.model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.testing.assert_close(continuation(small.model, policy, prompt, 6), wanted[:, 50:])


def test_a_full_cache_costs_nothing(small: Loaded) -> None:
    trials = windows_cut(Questions(small).windows(60, 2), 8)
    found = measure_text(small.model, Full(), trials, take_reference(small.model, trials, 4))
    assert found["kl_bits"] < 1e-6
    assert (found["top_agreement"], found["greedy_agreement"]) == (1.0, 1.0)


def test_keys_out_of_sight_are_lost_and_others_are_not(packaged: Loaded) -> None:
    questions = Questions(packaged)
    trials = [questions.passkey(384, depth, number) for depth in (0.0, 1.0) for number in range(3)]
    full = measure_answers(packaged.model, None, trials)
    short = measure_answers(packaged.model, StreamingLLM(budget_tokens=128), trials)
    assert full["by_depth"] == [[0.0, 1.0], [1.0, 1.0]]
    assert short["by_depth"] == [[0.0, 0.0], [1.0, 1.0]]
    assert (full["answers"], short["accuracy"]) == (6, 0.5)
    assert packaged.model.config._attn_implementation == "sdpa"


def test_a_policy_that_sees_the_question_keeps_its_answer(packaged: Loaded) -> None:
    questions = Questions(packaged)
    after = [questions.passkey(384, 0.5, number) for number in range(4)]
    within = [one for trial in after for one in trial.within()]
    policy = SnapKV(budget_tokens=64)
    blind, seen = (measure_answers(packaged.model, policy, trials)["accuracy"] for trials in (after, within))
    assert blind < seen


def test_costs_are_of_both_caches(small: Loaded) -> None:
    prompt, steps = Questions(small).windows(200, 1)[0], 6
    found = measure_cost(small.model, StreamingLLM(budget_tokens=16), prompt, steps=steps, repeats=2)
    token = SIZES["layers"] * 2 * SIZES["kv_heads"] * SIZES["head_dim"] * 4
    assert found["dense_cache_bytes"] == (200 + steps) * token
    assert 16 * token <= found["cache_bytes"] < 40 * token
    for name in ("prefill_s", "decode_s", "prefill_peak_bytes", "decode_peak_bytes"):
        assert found[name] >= 0
        assert found[f"dense_{name}"] >= 0
    assert found["prefill_s"] > found["decode_s"] > 0


def of_a_ratio() -> dict[str, Policy | None]:
    """Policies by name that take a ratio and no profile of heads; all of a cache; the dense one."""
    found: dict[str, Policy | None] = {"dense": None, "full": Full()}
    for name, cls in known_policies().items():
        with suppress(ValueError):
            found.setdefault(name, cls(compression_ratio=0.5))
    return found


# Two rows of every policy; one row alone of those whose rows differ most from each other's.
@pytest.mark.parametrize(
    ("name", "rows"), [*((name, 2) for name in of_a_ratio()), *((name, 1) for name in ("dense", "h2o", "snapkv"))]
)
def test_following_and_going_on_at_once_is_each_by_itself(small: Loaded, name: str, rows: int) -> None:
    """Logits, greedy tokens and bytes."""
    policy = of_a_ratio()[name]
    # No token twice: equal keys have equal norms, and rounding says which of them leaves.
    draw = torch.Generator().manual_seed(3)
    tokens = torch.stack([torch.randperm(256, generator=draw)[:48] for _ in range(rows)])
    prefix, tail = tokens[:, :40], tokens[:, 40:]
    apart: list[Tensor] = []
    held = follow(small.model, policy, prefix, tail, lambda _, logits: apart.append(logits))
    for count in (1, 4, 8, 9):  # the first alone, before the tail ends, with it, and past it
        together: list[Tensor] = []
        size, said = follow_and_go_on(
            small.model, policy, prefix, tail, lambda _, own, to=together: to.append(own), count
        )
        assert size == held
        torch.testing.assert_close(torch.stack(together), torch.stack(apart), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(said, continuation(small.model, policy, prefix, count))


def test_a_window_of_text_is_read_once(small: Loaded) -> None:
    """For its tail and for what the model goes on with, by the dense cache and by a policy; the dense one, which drops
    nothing, reads together what it was given."""
    trials = windows_cut([list(range(80)), list(range(80, 160))], 16)
    read: list[int] = []
    counting = small.model.register_forward_pre_hook(lambda model, args: read.append(args[0].shape[1]))
    dense = take_reference(small.model, trials, 8)
    measure_text(small.model, SnapKV(compression_ratio=0.5), trials, dense)
    counting.remove()
    assert read == [64, *[1] * 7, 8, 64, *[1] * 15]


def test_what_comes_together_is_what_comes_one_by_one(small: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the dense cache, in passes of as many tokens as their logits leave room for."""
    monkeypatch.setattr(measure, "LOGITS_AT_ONCE", 2 * 256 * 16)
    read: list[int] = []
    counting = small.model.register_forward_pre_hook(lambda model, args: read.append(args[0].shape[1]))
    draw = torch.Generator().manual_seed(3)
    prefix, tail = torch.randint(256, (2, 20), generator=draw), torch.randint(256, (2, 35), generator=draw)
    given: dict[int, Tensor] = {}
    size = follow(small.model, None, prefix, tail, given.__setitem__)
    counting.remove()
    assert read == [20, 16, 16, 2]
    with torch.no_grad():
        wanted = small.model(torch.cat([prefix, tail], 1), use_cache=False).logits[:, 19:-1]
    assert list(given) == list(range(35))
    torch.testing.assert_close(torch.stack([*given.values()], 1), wanted, atol=2e-5, rtol=1e-4)
    assert size == 54 * SIZES["layers"] * 2 * SIZES["kv_heads"] * SIZES["head_dim"] * 4 * 2
