"""A preset with the weights of another implementation gives its logits."""

from __future__ import annotations

import torch
from transformers import FocalNetConfig, FocalNetForImageClassification

from manyheads.models import ManyheadsConfig, ManyheadsForImageClassification
from manyheads.models.presets import PRESETS

# Ours for theirs, in this order.
NAMES = (
    ("embeddings.patch_embeddings.projection", "stem.0.conv"),
    ("embeddings.norm", "stem.0.after"),
    ("stages.0.downsample.projection", "stages.1.down.conv"),
    ("stages.0.downsample.norm", "stages.1.down.after"),
    ("focalnet.layernorm", "focalnet.stages.1.norm"),
    ("encoder.", ""),
    ("layers.0.weight", "layers.weight"),
    ("focal_layers.", "convs."),
    (".0.weight", ".weight"),
    (".layers.", ".blocks."),
    ("modulation.projection_in", "mechanism.f"),
    ("modulation.projection_context", "mechanism.h"),
    ("modulation.projection_out", "mechanism.proj"),
    ("modulation.", "mechanism."),
    ("norm2", "norm_mlp"),
    ("norm1", "norm"),
    ("fc1", "up_proj"),
    ("fc2", "down_proj"),
    ("classifier.", "classifier.classifier."),
    ("focalnet.", "hierarchy."),
)


@torch.no_grad()
def test_focalnet_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    layout = PRESETS["focalnet_tiny_lrf"]()
    layout["stages"] = [{**layout["stages"][i], "dim": dim, "depth": 2} for i, dim in ((0, 16), (-1, 32))]
    layout["stem"][0]["features"], layout["stages"][1]["down"]["features"] = 16, 32
    ours = ManyheadsForImageClassification(ManyheadsConfig(stages=layout, num_labels=5)).double().eval()
    config = FocalNetConfig(depths=[2, 2], embed_dim=16, focal_levels=[3, 3], focal_windows=[3, 3], num_labels=5)
    theirs = FocalNetForImageClassification(config).double().eval()
    weights = {}
    for name, tensor in theirs.state_dict().items():
        tensor.add_(0.1 * torch.randn_like(tensor))
        for old, new in NAMES:
            name = name.replace(old, new)
        weights[name] = tensor
    for name, own in ours.state_dict().items():
        weights[name] = weights[name].view(own.shape)
    ours.load_state_dict(weights)
    image = torch.randn(2, 3, 48, 40).double()
    torch.testing.assert_close(ours(image).logits, theirs(image).logits)
