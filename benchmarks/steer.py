"""Interventions on the packaged model that reads pictures: whether hallucinated answers fall; what a step costs with
one that edits a row, on a small Llama.

Claims: "Is there a 7?" of digits that are there and of as many that are not, the absent ones partners of those there
(POPE, arXiv 2305.10355, adversarial), on noisy held-out pictures. The answer is yes or no, whichever first letter is
likelier. Hallucinated: yes to what is not there; seen: yes to what is. One that says no to everything hallucinates
nothing: right is the share of all answers, and the claim shows where hallucinated falls and right does not. told_apart:
how often yes is more favoured where the digit is there than where another is not, 0.5 by chance.
Cuts of unlikely tokens are left out: two words are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from common import once, save
from manyheads.hosts.seeing import Seeing, load_seeing
from manyheads.hosts.taps import tap
from manyheads.steer import (
    agla,
    boost,
    causal_maps,
    control,
    find_sink_dims,
    imbalance,
    modality_mutual,
    redistribute,
    vision_heads,
)
from manyheads.steer.agla import local_view, relevance_map
from manyheads.steer.pictures import image_places
from manyheads.tasks.scenes import believed, held_out, pictures

MEASURES = ("src/manyheads/steer", "src/manyheads/hosts/calls.py", "src/manyheads/bundled/vlm/model.safetensors")
SCENES, NOISE, ROWS = 40, 0.4, 20
Opened = Callable[[Any, dict[str, Any]], AbstractContextManager[Any]]


def rule(model: Any, inputs: dict[str, Any], share: float) -> AbstractContextManager[Any]:
    width = model.config.get_text_config(decoder=True).hidden_size
    return redistribute(
        model,
        inputs["input_ids"] == model.config.image_token_id,
        share,
        sink_dims=find_sink_dims(model, inputs),
        threshold=20 * (width / 4096) ** 0.5,
    )


def mutual(model: Any, inputs: dict[str, Any]) -> AbstractContextManager[Any]:
    image = image_places(model, inputs, "benchmark")
    places = torch.arange(image.shape[1])
    return modality_mutual(model, image, places > (image * places).amax(-1, keepdim=True), 1.0)


def local(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return local_view(inputs["pixel_values"], relevance_map(model, inputs), 0.5)


METHODS: dict[str, Opened] = {
    "none": lambda model, inputs: nullcontext(),
    "redistribute[share=0.4]": lambda model, inputs: rule(model, inputs, 0.4),
    "vision_heads[scale=2]": lambda model, inputs: vision_heads(model, inputs, 2.0),
    "imbalance[alpha=0.5,gamma=1.1]": lambda model, inputs: imbalance(model, inputs, 0.5),
    "imbalance[alpha=0,beta=0,gamma=1.5]": lambda model, inputs: imbalance(model, inputs, 0.0, beta=0.0, gamma=1.5),
    "agla[alpha=2,kept=0.5]": lambda model, inputs: agla(model, local(model, inputs), 2.0, beta=0.0),
    "causal_maps[vision=uniform]": lambda model, inputs: causal_maps(model, 0.5, eps=0.0),
    "causal_maps[language=uniform]": lambda model, inputs: causal_maps(
        model, 0.5, vision=None, language="uniform", eps=0.0
    ),
    "modality_mutual": mutual,
}


def claims(seeing: Seeing) -> list[dict[str, Any]]:
    asked = held_out(SCENES, noise=NOISE, paired=True, kind="exists", seed=11)
    questions = believed(asked.scenes, "adversarial", seed=11)
    shown = [own for own, each in zip(pictures(asked.pixels), questions, strict=True) for _ in each]
    texts = [question.text for each in questions for question in each]
    wanted = torch.tensor([question.answer == "yes" for each in questions for question in each])
    yes, no = (seeing.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    rows, before = [], {}
    for name, opened in METHODS.items():
        said = []
        for start in range(0, len(texts), ROWS):
            inputs = seeing.inputs(shown[start : start + ROWS], texts[start : start + ROWS])
            try:
                with opened(seeing.model, inputs), torch.no_grad():
                    logits = seeing.model(**inputs, use_cache=False).logits[:, -1]
            except ValueError as error:
                rows.append({"what": "yes or no", "method": name, "refused": str(error)})
                break
            said.append(logits[:, yes] - logits[:, no])
        else:
            rows.append(_figures(name, torch.cat(said), wanted, before))
    return rows


def _figures(name: str, said: torch.Tensor, wanted: torch.Tensor, before: dict[str, float]) -> dict[str, Any]:
    yes, (there, absent) = said > 0, (said[wanted], said[~wanted])
    found = {
        "hallucinated": float(yes[~wanted].float().mean()),
        "seen": float(yes[wanted].float().mean()),
        "right": float((yes == wanted).float().mean()),
        "told_apart": float((there[:, None] > absent).float().mean()),
    }
    before.update({key: value for key, value in found.items() if name == "none"})
    shows = found["hallucinated"] < before["hallucinated"] and found["right"] >= before["right"]
    told = {} if name == "none" else {"claim": "shows" if shows else "does not show"}
    return {"what": "yes or no", "method": name, "answers": len(said), **found, **told}


def pointed(seeing: Seeing, count: int = 12) -> dict[str, Any]:
    """Whether attention on a digit's box rises when the box is pointed at."""
    asked = held_out(count, noise=NOISE, paired=True, kind="caption", seed=12)
    before, after = [], []
    for scene, picture in zip(asked.scenes, pictures(asked.pixels), strict=True):
        row, column, _ = scene.places[0]
        inputs = seeing.inputs([picture], ["What is there?"])
        side = round(int(image_places(seeing.model, inputs, "benchmark")[0].sum()) ** 0.5)
        cells = torch.zeros(side, side)
        step = side // 4
        cells[row * step : (row + 1) * step, column * step : (column + 1) * step] = 1
        with control(seeing.model, inputs, cells.view(1, -1), steps=5) as energies:
            before.append(1 - (energies[0] / 400) ** 0.5)
            after.append(1 - (min(energies) / 400) ** 0.5)
    return {
        "what": "attention on a box",
        "method": "control[steps=5]",
        "pictures": count,
        "before": sum(before) / count,
        "after": sum(after) / count,
    }


