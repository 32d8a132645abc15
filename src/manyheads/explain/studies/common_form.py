"""Softmax and linear attention, selective state spaces and recurrence in one form, and what their norms are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from manyheads.explain.studies.drawing import curve_plot, strip_plot
from manyheads.explain.studies.study import (
    Cell,
    Point,
    Study,
    Verdict,
    always,
    both_ways,
    checkpoints,
    paired,
    register_study,
    said,
    seeded,
)
from manyheads.tasks.draw import distinct, generator

if TYPE_CHECKING:
    from manyheads.runs.charts import Plot

FORMS = {
    "softmax": "softmax attention",
    "linear": "linear attention, normalised by its sum",
    "exp": "normalised by exp(w . u)",
    "softplus": "normalised by softplus(w . u)",
    "s6": "selective state space",
    "rnn": "gated recurrence",
}


@dataclass(frozen=True)
class System:
    """h_t = decay_t h_(t-1) + write_t (x) value_t, y_t = h_t^T read_t / norm_t: decay [b, n, f], write and read
    [b, n, f], value [b, n, e], norm [b, n]. f: the state's rows, e: the values' features."""

    decay: Tensor
    write: Tensor
    read: Tensor
    value: Tensor
    norm: Tensor

    def recurrent(self) -> Tensor:
        """Outputs [b, n, e], step by step."""
        b, n, f = self.write.shape
        state, out = self.value.new_zeros(b, f, self.value.shape[-1]), []
        for t in range(n):
            state = self.decay[:, t, :, None] * state + self.write[:, t, :, None] * self.value[:, t, None]
            out.append(torch.einsum("bf,bfe->be", self.read[:, t], state) / self.norm[:, t, None])
        return torch.stack(out, 1)

    def kernel(self) -> Tensor:
        """The unrolled matrix [b, n, n]: K_ij = read_i . (decay_i * .. * decay_(j+1)) write_j / norm_i for j <= i."""
        n = self.write.shape[1]
        rows = []
        for i in range(n):
            through = torch.ones_like(self.write[:, 0])
            row = [self.write.new_zeros(len(self.write))] * n
            for j in range(i, -1, -1):
                row[j] = (self.read[:, i] * through * self.write[:, j]).sum(-1) / self.norm[:, i]
                through = through * self.decay[:, j]
            rows.append(torch.stack(row, -1))
        return torch.stack(rows, 1)


class Mixer(nn.Module):
    """One layer of one of `FORMS`: u [b, n, dim] -> [b, n, dim]. All but softmax, whose features are infinitely many,
    have a `system`."""

    def __init__(self, form: str, dim: int, states: int) -> None:
        super().__init__()
        self.form = form
        self.q, self.k = (nn.Linear(dim, states, bias=False) for _ in range(2))
        self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.gate = nn.Linear(dim, states if form in ("s6", "rnn") else 1)
        self.rate = nn.Parameter(torch.linspace(0.05, 1.0, states).log())

    def system(self, u: Tensor) -> System:
        q, k, v = self.q(u), self.k(u), self.v(u)
        one = torch.ones_like(q[..., 0])
        if self.form == "s6":
            delta = F.softplus(self.gate(u))
            return System((-delta * self.rate.exp()).exp(), delta * k, q, v, one)
        if self.form == "rnn":
            keep = self.gate(u).sigmoid()
            return System(keep, 1 - keep, q, v, one)
        q, k = (F.elu(x) + 1 for x in (q, k))
        if self.form == "linear":
            norm = (q * k.cumsum(1)).sum(-1)
        else:
            raw = self.gate(u)[..., 0]
            norm = raw.exp() if self.form == "exp" else F.softplus(raw) + 1e-3
        return System(torch.ones_like(k), k, q, v, norm)

    def weights(self, u: Tensor) -> Tensor:
        """[b, n, n], what each output takes of each value."""
        if self.form == "softmax":
            return softmax_weights(self.q(u), self.k(u))
        return self.system(u).kernel()

    def forward(self, u: Tensor) -> Tensor:
        if self.form == "softmax":
            return self.out(self.weights(u) @ self.v(u))
        if self.form in ("s6", "rnn"):
            return self.out(self.system(u).recurrent())
        own = self.system(u)
        return self.out((own.read @ own.write.mT).tril() @ own.value / own.norm[..., None])


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(ahead, float("-inf")).softmax(-1)


def draw_recall(rows: int, pairs: int, words: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Tokens [rows, 3 pairs] k_1 v_1 k_2 v_2 .. then the keys again in another order, and the values asked for
    [rows, pairs]: multi-query recall. Keys are 0..words-1, values words..2 words-1."""
    keys = distinct(rows, pairs, 0, words, rng)
    values = torch.randint(words, 2 * words, (rows, pairs), generator=rng)
    order = torch.rand(rows, pairs, generator=rng).argsort(1)
    told = torch.stack([keys, values], -1).flatten(1)
    return torch.cat([told, keys.gather(1, order)], 1), values.gather(1, order)


