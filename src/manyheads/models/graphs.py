"""Labels for the nodes of graphs.

Shapes: b graphs, n nodes of each, f features of a node, k edges of each graph, e hidden size.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from manyheads.card import Pattern
from manyheads.finite import blanked
from manyheads.models.configuration import ManyheadsConfig, layer_pattern
from manyheads.models.layers import ManyheadsBlock, Mixer
from manyheads.models.losses import token_loss
from manyheads.models.masks import Masks, real_places
from manyheads.models.modeling import ManyheadsPreTrainedModel
from manyheads.models.stack import Stack


@dataclass
class ManyheadsNodeClassifierOutput(ModelOutput):
    """attentions: per layer [b, heads, n, n], of layers along edges zero where there is none."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None
    aux_loss: Tensor | None = None


class EdgeLabels(TypedDict, total=False):
    """Taken beside the named arguments: Trainer holds every parameter named after labels for one that it must have, and
    measures by."""

    edge_labels: Tensor | None


class ManyheadsForNodeClassification(ManyheadsPreTrainedModel):
    """Labels for nodes. Layers are mechanisms for graphs, which run along the edges of all graphs of the batch as one,
    in memory that grows with the edges; other noncausal mechanisms see all nodes of their graph and no edge, and may
    stand between them. Nodes have no order: no positions are added, whatever the configuration says of them."""

    main_input_name = "node_features"

    def __init__(self, config: ManyheadsConfig) -> None:
        super().__init__(config)
        self.embed_nodes = nn.Linear(config.num_node_features, config.hidden_size)
        self.stack = _stack(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_nodes

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_nodes = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        node_features: Tensor,
        edges: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        **beside: Unpack[EdgeLabels],
    ) -> ManyheadsNodeClassifierOutput:
        """node_features: [b, n, f]. edges: [b, 2, k] integers, sources above targets, from 0 to n - 1 in each graph; -1
        in both places where a graph has fewer. attention_mask: [b, n], nonzero = a node; features, edges and labels of
        what is none do not count. edge_labels: [b, k], where a layer takes them. labels: [b, n], -100 where nothing is
        asked."""
        joined, kept = joined_edges(edges, node_features)
        real, edge_labels = self._checked(node_features, attention_mask, beside)
        given = {"edges": joined}
        if edge_labels is not None:
            if edge_labels.shape != edges[:, 0].shape:
                raise ValueError(f"edge_labels {list(edge_labels.shape)} for edges {list(edges.shape)}; want [b, k]")
            given["labels"] = edge_labels[kept]
        wants = self._wants(output_attentions, output_hidden_states)
        nodes = node_features if real is None else blanked(node_features, ~real)
        x = self.embed_nodes(nodes.to(self.dtype))
        trace = self.stack(x, None, Masks(self_mask=real, beside=given), **wants)
        logits, loss, share = self.classifier(trace.last), None, 1.0
        if labels is not None:
            loss, share = token_loss(logits, labels, num_items_in_batch, real)
        loss = self._with_router_loss(loss, trace.aux_loss, share)
        return ManyheadsNodeClassifierOutput(loss, logits, trace.hidden_states, trace.attentions, trace.aux_loss)

    def _checked(self, nodes: Tensor, mask: Tensor | None, beside: EdgeLabels) -> tuple[Tensor | None, Tensor | None]:
        """What is a node, and the labels of edges."""
        if nodes.shape[2] != self.config.num_node_features:
            raise ValueError(f"node_features {list(nodes.shape)}; want {self.config.num_node_features} of each node")
        if mask is not None and mask.shape != nodes.shape[:2]:
            raise ValueError(f"attention_mask {list(mask.shape)}; want {list(nodes.shape[:2])}, one for each node")
        unknown = sorted(beside.keys() - EdgeLabels.__annotations__.keys())
        if unknown:
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {unknown[0]!r}")
        labels = beside.get("edge_labels")
        for i, layer in enumerate(self.stack.layers if labels is None else ()):
            mixer: Any = layer.self_attn
            if "labels" in mixer.takes:
                raise ValueError(
                    f"layer {i}, {mixer.mechanism.card.name}, takes labels of edges: give edge_labels= "
                    "(Trainer drops what forward does not name: remove_unused_columns=False)"
                )
        return None if mask is None else real_places("attention_mask", mask), labels


def joined_edges(edges: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """edges [b, 2, k] of graphs of n nodes -> [2, all] of one graph of b n nodes, and which of [b, k] are edges."""
    whole = not edges.is_floating_point() and edges.dtype != torch.bool
    if nodes.ndim != 3 or edges.ndim != 3 or edges.shape[:2] != (nodes.shape[0], 2) or not whole:
        raise ValueError(
            f"edges {list(edges.shape)} {edges.dtype} for node_features {list(nodes.shape)}; want integers [b, 2, k] "
            "for [b, n, f]"
        )
    b, n, _ = nodes.shape
    kept = (edges >= 0).any(1)
    if not bool(((edges >= 0).all(1) == kept).all()) or bool((edges >= n).any()) or bool((edges < -1).any()):
        raise ValueError(f"edges: want nodes from 0 to {n - 1}, or -1 as source and target where there is no edge")
    moved = edges + n * torch.arange(b, device=edges.device)[:, None, None]
    return moved.transpose(0, 1)[:, kept], kept


def _stack(config: ManyheadsConfig) -> Stack:
    own = copy.copy(config)
    own.positions, own.short_conv = "none", 0
    blocks = []
    for i, spec in enumerate(config.encoder_specs()):
        place = f"layers[{i}]"
        pattern = layer_pattern(place, spec, None, first=Pattern.GRAPH)
        if pattern.causal:
            raise ValueError(
                f"{place}: {spec!r} is causal, and nodes have no order; want a mechanism for graphs, or a noncausal one"
            )
        blocks.append(ManyheadsBlock(own, Mixer(own, place, spec, pattern)))
    return Stack(own, blocks)
