"""Locally biased subsampling: windows by hand, who meets whom, and hosts whose masked attention is the same."""

from typing import Any

import pytest
import torch
from tiny_families import checkpointing, prompt, tiny
from torch import Tensor
from zoo import build, inputs

from manyheads import create_attention
from manyheads.functional.shuffled import draw_windows, from_windows, into_windows
from manyheads.hosts.loading import load_model
from manyheads.hosts.taps import tap
from manyheads.registry import list_attentions, mechanism_class
from manyheads.testing.case import Case
from manyheads.training import LocallySubsampled, locally_subsampled, sampling

PADDED = torch.tensor([[True] * 11, [False] * 3 + [True] * 8, [True] * 5 + [False] * 6])


@pytest.mark.parametrize("spread", [0.0, 1.0, float("inf")])
@pytest.mark.parametrize("keep", [0.25, 0.4, 1.0])
def test_windows_hold_every_token_once_in_order(keep: float, spread: float) -> None:
    places, there = draw_windows(PADDED, keep, spread)
    longest, windows = 11, int(1 / keep + 1e-6)
    assert places.shape[2] == -(-longest // windows)
    for b in range(3):
        own = places[b][there[b]]
        assert sorted(own.tolist()) == PADDED[b].nonzero()[:, 0].tolist()
        for window, slots in zip(places[b], there[b], strict=True):
            held = window[slots].tolist()
            assert held == sorted(held)
    x = torch.randn(3, 11, 2)
    torch.testing.assert_close(from_windows(into_windows(x, places), places, 11), x)


def test_near_tokens_meet_more_often_and_far_ones_only_without_a_bias() -> None:
    real, rates = torch.ones(200, 40).bool(), {}
    for spread in (0.0, 1.0, float("inf")):
        places, _ = draw_windows(real, 0.2, spread)
        window = torch.empty(200, 40, dtype=torch.long)
        window.scatter_(1, places.flatten(1), torch.arange(5).repeat_interleave(8).expand(200, -1))
        meet = window[:, :, None] == window[:, None]
        rates[spread] = [meet.diagonal(lag, 1, 2).double().mean().item() for lag in (1, 8, 30)]
    assert rates[0.0][0] > 0.8
    assert rates[0.0][2] == 0
    near, middle, far = rates[1.0]
    assert near > 1.3 * middle > 0.05
    assert far == 0
    assert max(rates[float("inf")]) - min(rates[float("inf")]) < 0.05


def meeting(places: Tensor, there: Tensor, n: int) -> Tensor:
    """[b, n, n]: who is in whose window, and there."""
    b, c, _ = places.shape
    allowed = torch.zeros(b, n, n).bool()
    for row in range(b):
        for window in range(c):
            for i, real in zip(places[row, window].tolist(), there[row, window].tolist(), strict=True):
                for j, other in zip(places[row, window].tolist(), there[row, window].tolist(), strict=True):
                    allowed[row, i, j] |= real and other
    return allowed


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("given", ["nothing", "padding", "dense"])
def test_it_is_the_mechanism_under_the_mask_of_who_meets_whom(causal: bool, given: str) -> None:
    module = LocallySubsampled(
        create_attention("gqa", 8, 4, kv_heads=2, causal=causal, rotary={}).double(), keep=0.3
    ).train()
    x = torch.randn(3, 11, 8).double()
    dense = torch.rand(3, 4, 11, 11) < 0.7
    mask = {"nothing": None, "padding": PADDED, "dense": dense}[given]
    real = PADDED if given == "padding" else torch.ones(3, 11).bool()
    torch.manual_seed(5)
    found = module(x, mask=mask).output
    torch.manual_seed(5)
    allowed = meeting(*draw_windows(real, 0.3, 1.0), 11)[:, None]
    wanted = module.mechanism(x, mask=allowed & dense if given == "dense" else allowed).output
    torch.testing.assert_close(found[real], wanted[real])
    again = module(x, mask=mask).output
    assert (again - found).abs().max() > 1e-6
    torch.testing.assert_close(module.eval()(x).output, module.mechanism(x).output)
    with sampling(module):
        assert (module(x).output - module.mechanism(x).output).abs().max() > 1e-6


@pytest.mark.parametrize("name", list_attentions())
def test_every_mechanism_of_the_registry_with_one_window_is_itself(name: str) -> None:
    cls = mechanism_class(name)
    for pattern in sorted(cls.card.patterns):
        if "self" not in pattern:
            continue
        case = Case(cls, pattern)
        module, x = case.build(), case.x(7)
        if module.training:
            module.eval()
        try:
            wanted = module(x).output
            with sampling(wrapped := LocallySubsampled(module, keep=1.0)):
                found = wrapped(x).output
        except ValueError:
            continue
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


class Seen:
    """Attention under a mask that is made from what was drawn, for the host's own attention to check against."""

    def __init__(self, keep: float) -> None:
        self.keep = keep

    def __call__(self, call: Any) -> Tensor:
        n = call.query.shape[2]
        real = torch.ones(len(call.query), n).bool()
        if self.padding is not None:
            real = self.padding
        allowed = meeting(*draw_windows(real, self.keep, 1.0), n)[:, None]

        scores = call.weights().double().log()
        return (
            scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
            @ call.of_heads(call.value, range(call.heads)).double()
        ).to(call.output.dtype)

    padding: Tensor | None = None


HOSTS = ["llama", "mistral", "gemma2", "gpt2", "bert", "vit"]


@pytest.mark.parametrize("family", HOSTS)
def test_a_host_attends_within_windows(family: str) -> None:
    """Padding, sliding windows and caps: as whole attention whose weights elsewhere are taken away."""
    model, batch = build(family).eval(), inputs(family)
    for module in model.modules():  # training for the attention alone: no dropout anywhere
        if hasattr(module, "is_causal"):
            module.training = True
            module.attention_dropout = module.dropout_prob = 0.0
            if isinstance(getattr(module, "attn_dropout", None), torch.nn.Dropout):
                module.attn_dropout.p = 0.0
            if isinstance(getattr(module, "dropout", None), torch.nn.Dropout):
                module.dropout.p = 0.0
    torch.manual_seed(2)
    with locally_subsampled(model, keep=0.34):
        found = model(**batch)[0]
    reader = Seen(0.34)
    reader.padding = batch["attention_mask"].bool() if "attention_mask" in batch else None
    torch.manual_seed(2)
    with tap(model, reader):
        wanted = model(**batch)[0]
    real = torch.ones(found.shape[:2]).bool() if reader.padding is None else reader.padding
    torch.testing.assert_close(found[real], wanted[real], atol=1e-4, rtol=1e-3)
    assert (model.eval()(**batch)[0][real] - found[real]).abs().max() > 1e-3


def test_checkpointed_layers_draw_again_what_they_drew_also_when_left() -> None:
    ids, found = prompt(2, 16), []
    for again in (None, False, True):
        model = tiny("llama").train() if again is None else checkpointing(tiny("llama"), reentrant=again)
        torch.manual_seed(4)
        with locally_subsampled(model, keep=0.25):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for other in found[1:]:
        for name, own in found[0].items():
            torch.testing.assert_close(other[name], own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packaged_model_trains_within_windows(dtype: torch.dtype) -> None:
    model = load_model().model.to(dtype).train()
    ids = torch.tensor([list(b"drawing keys near by, drawing keys near by, drawing keys far off. ")])
    before = model(input_ids=ids, labels=ids).loss.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(4):
        with locally_subsampled(model, keep=0.25):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > before  # it sees a quarter
    assert losses[-1] < losses[0]
    assert model(input_ids=ids, labels=ids).loss.item() < before
    with locally_subsampled(model.eval()):
        inside = model(input_ids=ids).logits
    torch.testing.assert_close(inside, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="keep=0"):
        LocallySubsampled(create_attention("softmax", 8, 2), keep=0)
    with pytest.raises(ValueError, match="spread=-1"), locally_subsampled(tiny("llama"), spread=-1):
        pass
    module = LocallySubsampled(create_attention("softmax", 8, 2))
    with pytest.raises(ValueError, match="self attention in training"):
        module(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    with pytest.raises(ValueError, match="cross attention"), locally_subsampled(build("bart")):
        pass
    with pytest.raises(ValueError, match="wrap a mechanism"), locally_subsampled(create_attention("softmax", 8, 2)):
        pass
    model = build("bert").train()
    with pytest.raises(ValueError, match="attention dropout"), locally_subsampled(model):
        model(**inputs("bert"))
    model = tiny("llama").train()
    with locally_subsampled(model):
        past = model(input_ids=prompt(1, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="without a cache"):
            model(input_ids=prompt(1, 2), past_key_values=past)
        with pytest.raises(ValueError, match="leave that first"), tap(model, lambda call: None):
            pass
        with pytest.raises(ValueError, match="leave that first"), locally_subsampled(model):
            pass
