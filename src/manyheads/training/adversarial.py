"""Adversarial training of attention: the loss once more, with attention scores pushed where that hurts most."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from manyheads.training.perturbed import Passes, along_differences, check_sizes, listed, scaled, unit, zeros


def adversarial_attention_loss(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    *,
    epsilon: float,
    differences: bool = False,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    kind: str | None = None,
) -> Tensor:
    """L(softmax(s + r)): add it, times a factor (1 in the paper), to the loss of the task. Costs three passes.

        g = dL/dr at r = 0,   r = epsilon g / ||g||_2        (AT; r is no part of the graph)

    s [m]: the scores of one query of one head in a chosen layer (of all, by default), each such row one attention
    vector of the paper, so that each is moved by epsilon, in the units of s. loss_of runs the model on the batch and
    returns its mean loss, a number. No gradient is left on the parameters before the caller's backward. Attention
    dropout is left out of these passes; padded rows and hidden keys get no push, as no loss depends on them.

    differences (iAT): r_t = sum_k alpha_tk d_tk, with d_t = (s_t - s_k)_k / ||.||_2 and alpha = epsilon g / ||g||_2,
    g = dL/dalpha at alpha = 0. As each d_t has length one, dL/dalpha_tk = g_t d_tk, and so r is AT's in every row that
    tells its keys apart, and zero in those that weigh all alike: no [m, m] matrix is made for it.

    Raises ValueError for weights that are no softmax of scores, for reentrant checkpointing (non-reentrant is right),
    and for a loss_of that gives no number with a graph.
    Source: Kitada & Iyatomi, arXiv:2009.12064. Its released iAT takes differences between the sentences of a batch and
    steps by minus AT's r, which lowers the loss to first order: the paper is followed, not that.
    """
    check_sizes("adversarial_attention_loss", epsilon=epsilon)
    where = {"layers": layers, "stack": stack, "kind": kind}
    passes = Passes(model, loss_of, "adversarial_attention_loss", where)
    pushed = scaled(listed([unit(g) for g in passes.gradients(zeros, lambda loss: loss)]), epsilon)
    return passes.added(along_differences(pushed) if differences else pushed)
