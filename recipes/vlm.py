"""Train a small LLaVA that answers about pictures of digits: `python recipes/vlm.py --out DIR`.

A CLIP tower (40 x 40 pixels, patches of 5 x 5), a projector and a byte-level Llama, in transformers' own classes, on
`manyheads.tasks.scenes`. First the tower alone learns which digit every cell holds (`--tower` minutes, a linear head
that is thrown away), then everything learns to answer (`--minutes`). The loss is on answers alone. The questions of one
picture share its tokens in one row and do not see each other (a block mask, every question at the positions that it
would have alone), which is exactly one row per question and a third of the work. One question in ten sees no picture:
what the model says without one is then its prior, not an accident.

Minutes are those of the processor. The packaged model is a run with the defaults: the tower in three minutes (digits of
98% of held-out patches right), then 25 of answers, 4,210 steps. `benchmarks/results/vlm.json` holds what it gets right.
With the projector trained along and at twice the rate the starting circuit was lost: whether a digit is there was told
right 0.50 of the time after 41 seconds, against 0.83.

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
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.models.byte_tokenizer import byte_tokenizer
from manyheads.tasks.draw import generator
from manyheads.tasks.scenes import CANVAS, CELL, GRID, KINDS, Asked, Scene, held_out, render, training_batch

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
    tower_rate: float = 2e-3
    rate: float = 1e-3
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
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
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
    with torch.no_grad():
        start_tower(model.model.vision_tower, recipe)
        start_projector(model.model.multi_modal_projector)
        start_language(model.model.language_model, recipe)
    return model


# Where the Llama's vectors hold what, at the start: one number each for "constant" and "a digit is in this patch", the
# digit of a text byte, the digit, row and column of a patch, the digit asked for, where it is, and what is left of it.
CONSTANT, FLAG = 0, 21
WORD, SEEN, ROW, COLUMN, ASKED, FOUND, LEFT = (
    slice(*pair) for pair in ((1, 11), (11, 21), (22, 26), (26, 30), (30, 40), (40, 48), (48, 58))
)
MASS, FREE = 58, 61  # three numbers: how much is found, how much is like it, how much there is


def start_tower(tower: Any, recipe: Recipe) -> None:
    """Layer 0 starts with every patch looking at the four patches of its cell, one with each head: position vectors
    hold one of 16 for the cell and one of 4 for the place in it, and the heads match those. All of it is trained."""
    dim, head = recipe.vision_dim, recipe.vision_dim // recipe.vision_heads
    embed, side, step = tower.embeddings, CANVAS // PATCH, CELL // PATCH
    pixels = torch.linalg.qr(torch.randn(PATCH * PATCH, PATCH * PATCH))[0][:head]
    embed.patch_embedding.weight[:] = 0
    embed.patch_embedding.weight[:head] = pixels.view(head, 1, PATCH, PATCH) / 3
    places = embed.position_embedding.weight.normal_(0, 0.02)
    for at in range(side * side):
        i, j = divmod(at, side)
        places[1 + at, head + (i // step) * GRID + j // step] += 2
        places[1 + at, head + GRID * GRID + i % step * step + j % step] += 2
    attention = tower.encoder.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.weight.mul_(0.1)
    cell = slice(head, head + GRID * GRID)
    for own in range(recipe.vision_heads):
        q, k, v = (
            p.weight[own * head : (own + 1) * head] for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q[: GRID * GRID, cell] += torch.eye(GRID * GRID)
        k[: GRID * GRID, cell] += torch.eye(GRID * GRID)
        q[GRID * GRID, cell] += 1
        k[GRID * GRID, cell.stop + own % step**2] += 1
        v[:, :head] += torch.eye(head)
    attention.out_proj.weight[:] = torch.linalg.qr(torch.randn(dim, dim))[0]


def start_projector(projector: Any) -> None:
    for linear in (projector.linear_1, projector.linear_2):
        linear.weight.normal_(0, linear.in_features**-0.5)
    projector.linear_2.weight.mul_(0.1)
    projector.linear_2.bias[:] = 0
    projector.linear_2.bias[CONSTANT] = 0.6


def start_language(language: Any, recipe: Recipe) -> None:
    """Layer 0 starts with a head that carries the digit last read in the text. Layer 1 with three: one looks for that
    digit in the picture and fetches its row and column, one has its mass on all digits, one on those like the digit
    asked for. Layer 2 with one that fetches the digit left of the place found. They score on slow pairs of the rotation
    (the first on one that forgets after some twenty tokens). What follows from that for an answer is learnt, and all of
    this is trained on."""
    embed = language.embed_tokens.weight.normal_(0, 0.03)
    embed[:, FREE:].normal_(0, 0.15)
    embed[:, CONSTANT] = 0.6
    embed[list(b"0123456789"), WORD] = torch.eye(10)
    for layer in language.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            last.weight.mul_(0.5 * (2 * recipe.layers) ** -0.5)
    half = recipe.dim // recipe.heads // 2
    slow = [*range(half - 5, half), *range(2 * half - 5, 2 * half)]
    q, k, v, o = part(language.layers[0].self_attn, recipe, 0)
    q[1, CONSTANT] = 1.3
    k[1, WORD] = 1.3
    v[:10, WORD] = 0.4 * torch.eye(10)
    o[ASKED, :10] = 0.4 * torch.eye(10)
    attention = language.layers[1].self_attn
    for group, sharp in ((0, 1.4), (2, 0.5)):
        q, k, v, o = part(attention, recipe, group)
        q[slow, ASKED] = sharp * torch.eye(10)
        k[slow, SEEN] = sharp * torch.eye(10)
        v[:8, ROW.start : COLUMN.stop] = 0.4 * torch.eye(8)
        v[8, FLAG] = 0.4
        if group:
            o[MASS + 1, 8] = 1
        else:
            o[FOUND, :8] = 0.4 * torch.eye(8)
            o[MASS, 8] = 0.4
    q, k, v, o = part(attention, recipe, 1)
    q[slow[4], CONSTANT] = 0.5
    k[slow[4], FLAG] = 0.5
    v[8, FLAG] = 0.4
    o[MASS + 2, 8] = 1
    q, k, v, o = part(language.layers[2].self_attn, recipe, 0)
    across, along = [*range(half - 4, half)], [*range(2 * half - 4, 2 * half)]
    q[across, FOUND.start : FOUND.start + GRID] = 1.5 * torch.eye(GRID)
    q[along, FOUND.start + GRID : FOUND.stop] = torch.tensor(
        [[-1.5 if there >= here else 1.5 - 0.4 * (here - there) for here in range(GRID)] for there in range(GRID)]
    )
    k[across, ROW], k[along, COLUMN] = torch.eye(GRID), torch.eye(GRID)
    q[slow[0], CONSTANT] = k[slow[0], FLAG] = 1
    v[:10, SEEN] = 0.4 * torch.eye(10)
    o[LEFT, :10] = 0.4 * torch.eye(10)


def part(attention: Any, recipe: Recipe, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [head dim, dim] and o [dim, head dim] of a group's first head, nearly emptied."""
    size = recipe.dim // recipe.heads
    head, own = group * (recipe.heads // recipe.kv_heads) * size, group * size
    found = (
        attention.q_proj.weight[head : head + size],
        attention.k_proj.weight[own : own + size],
        attention.v_proj.weight[own : own + size],
        attention.o_proj.weight[:, head : head + size],
    )
    for each in found:
        each.mul_(0.1)
    return found


def processor() -> Any:
    """Bytes and an image token, pictures of any size to 40 x 40, and the place of the one in the other."""
    from tokenizers import AddedToken
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer(1024)
    # In this order they get the numbers 256, 257 and 258.
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", special=True, normalized=False)]})
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.convert_tokens_to_ids(["<image>", "</s>", "<pad>"]) == [IMAGE, END, PAD]
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessorPil(
        size={"height": CANVAS, "width": CANVAS}, do_center_crop=False, image_mean=half, image_std=half, resample=2
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
        tokens, wanted, blocks, places = [IMAGE] * PATCHES, [IGNORED] * PATCHES, [0] * PATCHES, [*range(PATCHES)]
        for number, question in enumerate(questions, 1):
            prompt, answer = list(f"{question.text}\n".encode()), [*question.answer.encode(), END]
            tokens += prompt + answer
            wanted += [IGNORED] * len(prompt) + answer
            size, sighted = len(prompt) + len(answer), rng.random() >= blind
            blocks += [number if sighted else -number] * size
            places += range(PATCHES, PATCHES + size)
        rows.append((tokens, wanted, blocks, places))
    width = max(len(row[0]) for row in rows)
    fill = (PAD, IGNORED, 10_000, 0)
    ids, labels, block, place = (
        torch.tensor([row[number] + [fill[number]] * (width - len(row[number])) for row in rows]) for number in range(4)
    )
    same = block[:, :, None] == block[:, None, :]
    sees = (block[:, :, None] >= 0) & (block[:, None, :] == 0)
    mask = (same | sees) & torch.ones(width, width, dtype=torch.bool).tril()
    return {"input_ids": ids, "labels": labels, "attention_mask": mask[:, None], "position_ids": place}


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


def patches(scenes: Sequence[Scene], dim: int) -> Tensor:
    """[b, patches, dim] what the projector is to make of every patch: the digit, row and column of its cell."""
    step = CELL // PATCH
    digit = cells(scenes).unflatten(1, (GRID, GRID)).repeat_interleave(step, 1).repeat_interleave(step, 2).flatten(1)
    found = torch.zeros(*digit.shape, dim)
    found[..., CONSTANT] = 0.6
    found[..., FLAG] = (digit < 10).float()
    found[..., SEEN] = F.one_hot(digit, 11)[..., :10].float()
    at = torch.arange(PATCHES)
    found[..., ROW] = F.one_hot(at // (CANVAS // PATCH) // step, GRID).float()
    found[..., COLUMN] = F.one_hot(at % (CANVAS // PATCH) // step, GRID).float()
    return found


def crowded(size: int, recipe: Recipe, step: int) -> tuple[list[Scene], Tensor]:
    """Pictures with a digit in three cells of four: more to learn from at the same price than scenes of five."""
    own, rng = random.Random(f"tower {recipe.seed} {step}"), generator("scenes", "tower", recipe.seed, step)
    places = [(row, column) for row in range(GRID) for column in range(GRID)]
    scenes = [Scene(tuple((*at, own.randrange(10)) for at in places if own.random() < 0.75)) for _ in range(size)]
    noise = torch.tensor([max(0.0, own.uniform(-2 * recipe.noisiest, recipe.noisiest)) for _ in range(size)])
    return scenes, render(scenes, rng, noise=noise)


class PatchReader(nn.Module):
    """Tower and projector: what they tell the Llama of every patch, [b, patches, dim]."""

    def __init__(self, model: Any):
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.projector(self.tower(normalised(pixels)).last_hidden_state[:, 1:])
        return found


class Run:
    """model, and where its training stands."""

    def __init__(self, recipe: Recipe, out: Path):
        self.recipe, self.out, self.model = recipe, out, build(recipe)
        out.mkdir(parents=True, exist_ok=True)

    def phase(self, name: str, module: nn.Module, loss_of: Any, minutes: float, report: Any, rate: float) -> None:
        matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in module.parameters() if p.requires_grad and p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        begun, step, said, seconds = time.process_time(), 0, 0.0, 0.0
        module.train()
        while seconds < 60 * minutes:
            share = seconds / (60 * minutes)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 40, (1 - share) / 0.5 + 0.01)
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step, seconds = step + 1, time.process_time() - begun
            if seconds - said > 20:
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
        reader, dim = PatchReader(self.model), self.recipe.dim
        fixed = held_out(64, seed=1)
        there, truth = (own := patches(fixed.scenes, dim))[..., FLAG] > 0, own[..., SEEN].argmax(-1)

        def loss_of(step: int) -> Tensor:
            scenes, pixels = crowded(32, self.recipe, step)
            wanted, found = patches(scenes, dim), reader(pixels)
            seen = wanted[..., FLAG] > 0
            named = F.cross_entropy(8 * found[..., SEEN][seen], wanted[..., SEEN][seen].argmax(-1))
            return named + (found - wanted).square().sum(-1).mean()

        @torch.no_grad()
        def report() -> str:
            found = reader(fixed.pixels)
            right = found[..., SEEN].argmax(-1) == truth
            flags = (found[..., FLAG] > 0.5) == there
            return f"patches right: digits {right[there].float().mean():.3f}, whether one {flags.float().mean():.3f}"

        self.phase("tower", reader, loss_of, minutes, report, self.recipe.tower_rate)

    def all(self, minutes: float) -> None:
        fixed = {kind: held_out(64, kind=kind, seed=1) for kind in KINDS}
        # What is told of the patches stays as it was learnt: at this pace it is lost faster than the Llama follows.
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(False)

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

        self.phase("answers", self.model, loss_of, minutes, report, self.recipe.rate)


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
        run.model = type(run.model).from_pretrained(given["start"], dtype=torch.float32)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)
    if given["tower"]:
        run.tower(given["tower"])
    run.all(given["minutes"])
    save(run.model.to(torch.bfloat16), run.out)


if __name__ == "__main__":
    main()
