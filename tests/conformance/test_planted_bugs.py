"""Mechanisms with one known bug each: the suite must catch every one, by the property that names it.

Each is a small real mistake, most of them seen in published code. None is registered.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyheads import Card, Family, Mechanism, Result, SoftmaxAttention, State, Where
from manyheads.functional.grouped import grouped_mix, masked_softmax
from manyheads.mechanism import Call
from manyheads.testing import check_mechanism, examine_mechanism


def bug(name: str, *patterns: str, **more: Any) -> Card:
    return Card(
        name=name,
        title="A planted bug",
        reference="none",
        family=Family.PLAIN,
        patterns=frozenset(patterns or ("causal-self", "noncausal-self")),
        time="n^2",
        state="n",
        **more,
    )


class Healthy(SoftmaxAttention):
    """softmax(q k^T / sqrt(d) - |i - j|) v: a distance penalty, done right. The ones below break it."""

    card = bug("healthy")

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - (i - j).abs()


class FutureThroughSelection(SoftmaxAttention):
    """Top-k keys are chosen over the whole sequence for all queries together, as in expert choice."""

    card = bug("future-through-selection", "causal-self")

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor | None:
        best = k.norm(dim=-1).topk(max(1, k.shape[2] // 2), -1).indices
        chosen = torch.zeros(k.shape[:3], dtype=torch.bool).scatter(-1, best, True)[:, :, None]
        chosen = chosen | (where.i[:, None] == where.j)
        allowed = where.allowed()
        return chosen if allowed is None else chosen & allowed


class FutureThroughNorm(SoftmaxAttention):
    """Keys are divided by their norm over time before they are used."""

    card = bug("future-through-norm", "causal-self")

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)

    def position(self, q: Tensor, k: Tensor, query_positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
        return q, k / (1e-3 + k.norm(dim=2, keepdim=True))


class FutureThroughCentroid(SoftmaxAttention):
    """In training keys are taken relative to a running mean, which all tokens of this pass have moved already."""

    card = bug("future-through-centroid", "causal-self", decodes=False)

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.register_buffer("centre", torch.zeros(self.head_dim))

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        assert isinstance(self.centre, Tensor)
        if self.training:
            with torch.no_grad():
                self.centre.lerp_(k.mean((0, 1, 2)), 0.1)
        near = (k - self.centre).square().sum(-1)[:, :, None]
        return super().score(q, k, where) - near


class CountsTwice(SoftmaxAttention):
    """The scale follows how many passes there were in training, of which checkpointing makes more."""

    card = bug("counts-twice")

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.register_buffer("passes", torch.zeros(()))

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        assert isinstance(self.passes, Tensor)
        scores = super().score(q, k, where) / (1 + self.passes)
        if self.training:
            self.passes += 1
        return scores


class CausalIgnored(SoftmaxAttention):
    """The causal flag is taken and not used."""

    card = bug("causal-ignored")

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor | None:
        return None if where.padding is None else where.padding[:, None, None, :]


class OffByOne(SoftmaxAttention):
    """Query i sees key i + 1."""

    card = bug("off-by-one", "causal-self")

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)

    def select(self, q: Tensor, k: Tensor, where: Where) -> Tensor | None:
        return (where.j <= where.i[:, None] + 1)[None, None]


class AlwaysCausal(SoftmaxAttention):
    """The non-causal form is causal too."""

    card = bug("always-causal", "noncausal-self")

    def mask_mod(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i


class PaddingTakesWeight(SoftmaxAttention):
    """Padded scores are zeroed instead of removed."""

    card = bug("padding-takes-weight")

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        return (scores if allowed is None else scores * allowed).softmax(-1)


class PaddingInTheMean(SoftmaxAttention):
    """Padding is masked in the weights, but enters a mean over the sequence."""

    card = bug("padding-in-the-mean", "noncausal-self")

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, source)
        return q, k, v - v.mean(2, keepdim=True)


class MaskBeforeBias(SoftmaxAttention):
    """The mask is a large negative score, and a positive bias is added after it."""

    card = bug("mask-before-bias")

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        return ((scores if allowed is None else scores.masked_fill(~allowed, -2.0)) + 3.0).softmax(-1)


class NaNOnEmptyRows(SoftmaxAttention):
    """A row with nothing to attend to is a softmax over minus infinity."""

    card = bug("nan-on-empty-rows")

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1)


class ScaleForgotten(SoftmaxAttention):
    """No 1 / sqrt(d): only an oracle can tell."""

    card = bug("scale-forgotten")

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        return q @ k.transpose(-1, -2)


class FastPathDiffers(SoftmaxAttention):
    """The fast path forgets the distance penalty that the stages have."""

    card = bug("fast-path-differs")

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - (i - j).abs()

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        allowed = where.allowed()
        return grouped_mix(masked_softmax(q @ k.transpose(-1, -2) * self.scale, allowed), v)


class BatchNormalised(SoftmaxAttention):
    """A statistic is taken over the batch."""

    card = bug("batch-normalised", "noncausal-self")

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        return (q * self.scale) @ k.transpose(-1, -2) / (1 + k.std())


class DeadParameter(SoftmaxAttention):
    """A learned temperature that is never used."""

    card = bug("dead-parameter")

    def __init__(self, dim: int, heads: int, *, causal: bool = False) -> None:
        super().__init__(dim, heads, causal=causal)
        self.temperature = nn.Parameter(torch.ones(heads))


class DetachedScores(SoftmaxAttention):
    """The forward is right, the gradient is cut."""

    card = bug("detached-scores")

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        return super().score(q, k, where) - 0.5 * super().score(q, k, where).detach()


class OneWrongGradient(SoftmaxAttention):
    """The forward is right, the gradient of one parameter counts twice."""

    card = bug("one-wrong-gradient")

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        output, losses = super().output(mixed, x, call)
        again = self.o_proj(mixed.detach().transpose(1, 2).flatten(-2))
        return output + again - again.detach(), losses


class OneCutGradient(SoftmaxAttention):
    """The forward is right, x learns nothing through the queries."""

    card = bug("one-cut-gradient")

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v = super().project(x, source)
        return super().project(3 * x.detach(), source)[0], k, v


class DiffersTraced(SoftmaxAttention):
    """While a graph is traced another scale is taken."""

    card = bug("differs-traced")

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        scores = super().score(q, k, where)
        return 1.01 * scores if torch.compiler.is_compiling() else scores

    def fused(self, q: Tensor, k: Tensor, v: Tensor, where: Where) -> Tensor | None:
        return None


class NoisyInEval(SoftmaxAttention):
    """Noise that stays on in eval mode."""

    card = bug("noisy-in-eval")

    def score(self, q: Tensor, k: Tensor, where: Where) -> Tensor:
        scores = super().score(q, k, where)
        return scores + torch.randn_like(scores)


class StillSoftmax(SoftmaxAttention):
    """Declares something new and computes softmax attention."""

    card = bug("still-softmax")


class Overflows(SoftmaxAttention):
    """exp without the maximum taken off."""

    card = bug("overflows")

    def normalise(self, scores: Tensor, allowed: Tensor | None) -> Tensor:
        weights = scores.exp() if allowed is None else scores.exp() * allowed
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)


class SilentKwargs(SoftmaxAttention):
    """Unknown arguments are swallowed."""

    card = bug("silent-kwargs")

    def __init__(self, dim: int, heads: int, *, causal: bool = False, **kwargs: Any) -> None:
        super().__init__(dim, heads, causal=causal)


class Running(Mechanism):
    """Mean of the values so far: a recurrent mechanism, done right. The ones below break its state."""

    card = bug("running-mean", "causal-self")

    def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
        super().__init__(dim, heads, causal=causal)
        self.v_proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        if call.dense is not None:
            raise ValueError(f"{self.card.name} takes no dense mask")
        real = torch.ones_like(x[..., :1]) if call.padding is None else call.padding[..., None].to(x.dtype)
        v = torch.where(real > 0, self.v_proj(x), 0)
        total, count = v.cumsum(1), real.cumsum(1)
        if call.state is not None:
            total, count = self.carry(call.state, total, count)
            call.state.advance(x.shape[1])
        return Result(torch.where(real > 0, total / count.clamp(min=1), 0))

    def carry(self, state: State, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        if state.length:
            total, count = total + state.fixed["total"], count + state.fixed["count"]
        state.fixed.update(total=total[:, -1:].clone(), count=count[:, -1:].clone())
        return total, count


class StaleAfterReorder(Running):
    """The state also lives on the module, where reorder does not reach it."""

    card = bug("stale-after-reorder", "causal-self")

    def carry(self, state: State, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        if state.length:
            held = self.__dict__["held"]
            if held[0].shape[0] == total.shape[0]:
                total, count = total + held[0], count + held[1]
        self.__dict__["held"] = (total[:, -1:].clone(), count[:, -1:].clone())
        return total, count


class ForgetsTheState(Running):
    """Every pass starts from nothing."""

    card = bug("forgets-the-state", "causal-self")

    def carry(self, state: State, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return total, count


class HiddenBytes(Running):
    """The state keeps a history that nbytes does not count."""

    card = bug("hidden-bytes", "causal-self")

    def carry(self, state: State, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        state.__dict__.setdefault("history", []).append(total.clone())
        return super().carry(state, total, count)


class ConstantInName(Running):
    """The card says a constant state, and it grows."""

    card = bug("constant-in-name", "causal-self")
    object.__setattr__(card, "state", "1")

    def carry(self, state: State, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        state.append("history", total)
        return super().carry(state, total, count)


class StaleSums(Running):
    """Remembers the padding beside rows that have summed it up: a mask over them later on changes nothing."""

    card = bug("stale-sums", "causal-self")

    def carry(self, state: State, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        if state.length:
            total, count = (t + state.grown[n].view()[:, -1:] for n, t in (("total", total), ("count", count)))
        state.append_optional("padding", None, torch.ones(1, state.length + total.shape[1], dtype=torch.bool))
        state.append("total", total)
        state.append("count", count)
        return total, count


class KeepsDimOnly(Running):
    """Integers in, but bfloat16 comes back as float32."""

    card = bug("keeps-dim-only", "causal-self")

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        return Result(super().attend(x, context, call).output.float())


class WrittenEarly(Healthy):
    """A pass that breaks off has left its keys in the state."""

    card = bug("written-early", "causal-self")

    def _pass(self, x: Tensor, context: Any, call: Call) -> Result:
        return self.attend(x, context, call) if call.state is None else self._continue(x, context, call, call.state)


class FutureThroughZeroWeights(SoftmaxAttention):
    """Later values are multiplied by weights of zero: harmless, until one is NaN."""

    card = bug("future-through-zero-weights", "causal-self")

    def _past_broken(self, x: Tensor, context: Any, call: Call, broken: Any) -> Result:
        return self._pass(x, context, call)


class RowsThroughZeroWeights(FutureThroughZeroWeights):
    """So are the values of other rows of the batch."""

    card = bug("rows-through-zero-weights", "causal-self")

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        output, losses = super().output(mixed, x, call)
        return output + 0 * x.sum(0, keepdim=True), losses


class PaddingThroughZeroWeights(FutureThroughZeroWeights):
    """So are padded ones."""

    card = bug("padding-through-zero-weights")


class Overflowing(SoftmaxAttention):
    """The mean over real tokens is a product with the mask, of tokens squared: 1e30 in padding is infinity, and NaN."""

    card = bug("overflowing", "noncausal-self")

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        real = torch.ones_like(x[..., 0]) if call.padding is None else call.padding.to(x.dtype)
        return Result(self.o_proj(x + ((x**16) * real[..., None]).sum(1, keepdim=True) / x.shape[1]))


class AnyPositions(Healthy):
    """Positions of another batch are taken by broadcasting."""

    card = bug("any-positions")

    def _check_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        whole = isinstance(positions, Tensor) and positions.dtype == torch.int64
        return positions if whole else super()._check_positions(x, positions)


class AnyState(Healthy):
    """A state of a module of another width is taken."""

    card = bug("any-state", "causal-self")

    def init_state(self, batch: int, *, capacity: int = 0) -> State:
        state = super().init_state(batch, capacity=capacity)
        state.config = None
        return state


class ReadAround(SoftmaxAttention):
    """Values come from the weight, whatever stands in the layer's place or hangs on it."""

    card = bug("read-around")

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, source)
        if self.reads(source):
            v = (source @ self.v_proj.weight.to(source.dtype).T).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return q, k, v

    def reads(self, source: Tensor) -> bool:
        return True


