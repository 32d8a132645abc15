"""SoftPAG: chosen heads are blurred towards looking at themselves, to weaken what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from manyheads.hosts.sites import text_stack
from manyheads.hosts.taps import AttentionCall
from manyheads.steer.common import Heads, changed, check_share, some_heads
from manyheads.steer.method import Prompt, steering


@contextmanager
def perturb(model: nn.Module, amount: float, *, heads: Heads | None = None, stack: str | None = None) -> Iterator[None]:
    """Claim: a model whose chosen heads are partly put out is a weak copy to be steered away from.

    A' = (1 - u) A + u I, u = amount; 0 changes nothing, 1 makes the heads pass on their own value. As I V = V it is
    done on the outputs, with no matrix: o' = (1 - u) o + u v_i. Needs a key for every query (self attention). stack:
    whose heads, where the model has several.
    Source: arXiv 2506.10978 (SoftPAG, HeadHunter), which guides a diffusion model by the difference of both runs:
    y = y_strong + w (y_strong - y_weak), see `guided`.
    """
    check_share("perturb: amount", amount)

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        if amount == 0:
            return None
        chosen = call.check_heads(own)
        n = call.query.shape[2]
        values = call.of_heads(call.value, chosen)[:, :, -n:]
        if values.shape[2] != n:
            raise ValueError(f"{call.site.path}: {n} queries on {call.key.shape[2]} keys have no diagonal")
        return call.replaced((1 - amount) * call.output[:, chosen] + amount * values, chosen)

    with changed(model, heads, change, stack):
        yield


def guided(strong: Tensor, weak: Tensor, scale: float) -> Tensor:
    """strong + scale (strong - weak): logits or scores, away from the weak run. scale 0 is the strong run."""
    return strong + scale * (strong - weak)


@steering(
    "perturb",
    title="chosen heads blurred towards looking at themselves",
    source="arXiv 2506.10978",
    kinds=("language", "vision-language"),
    neutral={"amount": 0.0},
    strength="amount",
    reach=(0.0, 1.0),
)
def _open(model: nn.Module, prompt: Prompt, *, heads: str, amount: float = 1.0) -> AbstractContextManager[None]:
    return perturb(model, amount, heads=some_heads(heads, "perturb"), stack=text_stack(model))
