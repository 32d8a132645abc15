"""Train a small byte-level Llama that answers passkeys, on the standard library's sources: `byte_llama.py --out DIR`.

Each batch mixes three kinds of row: one passkey among sources, several named numbers asked for in shuffled order, and
random segments that come back after filler. The loss is the mean over text bytes plus the mean over answer bytes (the
digits and the repeated parts); digits first told are not trained on. The length doubles from 128 to 2,048 each time
nine answer bytes in ten are right. Weights start from a rough copying circuit (`start_circuit`), all of it trained.

Measured with one thread of a shared AMD EPYC core, seed 0, defaults (918,656 parameters, 1.8 MB as bfloat16), 100 keys
per length on held-out sources, `--minutes 4.2`: length 1,024 reached at 67 s and 2,048 at 101 s; at the end 100% of the
passkeys of 128 to 1,024 bytes, 99% at 2,048, 2.04 bits per byte. `--minutes 1` in float32: 100% to 512, 92% at 1,024;
`--minutes 1.4`, killed and resumed: 99% at 1,024, 80% at 2,048; seed 1, `--minutes 1`: 96% at 512, 87% at 1,024.
Without the starting circuit (`--sharp 0`): 0% and chance on answers after 60 s; an earlier start with look-back heads
alone: 0% after 78 s.
`--minutes 50` on a busy machine (2,283 steps) is the model in the package: see its card.
In the 4.2 minute model, passkeys fall to 0% when KV heads 0 and 1 of layer 1 are silenced together, stay above 90%
without either one, and at 100% without the attention of layers 2 and 3 (15 keys of 512 bytes).

The seed fixes weights and batches; the learning rate follows the clock, so two runs agree closely but not bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

DIGITS = 5
STATEMENT = "\nThe pass key is {}. Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
# fmt: off
NAMES = [
    "amber", "birch", "cedar", "coral", "delta", "ember", "fjord", "grove", "hazel", "indigo", "jade", "karst",
    "lilac", "maple", "north", "olive", "pearl", "quartz", "river", "slate", "topaz", "umber", "violet", "willow",
]
# fmt: on
UNSEEN, TEXT, ANSWER = 0, 1, 2
LENGTHS = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the run besides the machine's speed."""

    seed: int = 0
    layers: int = 4
    dim: int = 128
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp: int = 320
    theta: float = 1e6
    lr: float = 3e-3
    tokens: int = 2048
    sharp: float = 60.0
    repeats: float = 0.3
    dtype: str = "bfloat16"  # autocast from 512 bytes on; "float32" where the processor has no bfloat16


