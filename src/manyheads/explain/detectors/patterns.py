"""What is read off attention weights: mass on keys of a kind, distance, entropy, stable rank, mass on an image.

    mass of a rule     mean over queries i that have such keys of sum_{j in rule(i)} A_ij
    distance           mean_i sum_j A_ij |i - j|, in tokens; on pictures between centres of patches, in patches
    entropy            mean_i -sum_j A_ij log A_ij, in nats
    spectral gap       1 - |second eigenvalue of A|, the eigenvalues by size (arXiv 2311.13541)
    stable rank        |A|_F^2 / |A|_2^2 of a head's A [n, m], between 1 and its rank
The rules are those of `manyheads.heads.scores` (echo, induction: arXiv 2407.15891; first and last tokens: 2309.17453);
where a model sees ahead, keys on both sides count. Previous and next token, special tokens: arXiv 1906.04341. Distance:
arXiv 2010.11929. |A|_2 is Lanczos' value on A^T A, from rows in blocks, so that one head's A is the most that is held.
Visual tokens (arXiv 2412.18108): mass on the image's tokens of queries after it, and how concentrated it is, here
1 - H(p) / log|image| with p that mass made to sum to one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from manyheads.explain.attributions.feed import Feed
from manyheads.explain.attributions.grid import layout
from manyheads.explain.detectors.reading import Measure, Rows, even, row_blocks, shares
from manyheads.explain.detectors.subject import Sample, Subject, sees_ahead
from manyheads.heads.scores import (
    SINKS,
    Rule,
    after_copies,
    copies,
    equal_tokens,
    first_tokens,
    last_tokens,
    token_before,
)
from manyheads.hosts.taps import BLOCK_WEIGHTS

_LANCZOS = 24
_LARGEST_SPECTRUM = 1024


# -- mass on keys of a kind ------------------------------------------------------------------------------------------


class Mass(Measure):
    """Mean mass on keys by rule. rules: name -> rule(sample, n, both) for n tokens; both: the layer sees ahead."""

    def __init__(self, rules: Mapping[str, Callable[[Sample, int, bool], Rule]]):
        self.rules = rules
        self.mass: dict[int, Tensor] = {}
        self.queries: dict[int, Tensor] = {}
        self._rules: list[Rule] = []

    def call(self, call: Any, sample: Sample) -> None:
        n, both = tokens(call), sees_ahead(call)
        self._rules = [rule(sample, n, both) for rule in self.rules.values()]

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        """One product for all rules; each rule's queries are those that have such a key."""
        i = torch.arange(rows.start, rows.stop, device=weights.device)[:, None]
        j = torch.arange(weights.shape[-1], device=weights.device)[None]
        chosen = torch.stack([rule(i, j) for rule in self._rules])
        mass = weights[0].flatten(1) @ chosen.flatten(1).to(weights.dtype).T
        layer, queries = call.layer, chosen.any(-1).sum(-1).cpu()
        self.mass[layer] = self.mass.get(layer, 0) + mass.T.double().cpu()
        self.queries[layer] = self.queries.get(layer, 0) + queries

    def scores(self) -> dict[str, Tensor]:
        """NaN where no query had such a key."""
        found = {}
        for index, name in enumerate(self.rules):
            rows = [
                self.mass[layer][index] / (int(self.queries[layer][index]) or math.nan) for layer in sorted(self.mass)
            ]
            found[name] = even(rows)
        return found


def tokens(call: Any) -> int:
    return int((call.query if hasattr(call, "query") else call.weights()).shape[2])


def ids_of(sample: Sample, name: str) -> Tensor:
    if sample.ids is None:
        raise ValueError(
            f"{name} compares tokens, and these inputs have no ids: it reads text, not pictures or vectors"
        )
    return sample.ids


def previous(sample: Sample, n: int, both: bool) -> Rule:
    return token_before


