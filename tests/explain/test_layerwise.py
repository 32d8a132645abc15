"""Layer-wise relevance by hand, what it conserves, and the saliency of its map by loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ResNetConfig, ResNetForImageClassification

from manyheads.explain.attributions import LayerwiseRelevance, salient_relevance

PIXELS = torch.randn(2, 3, 12, 14, generator=torch.Generator().manual_seed(1)).double()


class Small(nn.Module):
    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 5, 3, bias=not norm), nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.norm, self.head = (nn.BatchNorm2d(5) if norm else nn.Identity()), nn.Linear(6 * 5 * 6, 4)

    def forward(self, pixel_values):
        h = F.max_pool2d(F.relu(self.norm(self.first(pixel_values))), 2)
        return self.head(F.relu(self.second(h)).flatten(1))


def built(norm=False):
    model = Small(norm).double().eval()
    if norm:
        with torch.no_grad():
            model.norm.running_mean.normal_()
            model.norm.running_var.uniform_(0.5, 2)
            model.norm.weight.normal_()
    return model


def dense(function, x):
    """A linear map of x as a matrix [outputs, inputs]."""
    return torch.autograd.functional.jacobian(lambda t: function(t).flatten(), x).flatten(1)


def handed_on(matrix, x, relevance, alpha):
    found = torch.zeros_like(x)
    z = matrix * x
    for j in range(len(matrix)):
        for sign, share in ((1, alpha), (-1, 1 - alpha)):
            side = (sign * z[j]).clamp(min=0)
            if share and side.sum() > 0:
                found = found + share * side / side.sum() * relevance[j]
    return found


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_equation(alpha):
    model = built()
    with torch.no_grad():
        image = PIXELS[:1]
        a = F.relu(model.first(image))
        b, places = F.max_pool2d(a, 2, return_indices=True)
        c = F.relu(model.second(b))
        logits = model.head(c.flatten(1))[0]
        r = torch.zeros(4).double()
        r[2] = logits[2]
        r = handed_on(model.head.weight, c.flatten(), r, alpha)
        r = handed_on(dense(model.second, b), b.flatten(), r, alpha)
        r = F.max_unpool2d(r.view_as(b), places, 2, output_size=a.shape).flatten()
        matrix = dense(lambda t: F.conv2d(t, model.first.weight), image)
        low, high = (
            side.expand(1, 3, 12, 14).flatten() for side in (image.amin((2, 3), True), image.amax((2, 3), True))
        )
        z = matrix * image.flatten() - matrix.clamp(min=0) * low - matrix.clamp(max=0) * high
        wanted = (z / z.sum(1, keepdim=True) * r[:, None]).sum(0).view(3, 12, 14).sum(0)
    found = LayerwiseRelevance(model, alpha=alpha).attribute({"pixel_values": PIXELS}, target=[2, 2])
    torch.testing.assert_close(found[0], wanted)


def test_a_batch_norm_is_one_with_its_convolution():
    model, merged = built(norm=True), built()
    norm = model.norm
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    with torch.no_grad():
        merged.load_state_dict(
            {**merged.state_dict(), **{k: v for k, v in model.state_dict().items() if "norm" not in k}}
        )
        merged.first.weight.copy_(model.first.weight * gain[:, None, None, None])
        merged.first.bias.copy_(norm.bias - norm.running_mean * gain)
    found, wanted = (LayerwiseRelevance(m).attribute({"pixel_values": PIXELS}, target=1) for m in (model, merged))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_relevance_of_a_resnet_sums_to_its_logit(kind):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[2, 1], num_labels=3, layer_type=kind)
    model = ResNetForImageClassification(config).double().eval()
    pixels = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(2)).double()
    found = LayerwiseRelevance(model).attribute(pixels, target=[0, 2])
    logits = model(pixels).logits[torch.arange(2), torch.tensor([0, 2])].detach()
    assert found.shape == (2, 40, 36)
    torch.testing.assert_close(found.sum((1, 2)), logits)


def test_what_has_no_rule_is_refused_by_name():
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2, num_labels=3)
    with pytest.raises(ValueError, match=r"ConvNextForImageClassification computes \w+, which no rule"):
        LayerwiseRelevance(ConvNextForImageClassification(config).double()).attribute(PIXELS, target=0)
    with pytest.raises(ValueError, match="alpha=0"):
        LayerwiseRelevance(built(), alpha=0.5)


def by_loops(relevance, patch, nearest, far):
    """One scale, squares that do not fit half and quarter."""
    height, width = relevance.shape
    row = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    places = [(t, s) for t in range(0, height - patch + 1, patch // 2) for s in range(0, width - patch + 1, patch // 2)]
    total, count = torch.zeros_like(row), torch.zeros_like(row)
    for t, s in places:
        distances = []
        for u, v in places:
            if (u, v) != (t, s):
                unlike = (row[t : t + patch, s : s + patch] - row[u : u + patch, v : v + patch]).norm() / patch
                away = ((t - u) ** 2 + (s - v) ** 2) ** 0.5 / max(height, width)
                distances.append(unlike / (1 + far * away))
        total[t : t + patch, s : s + patch] += 1 - (-torch.stack(sorted(distances)[:nearest]).mean()).exp()
        count[t : t + patch, s : s + patch] += 1
    return total / count


def test_saliency_by_loops():
    relevance = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(3)).double()
    found = salient_relevance(relevance, patch=6, nearest=3, scales=[1.0])
    torch.testing.assert_close(found[0], by_loops(relevance[0], 6, 3, 3.0))


def test_what_stands_out_is_salient():
    relevance = torch.zeros(1, 40, 48)
    relevance[0, 18:22, 30:34] = 1
    found = salient_relevance(relevance)[0]
    peak = divmod(int(found.argmax()), 48)
    assert abs(peak[0] - 20) < 6
    assert abs(peak[1] - 32) < 6
    assert found.max() > 5 * found[:8, :8].max()
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(salient_relevance(torch.ones(1, 20, 20)).abs().max()) == 0


def test_saliency_refuses():
    with pytest.raises(ValueError, match="no square of 7 x 7"):
        salient_relevance(torch.zeros(1, 5, 20))
    with pytest.raises(ValueError, match=r"scales=\[2\]"):
        salient_relevance(torch.zeros(1, 9, 9), scales=[2])
    with pytest.raises(ValueError, match="NaN"):
        salient_relevance(torch.full((1, 9, 9), torch.nan))
