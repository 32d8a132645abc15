"""DIMAP on other hierarchical vision transformers than Swin: modules in loops, and heads that are gone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from manyheads.convert.dimap import block_head_scores, dimap, load_dimap, weight_scores
from manyheads.convert.hierarchical import LAYOUTS

SIZES: dict[str, dict[str, Any]] = {
    "swin": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4],
             "window_size": 2},
    "swinv2": {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4],
               "window_size": 2},
    "segformer": {"num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
                  "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
                  "decoder_hidden_size": 8},
    "pvt": {"image_size": 16, "num_encoder_blocks": 2, "depths": [1, 2], "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2]},
}  # fmt: skip
# Where the weights of the second stage's first block lie, written out: names of queries, keys, values; joined; the MLP.
OLD = ("attention.self.query", "attention.self.key", "attention.self.value")
NEW = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
PLACES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "swin": ("swin.encoder.layers.1.blocks.0", (NEW, ("attention.o_proj",), ("mlp.fc1", "mlp.fc2"))),
    "swinv2": ("swinv2.encoder.layers.1.blocks.0",
               (OLD, ("attention.output.dense",), ("intermediate.dense", "output.dense"))),
    "segformer": ("segformer.stages.1.blocks.0", (NEW, ("attention.o_proj",), ("mlp.fc1", "mlp.fc2"))),
    "pvt": ("pvt.encoder.block.1.0", (OLD, ("attention.output.dense",), ("mlp.dense1", "mlp.dense2"))),
}  # fmt: skip


def tiny(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **SIZES[kind], **more)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.double().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(3, 3, 16, 16).double()).logits


def test_all_families_are_tried() -> None:
    assert set(SIZES) == set(PLACES) == set(LAYOUTS)


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_modules_scores_in_loops(kind: str) -> None:
    model = tiny(kind)
    scores = weight_scores(model)
    block, modules = PLACES[kind]
    assert sum(name.startswith(f"{block}.") for name in scores) == 6
    for module in modules:
        names = [f"{block}.{path}.weight" for path in module]
        squares = [float(w) ** 2 for name in names for w in model.get_parameter(name).flatten()]
        for name in names:
            for i, j in ((0, 0), (3, 2), (7, 5)):
                own = float(model.get_parameter(name)[i, j]) ** 2
                assert float(scores[name][i, j]) == pytest.approx(own / sum(s for s in squares if s >= own), rel=1e-12)
    gone = dimap(model, 0.5)
    total = sum(score.numel() for score in scores.values())
    assert sum(int((gone.get_parameter(name) == 0).sum()) for name in scores) == round(0.5 * total)


@pytest.mark.parametrize("kind", list(SIZES))
def test_heads_that_are_gone_are_those_that_add_nothing(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    scores = block_head_scores(model)
    small = dimap(model, 0.5, structure="heads")
    lowest = torch.cat(scores).sort().values[5]
    kept = [(row >= lowest).nonzero().flatten().tolist() for row in scores]
    assert sum(map(len, kept)) == 5
    own = LAYOUTS[kind]
    with torch.no_grad():
        for block, row, cut in zip(own.blocks(model.base_model), kept, own.blocks(small.base_model), strict=True):
            joined = block.get_submodule(own.joined).weight
            size = joined.shape[1] // block.get_submodule(own.attention).num_attention_heads
            for head in set(range(joined.shape[1] // size)) - set(row):
                joined[:, size * head : size * (head + 1)] = 0.0
            assert cut.get_submodule(own.joined).weight.shape[1] == size * len(row)
    torch.testing.assert_close(logits(small), logits(model))
    small.save_pretrained(tmp_path)
    again = load_dimap(tmp_path)
    assert type(again) is type(model)
    torch.testing.assert_close(dict(again.state_dict()), dict(small.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(logits(again), logits(small))