class ReadAroundInDecoding(ReadAround):
    """The whole pass calls the layer, decoding absorbs its weight."""

    card = bug("read-around-in-decoding", "causal-self")

    def reads(self, source: Tensor) -> bool:
        return source.shape[1] == 1


class MixesDtypes(SoftmaxAttention):
    """Blends what a Linear gave with what it was given: under autocast they have two dtypes, and lerp takes one."""

    card = bug("mixes-dtypes")

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        output, losses = super().output(mixed, x, call)
        return torch.lerp(x, output, 0.5), losses


class WidensInDecoding(SoftmaxAttention):
    """Under autocast the whole pass gives half precision, a step float32."""

    card = bug("widens-in-decoding", "causal-self")

    def output(self, mixed: Tensor, x: Tensor, call: Call) -> tuple[Tensor, Mapping[str, Tensor]]:
        output, losses = super().output(mixed, x, call)
        return (output if call.state is None else output.to(x.dtype)), losses


class NormOfNothing(SoftmaxAttention):
    """Keys less the first, of length one over a floor that float16 takes for zero: the first is 0 / 0."""

    card = bug("norm-of-nothing", "noncausal-self")

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, source)
        moved = k - k[:, :, :1]
        return q, nn.functional.normalize(moved, dim=-1), v


