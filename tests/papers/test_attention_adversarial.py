"""Adversarial and virtual adversarial attention: by loops over rows, by identities, and on small hosts."""

from typing import Any

import pytest
import torch
from tiny_families import checkpointing, prompt, tiny
from torch import Tensor, nn
from zoo import build, inputs

from manyheads import create_attention
from manyheads.hosts.loading import load_model
from manyheads.training import adversarial_attention_loss, virtual_adversarial_attention_loss
from manyheads.training.perturbed import tilted, unit

WIDTH = 8


class Reader(nn.Module):
    """One attention and a line that reads it: small enough to write out."""

    def __init__(self, name: str = "softmax", **config: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = create_attention(name, WIDTH, 2, causal=True, **config)
        self.read = nn.Linear(WIDTH, 3)
        self.double().train()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.read(self.attention(x, mask=mask).output)


def by_hand(model: Reader, x: Tensor, added: Any) -> Tensor:
    """The same logits, row by row; added(row of the batch, head, query, scores) -> what is added to them."""
    own, d = model.attention, WIDTH // 2
    q, k, v = own.q_proj(x), own.k_proj(x), own.v_proj(x)
    batch = []
    for b in range(len(x)):
        queries = []
        for i in range(x.shape[1]):
            heads = []
            for h in range(2):
                part = slice(h * d, h * d + d)
                scores = torch.stack([q[b, i, part] @ k[b, j, part] / d**0.5 for j in range(i + 1)])
                weights = (scores + added(b, h, i, scores)).softmax(0)
                heads.append(sum(weights[j] * v[b, j, part] for j in range(i + 1)))
            queries.append(own.o_proj(torch.cat(heads)))
        batch.append(torch.stack(queries))
    return model.read(torch.stack(batch))


def mixture(alpha: Tensor, scores: Tensor) -> Tensor:
    """sum_k alpha_tk d_tk of the paper, alpha [m, m]."""
    each = []
    for t in range(len(scores)):
        d = scores[t] - scores
        each.append(alpha[t] @ (d / d.norm() if d.norm() > 0 else d))
    return torch.stack(each)


ROWS = [(b, h, i) for b in range(2) for h in range(2) for i in range(4)]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("differences", [False, True])
def test_the_loss_by_loops_and_its_gradients(differences: bool) -> None:
    model, x, labels = Reader(), torch.randn(2, 4, WIDTH).double(), torch.randint(3, (2, 4))
    found = adversarial_attention_loss(model, lambda: loss_of(model(x), labels), epsilon=0.7, differences=differences)
    assert all(p.grad is None for p in model.parameters())

    def form(free: Tensor, scores: Tensor) -> Tensor:
        return mixture(free, scores) if differences else free

    size = (lambda i: (i + 1, i + 1)) if differences else (lambda i: (i + 1,))
    free = {(b, h, i): torch.zeros(size(i)).double().requires_grad_() for b, h, i in ROWS}
    first = loss_of(by_hand(model, x, lambda b, h, i, s: form(free[b, h, i], s)), labels)
    slopes = dict(zip(ROWS, torch.autograd.grad(first, list(free.values()), allow_unused=True), strict=True))
    steps = {row: 0.7 * g / g.norm().clamp_min(1e-300) for row, g in slopes.items()}
    wanted = loss_of(by_hand(model, x, lambda b, h, i, s: form(steps[b, h, i], s)), labels)
    torch.testing.assert_close(found, wanted)
    assert found > first + 0.01
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (found, wanted))
    for name, own, other in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        torch.testing.assert_close(own, other, msg=lambda text, at=name: f"{at}: {text}")


def test_differences_leave_rows_that_weigh_all_alike() -> None:
    model, x, labels = Reader(), torch.randn(2, 4, WIDTH).double(), torch.randint(3, (2, 4))
    nn.init.zeros_(model.attention.q_proj.weight)
    plain = loss_of(model(x), labels)
    moved = adversarial_attention_loss(model, lambda: loss_of(model(x), labels), epsilon=1.0)
    still = adversarial_attention_loss(model, lambda: loss_of(model(x), labels), epsilon=1.0, differences=True)
    torch.testing.assert_close(still, plain)
    assert moved > plain + 0.01


