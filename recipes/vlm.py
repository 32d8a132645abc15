"""Train a small LLaVA that answers about pictures of digits: `python recipes/vlm.py --out DIR`.

A CLIP tower (40 x 40 pixels, patches of 5 x 5), a projector and a byte-level Llama, in transformers' own classes, on
`manyheads.tasks.scenes`. First the tower alone learns which digit every cell holds (`--tower` minutes, a linear head
that is thrown away), then everything learns to answer (`--minutes`). The loss is on answers alone. The questions of one
picture share its tokens in one row and do not see each other (a block mask, every question at the positions that it
would have alone), which is exactly one row per question and a third of the work. One question in ten sees no picture:
what the model says without one is then its prior, not an accident.

The seed fixes weights and batches; the learning rate follows the clock, so two runs agree closely but not bit for bit.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.models.byte_tokenizer import byte_tokenizer
from manyheads.tasks.scenes import CANVAS, CELL, GRID, KINDS, Asked, Scene, held_out, training_batch

PATCH = 5
PATCHES = (CANVAS // PATCH) ** 2
IMAGE, END, PAD = 256, 257, 258
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the run besides the machine's speed."""

    seed: int = 0
    vision_dim: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    dim: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 256
    rate: float = 2e-3
    batch: int = 8
    questions: int = 6
    blind: float = 0.1
    noisiest: float = 0.8


def build(recipe: Recipe) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(recipe.seed)
    vision = CLIPVisionConfig(
        hidden_size=recipe.vision_dim,
        intermediate_size=3 * recipe.vision_dim,
        projection_dim=recipe.vision_dim,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_heads,
        image_size=CANVAS,
        patch_size=PATCH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=PAD + 1,
        hidden_size=recipe.dim,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=recipe.dim**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    model = LlavaForConditionalGeneration(config)
    language = model.model.language_model
    with torch.no_grad():
        for layer in language.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.mul_((2 * recipe.layers) ** -0.5)
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            linear.weight.normal_(0, linear.in_features**-0.5)
    return model


def processor() -> Any:
    """Bytes and an image token, pictures of any size to 40 x 40, and the place of the one in the other."""
    from tokenizers import AddedToken
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer(1024)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]}
        | {"eos_token": "</s>", "pad_token": "<pad>"}
    )
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS}, do_center_crop=False, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %}{{ '\n' }}{% endif %}{% endfor %}"
)


def normalised(pixels: Tensor) -> Tensor:
    """[b, 3, 40, 40] of [b, 40, 40] in 0 to 1, as the processor makes them."""
    return (2 * pixels - 1)[:, None].expand(-1, 3, -1, -1)


def packed(asked: Asked, blind: float = 0.0, rng: random.Random | None = None) -> dict[str, Tensor]:
    """One row per picture: its tokens, then all of its questions with their answers, blocks that see the picture and
    themselves. blind: the share of questions that do not see the picture."""
    rng = rng or random.Random(0)
    rows = []
    for questions in asked.questions:
        ids, labels, blocks, places = [IMAGE] * PATCHES, [IGNORED] * PATCHES, [0] * PATCHES, [*range(PATCHES)]
        for number, question in enumerate(questions, 1):
            prompt, answer = list(f"{question.text}\n".encode()), [*question.answer.encode(), END]
            ids += prompt + answer
            labels += [IGNORED] * len(prompt) + answer
            size, sighted = len(prompt) + len(answer), rng.random() >= blind
            blocks += [number if sighted else -number] * size
            places += range(PATCHES, PATCHES + size)
        rows.append((ids, labels, blocks, places))
    width = max(len(row[0]) for row in rows)
    fill = (PAD, IGNORED, 10_000, 0)
    ids, labels, blocks, places = (
        torch.tensor([row[part] + [fill[part]] * (width - len(row[part])) for row in rows]) for part in range(4)
    )
    same = blocks[:, :, None] == blocks[:, None, :]
    sees = (blocks[:, :, None] >= 0) & (blocks[:, None, :] == 0)
    mask = (same | sees) & torch.ones(width, width, dtype=torch.bool).tril()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask[:, None], "position_ids": places}


def answers(model: Any, asked: Asked, blind: float = 0.0, rng: random.Random | None = None) -> tuple[Tensor, Tensor]:
    """Logits [b, n, v] and what they should say [b, n], -100 where nothing is asked."""
    row = packed(asked, blind, rng)
    labels = row.pop("labels")
    logits = model(**row, pixel_values=normalised(asked.pixels), use_cache=False).logits
    return logits[:, :-1].float(), labels[:, 1:]


