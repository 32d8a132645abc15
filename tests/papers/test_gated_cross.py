"""Gated cross attention against loops, its closed gate, and the cross attention of Llama 3.2 Vision in transformers."""

import torch
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

from manyheads.mechanisms.cross.gated_cross import GatedCross


def build(gate=0.7, **config):
    torch.manual_seed(0)
    module = GatedCross(12, 3, **config).double().eval()
    torch.nn.init.constant_(module.gate, gate)
    return module


def by_loops(module, x, context, allowed=None):
    """One sequence, one query and head at a time."""
    d, rows = 4, []
    for i in range(len(x)):
        mixed = torch.zeros(12, dtype=x.dtype)
        for h in range(3):
            part = slice(d * h, d * h + d)
            q = module.q_proj.weight[part] @ x[i]
            seen = [j for j in range(len(context)) if allowed is None or allowed[i, j]]
            scores = [((module.k_proj.weight[part] @ context[j]) @ q / d**0.5).exp() for j in seen]
            for j, score in zip(seen, scores, strict=True):
                mixed[part] += score / sum(scores) * (module.v_proj.weight[part] @ context[j])
        rows.append(torch.tanh(module.gate) * (module.o_proj.weight @ mixed))
    return torch.stack(rows)


@torch.no_grad()
def test_equation_and_tile_tags():
    module, x, tiles = build(), torch.randn(2, 5, 12).double(), torch.randn(2, 6, 12).double()
    torch.testing.assert_close(module(x, tiles).output[1], by_loops(module, x[1], tiles[1]))
    # Two tiles of three tokens; text tokens 1 and 3 are their tags and see one tile each.
    tags = torch.ones(5, 6, dtype=torch.bool)
    tags[1, 3:] = False
    tags[3, :3] = False
    found = module(x, tiles, mask=tags.expand(2, 1, -1, -1)).output[1]
    torch.testing.assert_close(found, by_loops(module, x[1], tiles[1], tags))


def test_a_closed_gate_gives_nothing_but_can_open():
    torch.manual_seed(0)
    module = GatedCross(12, 3).double()
    output = module(torch.randn(2, 5, 12).double(), torch.randn(2, 6, 12).double()).output
    torch.testing.assert_close(output, torch.zeros_like(output))
    (output * torch.randn_like(output) + output).sum().backward()
    assert module.gate.grad.abs().item() > 0
    torch.testing.assert_close(module.q_proj.weight.grad, torch.zeros(12, 12).double())


@torch.no_grad()
def test_parity_with_mllama():
    """Its layer norms queries and keys per head as well: on states for which that is the identity both are the same."""
    config = MllamaTextConfig(
        hidden_size=12, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=1, intermediate_size=8,
        cross_attention_layers=[0], vocab_size=16, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    layer = MllamaTextCrossAttention(config, layer_idx=0).double().eval()
    layer.q_norm = layer.k_norm = torch.nn.Identity()
    module = build()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(layer, name).load_state_dict(getattr(module, name).state_dict())
    x, context = torch.randn(2, 5, 12).double(), torch.randn(2, 6, 12).double()
    wanted, weights = layer(x, context)[:2]
    result = module(x, context, need_weights=True)
    torch.testing.assert_close(result.output, wanted * module.gate.tanh())
    torch.testing.assert_close(result.weights, weights)
