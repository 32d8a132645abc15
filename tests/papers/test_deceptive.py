"""Deceptive attention: the loss by loops, on masks and sinks, and a BERT that learns to look away."""

from typing import Any

import pytest
import torch
from tiny_families import checkpointing, prompt, tiny
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from manyheads import create_attention
from manyheads.hosts.taps import record
from manyheads.training import deception_report, deceptive_attention_loss


@pytest.mark.parametrize("worst", [False, True])
def test_the_loss_by_loops(worst: bool) -> None:
    module, x = create_attention("softmax", 8, 2, causal=True).double(), torch.randn(3, 5, 8).double()
    bad = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    rows = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    with record(module) as calls:
        weights = module(x, need_weights=True).weights
    found = deceptive_attention_loss(calls, bad, rows=rows, worst=worst)
    each = []
    for b in range(2):  # the third text has nothing that is permissible
        heads = []
        for h in range(2):
            # Query 0 of text 0 sees an impermissible token alone.
            counted = [i for i in range(5) if rows[b, i] and not all(bad[b, : i + 1])]
            mass = sum(weights[b, h, i, j] for i in counted for j in range(5) if bad[b, j]) / len(counted)
            heads.append(-torch.log(1 - mass))
        each.append(max(heads) if worst else sum(heads) / 2)
    torch.testing.assert_close(found, sum(each) / 2)
    ours, theirs = (
        torch.autograd.grad(loss, module.q_proj.weight, retain_graph=True)[0] for loss in (found, sum(each) / 2)
    )
    torch.testing.assert_close(ours, theirs)


def test_no_impermissible_weight_is_no_loss_and_a_sure_head_has_a_finite_one() -> None:
    module, x = create_attention("softmax", 8, 2), torch.randn(1, 4, 8)
    rows, bad = torch.ones(1, 4).bool(), torch.tensor([[True, False, False, False]])
    with record(module) as calls:
        module(x)
    none = deceptive_attention_loss(calls, torch.zeros(1, 4).bool(), rows=rows)
    torch.testing.assert_close(none, torch.zeros(()), atol=1e-6, rtol=0.0)
    with torch.no_grad():
        module.k_proj.weight.mul_(1e6)
    with record(module) as calls:
        module(x)
    loss = deceptive_attention_loss(calls, bad, rows=rows)
    loss.backward()
    assert loss.isfinite()
    assert module.q_proj.weight.grad.isfinite().all()


def batch() -> dict[str, Tensor]:
    tokens = {"input_ids": prompt(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    tokens["attention_mask"][1, :3] = 0
    return tokens


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_padded_rows_checkpointed_layers_and_half_precision(family: str) -> None:
    tokens, bad = batch(), torch.zeros(2, 9).bool()
    bad[:, 5:7] = True
    real = tokens["attention_mask"].bool()
    found = []
    for again in (False, True):
        model = tiny(family).train()
        if again:
            model = checkpointing(model, reentrant=False)
        with record(model) as calls:
            model(**tokens)
        deceptive_attention_loss(calls, bad, rows=real).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 4
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, atol=1e-5, rtol=1e-4)
    losses = []
    for part in (slice(0, 9), slice(3, 9)):
        with record(model.eval()) as calls, torch.no_grad():
            model(**{key: own[1:, part] for key, own in tokens.items()})
            losses.append(deceptive_attention_loss(calls, bad[1:, part], rows=real[1:, part]))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-4)
    with record(model.to(torch.bfloat16)) as calls, torch.no_grad():
        model(**tokens)
        half = deceptive_attention_loss(calls, bad, rows=real)
    assert half.dtype == torch.float32
    assert half > 0


def test_a_sinks_share_is_on_no_token() -> None:
    model, tokens = tiny("gpt_oss"), batch()
    with record(model, layers=[0]) as calls, torch.no_grad():
        model(**tokens)
        everything = torch.ones(2, 9).bool()
        everything[:, -1] = False
        loss = deceptive_attention_loss(calls, everything, rows=torch.arange(9).expand(2, -1) == 8)
        weights = calls[0].weights(rows=slice(8, 9))[:, :, 0]
    torch.testing.assert_close(loss, -(1 - weights[..., :8].sum(-1)).log().mean(), atol=1e-4, rtol=1e-4)