@torch.no_grad()
def accuracy(model: Any, asked: Asked) -> list[bool]:
    """For each question, in order, whether every token of the answer is the likeliest, given those before it: exactly
    when greedy decoding gives the whole answer."""
    found = []
    for start in range(0, len(asked.scenes), 64):
        part = slice(start, start + 64)
        some = Asked(asked.scenes[part], asked.pixels[part], asked.questions[part])
        logits, labels = answers(model, some)
        wrong = (logits.argmax(-1) != labels) & (labels != IGNORED)
        found += (~wrong.any(1)).tolist()
    return found


def cells(scenes: Sequence[Scene]) -> Tensor:
    """[b, 16] the digit of every cell, 10 for none."""
    found = torch.full((len(scenes), GRID, GRID), 10)
    for own, scene in zip(found, scenes, strict=True):
        for row, column, digit in scene.places:
            own[row, column] = digit
    return found.flatten(1)


class CellReader(nn.Module):
    """The tower with a linear head: which digit is in each cell."""

    def __init__(self, tower: nn.Module, dim: int):
        super().__init__()
        self.tower, self.head = tower, nn.Linear(dim, 11)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.tower(normalised(pixels)).last_hidden_state[:, 1:]
        side, step = CANVAS // PATCH, CELL // PATCH
        grid = hidden.unflatten(1, (side, side)).unflatten(2, (GRID, step)).unflatten(1, (GRID, step))
        found: Tensor = self.head(grid.mean((2, 4)).flatten(1, 2))
        return found


class Run:
    """model, and where its training stands."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out, self.model = recipe, out, build(recipe)
        out.mkdir(parents=True, exist_ok=True)

    def phase(self, name: str, module: nn.Module, loss_of: Any, minutes: float, report: Any) -> None:
        matrices = [p for p in module.parameters() if p.ndim > 1]
        vectors = [p for p in module.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.recipe.rate, betas=(0.9, 0.98))
        begun, step, said, seconds = time.perf_counter(), 0, 0.0, 0.0
        module.train()
        while seconds < 60 * minutes:
            share = seconds / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.rate * min(1.0, (step + 1) / 100, (1 - share) / 0.5 + 0.01)
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, seconds = step + 1, time.perf_counter() - begun
            if seconds - said > 30:
                said = seconds
                module.eval()
                print(f"{name} {seconds:5.0f} s, step {step}, loss {loss.item():.3f}, {report()}", flush=True)
                module.train()
                self.save()
        module.eval()
        print(f"{name} done: {seconds:.0f} s, step {step}, {report()}", flush=True)

    def save(self) -> None:
        save(self.model, self.out)

    def tower(self, minutes: float) -> None:
        reader = CellReader(self.model.model.vision_tower, self.recipe.vision_dim)
        fixed = held_out(64, seed=1)

        def loss_of(step: int) -> Tensor:
            asked = training_batch(64, self.recipe.seed + 1000, step, questions=0, noisiest=self.recipe.noisiest)
            return F.cross_entropy(reader(asked.pixels).flatten(0, 1), cells(asked.scenes).flatten())

        @torch.no_grad()
        def report() -> str:
            there = cells(fixed.scenes) < 10
            right = reader(fixed.pixels).argmax(-1) == cells(fixed.scenes)
            return f"cells right: digits {right[there].float().mean():.3f}, empty {right[~there].float().mean():.3f}"

        self.phase("tower", reader, loss_of, minutes, report)

    def all(self, minutes: float) -> None:
        fixed = {kind: held_out(64, kind=kind, seed=1) for kind in KINDS}

        def loss_of(step: int) -> Tensor:
            recipe = self.recipe
            asked = training_batch(
                recipe.batch, recipe.seed, step, questions=recipe.questions, noisiest=recipe.noisiest
            )
            logits, labels = answers(self.model, asked, recipe.blind, random.Random(f"blind {recipe.seed} {step}"))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

        def report() -> str:
            right = {kind: accuracy(self.model, own) for kind, own in fixed.items()}
            return ", ".join(f"{kind} {sum(own) / len(own):.2f}" for kind, own in right.items())

        self.phase("answers", self.model, loss_of, minutes, report)


def save(model: Any, folder: Path) -> None:
    """Weights, config, tokenizer and processor, as from_pretrained reads them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--tower", type=float, default=3)
    parser.add_argument("--start", type=Path, help="a folder whose weights to go on from")
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    given = vars(parser.parse_args())
    run = Run(Recipe(**{name: given[name] for name in asdict(Recipe())}), given["out"])
    if given["start"] is not None:
        run.model.load_state_dict(load_file(given["start"] / "model.safetensors"), strict=False)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)
    if given["tower"]:
        run.tower(given["tower"])
    run.all(given["minutes"])
    save(run.model.to(torch.bfloat16), run.out)


if __name__ == "__main__":
    main()
