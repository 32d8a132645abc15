"""Attention based credit: shares by loops, sums kept, and a reward model that learns what it rewards."""

import pytest
import torch
from tiny_families import prompt, tiny
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from manyheads import create_attention
from manyheads.hosts.taps import record
from manyheads.training import attention_reward, generator_reward
from manyheads.training.dense_reward import credit, generator_credit

RESPONSE = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]]).bool()


def weighed(name: str = "softmax") -> tuple[object, Tensor]:
    module, x = create_attention(name, 8, 2, causal=True).double(), torch.randn(3, 6, 8).double()
    with record(module) as calls, torch.no_grad():
        weights = module(x, need_weights=True).weights
    return calls[0], weights


@pytest.mark.parametrize("name", ["softmax", "based"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_by_loops(name: str, beta: float) -> None:
    call, weights = weighed(name)
    reward = torch.tensor([2.0, -1.0, 0.5]).double()
    wanted = torch.zeros(3, 6).double()
    for b in range(3):
        own = [t for t in range(6) if RESPONSE[b, t]]
        last = [sum(weights[b, h, own[-1], t] for h in range(2)) / 2 for t in own]
        for t, weight in zip(own, last, strict=True):
            wanted[b, t] = beta * reward[b] * weight / sum(last) + (1 - beta) * reward[b] * (t == own[-1])
    found = attention_reward(call, reward, RESPONSE, beta=beta)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(1), reward)
    assert (found[~RESPONSE] == 0).all()


def test_the_generators_by_loops() -> None:
    call, weights = weighed()
    wanted = torch.zeros(3, 6).double()
    for b in range(3):
        own = [t for t in range(6) if RESPONSE[b, t]]
        for t in own:
            later = [i for i in own if i >= t]
            wanted[b, t] = sum(weights[b, h, i, t] for i in later for h in range(2)) / len(later)
        wanted[b] /= wanted[b].sum()
    torch.testing.assert_close(generator_credit(call, RESPONSE), wanted)
    reward = torch.tensor([2.0, -1.0, 0.5]).double()
    torch.testing.assert_close(generator_reward(call, reward, RESPONSE), wanted * reward[:, None])


def test_a_response_without_weight_keeps_its_reward_at_the_end() -> None:
    call, _ = weighed()
    call.query = torch.zeros_like(call.query)
    call.key = torch.zeros_like(call.key)
    call.query[..., 0], call.key[:, :, 0, 0] = 1e4, 1e4  # all weight on the first token
    torch.testing.assert_close(credit(call, RESPONSE)[0], torch.tensor([0, 0, 0, 0, 1.0, 0]).double())


def test_padding_on_either_side_half_precision_and_no_gradient() -> None:
    model = tiny("llama")
    ids, response = prompt(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    left = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 6]),
    }
    right = {key: torch.roll(own, -3, 1) for key, own in left.items()}
    found = []
    for batch, start in (({"input_ids": ids}, 0), (left, 3), (right, 0)):
        with record(model, layers=[2]) as calls:
            model(**batch)
        own = torch.zeros(batch["input_ids"].shape).bool()
        own[:, start : start + 6] = response
        dense = attention_reward(calls[0], torch.tensor([1.5]), own)
        assert not dense.requires_grad
        found.append(dense[:, start : start + 6])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-4)
    with record(model.to(torch.bfloat16), layers=[2]) as calls:
        model(input_ids=ids)
    dense = attention_reward(calls[0], torch.tensor([1.5]).bfloat16(), response)
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.sum(1), torch.tensor([1.5]))


def texts(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two tokens of a question, six of an answer; it is good if a 5 is among them."""
    ids = torch.randint(8, 30, (rows, 8))
    ids[:, -1] = 2
    good, place = torch.randint(2, (rows,)), torch.randint(2, 7, (rows, 1))
    ids.scatter_(1, place, torch.where(good == 1, 5, 6)[:, None])
    return ids, good.float(), place


def test_a_reward_model_gives_its_reward_to_the_token_that_earned_it() -> None:
    config = LlamaConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1,
        pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model, response = LlamaForSequenceClassification(config).train(), torch.arange(8).expand(64, -1) > 1
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def earned() -> float:
        ids, reward, place = texts(64)
        with record(model) as calls, torch.no_grad():
            model(input_ids=ids)
        dense = attention_reward(calls[0], reward, response)
        return (dense.gather(1, place)[:, 0].sum() / reward.sum()).item()

    before = earned()
    for _ in range(40):
        ids, reward, _ = texts(32)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(input_ids=ids).logits[:, 0], reward)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.3  # a sixth is even
    assert earned() > 2 * before


def test_refusals() -> None:
    call, _ = weighed()
    reward = torch.ones(3)
    with pytest.raises(ValueError, match="beta=2"):
        attention_reward(call, reward, RESPONSE, beta=2)
    with pytest.raises(ValueError, match="one number for each"):
        attention_reward(call, torch.ones(2), RESPONSE)
    with pytest.raises(ValueError, match="no response"):
        attention_reward(call, reward, RESPONSE & (torch.arange(3) > 0)[:, None])
    with pytest.raises(ValueError, match="without a cache"):
        attention_reward(call, reward, RESPONSE[:, 1:])
    pooled = create_attention("hyena", 8, 2, causal=True)
    with record(pooled) as calls:
        pooled(torch.randn(3, 6, 8))
    with pytest.raises(ValueError, match="no weights"):
        attention_reward(calls[0], reward, RESPONSE)
