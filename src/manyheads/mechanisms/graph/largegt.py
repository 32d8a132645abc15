"""LargeGT: a local and a global module for graphs that do not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.card import Card, Family
from manyheads.finite import blanked
from manyheads.functional.deferred import Deferred, recomputing
from manyheads.functional.edges import edge_mix, real_edges
from manyheads.functional.grouped import masked_softmax
from manyheads.functional.precision import own_dtype
from manyheads.functional.weighted import attend_weighted
from manyheads.mechanism import Call, Mechanism, Result
from manyheads.registry import register

EPS = 1e-5


@register
class LargeGT(Mechanism):
    """Each node attends to tokens of a few sampled nodes around it, and to centroids of all nodes of the graph.

        tokens of node i: for each of its K sampled nodes j (itself first) x_j, (A x)_j and (A A x)_j, 3K in all
        t = W x;  u = LN(R t + MHA(LN t));  local = u_0 + sum_j softmax_j(a . u_j) u_j,  j > 0
        q = W_q [W_p x_i ; encoding_i], k = W_k E, v = W_v E[:, :g];  global = softmax(q k^T / sqrt(dim) + log c) v
        y = relu(W_2 relu(W_1 [local ; global]))

    A: edges and loops, entries 1 / sqrt(out-degree of the source, in-degree of the target), loops included. Heads are
    dim wide each. sampled: [n, K] from `functional.edges.sample_two_hops`, made once, offline. encoding: [n, g], what
    is known of a node's place (node2vec there). ids: [n], which of the `nodes` of the whole graph these are (default:
    the first n). E [centroids, 2g]: a codebook that k-means moves in training, by averages of decay `decay` of normed
    [W_p x ; encoding]; c_k: how many of all nodes were last nearest to k. Padded nodes are no neighbours and move
    nothing. No weights: local tokens are more than nodes.

    Source: Dwivedi et al., arXiv:2312.11109, and its released code in the form without batch norm, without dropout.
    There the codebook moves at the end of each training pass; here when the next one begins after a backward, so that
    checkpointing reads the same twice. Sizes of clusters start at one, not at zero, with which a first pass sends
    unused centroids to infinity. Rows of a batch are the same graph: of assignments the last row's stay.
    Weights: local att_embeddings_nope is local_in, layer linear_q/k/v, output_layer, res_proj, self_attention_norm,
    final_ln are q/k/v/o_proj, residual, norm, norm_out; of attn_layer the second half of the weight is readout (the
    first and the bias shift all scores of a node alike); lin_proj_g, lin_query/key/value_g are proj_g, q/k/v_g; vq's
    _embedding, _ema_w, _ema_cluster_size, bn are codebook, sums, sizes, mean and variance; c_idx is assigned.
    """

    card = Card(
        name="largegt",
        title="Graph Transformers for Large Graphs",
        reference="arXiv:2312.11109",
        family=Family.GRAPH,
        patterns={"graph"},
        time="n K^2",
        state="",
        decodes=False,
        example={"nodes": 80, "centroids": 4, "global_dim": 3},
        takes={
            "sampled": "[n, K] integers, nodes around each, itself first",
            "encoding": "[n, global_dim] floats, each node's place in the graph",
            "ids": "optional [n] integers, which nodes of the whole graph these are",
        },
        notes="for a large graph call it with part of its nodes: memory grows with n K heads dim",
    )

    codebook: Tensor
    sums: Tensor
    sizes: Tensor
    mean: Tensor
    variance: Tensor
    assigned: Tensor
    new_sums: Tensor
    new_sizes: Tensor
    new_moments: Tensor
    new_assigned: Tensor
    passes: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        causal: bool = False,
        nodes: int = 4096,
        centroids: int = 64,
        global_dim: int = 16,
        decay: float = 0.99,
    ) -> None:
        super().__init__(dim, heads, causal=causal)
        if min(nodes, centroids, global_dim) < 1 or not 0 <= decay <= 1:
            raise ValueError(
                f"largegt: nodes={nodes}, centroids={centroids}, global_dim={global_dim}, decay={decay}; want positive "
                "sizes and a decay from 0 to 1"
            )
        self.nodes, self.centroids, self.global_dim, self.decay = nodes, centroids, global_dim, decay
        wide, key = heads * dim, 2 * global_dim
        self.local_in, self.norm, self.norm_out = nn.Linear(dim, dim), nn.LayerNorm(dim), nn.LayerNorm(wide)
        self.q_proj, self.k_proj, self.v_proj, self.residual = (nn.Linear(dim, wide) for _ in range(4))
        self.o_proj, self.readout = nn.Linear(wide, wide), nn.Linear(wide, 1, bias=False)
        self.proj_g = nn.Linear(dim, global_dim)
        self.q_g, self.k_g, self.v_g = nn.Linear(key, wide), nn.Linear(key, wide), nn.Linear(global_dim, wide)
        self.up, self.down = nn.Linear(2 * wide, wide), nn.Linear(wide, dim)
        book = torch.randn(centroids, key)
        assigned = torch.randint(centroids, (nodes,))
        held = {"codebook": book, "sums": book.clone(), "sizes": torch.ones(centroids)}
        held |= {"mean": torch.zeros(key), "variance": torch.ones(key), "assigned": assigned}
        gathered = {"new_sums": torch.zeros_like(book), "new_sizes": torch.zeros(centroids), "passes": torch.zeros(1)}
        gathered |= {"new_moments": torch.zeros(2, key), "new_assigned": assigned.clone()}
        for name, value in {**held, **gathered}.items():
            self.register_buffer(name, value)
        self.deferred = Deferred()

    def example_inputs(self, n: int, edges: Tensor | None = None) -> Mapping[str, Tensor]:
        node = torch.arange(n)
        encoding = torch.sin(torch.outer(node + 1.0, torch.arange(1.0, self.global_dim + 1)))
        return {"sampled": torch.stack([node, node // 2, node // 3], 1), "encoding": encoding}

    def attend(self, x: Tensor, context: Any, call: Call) -> Result:
        sampled, encoding, ids = self._checked(x, call.inputs)
        if self.training and self.deferred.due():
            self._move()
        if call.padding is not None:
            x = blanked(x, ~call.padding)
        local = self._local(x, call.inputs["edges"], sampled, call.padding)
        place = encoding.to(x.dtype).expand(x.shape[0], -1, -1)
        known = torch.cat([self.proj_g(x).to(x.dtype), place], -1)
        if self.training and not recomputing():
            self._gather(known.detach(), ids, call.padding)
        both = torch.cat([local, self._global(known)], -1)
        output = self.down(self.up(both).relu()).relu()
        if self.training:
            self.deferred.watch(output)
        return Result(output)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    # -- around each node ------------------------------------------------------------------------------------------

    def _local(self, x: Tensor, edges: Tensor, sampled: Tensor, real: Tensor | None) -> Tensor:
        b, n, _ = x.shape
        once = _smoothed(x, edges, real)
        hops = self.local_in(torch.stack([x, once, _smoothed(once, edges, real)], 2))  # [b, n, 3, c], each node once
        normed = self.norm(hops)

        def tokens(rows: Tensor) -> Tensor:
            return rows[:, sampled].flatten(2, 3).flatten(0, 1)  # [b n, 3K, ...]

        q, k, v = (self._split(tokens(p(normed))) for p in (self.q_proj, self.k_proj, self.v_proj))
        here = None
        if real is not None:
            here = real[:, sampled].repeat_interleave(3, -1).flatten(0, 1)  # [b n, 3K]
        mixed, _ = attend_weighted(
            q, k, v, None if here is None else here[:, None, None], scale=self.dim**-0.5, need_weights=False
        )
        mixed = self.o_proj(mixed.transpose(1, 2).flatten(2))
        out = self.norm_out(tokens(self.residual(hops)) + mixed)
        others = out[:, 1:]
        weights = masked_softmax(self.readout(others).mT, None if here is None else here[:, None, 1:])
        return (out[:, 0] + (weights.to(others.dtype) @ others)[:, 0]).unflatten(0, (b, n))

    # -- centroids -------------------------------------------------------------------------------------------------

    def _global(self, known: Tensor) -> Tensor:
        book = (self.codebook * (self.variance + EPS).sqrt() + self.mean).to(known.dtype)
        q, k, v = (
            self._split(self.q_g(known)),
            self._split(self.k_g(book)),
            self._split(self.v_g(book[:, : self.global_dim])),
        )
        # Not bincount, whose size is not known where a graph is traced.
        count = self.assigned.new_zeros(self.centroids).index_add(0, self.assigned, torch.ones_like(self.assigned))
        scores = (self.dim**-0.5 * q @ k.mT).float() if known.dtype.itemsize < 4 else self.dim**-0.5 * q @ k.mT
        scores = scores + count.clamp(min=1).to(scores.dtype).log()
        mixed = masked_softmax(scores, (count > 0).expand(1, 1, 1, -1)).to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(2)

    @torch.no_grad()
    def _gather(self, known: Tensor, ids: Tensor, real: Tensor | None) -> None:
        """What this pass would move the codebook by, beside that of others since it last moved."""
        shown = torch.ones(known.shape[:2], dtype=torch.bool, device=known.device) if real is None else real
        rows = known[shown].to(self.codebook.dtype)
        if not len(rows):
            return
        with own_dtype(rows):
            variance, mean = torch.var_mean(rows, 0, correction=0)
            normed = (rows - mean) / (variance + EPS).sqrt()
            nearest = torch.cdist(normed.float(), self.codebook.float()).argmin(-1)
            member = F.one_hot(nearest, self.centroids).to(rows.dtype)
            self.new_sizes.add_(member.sum(0))
            self.new_sums.add_(member.mT @ normed)
            self.new_moments.add_(torch.stack([mean, variance * len(rows) / max(len(rows) - 1, 1)]))
            self.passes.add_(1)
        row, node = shown.nonzero(as_tuple=True)
        for last in range(len(known)):
            self.new_assigned[ids[node[row == last]]] = nearest[row == last]

    @torch.no_grad()
    def _move(self) -> None:
        if not bool(self.passes):
            return
        keep = self.decay
        sizes = keep * self.sizes + (1 - keep) * self.new_sizes
        total = sizes.sum()
        self.sizes.copy_((sizes + EPS) / (total + self.centroids * EPS) * total)
        self.sums.mul_(keep).add_((1 - keep) * self.new_sums)
        self.codebook.copy_(self.sums / self.sizes[:, None])
        mean, variance = self.new_moments / self.passes
        self.mean.lerp_(mean, 0.1)
        self.variance.lerp_(variance, 0.1)
        self.assigned.copy_(self.new_assigned)
        for gathered in (self.new_sums, self.new_sizes, self.new_moments, self.passes):
            gathered.zero_()

    # -- what is given by name -------------------------------------------------------------------------------------

    def _checked(self, x: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        n, sampled, encoding, ids = x.shape[1], inputs["sampled"], inputs["encoding"], inputs.get("ids")
        if ids is None:
            ids = torch.arange(n, device=x.device)
        for what, value, shape, top in (("sampled", sampled, (n, -1), n), ("ids", ids, (n,), self.nodes)):
            _want_nodes(what, value, shape, top, x.device)
        if not torch.compiler.is_compiling() and not torch.equal(sampled[:, 0], torch.arange(n, device=x.device)):
            raise ValueError("largegt: sampled does not begin with each node itself; want it as from sample_two_hops")
        fits = isinstance(encoding, Tensor) and encoding.is_floating_point() and encoding.device == x.device
        if not fits or tuple(encoding.shape) != (n, self.global_dim):
            given = list(encoding.shape) if isinstance(encoding, Tensor) else type(encoding).__name__
            raise ValueError(f"largegt: encoding is {given}; want floats {[n, self.global_dim]} on {x.device}")
        return sampled, encoding, ids


def _want_nodes(what: str, value: Any, shape: tuple[int, ...], top: int, device: torch.device) -> None:
    """Raises ValueError unless value holds whole numbers below top; -1 in the shape: at least one."""
    whole = isinstance(value, Tensor) and value.dtype == torch.int64 and value.device == device
    given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if not whole or len(value.shape) != len(shape) or value.shape[0] != shape[0] or value.shape[-1] == 0:
        raise ValueError(f"largegt: {what} is {given}; want int64 {[*shape]} on {device}")
    if not torch.compiler.is_compiling() and not 0 <= int(value.min()) <= int(value.max()) < top:
        raise ValueError(f"largegt: {what} names nodes {int(value.min())} to {int(value.max())}; want 0 to {top - 1}")


def _smoothed(x: Tensor, edges: Tensor, real: Tensor | None) -> Tensor:
    """A x, of real nodes and edges between them."""
    b, n, _ = x.shape
    count = x.new_ones(b, edges.shape[1]) if real is None else real_edges(real, edges).to(x.dtype)  # type: ignore[union-attr]
    out, into = (torch.ones(b, n, dtype=x.dtype, device=x.device).index_add(1, end, count).rsqrt() for end in edges)
    weights = (count * out[:, edges[0]] * into[:, edges[1]])[..., None]
    return edge_mix(weights, x[:, :, None], edges, n)[:, :, 0] + (out * into)[..., None] * x
