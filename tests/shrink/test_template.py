"""A chat template's tokens are found, and never dropped, whatever the policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loops import LEFT, Now, best, check
from recorder import held
from test_fast_kvzip import gates
from test_policies_on_policies import norms, window
from tiny_families import prompt, tiny
from torch import Tensor

from manyheads.shrink import (
    H2O,
    TOVA,
    AdaKV,
    ChatTemplate,
    ChunkKV,
    Composed,
    FastKVzip,
    KeyNorm,
    KVzip,
    MoA,
    Policy,
    SnapKV,
    StreamingLLM,
    TidalDecode,
    release,
)


class Letters:
    """A tokenizer whose tokens are letters, but for <...> and |, which are one and special."""

    all_special_ids = (1, 2)
    added_tokens_decoder = {3: "<s>", 4: "<u>", 5: "<a>"}  # noqa: RUF012
    chat_template = "yes"
    known = {"|": 2, "<s>": 3, "<u>": 4, "<a>": 5}  # noqa: RUF012
    takes_system = True

    def apply_chat_template(self, turns: list[dict[str, str]], add_generation_prompt: bool, tokenize: bool) -> str:
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": "Help."}, *turns]
        elif not self.takes_system:
            raise ValueError("no system message")
        text = "".join(f"<{turn['role'][0]}>as {turn['role']}:\n{turn['content']}|\n" for turn in turns)
        return text + ("<a>as assistant:\n" if add_generation_prompt else "")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        out = []
        while text:
            name = next((own for own in self.known if text.startswith(own)), text[0])
            out.append(self.known.get(name) or 100 + ord(name))
            text = text[len(name) :]
        return out


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("system", [True, False])
def test_what_is_template(own: bool, system: bool) -> None:
    """All but the words of turns; those of a system message count as template unless they are left out."""
    words = ["Be brief", "as user:", "as", "\n"]
    turns = [{"role": role, "content": text} for role, text in zip("sua", words[:3], strict=True)]
    for turn in turns:
        turn["role"] = {"s": "system", "u": "user", "a": "assistant"}[turn["role"]]
    turns = (turns if own else turns[1:]) + [{"role": "user", "content": words[3]}]
    tokenizer = Letters()
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    wanted = [True] * len(ids)
    at = 0
    for turn in turns:
        start = tokenizer.encode(text[: text.index(f"{turn['content']}|", at)], add_special_tokens=False)
        at = text.index(f"{turn['content']}|", at)
        if turn["role"] != "system" or not system:
            for place in range(len(start), len(start) + len(turn["content"])):
                wanted[place] = False
    found = ChatTemplate.of(tokenizer, system=system).places(torch.tensor([ids, ids]))
    assert found.tolist() == [wanted, wanted]
    assert not all(wanted)


def test_templates_without_system_messages_or_none_at_all() -> None:
    tokenizer = Letters()
    tokenizer.takes_system = False
    assert ChatTemplate.of(tokenizer).system is None
    tokenizer.chat_template = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="has no chat_template"):
        ChatTemplate.of(tokenizer)
    short = ChatTemplate(pieces=((5, 6, 7),), special=frozenset({9}))
    assert short.places(torch.tensor([[5, 9]])).tolist() == [[False, True]]


SPECIAL = frozenset({5, 17, 23, 31, 40})
RULE = ChatTemplate(special=SPECIAL)


@pytest.mark.parametrize("policy", [KeyNorm, SnapKV], ids=["norms", "window"])
def test_the_best_of_the_rest_stays(policy: Any) -> None:
    """By loops: what is protected, then the rule's best."""
    from loops import batch

    tokens, _ = batch()
    own = {"window_size": 3, "kernel_size": 1} if policy is SnapKV else {}
    score = window if policy is SnapKV else norms

    def rule(now: Now) -> list[int]:
        sure = [slot for slot in now.held if int(tokens[now.row, slot]) in SPECIAL]
        if len(now.held) <= 11 or (policy is SnapKV and now.decoding):
            return now.held
        ranked = score(now)
        return sure + best({slot: ranked[slot] for slot in now.held if slot not in sure}, 11 - len(sure))

    when = "prefill" if policy is SnapKV else "both"
    check(policy(budget_tokens=11, protect=RULE, when=when, **own), rule)


