"""The ends of a second modality: patches there and back, the schedule, the loss, and pictures that are learnt."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.convert.fused import Fused
from manyheads.convert.fused_ends import ImageEnds, draw_pictures, drawn_times, fusion_loss, load_ends, noised, trained

SIZES = {
    "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 20, "vocab_size": 40, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
# A caption and its picture; a picture and its caption behind it.
KINDS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0, 2, 2, 2, 2, 2, 2, 0]])
IDS = torch.tensor([[5, 6, 9, 9, 9, 9, 9, 9], [7, 9, 9, 9, 9, 9, 9, 8]])


def parts(seed: int = 0) -> tuple[Fused, ImageEnds]:
    torch.manual_seed(seed)
    text = LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()
    return Fused(text), ImageEnds(24, channels=3, patch=2).double()


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_tokens_are_patches_in_reading_order() -> None:
    _, ends = parts()
    shown, times = pictures(), torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert ends.tokens(shown) == 6
    found = ends.embed(shown, times).view(2, 6, 24)
    for k, at in ((0, 0), (1, 4)):
        row, column = divmod(at, 3)
        patch = shown[k, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
        angles = [float(times[k]) * 10 ** (3 * i / 31) for i in range(32)]
        told = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
        torch.testing.assert_close(found[k, at], ends.embedding(patch) + ends.time(told))
    states = torch.randn(12, 24, dtype=torch.float64)
    read = ends.noise(states, shown)
    torch.testing.assert_close(read[1, :, 2:4, 2:4].flatten(), ends.reading(states[10]))


def test_the_loss_is_text_and_noise() -> None:
    fused, ends = parts()
    shown, times = pictures(), torch.tensor([0.25, 0.5], dtype=torch.float64)
    noise = torch.randn_like(shown)
    found = fusion_loss(fused, ends, IDS, kinds=KINDS, pictures=shown, times=times, noise=noise)
    mixed = [
        math.cos(math.pi * t / 2) * x + math.sin(math.pi * t / 2) * e
        for t, x, e in zip((0.25, 0.5), shown, noise, strict=True)
    ]
    torch.testing.assert_close(noised(shown, noise, times), torch.stack(mixed))
    given = ends.embed(torch.stack(mixed), times)
    out = fused(IDS, kinds=KINDS, embeddings=given)
    logs = out.logits.log_softmax(-1)
    # Text that text or a picture stands before: the second token of the first row, the last of the second.
    text = -(logs[0, 0, 6] + logs[1, 6, 8]) / 2
    apart = (noise - ends.noise(out.states, shown)).square().mean()
    # transformers computes its loss in float32.
    torch.testing.assert_close(found.text, text.float())
    torch.testing.assert_close(found.pictures, apart)
    torch.testing.assert_close(found.whole, text.float() + 5 * apart)
    found.whole.backward()
    assert all(value.grad is not None for value in trained(fused, ends))
    alone = {name for name, value in fused.model.named_parameters() if value.requires_grad}
    assert alone == set(fused.own_weights())


def test_a_picture_before_its_caption_is_noised_half_way() -> None:
    times = torch.stack([drawn_times(KINDS, generator=torch.Generator().manual_seed(s)) for s in range(200)])
    assert 0.9 < float(times[:, 0].max()) < 1
    assert 0.45 < float(times[:, 1].max()) < 0.5
    # What stands behind it is padding, and no caption.
    mask = torch.ones_like(KINDS)
    mask[1, 7] = 0
    padded = torch.stack([drawn_times(KINDS, mask, generator=torch.Generator().manual_seed(s)) for s in range(200)])
    assert float(padded[:, 1].max()) > 0.9


def test_with_the_true_noise_the_picture_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is told the noise that the pictures hold at its time: what comes out is the pictures, whatever the
    steps. The first of them is read at the middle of the first part of time, and each follows its caption."""
    fused, ends = parts()
    wanted, at = pictures(), []
    embed = ends.embed

    def watched(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        at.append(float(times[0]))
        return embed(x, times)

    def true(states: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        assert states.shape == (12, 24)
        angle = math.pi * at[-1] / 2
        return (like - math.cos(angle) * wanted) / math.sin(angle)

    monkeypatch.setattr(ends, "embed", watched)
    monkeypatch.setattr(ends, "noise", true)
    for steps in (1, 4):
        at.clear()
        torch.testing.assert_close(draw_pictures(fused, ends, IDS[:, :2], (4, 6), steps=steps), wanted)
        assert at == [(steps - i - 0.5) / steps for i in range(steps)]


def test_captions_and_pictures_are_learnt_beside_the_text(tmp_path: Path) -> None:
    """Text stays what it was, bit for bit; what was learnt opens again from its file."""
    fused, ends = parts()
    before = fused(IDS).logits
    kinds = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    ids = torch.tensor([[1, 2, 0, 0, 0, 0], [1, 3, 0, 0, 0, 0]])
    wanted = torch.ones(2, 3, 4, 4, dtype=torch.float64) * torch.tensor([0.8, -0.8])[:, None, None, None]
    given = {"kinds": kinds, "pictures": wanted, "noise": torch.randn_like(wanted)}
    given["times"] = torch.tensor([0.4, 0.8], dtype=torch.float64)
    optimizer = torch.optim.AdamW(trained(fused, ends), lr=1e-2)
    losses = []
    for _ in range(40):
        found = fusion_loss(fused, ends, ids, **given)
        found.whole.backward()
        losses.append(float(found.pictures.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(fused(IDS).logits, before, rtol=0, atol=0)
    again = load_ends(ends.save(tmp_path / "ends.safetensors"))
    drawn = [draw_pictures(fused, one, ids[:, :2], (4, 4), steps=2, noise=wanted) for one in (ends, again)]
    torch.testing.assert_close(*drawn, rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    fused, ends = parts()
    shown, wrong = pictures(), KINDS.clone()
    wrong[1, 6] = 0
    refused: list[tuple[dict[str, Any], str]] = [
        ({"kinds": wrong, "pictures": shown}, r"2 pictures of \[5, 6\] tokens; given are 2 of 6"),
        ({"kinds": KINDS, "pictures": shown[:1]}, "given are 1 of 6"),
        ({"kinds": KINDS, "pictures": shown[:, :, :3]}, r"pictures are \[2, 3, 3, 6\]; want .* multiples of 2"),
        ({"kinds": KINDS, "pictures": shown, "times": torch.tensor([0.5, 1.5])}, "each from 0 to 1"),
    ]
    for given, told in refused:
        with pytest.raises(ValueError, match=told):
            fusion_loss(fused, ends, IDS, **given)
    with pytest.raises(ValueError, match="want 1 or more"):
        draw_pictures(fused, ends, IDS[:, :2], (4, 4), steps=0)