def step_cost(length: int = 256, rounds: int = 40) -> list[dict[str, Any]]:
    """A decode step with an intervention against one without, 12 layers of 9 heads on 3."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
    )
    model = LlamaForCausalLM(config).eval()
    prompt, token = torch.randint(0, 8192, (1, length)), torch.tensor([[7]])
    rows = []
    for name, opened in (
        ("a tap that reads nothing", lambda: tap(model, lambda call: None)),
        ("boost, every head of every layer", lambda: boost(model, slice(8, 24), 3.0)),
        ("boost, every head of one layer", lambda: boost(model, slice(8, 24), 3.0, heads=[(6, h) for h in range(9)])),
    ):
        with torch.no_grad():
            cache = model(prompt, use_cache=True).past_key_values

            def step(cache: Any = cache) -> None:
                model(token, past_key_values=cache, use_cache=True)
                cache.crop(-1)

            ratios = []
            for _ in range(rounds // 10):  # opening is no part of a step: both sides of a batch of steps in turns
                with opened():
                    step()
                    steered = _best(step)
                step()
                ratios.append(steered / _best(step))
        rows.append(
            {"what": "a decode step", "method": name, "ratio": sorted(ratios)[len(ratios) // 2], "target": 1.05}
        )
    return rows


def _best(call: Callable[[], None], times: int = 10) -> float:
    """The least of some: what is on top of it is other people's work."""
    return min(once(call) for _ in range(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vlm")
    model = parser.parse_args().model
    torch.set_num_threads(1)
    seeing = load_seeing(model)
    save("steer", "cpu", [*claims(seeing), pointed(seeing), *step_cost()])


if __name__ == "__main__":
    main()
