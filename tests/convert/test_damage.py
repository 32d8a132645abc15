"""What a conversion cost: greedy text as generate writes it, bytes by the formula, and text that is too short."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from manyheads.convert import damage
from manyheads.convert.damage import Judge, Sizes, calibration_rows, go_on
from manyheads.convert.grouped import grouped
from manyheads.hosts.loading import Loaded, load_model
from manyheads.hosts.questions import Questions

GREEDY = 16


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_model()


@pytest.fixture(scope="module")
def judge(loaded: Loaded) -> Judge:
    return Judge(loaded, Questions(loaded), Sizes(2, 192, 3, 256))


@pytest.fixture(scope="module", autouse=True)
def _greedy() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(damage, "GREEDY_TOKENS", GREEDY)
        yield


@pytest.fixture(scope="module")
def lines(loaded: Loaded, judge: Judge) -> list[dict[str, Any]]:
    return [judge.measure(each) for each in (loaded.model, grouped(loaded.model, 2, align="mean"))]


def test_greedy_text_is_what_generate_writes(loaded: Loaded, judge: Judge, lines: list[dict[str, Any]]) -> None:
    """Of a model that is near enough to begin as the original does."""
    made, shares = copy.deepcopy(loaded.model), []
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape)
    for row in judge.windows:
        prompt = row[None, :96]
        own, other = (
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=GREEDY, do_sample=False)[
                0, 96:
            ]
            for model in (made, loaded.model)
        )
        torch.testing.assert_close(go_on(made, prompt, GREEDY)[0][0], own)
        same = 0
        while same < GREEDY and own[same] == other[same]:
            same += 1
        shares.append(same / GREEDY)
    assert 0 < sum(shares) < 2
    assert judge.measure(made)["greedy_agreement"] == pytest.approx(sum(shares) / 2)
    assert lines[0]["greedy_agreement"] == 1.0


def test_bytes_keys_and_times(lines: list[dict[str, Any]]) -> None:
    before, after = lines
    # 4 layers, keys and values, 4 and 2 heads of 32 float32 numbers.
    assert (before["cache_bytes_per_token"], after["cache_bytes_per_token"]) == (4096.0, 2048.0)
    assert before["cache_bytes"] == 192 * 4096
    assert (before["passkeys"], before["needles"], before["keys"]) == (3, 3, 3)
    assert after["needles"] < 3
    assert (before["prefill_ratio"], before["decode_ratio"]) == (1.0, 1.0)
    assert after["prefill_s"] > after["decode_s"] > 0
    assert 0.05 < after["decode_ratio"] < 20


def test_a_line_per_token_of_a_state_that_does_not_grow(loaded: Loaded, judge: Judge) -> None:
    from manyheads.convert.hosted import hosted

    line = judge.measure(hosted(loaded.model, {"name": "hedgehog"}, (0, 1, 2, 3)))
    assert line["cache_bytes_per_token"] == 0
    assert line["cache_bytes"] > 0


def test_calibration_text_that_is_too_short_is_refused(loaded: Loaded) -> None:
    short = Questions(loaded, text="attend to what is there " * 40, where="--text notes.txt")
    assert len(calibration_rows(short, 900, 300)) == 3
    with pytest.raises(ValueError, match=r"notes.txt has 900 tokens .* --calibrate 1200 was asked: .*--calibrate 900$"):
        calibration_rows(short, 1200, 300)