def corpus(limit: int = 12_000_000) -> tuple[np.ndarray, np.ndarray]:
    """ASCII bytes of the standard library's sources: for training, and every twentieth file held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    kept: list[list[bytes]] = [[], []]
    total = 0
    for index, path in enumerate(sorted(root.rglob("*.py"))):
        if skipped & set(path.relative_to(root).parts) or total > limit:
            continue
        data = path.read_bytes()
        if data.isascii():
            kept[index % 20 == 0].append(data)
            total += len(data)
    return tuple(np.frombuffer(b"\n".join(part), np.uint8) for part in kept)  # type: ignore[return-value]


def build(recipe: Recipe) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    if recipe.sharp and (recipe.head_dim != 32 or recipe.dim < 128 or recipe.heads < 4 or recipe.layers < 2):
        raise ValueError(
            f"the starting circuit wants head_dim 32, dim >= 128, heads >= 4 and layers >= 2, given head_dim "
            f"{recipe.head_dim}, dim {recipe.dim}, heads {recipe.heads}, layers {recipe.layers}: "
            "change them or pass --sharp 0"
        )
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=recipe.dim,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
        tie_word_embeddings=True,
        initializer_range=recipe.dim**-0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.mul_((2 * recipe.layers) ** -0.5)
        if recipe.sharp:
            start_circuit(model, recipe)
    return model


def start_circuit(model: LlamaForCausalLM, recipe: Recipe) -> None:
    """Start from a rough copying circuit instead of waiting for one; all of it is trained like everything else.

    Residual layout: coordinate 0 is a constant, 1 to 31 the byte's random code, 32 j to 32 j + 31 the code of the byte
    j back (j = 1, 2, 3). Layer 0: three heads look j bytes back; the constant gives q and k a fixed part, and a phase
    between the two makes the score of RoPE pair i equal cos(f_i (n - m - j)), greatest at the distance j. Layer 1: half
    the heads compare the last three bytes with the three before each key, through random projections on the slow RoPE
    pairs, and copy the byte found into the code.
    """
    code, half = 32, recipe.head_dim // 2
    embed = model.model.embed_tokens.weight
    embed.normal_(0, 0.03)
    embed[:, 1:code].normal_(0, 0.15)
    embed[:, 0] = 0.6
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.3)
    constant = 0.6 * math.sqrt(recipe.dim / embed.pow(2).sum(-1).mean().item())  # coordinate 0 after RMSNorm
    size = math.sqrt(recipe.sharp / 6 * math.sqrt(recipe.head_dim)) / constant
    frequency = recipe.theta ** (-torch.arange(half) / half)
    group, eye = recipe.heads // recipe.kv_heads, torch.eye(code)[:, 1:]
    q, k, v, o = views(model.model.layers[0].self_attn, recipe)
    for head in range(3):
        angle = frequency[:6] * (head + 1)
        q[head].mul_(0.1)
        q[head, 0, :6, 0] = size * angle.cos()
        q[head, 1, :6, 0] = -size * angle.sin()
        k[head // group].mul_(0.1)
        k[head // group, 0, :6, 0] = size
        v[head // group].mul_(0.1)
        v[head // group, :, 1:code] = 0.1 * eye
        o[:, head].mul_(0.1)
        o[code * (head + 1) : code * (head + 2), head] += torch.eye(code)
    q, k, v, o = views(model.model.layers[1].self_attn, recipe)
    for head in range(recipe.heads // 2):
        kv = head // group
        q[head].mul_(0.1)
        if head % group == 0:
            k[kv].mul_(0.1)
            v[kv].mul_(0.1)
            v[kv, :, 1:code] = 0.3 * eye
            slow = [0.25 * torch.randn(2, half // 2, code - 1) for _ in range(3)]
            for j in range(3):
                k[kv, :, half // 2 :, code * (j + 1) + 1 : code * (j + 2)] = slow[j]
        for j in range(3):
            q[head, :, half // 2 :, code * j + 1 : code * (j + 1)] = slow[j]
        o[:, head].mul_(0.1)
        o[:code, head] += torch.eye(code) / (recipe.heads // 2) * 2


def views(attention: Any, recipe: Recipe) -> tuple[torch.Tensor, ...]:
    """The projections by head: q, k [heads, half of the RoPE pairs, pair, dim], v [kv, d, dim], o [dim, heads, d]."""
    half = recipe.head_dim // 2
    q = attention.q_proj.weight.view(recipe.heads, 2, half, recipe.dim)
    k = attention.k_proj.weight.view(recipe.kv_heads, 2, half, recipe.dim)
    v = attention.v_proj.weight.view(recipe.kv_heads, recipe.head_dim, recipe.dim)
    return q, k, v, attention.o_proj.weight.view(recipe.dim, recipe.heads, recipe.head_dim)


def digits(rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(0, 10, DIGITS)))


def filler(rng: np.random.Generator, text: np.ndarray, size: int) -> np.ndarray:
    start = int(rng.integers(0, len(text) - size))
    return text[start : start + size]


class Row:
    """One sequence under construction: bytes, and for each byte whether and how it is trained."""

    def __init__(self, length: int) -> None:
        self.data = np.zeros(length, np.uint8)
        self.kind = np.zeros(length, np.uint8)
        self.used = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.used

    def add(self, data: np.ndarray | str, kind: int) -> None:
        array = np.frombuffer(data.encode(), np.uint8) if isinstance(data, str) else data
        array = array[: self.left]
        self.data[self.used : self.used + len(array)] = array
        self.kind[self.used : self.used + len(array)] = kind
        self.used += len(array)


def facts(rng: np.random.Generator, text: np.ndarray, length: int, count: int) -> Row:
    """`count` keys told among filler, then asked for (each statement and question 20 to 55 bytes)."""
    row = Row(length)
    if count == 1:
        pairs = [(STATEMENT, QUESTION, digits(rng))]
    else:
        pairs = [
            (f"\nThe {n} number is {{}}.\n", f"\nWhat is the {n} number? The {n} number is ", digits(rng))
            for n in rng.choice(NAMES, count, replace=False)
        ]
    told = sum(len(s) + DIGITS - 2 for s, _, _ in pairs)
    asks = [pairs[i] for i in rng.permutation(count)]
    if count == 1:
        asks = asks * int(rng.integers(1, 2 + length // 256))
    asked = sum(len(q) + DIGITS + 1 for _, q, _ in asks)
    spare = max(0, length - told - asked)
    cuts = np.sort(rng.integers(0, spare + 1, count + len(asks)))
    if rng.random() < 0.5:  # half of the rows ask everything at the end, as in the measurement
        cuts[count:] = spare
    before = 0
    for cut, (statement, _, key) in zip(cuts[:count], pairs, strict=True):
        row.add(filler(rng, text, int(cut) - before), TEXT)
        before = int(cut)
        head, tail = statement.split("{}")
        row.add(head, TEXT)
        row.add(key, UNSEEN)
        row.add(tail, TEXT)
    for cut, (_, question, key) in zip(cuts[count:], asks, strict=True):
        row.add(filler(rng, text, int(cut) - before), TEXT)
        before = int(cut)
        row.add(question, TEXT)
        row.add(key, ANSWER)
        row.add(".", TEXT)
    row.add(filler(rng, text, row.left), TEXT)
    return row


def repeats(rng: np.random.Generator, text: np.ndarray, length: int) -> Row:
    """A segment nobody can guess (digits, letters, or printable bytes), filler, and the segment again, until full."""
    row = Row(length)
    low, high = ((48, 58), (97, 123), (33, 127))[int(rng.integers(3))]
    size = int(rng.integers(12, max(13, min(length // 3, 96))))
    segment = rng.integers(low, high, size).astype(np.uint8)
    row.add(segment, UNSEEN)
    while row.left:
        row.add(filler(rng, text, int(rng.integers(0, max(1, min(row.left, length // 2 - size) + 1)))), TEXT)
        start = int(rng.integers(0, size - 8))
        row.add(segment[start : start + 4], UNSEEN)  # the cue: what follows it is known
        row.add(segment[start + 4 :], ANSWER)
    return row


def batch(recipe: Recipe, text: np.ndarray, step: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch number `step`: a function of seed and step alone, so a resumed run sees what an unbroken one sees."""
    rng = np.random.default_rng((recipe.seed, step))
    rows = []
    for _ in range(max(2, recipe.tokens // length)):
        draw = rng.random()
        if draw < recipe.repeats:
            rows.append(repeats(rng, text, length + 1))
        elif draw < recipe.repeats + 0.35 or length < 256:
            rows.append(facts(rng, text, length + 1, 1))
        else:
            rows.append(facts(rng, text, length + 1, int(rng.integers(2, min(20, length // 90) + 1))))
    data = torch.from_numpy(np.stack([row.data for row in rows])).long()
    return data, torch.from_numpy(np.stack([row.kind for row in rows]))


def losses(model: LlamaForCausalLM, data: torch.Tensor, kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean loss of text, mean loss of answers, and the share of answer bytes right."""
    logits = model(data[:, :-1], use_cache=False).logits.float().flatten(0, 1)
    target, kind = data[:, 1:].flatten(), kind[:, 1:].flatten()
    each = F.cross_entropy(logits, target, reduction="none")
    answer = kind == ANSWER
    right = float((logits[answer].argmax(-1) == target[answer]).float().mean())
    return each[kind == TEXT].mean(), each[answer].mean(), right


@torch.no_grad()
def passkeys(
    model: LlamaForCausalLM, text: np.ndarray, length: int, depth: float, count: int, seed: int = 1234
) -> float:
    """Share of keys answered without one wrong digit; arg max of every digit given the right ones before it, which
    is all right exactly when greedy decoding is."""
    rng = np.random.default_rng((seed, length, int(depth * 1000)))
    spare = length - len(STATEMENT) + 2 - len(QUESTION) - 2 * DIGITS
    rows = []
    for _ in range(count):
        key, text_row, at = digits(rng), filler(rng, text, max(0, spare)), int(depth * max(0, spare))
        before, after = text_row[:at].tobytes(), text_row[at:].tobytes()
        rows.append(list(before + STATEMENT.format(key).encode() + after + (QUESTION + key).encode()))
    data = torch.tensor(rows)
    logits = model(data[:, :-1], use_cache=False, logits_to_keep=DIGITS).logits
    return float((logits.argmax(-1) == data[:, -DIGITS:]).all(-1).float().mean())


@torch.no_grad()
def bits(model: LlamaForCausalLM, text: np.ndarray, length: int = 1024, count: int = 16) -> float:
    """Bits per byte of held-out sources."""
    starts = np.linspace(0, len(text) - length - 1, count).astype(int)
    data = torch.from_numpy(np.stack([text[s : s + length + 1] for s in starts])).long()
    logits = model(data[:, :-1], use_cache=False).logits.float()
    return float(F.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())) / math.log(2)


def measure(
    model: LlamaForCausalLM, held: np.ndarray, lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048), count: int = 20
) -> dict[str, float]:
    """Print passkey accuracy by length and depth, and bits per byte of text; all on held-out filler."""
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    found: dict[str, float] = {}
    print("length " + " ".join(f"depth {depth:4.0%}" for depth in depths) + "   mean", flush=True)
    for length in lengths:
        scores = [passkeys(model, held, length, depth, count) for depth in depths]
        found[str(length)] = sum(scores) / len(scores)
        print(f"{length:6d} " + " ".join(f"{s:10.0%}" for s in scores) + f" {found[str(length)]:6.1%}", flush=True)
    found["bits"] = bits(model, held)
    print(f"bits per byte {found['bits']:.3f}", flush=True)
    return found


def write(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, str]) -> None:
    """Whole or not at all: a killed run leaves the file before."""
    partial = path.with_suffix(".partial")
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, partial, metadata=meta)
    os.replace(partial, path)


class Run:
    """The training run: model, optimiser, and where the curriculum stands."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.model = build(recipe)
        self.names = dict(self.model.named_parameters())
        matrices = [p for p in self.names.values() if p.ndim > 1]
        vectors = [p for p in self.names.values() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
        self.step, self.stage, self.right, self.seconds = 0, 0, 0.0, 0.0

    def save(self) -> None:
        tensors = dict(self.names)
        for name, parameter in self.names.items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{key}:{name}": value for key, value in state.items()}
        where = {"step": self.step, "stage": self.stage, "right": self.right, "seconds": self.seconds}
        meta = {"where": json.dumps(where), "recipe": json.dumps(asdict(self.recipe))}
        write(self.out / "training.safetensors", tensors, meta)

    def resume(self) -> bool:
        path = self.out / "training.safetensors"
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as opened:
                meta = opened.metadata()
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it to start again") from error
        if json.loads(meta["recipe"]) != asdict(self.recipe):
            raise ValueError(f"{path} belongs to another recipe ({meta['recipe']}): choose another --out")
        with torch.no_grad():
            for name, parameter in self.names.items():
                parameter.copy_(tensors[name])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"step:{name}" in tensors:
                    self.optimizer.state[parameter] = {key: tensors[f"{key}:{name}"] for key in keys}
        where = json.loads(meta["where"])
        self.step, self.stage, self.right, self.seconds = (where[k] for k in ("step", "stage", "right", "seconds"))
        return True

    def train(self, text: np.ndarray, seconds: float, top: int, every: float = 20.0) -> None:
        begun, said, saved = time.perf_counter() - self.seconds, self.seconds, self.seconds
        self.model.train()
        while self.seconds < seconds:
            share = self.seconds / seconds
            rate = self.recipe.lr * min(1.0, (self.step + 1) / 50, (1 - share) / 0.35 + 0.02)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            rng = np.random.default_rng((self.recipe.seed, self.step, 1))
            # Shorter lengths stay in the mix, the longest reached takes most of the time.
            stage = self.stage if rng.random() < 0.8 else int(rng.integers(0, self.stage + 1))
            data, kind = batch(self.recipe, text, self.step, LENGTHS[stage])
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.dtype == "bfloat16" and stage > 1):
                plain, answer, right = losses(self.model, data, kind)
            torch.autograd.backward(plain + answer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.right += 0.05 * (right - self.right) if stage == self.stage else 0
            self.seconds = time.perf_counter() - begun
            if self.right > 0.9 and LENGTHS[self.stage] < top:
                self.stage, self.right = self.stage + 1, 0.0
                print(f"{self.seconds:6.0f} s step {self.step}: length {LENGTHS[self.stage]}", flush=True)
            if self.seconds - said >= every:
                said = self.seconds
                print(
                    f"{self.seconds:6.0f} s of {seconds:.0f}, {seconds - self.seconds:.0f} left; step {self.step}, "
                    f"length {LENGTHS[self.stage]}, text {plain.item() / math.log(2):.2f} bits, "
                    f"answers {answer.item():.2f} nats, bytes right {self.right:.2f}",
                    flush=True,
                )
            if self.seconds - saved >= 60:
                saved = self.seconds
                self.save()
        self.save()

    def export(self) -> None:
        """The folder `from_pretrained` reads: config.json, bfloat16 weights and a tokenizer."""
        from manyheads.models.byte_tokenizer import byte_tokenizer

        folder = self.out / "model"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.to(torch.bfloat16) for name, p in self.names.items()}
        write(folder / "model.safetensors", tensors, {"format": "pt"})
        self.model.config.architectures = ["LlamaForCausalLM"]
        self.model.config.save_pretrained(folder)
        byte_tokenizer(self.model.config.max_position_embeddings).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the small byte-level Llama.")
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--top", type=int, default=2048, help="greatest training length")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    minutes, out, threads, top = (given.pop(name) for name in ("minutes", "out", "threads", "top"))
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    text, held = corpus()
    run = Run(Recipe(**given), out)
    resumed = run.resume()
    count = sum(p.numel() for p in run.model.parameters())
    state = "resumed" if resumed else "new"
    print(f"{state}: {count:,} parameters, {len(text):,} + {len(held):,} bytes of text", flush=True)
    run.train(text, 60 * minutes, top)
    run.model.eval()
    measure(run.model, held)
    run.export()


if __name__ == "__main__":
    main()
