"""An encoder-decoder on pairs like speech and its text: layers moved from the decoder to the encoder, and buckets.

An utterance is a text of tokens, each drawn out over two to six frames; a frame shows one of its token's four codes,
which one depends on the token before, and one in ten shows any code. Depths: the same training with models of about one
size, whose layers are ever more the encoder's; quality is the share of right next tokens under the true text, speed
that of greedy decoding, all models in turns. Batches: one pass of training over the same utterances, by a fixed batch
size, by buckets of frames, and by buckets of frames and tokens. The fixed size is given, and the bytes that a step of
it takes at the longest lengths are the room in which the buckets' sizes are found by measuring. Tokens are those of the
texts, without padding.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import save
from manyheads.models.configuration import ManyheadsConfig
from manyheads.models.heads import ManyheadsForSeq2SeqLM
from manyheads.training import BucketBatches, batch_sizes, length_buckets, measured_peak, padding_share
from manyheads.training.buckets import Bucket, Pair

MEASURES = ("src/manyheads/training/buckets.py",)

# Ids: padding, the start of a text, tokens, codes.
START, FIRST, TOKENS, CODES = 1, 2, 24, 96
SLIPS = 0.1
# (encoder, decoder) layers; a decoder's reads the encoder too, and is a third larger.
DEPTHS = ((3, 3), (4, 2), (6, 1))


@dataclass(frozen=True)
class Setting:
    """steps of `batch` utterances, per seed, of each depth; questions: utterances of `tokens` that are asked and
    decoded. pairs of a pass with up to `longest` tokens, of which `fixed` are a batch; turns: of every timing."""

    width: int = 64
    heads: int = 4
    steps: int = 700
    batch: int = 32
    tokens: int = 12
    questions: int = 256
    seeds: int = 2
    pairs: int = 768
    longest: int = 60
    fixed: int = 8
    turns: int = 3


FULL = Setting()
TINY = Setting(16, 2, 2, 4, 4, 8, 1, 12, 10, 2, 1)

# -- utterances --------------------------------------------------------------------------------------------------------


def utterance(drawn: random.Random, count: int) -> tuple[list[int], list[int]]:
    """(frames, tokens), both as ids."""
    tokens = [drawn.randrange(TOKENS) for _ in range(count)]
    frames: list[int] = []
    for before, token in zip([0, *tokens], tokens, strict=False):
        code = token * (CODES // TOKENS) + before % (CODES // TOKENS)
        shown = (drawn.randrange(CODES) if drawn.random() < SLIPS else code for _ in range(drawn.randint(2, 6)))
        frames += [FIRST + TOKENS + each for each in shown]
    return frames, [FIRST + token for token in tokens]


def speech(seed: str, count: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """Utterances of which most are short: the longest is as long as is allowed."""
    drawn = random.Random(seed)
    lengths = [longest, *(min(longest, max(2, round(drawn.lognormvariate(2.3, 0.7)))) for _ in range(count - 1))]
    return [utterance(drawn, length) for length in lengths]


def padded(rows: Iterable[list[int]], fill: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, fill)


def batch_of(examples: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    frames = padded((frames for frames, _ in examples), 0)
    return {
        "input_ids": frames,
        "attention_mask": (frames != 0).long(),
        "labels": padded((tokens for _, tokens in examples), -100),
    }


# -- the model ---------------------------------------------------------------------------------------------------------


def model_of(setting: Setting, encoder: int, decoder: int, seed: int, *, longest: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": setting.width, "num_attention_heads": setting.heads, "intermediate_size": 4 * setting.width}
    return ManyheadsForSeq2SeqLM(
        ManyheadsConfig(
            vocab_size=FIRST + TOKENS + CODES,
            num_hidden_layers=encoder,
            num_decoder_layers=decoder,
            layers=["softmax"],
            max_position_embeddings=longest,
            pad_token_id=0,
            bos_token_id=START,
            decoder_start_token_id=START,
            eos_token_id=None,
            is_encoder_decoder=True,
            is_causal=False,
            **sizes,
        )
    )


def learn(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    out = model(**batch, use_cache=False)
    loss = F.cross_entropy(out.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# -- depths ------------------------------------------------------------------------------------------------------------


def trained(setting: Setting, encoder: int, decoder: int, seed: int) -> Any:
    model = model_of(setting, encoder, decoder, seed, longest=8 * setting.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    warm = max(1, setting.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1.0, (setting.steps - step) / setting.steps * 1.5)
    )
    drawn = random.Random(f"depths {seed}")
    for _ in range(setting.steps):
        learn(model, optimizer, batch_of([utterance(drawn, setting.tokens) for _ in range(setting.batch)]))
        schedule.step()
    return model.eval()


@torch.no_grad()
def right(model: Any, batch: dict[str, Tensor]) -> float:
    found = model(**batch, use_cache=False).logits.argmax(-1)
    return float((found == batch["labels"]).double().mean())


def depths(setting: Setting) -> list[dict[str, Any]]:
    """A row for each: parameters, share of right tokens of each seed, greedy tokens per second and over the first's."""
    drawn = random.Random("questions")
    asked = batch_of([utterance(drawn, setting.tokens) for _ in range(setting.questions)])
    rows, first = [], []
    for encoder, decoder in DEPTHS:
        models = [trained(setting, encoder, decoder, seed) for seed in range(setting.seeds)]
        found = [right(model, asked) for model in models]
        size = sum(p.numel() for p in models[0].parameters())
        rows.append({"part": "depth", "encoder": encoder, "decoder": decoder, "parameters": size, "seeds": found,
                     "right": statistics.mean(found)})  # fmt: skip
        first.append(models[0])
        print(rows[-1], flush=True)
    few = {key: asked[key][:8] for key in ("input_ids", "attention_mask")}
    told = {"max_new_tokens": setting.tokens, "do_sample": False}
    seconds = by_turns([lambda model=model: model.generate(**few, **told) for model in first], setting.turns)
    for row, taken in zip(rows, seconds, strict=True):
        row["decoded_per_second"] = len(few["input_ids"]) * setting.tokens / statistics.median(taken)
        row["times_the_first"] = statistics.median(a / b for a, b in zip(seconds[0], taken, strict=True))
    return rows


