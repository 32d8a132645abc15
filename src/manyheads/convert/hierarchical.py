"""Where hierarchical vision transformers keep their blocks, their attention's weights, and what each head has beside
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def _nothing(attention: Any, heads: Tensor) -> None:
    return


@dataclass(frozen=True)
class Layout:
    """Names of modules in a block, dotted: inputs (queries, keys, values) and joined (the projection after them) of
    `attention`, and the MLP's two. size: the attention's attribute of a head's features. width: that of all heads'
    features, where it has one. cut: takes of what heads have beside projections those in `heads`."""

    blocks: Callable[[Any], list[Any]]
    attention: str
    inputs: tuple[str, str, str]
    joined: str
    mlp: tuple[str, str]
    size: str
    width: str | None = None
    cut: Callable[[Any, Tensor], None] = _nothing

    @property
    def modules(self) -> tuple[tuple[str, ...], ...]:
        return (tuple(f"{self.attention}.{name}" for name in self.inputs), (self.joined,), self.mlp)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.clone())
    return made


def _cut_table(attention: Any, heads: Tensor) -> None:
    table = attention.relative_position_bias
    table.relative_position_bias_table = nn.Parameter(table.relative_position_bias_table[:, heads].clone())


def _cut_scale(attention: Any, heads: Tensor) -> None:
    attention.logit_scale = nn.Parameter(attention.logit_scale[heads].clone())
    positions = attention.continuous_position_bias_mlp
    positions[-1] = linear(positions[-1].weight[heads], None)


def _of_layers(body: Any) -> list[Any]:
    return [block for layer in body.encoder.layers for block in layer.blocks]


_OLD = ("query", "key", "value")
_NEW = ("q_proj", "k_proj", "v_proj")
LAYOUTS: Mapping[str, Layout] = {
    "swin": Layout(_of_layers, "attention", _NEW, "attention.o_proj", ("mlp.fc1", "mlp.fc2"), "head_dim",
                   cut=_cut_table),
    "swinv2": Layout(_of_layers, "attention.self", _OLD, "attention.output.dense", ("intermediate.dense",
                     "output.dense"), "attention_head_size", "all_head_size", _cut_scale),
    "segformer": Layout(lambda body: [block for stage in body.stages for block in stage.blocks], "attention", _NEW,
                        "attention.o_proj", ("mlp.fc1", "mlp.fc2"), "head_dim"),
    "pvt": Layout(lambda body: [block for stage in body.encoder.block for block in stage], "attention.self", _OLD,
                  "attention.output.dense", ("mlp.dense1", "mlp.dense2"), "attention_head_size", "all_head_size"),
}  # fmt: skip


def layout(model: Any) -> Layout:
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) has no modules known to DIMAP; want one of {list(LAYOUTS)}"
        )
    return LAYOUTS[kind]


def blocks(model: Any) -> list[Any]:
    """ValueError for a family that is not known, or projections that are no plain Linear layers."""
    own = layout(model)
    found = own.blocks(model.base_model)
    paths = [path for module in own.modules for path in module]
    if not all(type(block.get_submodule(path)) is nn.Linear for block in found for path in paths):
        raise ValueError(
            f"{type(model).__name__}: its projections are not plain Linear layers (quantised, or with adapters): merge "
            "adapters first, and load it in float32 or bfloat16"
        )
    return found