POLICIES: list[Policy] = [
    SnapKV(budget_tokens=14, window_size=3, allocation=AdaKV(), protect=RULE),
    H2O(budget_tokens=14, protect=RULE),
    TOVA(budget_tokens=14, interval=3, protect=RULE),
    StreamingLLM(budget_tokens=14, sink_size=2, protect=RULE),
    StreamingLLM(budget_tokens=14, sink_size=2, positions="text", protect=RULE),
    MoA(rule=(12.0, 0.0), sink_size=2, protect=RULE),
    ChunkKV(base=KeyNorm(), budget_tokens=20, chunk_length=4, protect=RULE),
    KVzip(budget_tokens=14, sink_size=2, protect=RULE),
    FastKVzip(gates=gates(), budget_tokens=14, sink_size=2, protect=RULE),
    Composed(SnapKV(budget_tokens=16, window_size=3, protect=RULE), TOVA(budget_tokens=14, when="decode")),
]


def _tokens() -> Tensor:
    tokens = prompt(2, 40)
    tokens[torch.isin(tokens, torch.tensor(sorted(SPECIAL)))] = 50
    tokens[:, 4], tokens[:, 11], tokens[0, 12], tokens[1, 13], tokens[:, 30], tokens[1, 36] = 5, 17, 23, 31, 40, 5
    return tokens


def _check_kept(cache: Any, tokens: Tensor, first: int = 0) -> None:
    wanted = torch.isin(tokens, torch.tensor(sorted(SPECIAL)))
    for layer in cache.layers:
        for (row, _), slots in held(layer).items():
            sure = wanted[row, : cache.get_seq_length()].nonzero()[:, 0].tolist()
            assert {slot for slot in sure if not row or slot >= first} <= set(slots)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda own: type(own).__name__)
def test_never_dropped(policy: Policy) -> None:
    """In a padded batch, from a prompt, a second turn and single tokens."""
    model, tokens = tiny("llama").double(), _tokens()
    padding = torch.ones_like(tokens)
    padding[1, : LEFT[1]] = 0
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    cache, start = policy.make_cache(model), 0
    for end in (24, 33, *range(34, 41)):
        here = slice(start, end)
        given = {"attention_mask": padding[:, :end], "position_ids": positions[:, here]}
        with torch.no_grad():
            model(tokens[:, here], **given, past_key_values=cache)
        _check_kept(cache, tokens, LEFT[1])
        start = end
    assert min(min(own) for own in cache.lengths()) < 40
    release(model)


def test_beams_and_guesses() -> None:
    model, tokens = tiny("llama"), _tokens()[:, :30]
    policy = H2O(budget_tokens=16, protect=RULE)
    with policy(model) as active:
        alone = model.generate(tokens[:1], max_new_tokens=12, do_sample=False)
        _check_kept(active.cache, alone)
        assert torch.equal(
            alone, model.generate(tokens[:1], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        )
        both = model.generate(tokens, max_new_tokens=8, num_beams=3, do_sample=False)
        one = model.generate(tokens[:1], max_new_tokens=8, num_beams=3, do_sample=False)
        assert torch.equal(both[0, : one.shape[1]], one[0])
        cache = active.cache
        assert cache is not None
        cache.reset()
        assert cache.ids is None


@pytest.mark.parametrize("policy", [KeyNorm(budget_tokens=3, protect=RULE),
                                    KVzip(budget_tokens=6, sink_size=4, protect=RULE)])  # fmt: skip
def test_a_budget_that_is_too_small(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"protect .*never dropped.*larger"):
        _run(policy)


def _run(policy: Policy) -> None:
    model = tiny("llama")
    model(_tokens(), past_key_values=policy.make_cache(model))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"protect is ChatTemplate.of\(tokenizer\) or nothing; got 'x'"):
        H2O(protect="x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"protect=.* has no meaning"):
        TidalDecode(budget_tokens=4, protect=RULE)
    model = tiny("llama")
    policy = H2O(budget_tokens=12, protect=RULE)
    with pytest.raises(ValueError, match="came without: give the model input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(prompt(1, 20)), past_key_values=policy.make_cache(model))
    with pytest.raises(ValueError, match="call the model itself"):
        model.model(prompt(1, 20), past_key_values=policy.make_cache(model))
