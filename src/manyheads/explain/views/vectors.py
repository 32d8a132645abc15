"""Views of queries and keys: their product dimension by dimension, and all of them in one plane.

Embedding: Yeh et al., AttentionViz (arXiv 2305.03210). In each head, softmax does not change when a vector is added to
all keys, and dot products do not when q / c and c k take the place of q and k, so the two clouds can be laid over one
another: k <- c (k - mean k) + mean q / c, then one projection of both. Divergence: the paper takes the c at which
distance follows the dot product best, from a search whose code is not published; here c makes the clouds equally wide,
c = sqrt(rms |q - mean q| / rms |k - mean k|).

Neuron view: after Vig, A Multiscale Visualization of Attention (arXiv 1906.05714).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .attention import Panel, checked_tokens
from .chunks import deflate, planes
from .store import BASE64, AttentionStore, rounded
from .view import View

METHODS = {"pca": "principal components", "tsne": "t-SNE", "umap": "UMAP"}
# Keys that a query is joined to by lines: those that it attends to most.
LINES = 3


def view_neurons(
    calls: Sequence[Any],
    tokens: Sequence[str],
    *,
    key_tokens: Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    batch: int = 0,
    budget_mb: float = 32,
    title: str = "Neuron view",
    theme: str = "auto",
) -> View:
    """For a chosen pair of tokens, query, key and their product per dimension, from recorded calls, one per layer.

    Vectors are kept in half precision; score = scale * sum_d q_d k_d, before a mask, a bias or a soft cap; the weights
    are the model's own. Half of the budget is the weights'.
    """
    _need_vectors(calls)
    first = calls[0]
    chosen = first.check_heads(heads)
    n, m, dim = first.query.shape[2], first.key.shape[2], first.query.shape[3]
    size = len(calls) * len(chosen) * (n + m) * dim * 2 * BASE64 / 1e6
    if size > budget_mb / 2:
        raise ValueError(
            f"queries and keys of {len(calls)} layers, {len(chosen)} heads and {n} tokens take {size:.0f} MB of a "
            f"page; choose fewer layers or heads, or a budget_mb above {2 * size:.0f}"
        )
    store = AttentionStore.from_calls(calls, heads=chosen, batch=batch, budget_mb=budget_mb / 2, signed=False)
    vectors = {}
    for layer, call in enumerate(calls):
        query, key = _joint(call, chosen, batch)
        for place in range(len(chosen)):
            both = torch.cat([query[place].ravel(), key[place].ravel()]).clamp(-65504, 65504).half().numpy()
            vectors[f"{layer}/{place}"] = deflate(planes(both.view(np.uint16), 2))
    name = _key(vectors.values())
    blobs = {f"{name}/{at}": data for at, data in vectors.items()} | store.blobs(store.key)
    payload = {
        "panel": Panel(store, tokens, key_tokens).spec(store.key), "key": name, "dim": dim,
        "scale": [call.scale for call in calls],
    }  # fmt: skip
    return View("neuron", title, payload, blobs, theme)


def view_embedding(
    calls: Sequence[Any],
    tokens: Sequence[str],
    *,
    method: str = "pca",
    more: Sequence[tuple[Sequence[Any], Sequence[str]]] = (),
    heads: Sequence[int] | None = None,
    points: int = 100_000,
    batch: int = 0,
    seed: int = 0,
    title: str = "Queries and keys",
    theme: str = "auto",
) -> View:
    """Queries and keys of all heads in the plane, each head in a field of its own; self-attention, one call per layer.

    more: calls and tokens of further inputs, of any length, in the same map: what a head does shows over many. Lines
    join a query to the keys, of those shown, that it attends to most. method: "pca", "tsne" (scikit-learn's, slow) or
    "umap" (where umap-learn is installed). With more than `points` of them, evenly spaced positions are shown.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    _need_vectors(calls)
    chosen = calls[0].check_heads(heads)
    room = points // (2 * len(calls) * len(chosen) * (1 + len(more)))
    if room < 1:
        raise ValueError(
            f"points={points} leaves none for each of {len(calls)} layers, {len(chosen)} heads and {1 + len(more)} "
            "inputs"
        )
    # A line names its key in two bytes.
    room = min(room, 65535 // (1 + len(more)))
    inputs = [_input(calls, tokens, room, batch), *(_input(own, names, room, 0, calls) for own, names in more)]
    places, norms, most, explained, lines = [], [], [], [], []
    for layer in range(len(calls)):
        parts = [[vectors[:, own.positions] for vectors in _joint(own.calls[layer], chosen, own.batch)]
                 for own in inputs]  # fmt: skip
        query, key = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
        lines.append(_lines([own.joined(layer, chosen) for own in inputs]))
        for place in range(len(chosen)):
            plane, share = _flat(query[place], key[place], method, seed)
            lengths = torch.cat([query[place], key[place]]).norm(dim=1).numpy()
            places.append(plane)
            most.append(float(lengths.max()))
            norms.append((255 * lengths / (most[-1] or 1)).round().astype(np.uint8))
            explained.append(share)
    flat = (np.concatenate(places) * 65535).round().astype(np.uint16)
    data = deflate(planes(flat[:, 0], 2) + planes(flat[:, 1], 2) + np.concatenate(norms).tobytes())
    keys = np.concatenate([own for own, _ in lines])
    joined = deflate(planes(keys.ravel(), 2) + np.concatenate([own for _, own in lines]).tobytes())
    name, sizes = _key([data]), [len(own.names) for own in inputs]
    payload = {
        "layers": [call.layer for call in calls], "heads": chosen,
        "positions": [place for own in inputs for place in own.positions.tolist()],
        "tokens": [own.names[place] for own in inputs for place in own.positions],
        "inputs": [at for at, own in enumerate(inputs) for _ in own.positions] if more else None,
        "points": name, "lines": f"{name}/lines", "each": keys.shape[-1], "norms": rounded(np.array(most), 4),
        "method": METHODS[method], "explained": rounded(np.array(explained)) if method == "pca" else None,
        "sampled": sum(sizes) if sum(len(own.positions) for own in inputs) < sum(sizes) else None,
    }  # fmt: skip
    return View("embedding", title, payload, {name: data, f"{name}/lines": joined}, theme)


@dataclass(frozen=True)
class _Input:
    """One input's calls, its tokens' names, and which of them are shown."""

    calls: Sequence[Any]
    names: list[str]
    positions: NDArray[np.int64]
    batch: int

    def joined(self, layer: int, heads: list[int]) -> tuple[Tensor, Tensor]:
        """Of every shown query the shown keys that it attends to most, and how much: [heads, shown, LINES or fewer]."""
        call, shown = self.calls[layer], torch.from_numpy(self.positions)
        found = []
        for head in heads:
            rows = []
            for part in call.blocks([head]):
                start, stop, _ = part.indices(len(self.names))
                inside = shown[(shown >= start) & (shown < stop)] - start
                rows.append(call.weights([head], part).detach()[self.batch, 0].float().cpu()[inside][:, shown])
            found.append(torch.cat(rows))
        best = torch.stack(found).abs().topk(min(LINES, len(shown)), -1)
        return best.indices, best.values


def _input(calls: Sequence[Any], tokens: Sequence[str], room: int, batch: int, like: Sequence[Any] = ()) -> _Input:
    _need_vectors(calls)
    if like and ([own.query.shape[1::2] for own in calls] != [own.query.shape[1::2] for own in like]):
        raise ValueError("inputs of one map differ in layers, heads or head dimension: record the same model")
    n, m = calls[0].query.shape[2], calls[0].key.shape[2]
    if n != m:
        raise ValueError(f"queries and keys must be of the same tokens; got {n} and {m}")
    positions = np.unique(np.linspace(0, n - 1, min(n, room)).round().astype(np.int64))
    return _Input(calls, checked_tokens(tokens, n, "queries"), positions, batch)


def _lines(inputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Keys by their place among all inputs' shown tokens, and weights in 255ths: [heads, shown, each] flattened."""
    each = min(keys.shape[-1] for keys, _ in inputs)
    start, places, sizes = 0, [], []
    for keys, weights in inputs:
        places.append(keys[..., :each] + start)
        sizes.append((255 * weights[..., :each].clamp(0, 1)).round())
        start += keys.shape[1]
    whole = torch.cat(places, 1).flatten(0, 1).numpy().astype(np.uint16)
    return whole, torch.cat(sizes, 1).flatten().numpy().astype(np.uint8)


def align(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries q / c and keys c (k - mean k) + mean q / c, [n, d], whose attention is that of q and k."""
    wide = [float((each - each.mean(0)).square().sum(1).mean().sqrt()) for each in (query, key)]
    c = (wide[0] / wide[1]) ** 0.5 if min(wide) > 0 else 1.0
    query = query / c
    return query, c * (key - key.mean(0)) + query.mean(0)


def _flat(query: Tensor, key: Tensor, method: str, seed: int) -> tuple[NDArray[np.float64], float]:
    """Both in the unit square [2n, 2], and the share of variance that it holds."""
    both = torch.cat(align(query.double(), key.double()))
    centred = both - both.mean(0)
    if method == "tsne":
        from sklearn.manifold import TSNE

        near = max(1.0, min(30.0, (len(both) - 1) / 3))
        plane = TSNE(perplexity=near, init="random", random_state=seed).fit_transform(centred.numpy()).astype(float)
        share = float("nan")
    elif method == "umap":
        plane = _umap()(n_neighbors=max(2, min(15, len(both) - 1)), random_state=seed).fit_transform(centred.numpy())
        plane, share = plane.astype(float), float("nan")
    else:
        with _one_thread():
            values, axes = torch.linalg.eigh(centred.T @ centred)
        axes = axes[:, -2:].flip(1)
        # An axis may point either way: its largest part is made positive, so that a page can be made again.
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        plane = torch.nn.functional.pad(centred @ axes, (0, 2 - axes.shape[1])).numpy()
        share = float(values[-2:].sum() / values.sum()) if float(values.sum()) > 0 else 1.0
    low, wide = plane.min(0), float((plane.max(0) - plane.min(0)).max()) or 1.0
    return (plane - low) / wide + (1 - (plane.max(0) - low) / wide) / 2, share


@contextmanager
def _one_thread() -> Iterator[None]:
    """For a head's matrices of some dozen rows: threads wait for each other longer than they work, and where others
    use the cores a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _umap() -> Any:
    import importlib

    try:
        return importlib.import_module("umap").UMAP
    except ImportError:
        raise ValueError("method='umap' needs umap-learn: pip install umap-learn, or take 'pca' or 'tsne'") from None


def _joint(call: Any, heads: list[int], batch: int) -> tuple[Tensor, Tensor]:
    chosen = torch.tensor(heads, device=call.query.device)
    query, key = call.query.detach()[batch, chosen], call.of_heads(call.key, chosen).detach()[batch]
    if not (bool(torch.isfinite(query).all()) and bool(torch.isfinite(key).all())):
        raise ValueError(f"{call.site.path}: queries or keys hold NaN or infinite numbers")
    return query.float().cpu(), key.float().cpu()


def _need_vectors(calls: Sequence[Any]) -> None:
    if not calls:
        raise ValueError("no calls were recorded; run the model inside `with record(model) as calls`")
    for call in calls:
        if not hasattr(call, "query"):
            raise ValueError(f"{call.site.path}: {type(call.site.module).__name__} offers no queries and keys")
        if call.query.shape[1:] != calls[0].query.shape[1:] or call.key.shape[2] != calls[0].key.shape[2]:
            raise ValueError("the calls differ in heads, tokens or head dimension; record one stack and kind")


def _key(blobs: Any) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for blob in blobs:
        digest.update(blob)
    return digest.hexdigest()