def by_turns(calls: list[Callable[[], Any]], turns: int) -> list[list[float]]:
    """Seconds of every call in each turn, after one that is not counted."""
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for call, held in zip(calls, taken, strict=True):
            begun = time.perf_counter()
            call()
            if turn:
                held.append(time.perf_counter() - begun)
    return taken


# -- batches -----------------------------------------------------------------------------------------------------------


def batches(setting: Setting) -> list[dict[str, Any]]:
    """A row for each way: batches of a pass, shares of padding, tokens per second and over those of the fixed size."""
    examples = speech("batches", setting.pairs, setting.longest)
    pairs = [(len(frames), len(tokens)) for frames, tokens in examples]
    model = model_of(setting, 4, 2, 0, longest=6 * setting.longest)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(count: int, bucket: Bucket) -> None:
        """On the bucket's upper bounds."""
        frames = [FIRST + TOKENS] * bucket.inputs, [FIRST] * bucket.outputs
        learn(model, optimizer, batch_of([frames] * count))

    peak = measured_peak(step)
    worst = Bucket(max(n for n, _ in pairs), max(m for _, m in pairs))
    room = peak(setting.fixed, worst)
    ways: dict[str, list[list[int]]] = {"fixed": list(fixed(len(pairs), setting.fixed))}
    sizes: dict[str, dict[Bucket, int]] = {}
    for name, outputs in (("frames", 1), ("frames and tokens", 3)):
        sizes[name] = batch_sizes(length_buckets(pairs, 4, outputs), peak, max(1, room), most=8 * setting.fixed)
        ways[name] = list(BucketBatches(pairs, sizes[name]))
    passes = [lambda way=way: one_pass(model, optimizer, examples, way) for way in ways.values()]
    seconds = by_turns(passes, setting.turns)
    total, rows = sum(m for _, m in pairs), []
    for (name, way), taken in zip(ways.items(), seconds, strict=True):
        frames, tokens = padding_share(pairs, way)
        rows.append({"part": "batches", "buckets": name, "batches": len(way), "room_bytes": room,
                     "sizes": sorted(sizes[name].values()) if name in sizes else [setting.fixed],
                     "padding_frames": frames, "padding_tokens": tokens,
                     "tokens_per_second": total / statistics.median(taken),
                     "times_the_fixed": statistics.median(a / b for a, b in zip(seconds[0], taken, strict=True)),
                     "pairs": pairs_told(pairs)})  # fmt: skip
    return rows


def fixed(count: int, size: int) -> Iterator[list[int]]:
    order = random.Random("fixed").sample(range(count), count)
    return (order[start : start + size] for start in range(0, count, size))


def one_pass(model: Any, optimizer: Any, examples: list[Any], way: list[list[int]]) -> None:
    for numbers in way:
        learn(model, optimizer, batch_of([examples[number] for number in numbers]))


def pairs_told(pairs: list[Pair]) -> str:
    return f"{len(pairs)} of up to {max(n for n, _ in pairs)} frames and {max(m for _, m in pairs)} tokens"


def measured(setting: Setting) -> list[dict[str, Any]]:
    return [*depths(setting), *batches(setting)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, to see it work; not saved")
    if parser.parse_args().tiny:
        for row in measured(TINY):
            print(row)
        return
    save("speech", "cpu", measured(FULL))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
