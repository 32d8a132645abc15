"""Windows put back in place and hierarchies upsampled, against loops over cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from manyheads.explain.explanation import explain_image
from manyheads.explain.hierarchies import GridLayer, grid_layers, is_hierarchy, rollout, upsampled, window_cells
from manyheads.hosts.loading import load_any
from manyheads.models import ManyheadsConfig, ManyheadsForImageClassification

STAGES = {
    "stem": [{"features": 16, "kernel": 4, "stride": 4, "after": "layer"}],
    "stages": [
        {"dim": 16, "depth": 2, "heads": 2, "mixers": [{"name": "twins-local", "window": 3}, "focal-modulation"]},
        {"dim": 32, "depth": 1, "heads": 4, "mixers": ["softmax"], "down": {"after": "layer"}},
    ],
}


def _swin(size: int = 40) -> Any:
    torch.manual_seed(0)
    sizes = {"image_size": size, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = transformers.SwinConfig(**sizes, window_size=4, num_labels=3, initializer_range=0.3)
    return transformers.SwinForImageClassification(config).eval()


def _staged() -> Any:
    torch.manual_seed(0)
    return ManyheadsForImageClassification(
        ManyheadsConfig(stages=STAGES, num_labels=3, image_size=24, patch_size=4)
    ).eval()


def _pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("size", [32, 40, 44])
def test_weights_in_shifted_windows_stand_where_their_cells_do(size: int) -> None:
    model, inputs = _swin(size), _pixels(size)
    model.set_attn_implementation("eager")
    own: list[tuple[Any, Tensor]] = []
    for stage in model.swin.encoder.layers:
        for block in stage.blocks:
            block.attention.register_forward_hook(lambda m, a, out, block=block: own.append((block, out[1])))
    with torch.no_grad():
        model(**inputs)
    inside = list(own)
    found = grid_layers(model, inputs)
    assert [layer.layer for layer in found] == [0, 1, 2, 3]
    assert any(int(block.shift_size) for block, _ in inside)
    side = size // 4
    for layer, (block, weights) in zip(found, inside, strict=True):
        window, shift = int(block.window_size), int(block.shift_size)
        assert (layer.rows, layer.columns) == (side, side)
        whole = -(-side // window) * window
        wanted = torch.zeros(weights.shape[1], side * side, side * side)
        across = whole // window
        for number in range(len(weights)):
            cells = []
            for place in range(window * window):
                y = (number // across * window + place // window + shift) % whole
                x = (number % across * window + place % window + shift) % whole
                cells.append(y * side + x if y < side and x < side else None)
            for i, query in enumerate(cells):
                for j, key in enumerate(cells):
                    if query is not None and key is not None:
                        wanted[:, query, key] = weights[number, :, i, j]
        assert layer.weights is not None
        torch.testing.assert_close(layer.weights, wanted, atol=1e-5, rtol=1e-4)
        side = -(-side // 2) if layer.layer == 1 else side


def test_what_a_cell_does_not_look_at_does_not_change_it() -> None:
    """By the model itself: a patch in the second layer's window of a cell moves what that layer adds to it, and none
    outside of it does."""
    model, inputs = _swin(32), _pixels(32)
    block, cells = model.swin.encoder.layers[0].blocks[1], window_cells(8, 8, 4, 2)
    hidden = torch.randn(1, 64, 16)
    (layer,) = (own for own in grid_layers(model, inputs) if own.layer == 1)
    assert layer.weights is not None
    with torch.no_grad():
        before = block(hidden, (8, 8))[0]
        for query in (0, 18, 27, 63):
            looked = layer.weights[:, query].amax(0) > 1e-12
            mates = {int(cell) for row in cells if query in row.tolist() for cell in row}
            assert {int(cell) for cell in looked.nonzero()[:, 0]} <= mates
            for cell in range(64):
                if cell == query:
                    continue
                changed = hidden.clone()
                changed[0, cell] = torch.randn(16)
                moved = bool((block(changed, (8, 8))[0][0, query] != before[0, query]).any())
                assert moved == bool(looked[cell])


def test_layers_of_our_own_stages() -> None:
    model, inputs = _staged(), _pixels(24)
    assert is_hierarchy(model)
    found = grid_layers(model, inputs)
    assert [(own.rows, own.columns, own.weights is None) for own in found] == [
        (6, 6, False),
        (6, 6, True),
        (3, 3, False),
    ]
    assert "no weights" in found[1].why
    assert found[0].weights is not None
    for query in range(36):
        for key in range(36):
            mates = query // 18 == key // 18 and query % 6 // 3 == key % 6 // 3
            assert (float(found[0].weights[:, query, key].amax()) > 0) == mates
    chosen = grid_layers(model, inputs, [2])
    assert [own.layer for own in chosen] == [2]
    with pytest.raises(ValueError, match=r"layers 0 to 2; got \[5\]"):
        grid_layers(model, inputs, [5])
    with pytest.raises(ValueError, match="focal-modulation: has no weights"):
        grid_layers(model, inputs, [1])


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (3, 3), (9, 4)])
def test_cells_of_small_grids_stand_for_those_merged_into_them(size: tuple[int, int]) -> None:
    few = torch.rand(-(-size[0] // 2), -(-size[1] // 2), dtype=torch.float64)
    wide, shared = upsampled(few, *size), upsampled(few, *size, shares=True)
    torch.testing.assert_close(shared.sum(), few.sum())
    for y in range(size[0]):
        for x in range(size[1]):
            assert wide[y, x] == few[y // 2, x // 2]
            rows = sum(1 for other in range(size[0]) if other // 2 == y // 2)
            columns = sum(1 for other in range(size[1]) if other // 2 == x // 2)
            torch.testing.assert_close(shared[y, x], few[y // 2, x // 2] / (rows * columns))


def test_rollout_over_a_hierarchy_is_the_product_of_its_layers() -> None:
    torch.manual_seed(0)
    large, small = torch.rand(2, 16, 16).softmax(-1), torch.rand(3, 4, 4).softmax(-1)
    found = [GridLayer(0, "", 4, 4, large), GridLayer(1, "", 4, 4, None, "none"), GridLayer(2, "", 2, 2, small)]
    merging = torch.zeros(4, 16)
    for cell in range(16):
        merging[cell // 4 // 2 * 2 + cell % 4 // 2, cell] = 0.25
    mixed = [0.5 * torch.eye(len(own[0])) + 0.5 * own.mean(0) for own in (small, large)]
    wanted = torch.full((4,), 0.25) @ mixed[0] @ merging @ mixed[1]
    torch.testing.assert_close(rollout(found).flatten(), wanted)


@pytest.mark.parametrize("kind", ["swin", "staged"])
def test_the_command_explains_a_picture(kind: str, tmp_path: Path) -> None:
    (_swin(32) if kind == "swin" else _staged()).save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "picture.png")
    loaded = load_any(tmp_path / "model")
    found = explain_image(loaded, tmp_path / "picture.png")
    page, data = found.write(tmp_path / "out")
    assert page.stat().st_size > 10_000
    assert data.exists()
    side = 8 if kind == "swin" else 6
    sides = {(len(own), len(own[0])) for own in found.report["maps"].values()}
    assert sides == ({(8, 8)} if kind == "swin" else {(6, 6), (3, 3)})  # Grad-CAM has the size of its stage
    assert found.report["maps"].keys() >= {"rollout", f"layer 0 ({side} x {side}): from the middle"}
    assert [own["layer"] for own in found.report["stages"]] == ([0, 1, 2, 3] if kind == "swin" else [0, 1, 2])
    assert [own["layer"] for own in found.report["stages"] if "left_out" in own] == ([] if kind == "swin" else [1])
    assert len(found.views) == 3
    numbers = [panel["store"]["layers"] for view in found.views[1:] for panel in view.payload["panels"]]
    assert numbers == ([[0, 1], [2, 3]] if kind == "swin" else [[0], [2]])
    there = "there is rollout alone" if kind == "swin" else "there is rollout, grad-cam, guided-grad-cam"
    with pytest.raises(ValueError, match=there):
        explain_image(loaded, tmp_path / "picture.png", methods=["flow"])
    only = explain_image(loaded, tmp_path / "picture.png", layers=[0])
    assert len(only.report["stages"]) == 1


def test_models_of_one_size_are_none_of_these() -> None:
    vit = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**vit, intermediate_size=16))
    assert not is_hierarchy(model)
    assert not is_hierarchy(torch.nn.Linear(2, 2))
    assert is_hierarchy(_swin())
