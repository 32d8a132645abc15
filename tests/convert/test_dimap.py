"""DIMAP on a tiny Swin: the score in loops, scales that do not matter, and heads that are gone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SwinConfig, SwinForImageClassification, SwinModel, ViTConfig, ViTForImageClassification

from manyheads.convert.dimap import block_head_scores, dimap, distortion, load_dimap, weight_scores


def tiny(cls: Any = SwinForImageClassification, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2}
    model = cls(SwinConfig(**{**sizes, **more})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model.double().requires_grad_(False)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(3, 3, 16, 16).double()).logits


def blocks(model: Any) -> list[Any]:
    return [block for layer in model.base_model.encoder.layers for block in layer.blocks]


def test_the_score_in_loops() -> None:
    model = tiny()
    scores = weight_scores(model)
    prefix = "swin.encoder.layers.1.blocks.0."
    for module in (("attention.q_proj", "attention.k_proj", "attention.v_proj"), ("attention.o_proj",)):
        names = [f"{prefix}{path}.weight" for path in module]
        squares = [float(w) ** 2 for name in names for w in model.get_parameter(name).flatten()]
        for name in names:
            for i, j in ((0, 0), (3, 2), (7, 5)):
                own = float(model.get_parameter(name)[i, j]) ** 2
                left = sum(square for square in squares if square >= own)
                assert float(scores[name][i, j]) == pytest.approx(own / left, rel=1e-12)
        assert max(float(scores[name].max()) for name in names) == 1.0
    assert not any("norm" in name or "reduction" in name or "classifier" in name for name in scores)
    assert distortion(torch.zeros(3)).tolist() == [1.0, 0.0, 0.0]


def test_as_many_weights_go_as_asked_whatever_the_scale_of_a_stage() -> None:
    model = tiny()
    total = sum(score.numel() for score in weight_scores(model).values())
    small = dimap(model, 0.5)
    gone = {name: small.get_parameter(name) == 0 for name in weight_scores(model)}
    assert sum(int(lost.sum()) for lost in gone.values()) == round(0.5 * total)
    for name, lost in gone.items():
        torch.testing.assert_close(small.get_parameter(name)[~lost], model.get_parameter(name)[~lost])
    with torch.no_grad():
        for path in ("q_proj", "k_proj", "v_proj"):
            getattr(blocks(model)[0].attention, path).weight.mul_(1e-3)
    scaled = dimap(model, 0.5)
    for name, lost in gone.items():
        torch.testing.assert_close(scaled.get_parameter(name) == 0, lost)
    torch.testing.assert_close(logits(dimap(model, 0.0)), logits(model), rtol=0, atol=0)


def test_heads_in_loops() -> None:
    model = tiny()
    for block, row in zip(blocks(model), block_head_scores(model), strict=True):
        layer, dim = block.attention, block.attention.head_dim
        sizes = []
        for head in range(layer.num_attention_heads):
            rows = slice(dim * head, dim * (head + 1))
            parts = [getattr(layer, path).weight[rows] for path in ("q_proj", "k_proj", "v_proj")]
            sizes.append(sum(float(v) ** 2 for p in [*parts, layer.o_proj.weight[:, rows]] for v in p.flatten()))
        for head, size in enumerate(sizes):
            left = sum(other for other in sizes if other >= size)
            assert float(row[head]) == pytest.approx(size / left, rel=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_heads_that_are_gone_are_those_that_add_nothing(bias: bool, tmp_path: Path) -> None:
    model = tiny(qkv_bias=bias)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = block_head_scores(model)
    small = dimap(model, 0.5, structure="heads")
    lowest = torch.cat(scores).sort().values[5]
    kept = [(row >= lowest).nonzero().flatten().tolist() for row in scores]
    assert [block.attention.num_attention_heads for block in blocks(small)] == [len(row) for row in kept]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    with torch.no_grad():
        for block, row in zip(blocks(model), kept, strict=True):
            dim = block.attention.head_dim
            for head in set(range(block.attention.num_attention_heads)) - set(row):
                block.attention.o_proj.weight[:, dim * head : dim * (head + 1)] = 0.0
    torch.testing.assert_close(logits(small), logits(model))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    small.save_pretrained(tmp_path)
    again = load_dimap(tmp_path)
    assert type(again) is SwinForImageClassification
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="mismatch"):  # never silently the wrong heads
        SwinForImageClassification.from_pretrained(tmp_path)


def test_a_body_without_a_head_too(tmp_path: Path) -> None:
    small = dimap(tiny(SwinModel), 0.3, structure="heads")
    small.save_pretrained(tmp_path)
    assert type(load_dimap(tmp_path)) is SwinModel


def test_what_is_refused(tmp_path: Path) -> None:
    vit = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"model_type 'vit'\) has no modules known to DIMAP"):
        dimap(vit, 0.5)
    with pytest.raises(ValueError, match="share=1"):
        dimap(tiny(), 1)
    with pytest.raises(ValueError, match="structure='rows': want weights or heads"):
        dimap(tiny(), 0.5, structure="rows")
    with pytest.raises(ValueError, match=r"8 of 10 heads in 3 blocks, each of which keeps one; want 0.700 at most"):
        dimap(tiny(), 0.8, structure="heads")
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use from_pretrained"):
        load_dimap(tmp_path)
