"""What mechanisms of our own do inside, as taps see it: against loops, against the eager forward, against a Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_models import built, own, pair, spec, tokens
from torch import Tensor
from torch.testing import assert_close

from manyheads import card, list_attentions
from manyheads.card import Pattern
from manyheads.explain.attributions import METHODS, LogitFlow
from manyheads.hosts.calls import MechanismCall
from manyheads.hosts.taps import AttentionCall, record, tap
from manyheads.steer import boost, scaled, steer
from manyheads.testing.fed import feed

INSIDE = [
    "back-attention", "bam", "calm", "coca", "complexformer", "dgqa", "efficient-slices", "eit", "entmax",
    "gated-cross", "gqa", "hepos", "kdgqa", "landmark", "mae", "mhe", "mixture-of-transformers", "mla", "moba",
    "modality-gate", "modality-mutual", "moh", "monotonic", "mqa", "mswa", "multi-scale", "multi-token",
    "multi-window", "music-transformer", "nats", "neighborhood", "neural-attention", "optimised", "pgqa",
    "rcmha", "selective-temperature", "shaw", "sinkhorn", "skim", "softmax", "wn-duma", "x-pool",
]  # fmt: skip
OWN_MIX = ["dgqa", "mhe", "shaw"]


def passes(name: str) -> list[tuple[Any, Tensor, dict[str, Any]]]:
    """A pass of every declared pattern of tokens in a row: the module, x and what else it is called with."""
    torch.manual_seed(1)
    found = []
    for pattern in sorted(card(name).patterns):
        if pattern in (Pattern.GRID, Pattern.GRID_CROSS, Pattern.VOLUME, Pattern.MAPS, Pattern.GRAPH):
            continue
        module = feed(built(name, pattern.causal), pattern)
        x, more = torch.randn(2, 9, module.dim, dtype=torch.float64), {}
        if pattern.cross:
            source = torch.randn(2, 7, module.source_dim or module.dim, dtype=torch.float64)
            more["context"] = source if module.sources == 1 else (source,) * module.sources
        found.append((module, x, more))
    return found


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_tells_what_it_does_inside_or_says_that_it_does_not(name: str) -> None:
    for module, x, more in passes(name):
        with torch.no_grad():
            wanted = module(x, **more)
            with record(module) as calls:
                given = module(x, **more)
        assert given.weights is None
        assert_close(given.output, wanted.output, atol=1e-9, rtol=1e-9)
        assert isinstance(calls[-1], AttentionCall) == (name in INSIDE)
        assert isinstance(calls[-1], MechanismCall) == (name not in INSIDE)
        assert module.listener is None


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_inside_is_what_the_mechanism_computes(name: str) -> None:
    for module, x, more in passes(name):
        with torch.no_grad():
            whole = module(x, **more, need_weights=True).weights
            with record(module) as calls:
                module(x, **more)
            weights = calls[0].weights()
            assert_close(weights, whole, atol=1e-9, rtol=1e-9)
            assert_close(calls[0].weights([1], slice(2, 5)), whole[:, [1], 2:5], atol=1e-9, rtol=1e-9)
            if name in OWN_MIX:
                with pytest.raises(ValueError, match=f"{name}.*give more than their weights"):
                    calls[0].check_values()
                continue
            every = torch.arange(calls[0].heads)
            mixed = weights @ calls[0].of_heads(calls[0].value, every)
            assert_close(calls[0].output, mixed, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_of_weights_are_autograds_through_the_eager_forward(name: str) -> None:
    for module, x, more in passes(name):
        with record(module, gradients=True) as calls:
            (module(x, **more).output.sin() * torch.arange(x.shape[-1])).sum().backward()
        shape = calls[0].weights().shape
        zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)

        def edited(call: Any, zero: Tensor = zero) -> Tensor:
            return call.mix(lambda weights, rows: weights + zero[:, :, rows])

        with tap(module, edited):
            (module(x, **more).output.sin() * torch.arange(x.shape[-1])).sum().backward()
        assert zero.grad is not None
        assert float(zero.grad.abs().max()) > 1e-6
        assert_close(calls[0].weight_gradients(), zero.grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", INSIDE)
def test_an_edit_that_changes_nothing_changes_nothing_and_silence_is_silence(name: str) -> None:
    for module, x, more in passes(name):
        with torch.no_grad():
            wanted = module(x, **more).output
            with tap(module, lambda call: call.mix(lambda weights, rows: weights, [0, 2])):
                assert_close(module(x, **more).output, wanted, atol=1e-9, rtol=1e-9)
            with tap(module, lambda call: call.replaced(torch.zeros_like(call.output[:, [1]]), [1])):
                silent = module(x, **more).output
        assert float((silent - wanted).abs().max()) > 1e-6


def test_gradients_of_weights_by_an_explicit_softmax_attention() -> None:
    """The whole layer written out, with the weights as a leaf of their own."""
    module = built("softmax", causal=True)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    with record(module, gradients=True) as calls:
        module(x).output.square().sum().backward()
    leaf = torch.zeros(1, 4, 6, 6, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (4, 4)) for p in (module.q_proj, module.k_proj, module.v_proj))
    for h in range(4):
        for i in range(6):
            scores = torch.stack([(q[0, i, h] * k[0, j, h]).sum() / 2 for j in range(i + 1)])
            leaf[0, h, i, : i + 1] = scores.detach().softmax(0)
    assert_close(calls[0].weights(), leaf)
    leaf.requires_grad_()
    heads = torch.stack([sum(leaf[0, :, i, j, None] * v[0, j] for j in range(6)) for i in range(6)])
    module.o_proj(heads.flatten(1)).square().sum().backward()
    assert_close(calls[0].weight_gradients(), leaf.grad, atol=1e-10, rtol=1e-9)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(METHODS))
def test_attributions_equal_those_of_a_llama_of_the_same_weights(name: str) -> None:
    ours, theirs = pair()
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = []
    for model in (ours, theirs):
        method = METHODS[name](model, None)
        found.append(method.attribute(batch, torch.tensor([5, 6]) if method.of_target else None))
    assert float(found[1].abs().max()) > 1e-3
    # transformers turns by angles in float32.
    assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_parts_of_a_logit_add_up_to_it() -> None:
    model, ids = own("softmax", {"name": "mswa", "window": 4}), tokens(2, 8)
    parts = LogitFlow(model).decompose(ids, torch.tensor([4, 9]))
    assert_close(parts.total, model(ids).logits[:, -1].gather(1, torch.tensor([[4], [9]]))[:, 0].detach())


def test_parts_of_a_logit_add_up_without_mlps() -> None:
    model, ids = own(intermediate_size=0), tokens(1, 5)
    parts = LogitFlow(model).decompose(ids, 4)
    assert_close(parts.total, model(ids).logits[:, -1, 4].detach())
    assert_close(parts.mlps, torch.zeros_like(parts.mlps))


@pytest.mark.parametrize(
    ("name", "methods"),
    {
        "hedgehog": "attention-gradient relevance value-norm logit-flow attention-grad-cam",
        "mhe": "value-norm logit-flow",
        "shaw": "value-norm logit-flow",
        "moh": "value-norm logit-flow",
        "mae": "value-norm logit-flow",
        "multi-token": "value-norm logit-flow",
    }.items(),
)
def test_what_a_mechanism_cannot_have_is_refused_with_its_name(name: str, methods: str) -> None:
    model = own(spec(name))
    for method in methods.split():
        with pytest.raises(ValueError, match=name):
            METHODS[method](model, None).attribute(tokens(1, 6), 4)


def test_what_is_done_to_the_heads_after_their_map_is_not_left_out() -> None:
    """A gate behind the output map scales what a token adds: its norm without the gate is no answer."""
    torch.manual_seed(5)
    x, source = (torch.randn(1, 5, 16, dtype=torch.float64) for _ in range(2))
    module = built("gated-cross", causal=False)

    class Reads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = module

        def forward(self, x: Tensor) -> Tensor:
            return self.cross(x, source).output.mean(1)

    method = METHODS["value-norm"](Reads(), None)
    method.streams, method.end = lambda site: ("x", "source"), "x"
    with pytest.raises(ValueError, match=r"gated-cross.*no linear map"):
        method.attribute(x)


def test_heads_are_scaled_as_if_their_weights_were() -> None:
    model, ids = own(), tokens(2, 7)
    with torch.no_grad():
        with scaled(model, {(0, 1): 0.3, (1, 2): 0.0}):
            given = model(ids).logits
        for layer, head, factor in ((0, 1, 0.3), (1, 2, 0.0)):
            model.model.stack.layers[layer].self_attn.mechanism.o_proj.weight[:, 4 * head : 4 * head + 4] *= factor
        wanted = model(ids).logits
    assert_close(given, wanted)


def test_a_vector_is_added_to_a_head() -> None:
    model, ids, vector = own(), tokens(2, 7), torch.randn(4, dtype=torch.float64)
    out = model.model.stack.layers[1].self_attn.mechanism.o_proj
    with torch.no_grad():
        with steer(model, {(1, 2): vector}, 0.5):
            given = model(ids).logits
        out.bias = torch.nn.Parameter(out.weight[:, 8:12] @ vector * 0.5)
        assert_close(given, model(ids).logits)


@pytest.mark.parametrize("name", ["softmax", "mswa", "eit", "shaw", "mla", "landmark"])
def test_more_attention_to_a_span_is_what_the_formula_says(name: str) -> None:
    """Weights of the span times the factor, rows summed to one again; then the mechanism's own way on."""
    module = built(name, causal=True)
    x = torch.randn(1, 6, module.dim, dtype=torch.float64)
    with torch.no_grad():
        with record(module) as calls:
            module(x)
        weights = calls[0].weights().clone()
        weights[..., 1:3] *= 3.0
        weights /= weights.sum(-1, keepdim=True)
        with boost(module, [1, 2], 3.0):
            given = module(x).output
        if name == "shaw":
            mixed = module.mix(weights, calls[0].value, calls[0].where)
        else:
            mixed = weights @ calls[0].of_heads(calls[0].value, torch.arange(calls[0].heads))
        assert_close(given, module.o_proj(mixed.transpose(1, 2).flatten(-2)))


