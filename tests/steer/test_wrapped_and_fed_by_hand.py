"""What people put around a model, how they feed it, and how they name places: the same answer, or an error by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from vision_hosts import IMAGE, batch, llava

from manyheads.steer import agla, boost, causal_maps, control, imbalance, juice, redistribute
from manyheads.steer.buckets import buckets
from manyheads.steer.focus import focused
from manyheads.steer.focus_icl import focus_icl
from manyheads.steer.modality_gate import modality_gate

# Read by peft.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GIVEN = {name: own for name, own in batch().items() if name != "position_ids"}
PICTURE = GIVEN["input_ids"] == IMAGE
REGION = torch.tensor([[1.0, 1.0, 0, 0, 0, 0, 0, 0, 0]])
ONES = torch.ones(8, dtype=torch.float64)
OPENED: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "agla": lambda m: agla(m, GIVEN["pixel_values"] * 0.3, 2.0),
    "imbalance": lambda m: imbalance(m, GIVEN, 0.9, salient=PICTURE),
    "causal_maps": lambda m: causal_maps(m, 0.5, vision=None, language="uniform"),
    "modality_gate": lambda m: modality_gate(m),
    "juice": lambda m: juice(m, {(1, 0): 1.5}, stack="language"),
    "control": lambda m: control(m, GIVEN, REGION, steps=2),
    "focused": lambda m: focused(m, {(1, 0): (ONES, ONES)}),
    "boost": lambda m: boost(m, PICTURE, 6.0),
}
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "peft": lambda m: peft.get_peft_model(m, peft.LoraConfig(target_modules=["q_proj"], r=2)).eval(),
    "compiled": lambda m: torch.compile(m, backend="eager"),
}


def answer(m: Any, **options: Any) -> Tensor:
    made = m.generate(
        **GIVEN, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(made.logits, 1).double()


@torch.no_grad()
def logits(m: Any) -> Tensor:
    return m(**GIVEN).logits


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapped_model_answers_as_the_one_inside(wrapped: str, name: str) -> None:
    own = llava()
    with OPENED[name](own):
        wanted = answer(own)
    around = WRAPPED[wrapped](llava())
    assert not torch.equal(answer(around), wanted)
    with OPENED[name](around):
        assert_close(answer(around), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["modality_gate", "focused"])
def test_what_was_compiled_and_run_before_is_changed_all_the_same(name: str) -> None:
    own, fast = llava(), llava()
    plain = logits(fast)
    for layer in fast.model.language_model.layers:
        layer.compile(backend="eager")
    assert_close(logits(fast), plain, atol=1e-8, rtol=1e-8)
    with OPENED[name](own):
        wanted = logits(own)
    with OPENED[name](fast):
        assert_close(logits(fast), wanted, atol=1e-8, rtol=1e-8)
    assert_close(logits(fast), plain, atol=1e-8, rtol=1e-8)


# -- fed by hand -------------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 5, 9, 12, 7, 33, 8], [1, 8, 8, 2, 40, 11, 3]])
NEXT = torch.tensor([[4, 6, 21], [31, 2, 17]])


def text_model() -> Any:
    torch.manual_seed(7)
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**wide, num_hidden_layers=3, vocab_size=61, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval().double()


TWICE: dict[str, Callable[[Any], list[AbstractContextManager[Any]]]] = {
    "juice": lambda m: [juice(m, {(0, 1): 1.5, (2, 0): -1.0})],
    "juice in juice": lambda m: [juice(m, {(1, 0): 1.5}), juice(m, {(1, 2): -1.0, (2, 0): 2.0})],
    "buckets": lambda m: [buckets(m, [1e4, 3e4])],
    "buckets, none the model's own": lambda m: [buckets(m, [3e4, 5e4])],
    "juice in buckets": lambda m: [buckets(m, [1e4, 3e4]), juice(m, {(1, 0): 1.5})],
}


@pytest.mark.parametrize("name", TWICE)
@torch.no_grad()
def test_a_cache_that_the_model_made_goes_on_as_the_text_at_once(name: str) -> None:
    m = text_model()
    with ExitStack() as stack:
        for each in TWICE[name](m):
            stack.enter_context(each)
        out = m(IDS)
        parts = [out.logits]
        for own in NEXT.split(1, 1):
            out = m(own, past_key_values=out.past_key_values)
            parts.append(out.logits)
        wanted = m(torch.cat([IDS, NEXT], 1), use_cache=False).logits
    assert_close(torch.cat(parts, 1), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_copied_cache_moves_companions_of_its_own() -> None:
    """One prompt is read once, and its cache copied for each question: beams of one move no row of another."""
    m = text_model()
    with juice(m, {(0, 1): 1.5, (2, 0): 1.5}):
        first = m(IDS[:, 1:], past_key_values=m(IDS[:, :1]).past_key_values).past_key_values
        second = copy.deepcopy(first)
        second.reorder_cache(torch.tensor([1, 0]))
        assert_close(
            m(NEXT[:, :1], past_key_values=first).logits[:, -1],
            m(torch.cat([IDS, NEXT[:, :1]], 1), use_cache=False).logits[:, -1],
            atol=1e-6,
            rtol=1e-6,
        )
        turned = m(NEXT[:, :1], past_key_values=second).logits[:, -1]
        wanted = m(torch.cat([IDS.flip(0), NEXT[:, :1]], 1), use_cache=False).logits[:, -1]
        assert_close(turned, wanted, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_cache_that_was_fed_without_the_block_is_refused() -> None:
    m = text_model()
    cache = transformers.DynamicCache(config=m.config)
    with juice(m, {(1, 0): 1.5}):
        m(IDS, past_key_values=cache)
    with juice(m, {(1, 0): 1.5}):  # a second turn in a block of its own
        m(NEXT[:, :1], past_key_values=cache)
    m(NEXT[:, 1:2], past_key_values=cache)
    with juice(m, {(1, 0): 1.5}), pytest.raises(ValueError, match="juice: the cache was fed outside"):
        m(NEXT[:, 2:], past_key_values=cache)


def test_a_models_own_forward_is_there_again() -> None:
    """accelerate gives a model that it places a forward of its own."""
    m = text_model()
    own = m.forward
    m.forward = lambda *args, **kwargs: own(*args, **kwargs)
    placed = m.forward
    with buckets(m, [1e4, 3e4]):
        pass
    assert m.forward is placed


# -- places ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_have_spans_of_their_own_and_their_beams_too() -> None:
    m = text_model()
    spans = torch.zeros(2, 7, dtype=torch.bool)
    spans[0, 1:3] = spans[1, 4:6] = True
    with boost(m, spans, 5.0):
        both = m(IDS).logits
        beams = m.generate(IDS, max_new_tokens=3, num_beams=2, do_sample=False)
    for row in range(2):
        with boost(m, spans[row].nonzero()[:, 0].tolist(), 5.0):
            assert_close(both[row : row + 1], m(IDS[row : row + 1]).logits, atol=1e-8, rtol=1e-8)
            alone = m.generate(IDS[row : row + 1], max_new_tokens=3, num_beams=2, do_sample=False)
        assert torch.equal(alone, beams[row : row + 1])
    for opened in (
        lambda: focus_icl(m, spans, 2, dropped=0.5),
        lambda: redistribute(m, spans, 0.5, sink_dims=[1], threshold=0.5, centric=0.0, least=0.0),
    ):
        with opened():
            assert m.generate(IDS, max_new_tokens=2, num_beams=2, do_sample=False).shape == (2, 9)


@pytest.mark.parametrize(
    "span", [slice(-3, None), slice(0, -1), [False, True], torch.tensor([False, True]), [1.5], "words", None, 3, [-1]]
)
def test_what_names_no_places_is_refused(span: Any) -> None:
    m = text_model()
    with torch.no_grad(), boost(m, span, 5.0), pytest.raises(ValueError, match="a span"):
        m(IDS)


def test_factors_and_heads_that_mean_nothing_are_refused() -> None:
    m = text_model()
    with pytest.raises(ValueError, match="finite"), boost(m, [1], float("inf")):
        pass
    heads: Any
    for heads in ("0.1", (0, 1), [(0,)], ["0.1", "0.2"]):
        with pytest.raises(ValueError, match="pairs"), boost(m, [1], 2.0, heads=heads):
            pass


def test_a_row_is_pointed_at_its_region_whatever_stands_beside_it() -> None:
    """How long a row's latent is worked on is the row's own business."""
    m = llava()
    region = torch.tensor([[0.0, 0, 0, 0, 1, 1, 0, 0, 0]])
    with control(m, GIVEN, region, steps=3):
        both = logits(m)[:, -1]
    for row in range(2):
        real = GIVEN["attention_mask"][row].bool()
        own = {name: each[row : row + 1][:, real] for name, each in GIVEN.items() if name != "pixel_values"}
        own["pixel_values"] = GIVEN["pixel_values"][row : row + 1]
        with control(m, own, region, steps=3), torch.no_grad():
            assert_close(m(**own).logits[0, -1], both[row], atol=1e-4, rtol=1e-4)
