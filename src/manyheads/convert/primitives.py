"""A mixture of multiplication primitives: each MLP twice, with products and with shifts, and a router between them.

    y_i = E_c(x_i),  c = argmax_e (W x_i)_e + noise_e,  noise ~ N(0, 1/2) in training and none after

    balance = SCV_e(a_e sum_i p_ie) + SCV_e(a_e sum_i q_ie),  SCV(z) = variance / mean^2

p_i = softmax(W x_i); q_ie = Phi(2 ((W x_i)_e - the other's noisy score)), how likely e would win under other noise.
a: what a token costs in each, so that the dearer one gets fewer; 6 to 4 in the released code, measured on a GPU there.
Projections of attention stay products, as what is mixed are MLPs.

Source: You et al., ShiftAddViT, arXiv:2306.06446, stage 3, and its `NoisyGate_V2`. There E_c is multiplied by p_ic,
which would shrink a trained MLP by up to half at the start; here the value is 1, as in its `NaiveGate`, with the
gradient of log p_ic, so that the router learns from the text too. Its q compares scores with softmaxes of scores; here
both are scores, as in Shazeer et al., arXiv:1701.06538. Sums leave padding out. No time is saved in torch; see
`shifted`.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from manyheads.convert.hosted import check_hosted, hosted
from manyheads.convert.shifted import BITS, check_bits, linears, put_shifts
from manyheads.convert.shifted import settled as _plain

LATENCIES = (6.0, 4.0)
# Of the balance in the loss, as in the released code.
WEIGHT = 0.01


@torch.no_grad()
def primitive_mixture(
    model: Any, bits: int | None = BITS, *, latencies: tuple[float, float] = LATENCIES, seed: int = 0
) -> Any:
    """A ManyheadsForCausalLM whose MLPs are pairs of the host's, one of them made of shifts; the given model is left as
    it is. bits: None leaves both as they are, which is the host, whatever the router. latencies: what a token costs
    with products, and with shifts. seed: of the routers. Call `settled_mixture` before it is
    saved."""
    check_hosted(model)
    if bits is not None:
        check_bits(bits)
    if len(latencies) != 2 or not all(0 < cost < math.inf for cost in latencies):
        raise ValueError(f"latencies={latencies}: want what a token costs with products, and with shifts, above 0")
    from manyheads.convert.primitive_mlp import PrimitiveMLP
    from manyheads.models import ManyheadsForCausalLM

    base = hosted(model)
    config = base.config.to_diff_dict() | {
        "num_local_experts": 2, "num_experts_per_tok": 1, "router_loss_weight": WEIGHT,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = ManyheadsForCausalLM(type(base.config)(**config)).to(base.dtype)
    state = made.state_dict()
    for key, value in base.state_dict().items():
        pair = ".mlp." in key and ".mlp.norm" not in key
        for name in [key.replace(".mlp.", f".mlp.experts.{e}.") for e in range(2)] if pair else [key]:
            state[name].copy_(value)
    for layer in made.model.stack.layers:
        layer.mlp.__class__ = PrimitiveMLP
        layer.mlp.__dict__["latencies"] = tuple(latencies)
        if bits is not None:
            put_shifts(layer.mlp.experts[1], set(linears(layer.mlp.experts[1])), bits)
    made.generation_config = copy.deepcopy(base.generation_config)
    return made.to(base.device).eval()


def settled_mixture(model: Any) -> Any:
    """The same in plain layers of the class that opens again, with the rounded weights in place of the free ones."""
    from manyheads.models.feed_forward import ExpertMLP

    made = _plain(model)
    for layer in made.model.stack.layers:
        layer.mlp.__class__ = ExpertMLP
    return made