def following(sample: Sample, n: int, both: bool) -> Rule:
    if not both:
        raise ValueError("next: this model does not see ahead, so that no head can attend to the next token")
    return lambda i, j: j == i + 1


def duplicate(sample: Sample, n: int, both: bool) -> Rule:
    ids = ids_of(sample, "duplicate")
    return (lambda i, j: (j != i) & (ids[i] == ids[j])) if both else equal_tokens(ids)


def echo(sample: Sample, n: int, both: bool) -> Rule:
    if not sample.period:
        return duplicate(sample, n, both)
    rule, ids = copies(sample.period, sample.start), sample.ids
    return (lambda i, j: rule(i, j) | (rule(j, i) & (ids[i] == ids[j]))) if both and ids is not None else rule


def induction(sample: Sample, n: int, both: bool) -> Rule:
    """Keys that follow earlier copies of the query's token; not the query itself."""
    if sample.period and not both:
        return after_copies(sample.period, sample.start)
    ids = ids_of(sample, "induction")

    def rule(i: Tensor, j: Tensor) -> Tensor:
        after = (j >= 1) & (ids[(j - 1).clamp_min(0)] == ids[i]) & (j - 1 != i)
        return after & ((j != i) | (not both)) if both else after & (j <= i)

    return rule


def sink(sample: Sample, n: int, both: bool) -> Rule:
    """The first tokens; of a model that sees ahead the tokenizer's own, or the first token."""
    if not both:
        return first_tokens(*window(n))
    special = sample.special
    if special is None or not bool(special.any()):
        return lambda i, j: (j == 0) & (i > 0)
    return lambda i, j: special[j] & ~special[i]


def local(sample: Sample, n: int, both: bool) -> Rule:
    sinks, recent = window(n)
    return (lambda i, j: (i - j).abs() < recent) if both else last_tokens(sinks, recent)


