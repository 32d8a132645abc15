"""Masked hard instance mining: a teacher points out what is easy, and the student learns from the rest."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from manyheads.card import Pattern
from manyheads.functional.drawing import draw, highest, share
from manyheads.mechanism import Mechanism, Result
from manyheads.training.given import check_mechanism_given


class HardInstanceMining(nn.Module):
    """A pool that trains on bags without the instances that its own running average attends to most.

        a = teacher's weights on the whole bag, mean over heads
        masked = a random share `pick` of the high / pick highest, the `low` lowest, and `random` of any (shares of n)
        result = student(bag without masked)
        losses["consistency"] = -softmax(z_teacher / temperature) . log softmax(z_student)

    z: pooled vectors. Call `update()` after each optimiser step: teacher = momentum teacher + (1 - momentum) student.
    In eval mode it is the student. A bag that would lose all its instances keeps them all. `high` and `momentum` may be
    set anew between steps: in the released recipes one falls to 0 and the other rises to 1 along a cosine.

    Source: Tang et al., Multiple Instance Learning Framework with Masked Hard Instance Mining for Whole Slide Image
    Classification, arXiv:2307.15254, and its released mhim_abmil.py. There the heads of several-headed students vote
    or take shares; here their weights are averaged. The teacher's own classifier is the caller's.
    """

    def __init__(
        self,
        student: Mechanism,
        *,
        high: float = 0.03,
        pick: float = 0.5,
        low: float = 0.0,
        random: float = 0.0,
        momentum: float = 0.9999,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        check_mechanism_given("HardInstanceMining", student)
        if Pattern.POOL not in student.card.patterns:
            raise ValueError(
                f"HardInstanceMining: {student.card.name} is no pool; it declares {sorted(student.card.patterns)}"
            )
        shares = {"high": high, "low": low, "random": random, "momentum": momentum}
        if any(not 0 <= value <= 1 for value in shares.values()) or not 0 < pick <= 1 or temperature <= 0:
            raise ValueError(
                f"HardInstanceMining: {shares}, pick={pick}, temperature={temperature}; want shares and momentum in "
                "[0, 1], pick in (0, 1], temperature above 0"
            )
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.high, self.pick, self.low, self.random = high, pick, low, random
        self.momentum, self.temperature = momentum, temperature

    def train(self, mode: bool = True) -> HardInstanceMining:
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update(self) -> None:
        narrow = {p.dtype for p in self.teacher.parameters() if 0 < 1 - self.momentum < torch.finfo(p.dtype).eps}
        if narrow:
            raise ValueError(
                f"HardInstanceMining: parameters of {', '.join(sorted(map(str, narrow)))}, momentum={self.momentum}, "
                "whose steps are lost in rounding; keep the parameters in float32 and compute under torch.autocast"
            )
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, 1 - self.momentum)
        for held, now in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            held.copy_(now)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, need_weights: bool = False) -> Result:
        if not self.training:
            return self.student(x, mask=mask, need_weights=need_weights)
        with torch.no_grad():
            seen = self.teacher(x, mask=mask, need_weights=True)
        if seen.weights is None:
            raise ValueError(f"HardInstanceMining: {self.student.card.name} has no weights to mine by")
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        result: Result = self.student(x, mask=self.kept(seen.weights.mean((1, 2)), real), need_weights=need_weights)
        wide = torch.promote_types(result.output.dtype, torch.float32)
        target = (seen.output.to(wide) / self.temperature).softmax(-1)
        each = -(target * result.output.to(wide).log_softmax(-1)).sum(-1)
        bags = real.any(1)
        consistency = each.masked_fill(~bags, 0.0).sum() / bags.sum().clamp_min(1)
        return result._replace(losses={**result.losses, "consistency": consistency})

    def kept(self, scores: Tensor, real: Tensor) -> Tensor:
        """The instances left to the student, [b, n] bool, by the teacher's scores [b, n]."""
        # More than everything cannot be picked from: then of everything, the share that is wanted.
        pick = max(self.pick, self.high)
        pool = highest(scores, real, share(real, self.high / pick))
        masked = draw(pool, share(pool, pick))
        masked = masked | highest(-scores, real, share(real, self.low)) | draw(real, share(real, self.random))
        left = real & ~masked
        return torch.where(left.any(1, keepdim=True), left, real)