class Recaller(nn.Module):
    """Embedding with the token before (a shift, as short convolutions give), two mixers with residuals, and a head."""

    def __init__(self, form: str, words: int, dim: int, states: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(2 * words, dim)
        self.mixers = nn.ModuleList(Mixer(form, dim, states) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.before = nn.Linear(dim, dim, bias=False)
        self.head = nn.Linear(dim, 2 * words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.before(F.pad(x, (0, 0, 1, 0))[:, :-1])
        for mixer, norm in zip(self.mixers, self.norms, strict=False):
            x = x + mixer(norm(x))
        return self.head(self.norms[-1](x))


@register_study
@dataclass(frozen=True)
class CommonForm(Study):
    """Sieber et al., Understanding the Differences in Foundation Models: Attention, State Space Models, and Recurrent
    Neural Networks, arXiv:2405.15731.

    All are h_t = L_t h_(t-1) + B_t u_t, y_t = C_t h_t (`System`), of which softmax attention takes infinitely many
    states. Normalised attention has y_t = sum_j phi(q) phi(k_j) v_j / eta(u_t): its divisor is a function of the token
    alone. Measured: multi-query recall; how far the recurrence is from its unrolled matrix.
    Divergence: one head, width and states of a few dozens, some hundred steps, phi = elu + 1; the recurrence is a
    gated one with a matrix state.
    """

    name = "common-form"
    title = "Attention, state spaces and recurrence in one form"
    claim = (
        "Written as one linear system, attention normalised by a function of the token alone recalls more than linear "
        "attention normalised by its sum, and softmax attention more than either, a state space or a gated recurrence."
    )
    reference = "arXiv:2405.15731"
    simplified = (
        "Multi-query recall of a few pairs, two layers of width 32, some hundred steps; the paper has up to 256 pairs, "
        "larger widths, and WikiText."
    )
    columns: ClassVar[Mapping[str, str]] = {"recall": "recall", "apart": "recurrence from matrix"}

    words: int = 16
    pairs: int = 6
    dim: int = 32
    states: int = 16
    steps: int = 500
    batch: int = 48
    learning_rate: float = 0.01

    def points(self) -> list[Point]:
        return [{"label": label, "form": form} for form, label in FORMS.items()]

    def measure(self, point: Point, seed: int) -> dict[str, Any]:
        rng = generator(self.name, "train", seed)
        held, right = draw_recall(256, self.pairs, self.words, generator(self.name, "eval", seed))
        with seeded(self.name, "weights", seed):
            model = Recaller(point["form"], self.words, self.dim, self.states)
        optimiser = torch.optim.AdamW(model.parameters(), self.learning_rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps + 1)
        curve, marks = [], checkpoints(self.steps, 12)
        for step in range(self.steps + 1):
            if step in marks:
                with torch.no_grad():
                    said_ = model(held)[:, -self.pairs :].argmax(-1)
                curve.append({"step": step, "recall": float((said_ == right).float().mean())})
            tokens, wanted = draw_recall(self.batch, self.pairs, self.words, rng)
            optimiser.zero_grad()
            F.cross_entropy(model(tokens)[:, -self.pairs :].flatten(0, 1), wanted.flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        return {"recall": curve[-1]["recall"], "apart": apart(model, held[:2]), "curve": curve}

    def verdict(self, cells: Sequence[Cell]) -> Verdict:
        parts, lines = [], []
        for more, less in [("exp", "linear"), ("softplus", "linear"), *(("softmax", own) for own in FORMS)][:-1]:
            if more == less:
                continue
            pairs = paired(cells, "recall", {"form": more}, {"form": less})
            parts.append(always(pairs))
            lines.append(said(f"Recall of {FORMS[more]}, against {FORMS[less]}", pairs))
        pairs = paired(cells, "recall", {"form": "softmax"}, {"form": "rnn"})
        lines.append(said(f"Recall of {FORMS['softmax']}, against {FORMS['rnn']}", pairs))
        return Verdict(both_ways([*parts, always(pairs)]), {}, tuple(lines))

    def plots(self, cells: Sequence[Cell]) -> list[Plot]:
        return [
            *strip_plot(cells, "recall", "Recall", "Of values asked for, on held-out draws.", "share"),
            *curve_plot(cells, "recall", "Recall over training", "On held-out draws.", "share"),
        ]


@torch.no_grad()
def apart(model: Recaller, tokens: Tensor) -> float:
    """The greatest difference of the first layer's recurrence from its unrolled matrix, 0 for softmax, which has no
    finite one."""
    mixer: Any = model.mixers[0]
    u = model.norms[0](model.embed(tokens))
    if mixer.form == "softmax":
        return 0.0
    own: System = mixer.system(u)
    return float((own.recurrent() - own.kernel() @ own.value).abs().max() / own.value.abs().max())
