"""Grad-CAM on convolutional feature maps: transformers' ResNet and ConvNeXt, guided backpropagation against captum."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from manyheads.explain.attributions import MapGradCAM
from manyheads.explain.pictures import cam
from manyheads.models import ManyheadsConfig, ManyheadsForObjectDetection


def resnet(**more):
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**{**sizes, **more})).double().eval()


def convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    return ConvNextForImageClassification(config).double().eval()


class InPlace(nn.Module):
    """ReLUs that write into the map, as functions and as modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.relu = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.ReLU(inplace=True)
        self.head = nn.Linear(5, 3)

    def forward(self, pixel_values):
        h = self.relu(self.first(pixel_values))
        return self.head(F.relu(self.second(h), inplace=True).mean((2, 3)))


PIXELS = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(1)).double()


def last_stage(model, pixels):
    with torch.no_grad():
        return model.resnet(pixels).last_hidden_state


def test_before_a_mean_and_a_linear_layer_it_is_cam():
    model = resnet()
    maps, row = last_stage(model, PIXELS), model.classifier[-1].weight[2]
    wanted = torch.einsum("bkrc,k->brc", maps, row).clamp_min(0) / maps[0, 0].numel()
    torch.testing.assert_close(MapGradCAM(model).attribute(PIXELS, target=2), wanted.detach())


@pytest.mark.parametrize(
    ("model", "part"), [(resnet(), "resnet.encoder.stages.0"), (convnext(), "convnext.encoder.stages.0")]
)
def test_any_part_against_its_gradient_by_hand(model, part):
    kept = []
    hook = model.get_submodule(part).register_forward_hook(lambda m, i, o: kept.append(o) or o.retain_grad())
    logits = model(PIXELS).logits[torch.arange(2), torch.tensor([0, 2])]
    logits.sum().backward()
    hook.remove()
    alpha = kept[0].grad.mean((2, 3), keepdim=True)
    wanted = (alpha * kept[0]).sum(1).clamp_min(0).detach()
    found = MapGradCAM(model, part=part).attribute(PIXELS, target=[0, 2])
    torch.testing.assert_close(found, wanted)
    assert found.shape[1] > 1
    assert bool((found > 0).any())


def test_convnext_has_a_map_and_no_relu():
    model = convnext()
    assert MapGradCAM(model).attribute(PIXELS, target=1).shape == (2, 6, 8)
    with pytest.raises(ValueError, match="ConvNextForImageClassification has no ReLU"):
        MapGradCAM(model, guided=True).attribute(PIXELS, target=1)


def test_guided_backpropagation_is_captums():
    from captum.attr import GuidedBackprop

    model = resnet()
    cam = MapGradCAM(model).attribute(PIXELS, target=1)
    found = MapGradCAM(model, guided=True).attribute(PIXELS, target=1)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model(pixels).logits

    with pytest.warns(UserWarning, match="hooks"):
        slopes = GuidedBackprop(Logits()).attribute(PIXELS.clone().requires_grad_(), target=1)
    wide = F.interpolate(cam[:, None], (24, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, slopes.detach() * wide)
    assert found.abs().max() > 0


def test_relus_in_place_change_nothing():
    model, plain = InPlace().double(), InPlace().double()
    plain.relu = nn.ReLU()
    plain.forward = lambda pixel_values: plain.head(
        F.relu(plain.second(plain.relu(plain.first(pixel_values)))).mean((2, 3))
    )
    for options in ({"part": "second"}, {"part": "first", "guided": True}):
        found, wanted = (MapGradCAM(m, **options).attribute({"pixel_values": PIXELS}, 1) for m in (model, plain))
        torch.testing.assert_close(found, wanted)
        assert found.abs().max() > 0


def test_maps_with_channels_last():
    class Turned(InPlace):
        def __init__(self):
            super().__init__()
            self.turn = nn.Identity()

        def forward(self, pixel_values):
            return self.head(self.turn(F.relu(self.second(self.first(pixel_values))).movedim(1, -1)).mean((1, 2)))

    model = Turned().double()
    found = MapGradCAM(model, part="turn", channels_last=True).attribute({"pixel_values": PIXELS}, 1)
    maps, row = F.relu(model.second(model.first(PIXELS))), model.head.weight[1]
    torch.testing.assert_close(found, torch.einsum("bkrc,k->brc", maps, row).clamp_min(0).detach() / 560)


def test_the_model_is_left_as_it_was():
    model = resnet().train()
    MapGradCAM(model, guided=True).attribute(PIXELS, target=0)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_refusals():
    model = resnet()
    with pytest.raises(ValueError, match=r"part='nowhere' is no part of ResNet"):
        MapGradCAM(model, part="nowhere")
    with pytest.raises(ValueError, match="gave no map"):
        MapGradCAM(model, part="classifier").attribute(PIXELS, target=0)
    with pytest.raises(ValueError, match="which of the 3 outputs"):
        MapGradCAM(model).attribute(PIXELS)
    with pytest.raises(ValueError, match="target 3 is not one"):
        MapGradCAM(model).attribute(PIXELS, target=3)
    with pytest.raises(ValueError, match="want pixels"):
        MapGradCAM(model).attribute(PIXELS[0], target=0)


def test_a_class_of_a_detector_is_one_of_many_queries():
    """The last query is no answer of the model, as the last token is of a language model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ManyheadsConfig(**sizes, image_size=[24, 32], patch_size=8, num_labels=3, num_queries=4)
    model = ManyheadsForObjectDetection(config).double().eval()
    with pytest.raises(ValueError, match=r"\[2, 4, 4\].*give score="):
        cam(model, PIXELS, 1)
    chosen = MapGradCAM(model, part="stack.layers.0", grid=(3, 4), score=lambda output: output.logits[:, 2, 1])
    assert chosen.attribute(PIXELS).shape == (2, 3, 4)
