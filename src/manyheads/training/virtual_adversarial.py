"""Virtual adversarial training of attention: the push that changes the answer most, found without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall
from manyheads.training.perturbed import Added, Passes, along_differences, check_sizes, listed, scaled, unit, zeros


def virtual_adversarial_attention_loss(
    model: nn.Module,
    logits_of: Callable[[], Tensor],
    *,
    epsilon: float,
    real: Tensor | None = None,
    xi: float = 0.1,
    iterations: int = 1,
    differences: bool = False,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
) -> Tensor:
    """KL(p(s) || p(s + r)), mean over answers: add it, times a factor, to the loss of the task, or use it alone on
    unlabelled text. Costs 2 + 2 iterations passes.

        u = a random direction;   iterations times:  g = d KL(p(s) || p(s + xi u)) / du,   u = g / ||g||_2
        r = epsilon u        (p(s) and r are no part of the graph)

    s: scores as in adversarial_attention_loss, every row of them moved by epsilon. logits_of runs the model and returns
    logits [..., classes]; real [...], True at answers that count (a padded batch's real tokens), all by default. xi, in
    the units of s, is not as small as for inputs in float32: bfloat16 weights would not move.

    differences (iVAT): r_t = sum_k alpha_tk d_tk with unit differences d_t = (s_t - s_k)_k / ||.||_2. Started from a
    random alpha, r is as random as u is, and the step gives u in every row that tells its keys apart (as in iAT);
    rows that weigh all keys alike stay.

    Raises ValueError as adversarial_attention_loss does.
    Source: Kitada & Iyatomi, arXiv:2104.08763; no code was found. The power iteration is Miyato et al.'s,
    arXiv:1704.03976.
    """
    who = "virtual_adversarial_attention_loss"
    check_sizes(who, epsilon=epsilon, xi=xi)
    if iterations < 1 or xi == 0:
        raise ValueError(f"{who}: iterations={iterations}, xi={xi}; want at least one step, of some length")
    # Drawn beside the passes, whose dropout stays as it is.
    beside = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
    passes = Passes(model, logits_of, who, {"layers": layers, "stack": stack, "kind": kind})
    with torch.no_grad():
        target = passes.added(zeros).detach()

    def random(number: int, call: AttentionCall) -> Tensor:
        nothing = zeros(number, call)
        drawn = torch.randn(nothing.shape, generator=beside, dtype=nothing.dtype).to(nothing.device)
        return unit(drawn.masked_fill(call.weights() == 0, 0.0))

    step: Added = along_differences(random) if differences else random
    for _ in range(iterations):
        found = passes.gradients(scaled(step, xi), lambda logits: _divergence(target, logits, real))
        pushed = listed([unit(g) for g in found])
        step = along_differences(pushed) if differences else pushed
    return _divergence(target, passes.added(scaled(step, epsilon)), real)


def _divergence(target: Tensor, logits: Tensor, real: Tensor | None) -> Tensor:
    """Mean over real answers of KL(softmax(target) || softmax(logits)), float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    before, after = target.to(wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    each = (before.exp() * (before - after)).sum(-1)
    if real is None:
        return each.mean()
    if real.shape != each.shape:
        raise ValueError(
            f"virtual_adversarial_attention_loss: real {list(real.shape)} for answers {list(each.shape)}; want one "
            "for each"
        )
    counted = real.to(device=each.device, dtype=torch.bool)
    return each.masked_fill(~counted, 0.0).sum() / counted.sum().clamp_min(1)