@pytest.mark.parametrize("differences", [False, True])
def test_the_virtual_loss_is_the_push_that_a_direct_search_finds(differences: bool) -> None:
    """Many power iterations at a small xi, of one row of scores, against the largest divergence on the circle."""
    model, x = Reader(), torch.randn(1, 3, WIDTH).double()
    real = torch.tensor([[False, False, True]])
    nn.init.zeros_(model.attention.o_proj.weight[:, WIDTH // 2 :])  # one head answers
    found = virtual_adversarial_attention_loss(
        model, lambda: model(x), epsilon=0.05, real=real, xi=1e-3, iterations=30, differences=differences
    )
    before = model(x)[0, 2].log_softmax(-1).detach()
    best = 0.0
    with torch.no_grad():
        for turn in torch.arange(0, 2 * torch.pi, 0.05):
            # Pushes of three scores that do not just raise them all, which changes nothing.
            one, two = torch.tensor([1.0, -1.0, 0.0]) / 2**0.5, torch.tensor([1.0, 1.0, -2.0]) / 6**0.5
            push = 0.05 * (turn.cos() * one + turn.sin() * two).double()
            after = by_hand(model, x, lambda b, h, i, s, r=push: r[: len(s)])[0, 2].log_softmax(-1)
            best = max(best, float((before.exp() * (before - after)).sum()))
    torch.testing.assert_close(found.item(), best, rtol=0.02, atol=0.0)


def test_a_virtual_push_hurts_more_than_a_random_one_and_nothing_is_nothing() -> None:
    model, x = Reader(), torch.randn(2, 6, WIDTH).double()
    found = virtual_adversarial_attention_loss(model, lambda: model(x), epsilon=0.5, iterations=2)
    before, chance = model(x).log_softmax(-1).detach(), []
    for _ in range(20):
        draws = {(b, h, i): torch.randn(i + 1).double() for b in range(2) for h in range(2) for i in range(6)}
        after = by_hand(model, x, lambda b, h, i, s, own=draws: 0.5 * own[b, h, i] / own[b, h, i].norm())
        chance.append((before.exp() * (before - after.log_softmax(-1))).sum(-1).mean().detach())
    assert found > 1.5 * max(chance)
    assert virtual_adversarial_attention_loss(model, lambda: model(x), epsilon=0.0) == 0


def test_tilting_is_adding_to_scores_beside_a_sink_and_in_rows_that_see_nothing() -> None:
    scores, sink, r = torch.randn(5, 7).double(), torch.randn(5, 1).double(), 3 * torch.randn(5, 7).double()
    weights = torch.cat([scores, sink], 1).softmax(1)[:, :7]
    torch.testing.assert_close(tilted(weights, r), torch.cat([scores + r, sink], 1).softmax(1)[:, :7])
    assert (tilted(torch.zeros(2, 3), torch.full((2, 3), 90.0)) == 0).all()
    torch.testing.assert_close(unit(torch.tensor([[3e-30, 4e-30], [0, 0]])), torch.tensor([[0.6, 0.8], [0, 0]]))


def text(name: str) -> dict[str, Tensor]:
    tokens = {"input_ids": prompt(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    tokens["attention_mask"][1, :3] = 0
    return tokens


def both(model: Any, batch: dict[str, Tensor], labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    real = batch["attention_mask"].bool()
    one = adversarial_attention_loss(model, lambda: model(**batch, labels=labels).loss, epsilon=1.0, **options)
    two = virtual_adversarial_attention_loss(model, lambda: model(**batch).logits, epsilon=1.0, real=real, **options)
    return one, two


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_left_padding_and_gradient_checkpointing(family: str) -> None:
    """A padded row is the row alone (caps and sinks included), and layers computed anew have the same pushes."""
    batch = text(family)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1, 3] = -100  # the library would have a padded place predict it
    found = []
    for again in (False, True):
        model = tiny(family).train()
        if again:
            model = checkpointing(model, reentrant=False)
        torch.manual_seed(3)
        losses = both(model, batch, labels)
        (losses[0] + losses[1]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own, atol=2e-5, rtol=1e-3, msg=lambda t, at=name: f"{at}: {t}")
    padded = {key: own[1:] for key, own in batch.items()}
    alone = {key: own[1:, 3:] for key, own in batch.items()}
    first = adversarial_attention_loss(model, lambda: model(**padded, labels=labels[1:]).loss, epsilon=1.0)
    second = adversarial_attention_loss(model, lambda: model(**alone, labels=labels[1:, 3:]).loss, epsilon=1.0)
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_packaged_model_the_push_raises_the_loss_and_training_lowers_it(dtype: torch.dtype) -> None:
    model = load_model().model.to(dtype).train()
    ids = torch.tensor([list(b"a row of weights sums to one.")])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = model(**batch, labels=ids).loss.detach()
    first, shaken = both(model, batch, ids)
    assert first > plain + 0.05
    assert shaken > 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        one, two = both(model, batch, ids)
        (one + two).backward()
        optimizer.step()
    last, calm = both(model, batch, ids)
    assert last < first - 0.05
    assert calm < 0.9 * shaken


def test_an_encoder_and_chosen_layers() -> None:
    model, batch = build("bert").train(), inputs("bert")

    def answer() -> Tensor:
        return model(**batch).last_hidden_state

    torch.manual_seed(3)  # the same dropout
    plain = adversarial_attention_loss(model, lambda: answer()[..., 0].square().mean(), epsilon=0.0)
    losses = []
    for layers in ([0], [1], None):
        torch.manual_seed(3)
        loss = adversarial_attention_loss(model, lambda: answer()[..., 0].square().mean(), epsilon=1.0, layers=layers)
        losses.append(loss.item())
    assert min(losses) > plain.item() + 1e-4
    assert len(set(losses)) == 3
    assert virtual_adversarial_attention_loss(model, answer, epsilon=1.0, real=batch["attention_mask"]) > 0


def test_dropout_is_the_same_in_every_pass() -> None:
    """Otherwise the divergence would be that of two draws, and not of the push."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).train()
    ids = prompt(3, 7)
    none = virtual_adversarial_attention_loss(model, lambda: model(input_ids=ids).logits, epsilon=0.0)
    torch.testing.assert_close(none, torch.zeros(()), atol=1e-6, rtol=0.0)
    small = virtual_adversarial_attention_loss(model, lambda: model(input_ids=ids).logits, epsilon=0.1)
    assert 0 < small < 1e-3


@pytest.mark.parametrize(
    "config", [("eit", {}), ("gqa", {"kv_heads": 1}), ("moba", {"block": 2, "top_k": 1}), ("shaw", {})]
)
def test_mechanisms_whose_weights_are_a_softmax(config: tuple[str, dict[str, Any]]) -> None:
    model, x, labels = Reader(config[0], **config[1]), torch.randn(2, 5, WIDTH).double(), torch.randint(3, (2, 5))
    plain = loss_of(model(x), labels)
    assert adversarial_attention_loss(model, lambda: loss_of(model(x), labels), epsilon=1.0) > plain + 0.01


def test_refusals() -> None:
    x, labels = torch.randn(2, 5, WIDTH).double(), torch.randint(3, (2, 5))
    linear = Reader("based")
    with pytest.raises(ValueError, match="based"):
        adversarial_attention_loss(linear, lambda: loss_of(linear(x), labels), epsilon=1.0)
    sparse = Reader("entmax")
    with pytest.raises(ValueError, match="no softmax"):
        adversarial_attention_loss(sparse, lambda: loss_of(sparse(x), labels), epsilon=1.0)
    model = Reader()
    with pytest.raises(ValueError, match="one number"):
        adversarial_attention_loss(model, lambda: model(x), epsilon=1.0)
    with pytest.raises(ValueError, match="run the model"):
        adversarial_attention_loss(model, lambda: model.read(x).sum(), epsilon=1.0)
    with pytest.raises(ValueError, match="epsilon"):
        adversarial_attention_loss(model, lambda: loss_of(model(x), labels), epsilon=-1.0)
    with pytest.raises(ValueError, match="iterations=0"):
        virtual_adversarial_attention_loss(model, lambda: model(x), epsilon=1.0, iterations=0)
    with pytest.raises(ValueError, match="want one for each"):
        virtual_adversarial_attention_loss(model, lambda: model(x), epsilon=1.0, real=torch.ones(2, 4))
    host = checkpointing(tiny("llama"), reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        adversarial_attention_loss(host, lambda: host(input_ids=prompt(1, 5)).logits.sum(), epsilon=1.0)
    growing = iter([x, x[:, :4]])
    with pytest.raises(ValueError, match="same batch"):
        adversarial_attention_loss(model, lambda: model(next(growing)).sum(), epsilon=1.0)
