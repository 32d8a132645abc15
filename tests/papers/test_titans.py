"""Titans: the memory's recurrence with gradients by autograd, token by token, and the three forms as loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from manyheads.mechanisms.recurrent.titans import Titans
from manyheads.testing import check_mechanism

HOLDS = ["decode", "decode-padded", "left-padding", "padding", "no-future", "reorder", "gradients", "state-bytes"]


def built(**config: object) -> Titans:
    torch.manual_seed(0)
    module = Titans(6, 2, **{"chunk": 3, "window": 3, "persistent": 2, **config}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        module.rates.bias.copy_(torch.tensor([-1.0, -2.0, 0.5, 1.0, 1.5, 0.7]))
    return module


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def network(weights: list[Tensor], x: Tensor) -> Tensor:
    for layer, matrix in enumerate(weights):
        x = matrix @ (x * torch.sigmoid(x) if layer else x)
    return x


class Learner:
    """One row and head, one token at a time."""

    def __init__(self, module: Titans, h: int) -> None:
        self.module, self.part, self.h = module, slice(3 * h, 3 * h + 3), h
        self.weights = [w[h].detach().clone() for w in module.first]
        self.speed = [torch.zeros_like(w) for w in self.weights]
        self.anchor, self.seen = self.weights, 0

    def begin(self) -> None:
        if self.seen % self.module.chunk == 0:
            self.anchor = self.weights
        self.seen += 1

    def query(self, x: Tensor) -> Tensor:
        q = F.silu(self.module.memory_q.weight[self.part] @ normed(x))
        return q / q.norm()

    def learn(self, x: Tensor) -> Tensor:
        module, x = self.module, normed(x)
        k = F.silu(module.memory_k.weight[self.part] @ x)
        k, v = k / k.norm(), module.memory_v.weight[self.part] @ x
        rates = (module.rates.weight @ x + module.rates.bias).sigmoid()
        alpha, eta, theta = (float(rates[2 * kind + self.h]) for kind in range(3))
        with torch.enable_grad():
            at = [w.detach().requires_grad_() for w in self.anchor]
            loss = (network(at, k.detach()) - v.detach()).square().mean()
            slopes = torch.autograd.grad(loss, at)
        self.speed = [eta * s - theta * g for s, g in zip(self.speed, slopes, strict=True)]
        self.weights = [(1 - alpha) * w + s for w, s in zip(self.weights, self.speed, strict=True)]
        return network(self.weights, F.normalize(F.silu(module.memory_q.weight[self.part] @ x), dim=0))


def attended(module: Titans, query: Tensor, sources: list[Tensor]) -> Tensor:
    """One query over the persistent tokens and the sources."""
    sources, out = [*(module.persistent if module.persistent is not None else []), *sources], []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        q = module.attention_q.weight[part] @ query
        scores = torch.stack([q @ (module.attention_k.weight[part] @ s) for s in sources]) / 3**0.5
        shares = scores.softmax(0)
        out.append(sum(a * (module.attention_v.weight[part] @ s) for a, s in zip(shares, sources, strict=True)))
    return torch.cat(out)


def gated(module: Titans, y: Tensor, m: Tensor) -> Tensor:
    return normed(y) * module.norms[0] * torch.sigmoid(normed(m) * module.norms[1])


def one_row(module: Titans, x: Tensor) -> Tensor:
    heads, out, read = [Learner(module, h) for h in range(2)], [], []
    told: list[Tensor] = []
    for t in range(len(x)):
        for head in heads:
            head.begin()
        if module.form == "mac":
            start = t // module.chunk * module.chunk
            told.append(torch.cat([network(head.anchor, head.query(x[t])) for head in heads]))
            y = attended(module, x[t], [*told[start:], *x[start : t + 1]])
            out.append(gated(module, y, torch.cat([head.learn(y) for head in heads])))
            continue
        read.append(torch.cat([head.learn(x[t]) for head in heads]))
        start = max(0, t - module.window + 1)
        if module.form == "lmm":
            out.append(read[t])
        elif module.form == "mag":
            out.append(gated(module, attended(module, x[t], list(x[start : t + 1])), read[t]))
        else:
            out.append(attended(module, read[t], read[start:]))
    return torch.stack(out) @ module.o_proj.weight.T


@pytest.mark.parametrize("form", ["lmm", "mac", "mag", "mal"])
@pytest.mark.parametrize("config", [{}, {"chunk": 1, "depth": 1}, {"depth": 3, "chunk": 4, "persistent": 0}])
@torch.no_grad()
def test_equals_gradient_descent_token_by_token(form: str, config: dict[str, object]) -> None:
    module, x = built(form=form, **config), tokens(8)
    assert_close(module(x).output, torch.stack([one_row(module, row) for row in x]), rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_a_matrix_without_momentum_or_forgetting_follows_the_delta_rule() -> None:
    module, x = built(form="lmm", depth=1, chunk=1), tokens(5)
    module.rates.weight.zero_()
    module.rates.bias.copy_(torch.tensor([-50.0, -50.0, -50.0, -50.0, 0.0, 0.0]))
    rows = normed(x[0])
    k, q = (F.normalize(F.silu(rows @ p.weight[:3].T), dim=-1) for p in (module.memory_k, module.memory_q))
    v, matrix, out = rows @ module.memory_v.weight[:3].T, module.first[0][0].clone(), []
    for t in range(5):
        matrix = matrix + 0.5 * 2 / 3 * torch.outer(v[t] - matrix @ k[t], k[t])
        out.append(matrix @ q[t])
    module.o_proj.weight.copy_(torch.eye(6))
    assert_close(module(x).output[0, :, :3], torch.stack(out))


@torch.no_grad()
def test_what_is_repeated_is_memorised() -> None:
    """The same token again and again: its key comes to give its value, and sooner with larger steps."""
    module, x = built(form="lmm", chunk=1), tokens(1).expand(-1, 60, -1)
    module.memory_q.weight.copy_(module.memory_k.weight)
    module.o_proj.weight.copy_(torch.eye(6))
    module.rates.weight.zero_()
    gaps = []
    for step in (-6.0, 0.0):
        module.rates.bias.copy_(torch.tensor([-30.0, -30.0, -2.0, -2.0, step, step]))
        wanted = normed(x[:, -1]) @ module.memory_v.weight.T
        gaps.append(float((module(x).output[:, -1] - wanted).abs().max()))
    assert gaps[1] < 1e-3 < 0.1 < gaps[0]


@pytest.mark.parametrize("form", ["lmm", "mag", "mal"])
def test_every_form_holds_what_the_card_says(form: str) -> None:
    check_mechanism(Titans, config={"form": form}, properties=HOLDS)


@torch.no_grad()
def test_rows_that_begin_their_chunks_at_different_tokens() -> None:
    for form in ("lmm", "mac", "mag", "mal"):
        module, x = built(form=form), tokens(11)
        mask = torch.arange(11)[None] >= torch.tensor([[4], [1]])
        garbage = torch.where(mask[..., None], x, 1e3)
        state = module.init_state(2)
        parts = [module(garbage[:, :5], mask=mask[:, :5], state=state)]
        parts += [module(x[:, start : start + size], state=state) for start, size in ((5, 1), (6, 1), (7, 4))]
        found = torch.cat([part.output for part in parts], 1)
        for row, start in enumerate((4, 1)):
            assert_close(found[row, start:], module(x[row : row + 1, start:]).output[0])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="titans: form='mam'; want one of"):
        built(form="mam")
    for config in ({"chunk": 0}, {"depth": 0}, {"persistent": -1}, {"window": 0}):
        with pytest.raises(ValueError, match="titans: chunk="):
            built(**config)
    with pytest.raises(ValueError, match="titans: a dense mask"):
        built()(tokens(3), mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))