def window(n: int) -> tuple[int, int]:
    """First and last tokens that sinks and local mass look at: 4 and a sixteenth, fewer in short inputs."""
    return min(SINKS, max(1, n // 8)), max(2, n // 16)


# -- distance, entropy, rank -----------------------------------------------------------------------------------------


class Distance(Measure):
    def __init__(self, subject: Subject):
        self.subject, self.rows, self.sums = subject, Rows(), torch.zeros(0)

    def call(self, call: Any, sample: Sample) -> None:
        self.sums = torch.zeros(call.heads, dtype=torch.float64)
        n = tokens(call)
        feed = Feed(self.subject.model, sample.named)
        found = layout(feed, self.subject.stack)
        at = torch.arange(n, device=self.subject.device)
        self.places, self.first, self.stop = at[:, None].float(), 0, n
        if found is not None:
            at = at - found.first
            self.places = torch.stack([at // found.columns, at % found.columns], 1).float()
            self.first, self.stop = found.first, found.stop

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        """Between patches alone, where something stands beside them (class, register, detection tokens)."""
        start, stop = max(self.first, rows.start), min(self.stop, rows.stop)
        if start >= stop:
            return
        weights = weights[:, :, start - rows.start : stop - rows.start, self.first : self.stop]
        keys = self.places[self.first : self.first + weights.shape[-1]]
        far = torch.cdist(self.places[start:stop], keys).to(weights.dtype)
        mass = weights.sum(-1, keepdim=True) if self.stop - self.first < len(self.places) else 1.0
        part = torch.einsum("bhnm,nm->bhn", weights, far) / torch.as_tensor(mass, device=far.device).squeeze(-1)
        self.sums += part.double().sum((0, 2)).cpu()

    def done(self, call: Any, sample: Sample) -> None:
        self.rows.add(call.layer, self.sums / (self.stop - self.first))

    def scores(self) -> dict[str, Tensor]:
        return {"distance": self.rows.mean()}


class Entropy(Measure):
    def __init__(self) -> None:
        self.rows, self.sums = Rows(), torch.zeros(0)

    def call(self, call: Any, sample: Sample) -> None:
        self.sums = torch.zeros(call.heads, dtype=torch.float64)

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        self.sums += torch.special.entr(weights).sum(-1).double().sum((0, 2)).cpu()

    def done(self, call: Any, sample: Sample) -> None:
        self.rows.add(call.layer, self.sums / tokens(call))

    def scores(self) -> dict[str, Tensor]:
        return {"entropy": self.rows.mean()}


class SpectralGap(Measure):
    """A matrix that looks back alone is triangular: its eigenvalues are its diagonal."""

    def __init__(self) -> None:
        self.rows, self.kept = Rows(), []  # type: ignore[var-annotated]

    def call(self, call: Any, sample: Sample) -> None:
        n = tokens(call)
        if n > _LARGEST_SPECTRUM and sees_ahead(call):
            raise ValueError(
                f"spectral-gap: all eigenvalues of {n} x {n} matrices take too long: give inputs of up to "
                f"{_LARGEST_SPECTRUM} tokens"
            )
        self.ahead, self.kept = sees_ahead(call), []

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        own = weights[0].double().cpu()
        self.kept.append(own if self.ahead else own.diagonal(rows.start, 1, 2))

    def done(self, call: Any, sample: Sample) -> None:
        whole = torch.cat(self.kept, 1)
        self.rows.add(call.layer, spectral_gaps(whole) if self.ahead else 1 - _second(whole.abs()))

    def scores(self) -> dict[str, Tensor]:
        return {"spectral-gap": self.rows.mean()}


def spectral_gaps(weights: Tensor) -> Tensor:
    """1 - |second eigenvalue| of square matrices [..., n, n]: 1 where every row is the same, 0 for the identity."""
    return 1 - _second(torch.linalg.eigvals(weights.double()).abs())


def _second(sizes: Tensor) -> Tensor:
    if sizes.shape[-1] < 2:
        raise ValueError("spectral-gap: one token has one eigenvalue: give inputs of two or more")
    return sizes.topk(2, -1).values[..., 1]


class StableRank(Measure):
    needs_weights = False

    def __init__(self) -> None:
        self.rows = Rows()

    def call(self, call: Any, sample: Sample) -> None:
        self.rows.add(call.layer, stable_ranks(call))

    def scores(self) -> dict[str, Tensor]:
        return {"rank": self.rows.mean()}


def stable_ranks(call: Any) -> Tensor:
    """|A|_F^2 / |A|_2^2 of every head's weights, [h], float64: side by side where their matrices stay small."""
    n = tokens(call)
    m = call.key.shape[2] if hasattr(call, "key") else n
    together = max(1, 2 * BLOCK_WEIGHTS // (n * m))
    heads = torch.arange(call.heads).split(together)
    return torch.cat([_stable_ranks(call, some.tolist(), n, m) for some in heads])


def _stable_ranks(call: Any, heads: list[int], n: int, m: int) -> Tensor:
    kept = list(_of_heads(call, heads)) if n * m <= BLOCK_WEIGHTS else None
    like = call.output.new_zeros(len(heads), dtype=torch.promote_types(call.output.dtype, torch.float32))

    def gram(vector: Tensor) -> Tensor:
        """A^T A v of every head [heads, m], every block read once."""
        out = torch.zeros_like(vector)
        for block in kept if kept is not None else _of_heads(call, heads):
            seen = block.shape[2]
            there = block @ vector[:, :seen, None]
            out[:, :seen] += (block.transpose(1, 2) @ there)[:, :, 0]
        return out

    frobenius = torch.zeros(len(heads), dtype=torch.float64)
    for block in kept if kept is not None else _of_heads(call, heads):
        frobenius += block.square().sum((1, 2), dtype=torch.float64).cpu()
    return frobenius / greatest_eigenvalue(gram, m, like).cpu()


def _of_heads(call: Any, heads: list[int]) -> Iterator[Tensor]:
    """[heads, rows, m] in blocks that stay in a core's cache."""
    if not hasattr(call, "query"):
        yield shares(call, row_blocks(call)[0])[0, heads]
        return
    n, m = tokens(call), call.key.shape[2]
    step = max(1, BLOCK_WEIGHTS // (16 * m))
    for first in range(0, n, step):
        yield shares(call, slice(first, min(n, first + step)), heads)[0]


def greatest_eigenvalue(matrix: Callable[[Tensor], Tensor], size: int, like: Tensor) -> Tensor:
    """Lanczos' greatest Ritz value of symmetric matrices, with all vectors kept orthogonal. matrix: what they make of
    vectors [..., size], one each; like [...]: how many they are, of which dtype."""
    generator = torch.Generator().manual_seed(0)
    # Weights are not negative, so that their first singular vector is not either: nearly all of the start lies there.
    start = (1 + 0.1 * torch.randn(size, generator=generator, dtype=torch.float64)).to(like)
    steps = min(_LANCZOS, size)
    basis = like.new_zeros(*like.shape, steps, size)
    basis[..., 0, :] = start / start.norm()
    tri = torch.zeros(*like.shape, steps, steps, dtype=torch.float64, device=like.device)
    going = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    for k in range(steps):
        last, known = basis[..., k, :], basis[..., : k + 1, :]
        new = matrix(last)
        # A matrix that is done repeats a value between its least and its greatest: it does not change the greatest.
        own = (new * last).sum(-1).double()
        tri[..., k, k] = own if k == 0 else torch.where(going, own, tri[..., 0, 0])
        for _ in range(2):
            new = new - (known.transpose(-1, -2) @ (known @ new[..., None]))[..., 0]
        length = new.norm(dim=-1)
        going = going & (length > 1e-6 * tri[..., 0, 0].abs())
        if k + 1 == steps or not bool(going.any()):
            return torch.linalg.eigvalsh(tri[..., : k + 1, : k + 1])[..., -1]
        tri[..., k, k + 1] = tri[..., k + 1, k] = torch.where(going, length.double(), 0.0)
        basis[..., k + 1, :] = torch.where(going[..., None], new / length[..., None], 0.0)
    raise AssertionError("a matrix has at least one row")


# -- visual tokens ---------------------------------------------------------------------------------------------------


class Visual(Measure):
    """Mass on an image's tokens of the queries after it (of all other tokens, in a model that sees ahead)."""

    def __init__(self) -> None:
        self.mass, self.sharp = Rows(), Rows()

    def call(self, call: Any, sample: Sample) -> None:
        image = sample.image
        if image is None or bool(image.all()):
            raise ValueError(
                "visual: no tokens of these inputs stand for an image: give inputs= of a model whose config has an "
                "image_token_id, or image_span=(start, stop)"
            )
        at = torch.arange(len(image), device=image.device)
        self.asks = ~image if sees_ahead(call) else at > int(image.nonzero()[-1])
        if not bool(self.asks.any()):
            raise ValueError("visual: no token comes after the image, so that none can look at it")
        self.sums = torch.zeros(2, call.heads, dtype=torch.float64)

    def block(self, call: Any, weights: Tensor, rows: slice, sample: Sample) -> None:
        assert sample.image is not None
        own = weights[0][:, self.asks[rows]][:, :, sample.image[: weights.shape[-1]]].double()
        mass = own.sum(-1)
        p = own / mass.clamp_min(torch.finfo(torch.float64).tiny)[..., None]
        most = math.log(own.shape[-1]) or 1.0
        sharp = 1 - torch.special.entr(p).sum(-1) / most
        self.sums += torch.stack([mass.sum(-1), sharp.sum(-1)]).cpu()

    def done(self, call: Any, sample: Sample) -> None:
        mean = self.sums / int(self.asks.sum())
        self.mass.add(call.layer, mean[0])
        self.sharp.add(call.layer, mean[1])

    def scores(self) -> dict[str, Tensor]:
        return {"visual": self.mass.mean(), "visual-concentration": self.sharp.mean()}
