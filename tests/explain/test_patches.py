"""Which tokens are patches: by family, against the config and against the picture itself."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from manyheads.explain.attributions import (
    METHODS,
    GradCAM,
    InputGradient,
    RawAttention,
    deletion_curve,
    leave_one_out,
    token_grid,
)
from manyheads.explain.detectors import detect
from manyheads.hosts.patches import find_patches
from manyheads.hosts.taps import record

WIDE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "num_channels": 3,
}  # fmt: skip
SQUARE = {"image_size": 16, "patch_size": 4}
# Family -> its settings, the tokens before the patches, those after them, height and width of the picture.
FAMILIES: dict[str, tuple[dict[str, Any], int, int, tuple[int, int]]] = {
    "vit": (SQUARE, 1, 0, (16, 16)),
    "vit wide": ({"image_size": (8, 20), "patch_size": 4}, 1, 0, (8, 20)),
    "vit tall patches": ({"image_size": (16, 8), "patch_size": (8, 2)}, 1, 0, (16, 8)),
    "deit": (SQUARE, 2, 0, (16, 16)),  # class and distillation
    "dinov2": (SQUARE, 1, 0, (16, 24)),
    "dinov2_with_registers": ({**SQUARE, "num_register_tokens": 3}, 4, 0, (16, 16)),
    "dinov3_vit": ({**SQUARE, "num_register_tokens": 2}, 3, 0, (12, 16)),
    "siglip_vision_model": (SQUARE, 0, 0, (16, 16)),
    "clip_vision_model": (SQUARE, 1, 0, (16, 16)),
    "beit": ({**SQUARE, "use_absolute_position_embeddings": True}, 1, 0, (16, 16)),
    "vit_msn": (SQUARE, 1, 0, (16, 16)),
    "ijepa": (SQUARE, 0, 0, (16, 16)),
    "yolos": ({"image_size": [16, 24], "patch_size": 4, "num_detection_tokens": 5}, 1, 5, (16, 24)),
    "pixtral": ({**SQUARE, "head_dim": 8}, 0, 0, (16, 12)),
}


@cache
def built(name: str, head: str = "AutoModel", **more: Any) -> Any:
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(name.split()[0], **{**WIDE, **FAMILIES[name][0], **more})
    model = getattr(transformers, head).from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model


def picture(name: str, rows: int = 1) -> Tensor:
    return torch.rand(rows, 3, *FAMILIES[name][3], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_patches_are_the_tokens_that_their_pixels_move(name: str) -> None:
    """Before and after are the family's own numbers; and a patch that is changed alone changes its token's values."""
    settings, before, after, (height, width) = FAMILIES[name]
    model, pixels, size = built(name), picture(name), settings["patch_size"]
    high, wide = (size, size) if isinstance(size, int) else size
    found = find_patches(model, pixels)
    assert (found.rows, found.columns, found.size) == (height // high, width // wide, (high, wide))
    assert (found.first, found.tokens - found.stop) == (before, after)

    def values(given: Tensor) -> Tensor:
        with torch.no_grad(), record(model, layers=[0]) as calls:
            model(pixel_values=given)
        return calls[0].value[0].transpose(0, 1).flatten(1)

    plain = values(pixels)
    assert found.tokens == len(plain)
    for row in range(found.rows):
        for column in range(found.columns):
            changed = pixels.clone()
            changed[..., row * high : (row + 1) * high, column * wide : (column + 1) * wide] += torch.randn(high, wide)
            moved = ((values(changed) - plain).norm(dim=-1) > 1e-4).nonzero()[:, 0].tolist()
            assert moved == [before + row * found.columns + column]


def test_the_model_is_left_as_it_was() -> None:
    model = built("vit").train()
    state = torch.random.get_rng_state()
    find_patches(model, picture("vit"))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_other_sizes_than_the_models_own() -> None:
    found = find_patches(built("vit"), torch.rand(1, 3, 12, 20), interpolate_pos_encoding=True)
    assert (found.first, found.rows, found.columns, found.tokens) == (1, 3, 5, 16)


def other(name: str, **settings: Any) -> Any:
    return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **{**WIDE, **settings})).eval()


def test_what_has_no_grid_that_is_known() -> None:
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2]}
    windows = transformers.SwinModel(transformers.SwinConfig(**swin, window_size=4)).eval()
    refusals = [
        ("are not one for each", other("vit_mae", **SQUARE), torch.rand(1, 3, 16, 16)),  # in another order each time
        ("are not \\[b, n, e\\]", windows, torch.rand(1, 3, 32, 32)),
        (
            "pixel_values are \\[1, 2, 3, 16, 16\\]",
            other("videomae", **SQUARE, num_frames=2),
            torch.rand(1, 2, 3, 16, 16),
        ),
        ("are not \\[b, n, e\\]", built("pixtral"), picture("pixtral", 2)),  # two pictures in one row
        ("has no patch of", built("vit"), torch.rand(1, 3, 3, 16)),
        ("takes no pixel_values", transformers.BertModel(transformers.BertConfig(**WIDE)), torch.rand(1, 3, 16, 16)),
    ]
    for message, model, pixels in refusals:
        with pytest.raises(ValueError, match=message):
            find_patches(model, pixels)


def detector() -> Any:
    return built("yolos", "AutoModelForObjectDetection", num_labels=3)


def score(out: Any) -> Tensor:
    return out.logits[:, 2, 1]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("flow", "logit-flow", "random")])
def test_detection_tokens_are_no_patches(method: str) -> None:
    """The grid of every method is that of tokens 1 to 24, and what no patch can be is left out."""
    model, pixels = detector(), picture("yolos")
    found = METHODS[method](model, score).attribute(pixels, position=25 + 2)
    assert found.shape == (1, 30)
    assert_close(token_grid(found, model, pixels).flatten(), found[0, 1:25])
    if method in ("saliency", "input-gradient", "integrated-gradients"):
        assert float(found[0, 25:].abs().sum() + found[0, 0].abs()) == 0


def test_gradients_and_removal_meet_their_own_patch() -> None:
    """Against the picture: x dy/dx of a patch's pixels, and the score without it."""
    model, pixels = detector(), picture("yolos").requires_grad_()
    (slope,) = torch.autograd.grad(score(model(pixels)).sum(), pixels)
    wanted = (slope * pixels).detach().sum(1).unflatten(1, (4, 4)).unflatten(3, (6, 4)).sum((2, 4))
    pixels = pixels.detach()
    at = {"position": 27, "score": score}
    assert_close(token_grid(InputGradient(model, score=score).attribute(pixels, position=27), model, pixels), wanted)
    grid = token_grid(leave_one_out(model, pixels, **at), model, pixels)
    for row, column in ((0, 0), (2, 5), (3, 1)):
        dark = pixels.clone()
        dark[..., row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 0
        gone = (score(model(pixels)) - score(model(dark))).detach()[0]
        assert_close(grid[0, row, column].float(), gone, atol=1e-5, rtol=1e-4)
    order = torch.arange(30.0)[None]
    curve = deletion_curve(model, pixels, order, steps=24, **at)
    dark = pixels.clone()
    dark[..., 12:16, 20:24] = 0  # the last patch has the greatest number among the patches
    assert_close(curve.values[0][1], float(score(model(dark)).detach()), atol=1e-5, rtol=1e-4)


def test_the_mean_of_grad_cam_is_over_patches() -> None:
    model, pixels = copy.deepcopy(detector()).double(), picture("yolos").double()
    found = GradCAM(model, over="attention", score=score).attribute(pixels, position=27)
    with record(model, gradients=True) as calls:
        score(model(pixels)).sum().backward()
    weights, slopes = calls[-1].weights()[0, :, 27].detach(), calls[-1].weight_gradients()[0, :, 27]
    wanted = (weights * slopes[:, 1:25].mean(1, keepdim=True)).sum(0).clamp_min(0)
    assert_close(found[0], wanted)


def test_an_answer_that_is_of_no_token_in_its_place_is_refused() -> None:
    with pytest.raises(ValueError, match="are not one for each of 30 tokens"):
        METHODS["relevance"](detector(), None).attribute(picture("yolos"), 1, position=2)


def test_distances_are_between_patches() -> None:
    """Uniform attention: the mean distance of a 4 x 6 grid, whatever stands beside it."""
    model = copy.deepcopy(built("yolos"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "query" in name or "q_proj" in name:
                parameter.zero_()
    points = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0))
    wanted = torch.cdist(points, points).mean()
    assert_close(
        detect(model, ["distance"], inputs=picture("yolos")).scores["distance"],
        wanted.expand(2, 4),
        atol=1e-5,
        rtol=1e-5,
    )


def test_models_without_a_class_token_are_read_at_the_mean() -> None:
    model, pixels = built("siglip_vision_model"), picture("siglip_vision_model")
    found = RawAttention(model).attribute(pixels)
    assert_close(found, RawAttention(model).attribute(pixels, position="mean"))
    other_found = RawAttention(built("clip_vision_model")).attribute(picture("clip_vision_model"))
    assert_close(
        other_found, RawAttention(built("clip_vision_model")).attribute(picture("clip_vision_model"), position=0)
    )