# -- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "mswa", "eit", "mla", "shaw"])
def test_calls_of_a_decoding_stay_what_they_were(name: str) -> None:
    """A state writes over what it held; a call that was recorded does not change with it."""
    model, ids = own(spec(name)), tokens(1, 12)
    now, later = [], []
    with torch.no_grad(), record(model) as calls:
        past = model(ids[:, :5], use_cache=True).past_key_values
        for at in range(5, 12):
            past = model(ids[:, at : at + 1], past_key_values=past, use_cache=True).past_key_values
            now.append((calls[-1].weights().clone(), calls[-1].value.clone()))
        later = [(call.weights(), call.value) for call in calls if call.site.layer == calls[-1].site.layer][1:]
        whole = model(ids, output_attentions=True).attentions[-1]
    for at, (one, two) in enumerate(zip(now, later, strict=True), 5):
        assert_close(one, two)
        assert_close(two[0], whole[:, :, at : at + 1, at + 1 - two[0].shape[-1] : at + 1], atol=1e-9, rtol=1e-9)


def test_keys_stand_in_the_order_of_the_text_after_tokens_were_hidden() -> None:
    module = built("softmax", causal=True)
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    told = torch.tensor([[True, True, False, True, True, True]])
    with torch.no_grad():
        state = module.init_state(1)
        module(x[:, :4], state=state)
        with record(module) as calls:
            module(x[:, 4:], state=state, mask=told)
        assert_close(calls[0].weights(), module(x, mask=told, need_weights=True).weights[:, :, 4:])
        assert_close(calls[0].weights() @ calls[0].value, calls[0].output)
        assert_close(calls[0].key, module.k_proj(x).unflatten(-1, (4, 4)).transpose(1, 2))


@pytest.mark.parametrize("name", ["softmax", "eit"])
def test_broken_tokens_are_broken_inside_too(name: str) -> None:
    model, ids = own(spec(name)), tokens(1, 6)
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 3]] = torch.nan
    with torch.no_grad(), record(model) as calls:
        model(ids)
    broken = calls[0].weights().isnan().any(-1)[0, 0]
    assert broken[3:].all()
    assert not broken[: int((ids[0] == ids[0, 3]).nonzero()[0])].any()
    with pytest.raises(ValueError, match="NaN"):
        METHODS["raw-attention"](model, None).attribute(ids)


def test_packed_text_and_left_padding_are_read_as_they_are() -> None:
    model = own()
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, output_attentions=True).attentions
        with record(model) as calls:
            model(ids, attention_mask=mask)
    for call, own_weights in zip(calls, whole, strict=True):
        assert_close(call.weights(), own_weights)
        assert not calls[0].weights()[1, :, 3:, :3].any()