def scaled_oracle(module: Mechanism, x: Tensor, context: Any) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, head by head and row by row."""
    assert isinstance(module, SoftmaxAttention)
    size, (batch, n, _) = module.head_dim, x.shape
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    mixed = torch.zeros_like(q)
    for b in range(batch):
        for h in range(module.heads):
            at = slice(h * size, (h + 1) * size)
            for i in range(n):
                seen = i + 1 if module.causal else n
                scores = torch.stack([q[b, i, at] @ k[b, j, at] / size**0.5 for j in range(seen)])
                mixed[b, i, at] = scores.softmax(0) @ v[b, :seen, at]
    return module.o_proj(mixed)


BUGS: list[tuple[type[Mechanism], str]] = [
    (FutureThroughSelection, "no-future"),
    (FutureThroughNorm, "no-future"),
    (FutureThroughCentroid, "no-future-training"),
    (CountsTwice, "checkpoint"),
    (CausalIgnored, "no-future"),
    (OffByOne, "no-future"),
    (AlwaysCausal, "sees-all"),
    (PaddingTakesWeight, "padding"),
    (PaddingInTheMean, "padding"),
    (MaskBeforeBias, "dense-mask"),
    (NaNOnEmptyRows, "all-padding"),
    (ScaleForgotten, "oracle"),
    (FastPathDiffers, "weights"),
    (BatchNormalised, "batch"),
    (DeadParameter, "gradients"),
    (DetachedScores, "gradcheck"),
    (OneWrongGradient, "gradcheck"),
    (OneCutGradient, "gradcheck"),
    (DiffersTraced, "compile"),
    (NoisyInEval, "deterministic"),
    (StillSoftmax, "not-softmax"),
    (Overflows, "extreme"),
    (SilentKwargs, "refuses"),
    (StaleAfterReorder, "reorder"),
    (ForgetsTheState, "decode"),
    (StaleSums, "mask-earlier"),
    (HiddenBytes, "state-bytes"),
    (ConstantInName, "state-bytes"),
    (KeepsDimOnly, "dtype"),
    (WrittenEarly, "broken-off"),
    (FutureThroughZeroWeights, "no-numbers-ahead"),
    (RowsThroughZeroWeights, "no-numbers-ahead"),
    (PaddingThroughZeroWeights, "no-numbers-padded"),
    (Overflowing, "no-numbers-padded"),
    (AnyPositions, "odd-arguments"),
    (AnyState, "odd-arguments"),
    (MixesDtypes, "autocast"),
    (WidensInDecoding, "autocast"),
    (NormOfNothing, "autocast"),
    (NormOfNothing, "dtype"),
    (ReadAround, "wrapped"),
    (ReadAroundInDecoding, "wrapped"),
]


@pytest.mark.parametrize(("cls", "name"), BUGS, ids=[f"{cls.card.name}-{name}" for cls, name in BUGS])
def test_caught_by_name(cls: type[Mechanism], name: str) -> None:
    oracle = scaled_oracle if name == "oracle" else None
    findings = list(examine_mechanism(cls, properties=[name], oracle=oracle))
    assert findings, f"{name} does not apply to {cls.card.name}"
    assert any(not f.holds for f in findings), f"{name} holds for {cls.card.name}"
    failed = next(f for f in findings if not f.holds)
    assert failed.size is not None
    assert f"n={failed.size}" in failed.message


@pytest.mark.parametrize("cls", [Healthy, Running])
def test_the_healthy_ones_pass(cls: type[Mechanism]) -> None:
    check_mechanism(cls)


def test_the_smallest_failing_input_is_reported() -> None:
    (found,) = examine_mechanism(OffByOne, properties=["no-future"])
    assert found.size == 2  # one token has no future to leak


def test_check_names_every_failure() -> None:
    with pytest.raises(AssertionError, match=r"off-by-one fails .* properties") as caught:
        check_mechanism(OffByOne)
    assert "no-future" in str(caught.value)
    assert "leak from the future" in str(caught.value)


def test_a_right_scale_passes_the_oracle() -> None:
    class RightScale(SoftmaxAttention):
        """softmax(q k^T / sqrt(d)) v."""

        card = bug("right-scale")

    findings = list(examine_mechanism(RightScale, properties=["oracle"], oracle=scaled_oracle))
    assert len(findings) == 2
    assert all(f.holds for f in findings)


def test_unknown_property_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown properties"):
        list(examine_mechanism(Healthy, properties=["no-such"]))


def test_config_reaches_the_constructor() -> None:
    seen: list[Mapping[str, Any]] = []

    class Recorder(SoftmaxAttention):
        """softmax attention that remembers how it was built."""

        card = bug("recorder")

        def __init__(self, dim: int, heads: int, *, causal: bool = False, extra: int = 0) -> None:
            super().__init__(dim, heads, causal=causal)
            seen.append({"dim": dim, "extra": extra})

    list(examine_mechanism(Recorder, properties=["shapes"], config={"extra": 3, "dim": 8, "heads": 2}))
    assert {"dim": 8, "extra": 3} in seen


def test_a_constructor_that_fails_is_a_finding_and_no_crash() -> None:
    class Unbuildable(SoftmaxAttention):
        """softmax(q k^T) v, of which no instance can be built."""

        card = bug("unbuildable", "causal-self")

        def __init__(self, dim: int, heads: int, *, causal: bool = True) -> None:
            raise RuntimeError("no such file")

    findings = list(examine_mechanism(Unbuildable))
    assert len([f for f in findings if not f.holds]) > 20
    assert "no such file" in findings[0].message


def test_what_does_not_apply_is_not_counted() -> None:
    names = {f.property for f in examine_mechanism(Running)}
    assert {"no-future", "decode"} <= names
    assert names.isdisjoint({"pool-padding", "not-softmax", "oracle"})
