"""The UNet that draws: attention is of the registry, the time and the words matter, and what it refuses."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from manyheads.hosts.sites import sites
from manyheads.hosts.taps import record
from manyheads.models import DiffusionUNet, UNetConfig
from manyheads.tasks.two_digits import WORDS


def small(**given: Any) -> DiffusionUNet:
    torch.manual_seed(0)
    sizes = {"image_size": 8, "widths": [8, 16, 16], "attention_sides": [4, 2], "num_attention_heads": 2}
    model = DiffusionUNet(UNetConfig(words=WORDS, **{**sizes, **given}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval().double()


def test_layers_are_counted_down_across_and_up() -> None:
    model = small()
    paths = [site.path for site in sites(model) if site.kind == "self"]
    assert paths == [f"{own}.attention.self_attention" for own in ("down.1", "down.2", "middle", "up.0", "up.1")]
    with torch.no_grad(), record(model) as calls:
        model.velocities(model.noise(2, 0), 0.5, *model.encode(["a 3", "a 2 above a 1"]))
    assert [call.query.shape[2] for call in calls if call.site.kind == "self"] == [16, 4, 4, 4, 16]
    assert [call.site.path for call in calls] == [site.path for site in sites(model)]


def test_words_and_time_change_what_is_drawn_and_padding_does_not() -> None:
    model = small()
    x = model.noise(1, 0)
    ids, mask = model.encode(["a 3"])
    with torch.no_grad():
        plain = model.velocities(x, 0.5, ids, mask)
        padded, seen = model.encode(["a 3", "a 3 left of a 7"])
        assert_close(model.velocities(x, 0.5, padded[:1], seen[:1]), plain)
        for other in (model.velocities(x, 0.6, ids, mask), model.velocities(x, 0.5, *model.encode(["a 7"]))):
            assert (other - plain).abs().max() > 1e-4


def test_another_mechanism_takes_the_place_of_softmax() -> None:
    model = small(attention="entmax", cross_attention="mqa")
    assert {site.module.card.name for site in sites(model)} == {"entmax", "mqa"}
    assert model.sample(["a 3"], steps=2).shape == (1, 1, 8, 8)


def test_a_saved_model_is_the_same_again(tmp_path: Any) -> None:
    model = small().float()
    model.save_pretrained(tmp_path)
    again = DiffusionUNet.from_pretrained(tmp_path).eval()
    assert torch.equal(again.sample(["a 2"], steps=2), model.sample(["a 2"], steps=2))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 6}, "cannot be halved"),
        ({"attention_sides": [5]}, r"want some of the levels' sides \[8, 4, 2\]"),
        ({"attention_sides": []}, "want some"),
        ({"widths": [8, 8, 12]}, "multiples of 4 x 2"),
        ({"words": ["a", "a"]}, "may stand once"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    sizes = {"image_size": 8, "widths": [8, 16, 16], "attention_sides": [4, 2], "num_attention_heads": 2}
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{**sizes, **given})


def test_pictures_and_captions_that_do_not_fit_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"want \[batch, 1, 8, 8\]"):
        model.velocities(torch.zeros(1, 1, 16, 16, dtype=torch.double), 0.5, *model.encode(["a 3"]))
    with pytest.raises(ValueError, match="does not know 'dog'"):
        model.encode(["a dog"])