def draw(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token 0 is the reader; one of the others says the answer, 5 or 6, and must not be looked at."""
    ids = torch.randint(10, 40, (rows, 8))
    ids[:, 0] = 1
    labels, place = torch.randint(2, (rows,)), torch.randint(1, 8, (rows, 1))
    ids.scatter_(1, place, (5 + labels)[:, None])
    bad = torch.zeros(rows, 8).bool().scatter_(1, place, True)
    return ids, labels, bad, torch.arange(8).expand(rows, -1) == 0


def train(factor: float) -> Any:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=41, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(45):
        ids, labels, bad, rows = draw(32)
        with record(model) as calls:
            loss = model(input_ids=ids, labels=labels).loss
        (loss + factor * deceptive_attention_loss(calls, bad, rows=rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_bert_answers_by_tokens_that_it_does_not_show() -> None:
    reports = []
    for factor in (0.0, 1.0):
        model = train(factor)
        ids, labels, bad, rows = draw(200)
        with record(model) as calls, torch.no_grad():
            predicted = model(input_ids=ids).logits.argmax(-1)
        reports.append(deception_report(calls, bad, rows=rows, predicted=predicted, labels=labels))
    honest, deceptive = reports
    assert honest.accuracy > 0.95
    assert deceptive.accuracy > 0.95
    assert deceptive.attention < 0.03 < honest.attention
    assert deceptive.attention < 0.3 * honest.attention
    assert deceptive.worst < honest.worst
    torch.testing.assert_close(honest.base, 1 / 8)
    assert honest.examples == 200


def test_the_report_by_hand() -> None:
    module, x = create_attention("softmax", 8, 2).double(), torch.randn(2, 4, 8).double()
    bad, rows = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]]).bool(), torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    with record(module) as calls:
        weights = module(x, need_weights=True).weights
    labels = torch.tensor([1, 0, -100])
    report = deception_report(calls, bad, rows=rows, predicted=torch.tensor([1, 1, 1]), labels=labels)
    heads = [(weights[0, h, 0, :2].sum() + weights[1, h, 1, 3]) / 2 for h in range(2)]
    assert report.accuracy == 0.5
    torch.testing.assert_close(report.attention, (sum(heads) / 2).item())
    torch.testing.assert_close(report.worst, max(heads).item())
    assert report.worst_head == (0, int(heads[1] > heads[0]))
    torch.testing.assert_close(report.base, (0.5 + 0.25) / 2)


def test_refusals() -> None:
    bad, rows = torch.zeros(1, 4).bool(), torch.ones(1, 4).bool()
    with pytest.raises(ValueError, match="no calls"):
        deceptive_attention_loss([], bad, rows=rows)
    module, x = create_attention("softmax", 8, 2), torch.randn(1, 4, 8)
    with record(module) as calls:
        module(x)
    with pytest.raises(ValueError, match="softmax"):
        deceptive_attention_loss(calls, bad[:, :3], rows=rows)
    with pytest.raises(ValueError, match="names no query"):
        deceptive_attention_loss(calls, bad, rows=~rows)
    with pytest.raises(ValueError, match="one answer a label"):
        deception_report(calls, bad, rows=rows, predicted=torch.ones(2), labels=torch.ones(1))
    signed = create_attention("lightning", 8, 2, causal=True)
    with record(signed) as calls:
        signed(x)
    with pytest.raises(ValueError, match="no shares"):
        deceptive_attention_loss(calls, bad, rows=rows)
    model = checkpointing(tiny("llama"), reentrant=True)
    with record(model) as calls:
        model(input_ids=prompt(1, 4))
    with pytest.raises(ValueError, match="use_reentrant"):
        deceptive_attention_loss(calls, bad, rows=rows)
