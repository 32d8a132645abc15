"""What every process of a group holds of decoding with a spread cache, against `generate` in one."""

import pytest
import torch.distributed as dist
from switch_cases import batch_of, hosted, ours, rope

from manyheads.parallel import sequence_parallel, traffic

NEW = 7


def equal(model, n: int = 13, *, padded: str = "", eos: int | None = None) -> None:
    batch = batch_of(n, padded=padded)
    batch.pop("labels")
    model.eval()
    told = {"max_new_tokens": NEW, "eos_token_id": eos, "pad_token_id": 0}
    wanted = model.generate(**batch, do_sample=False, **told)
    with sequence_parallel(model) as spread:
        found = spread.generate(**batch, **told)
        again = spread.generate(**batch, **told)
    assert found.tolist() == wanted.tolist()
    assert again.tolist() == wanted.tolist()


def ends() -> None:
    """A row that has come to its end is filled up, and all stop when all have."""
    model, batch = ours("softmax").eval(), batch_of(13)
    plain = model.generate(batch["input_ids"], max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for row, place in ((0, 14), (1, 15)):
        equal(model, eos=int(plain[row, place]))


def settings() -> None:
    """What the model's generation_config says is heard, or refused; padding that no mask tells of is seen."""
    batch = batch_of(13)
    batch["input_ids"][1, :3] = 0
    plain = ours("softmax").eval().generate(batch["input_ids"], max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    for model in (ours("softmax").eval(), hosted("llama").eval()):
        own = model.generation_config
        own.eos_token_id, own.pad_token_id, own.suppress_tokens = plain[:, 14].tolist(), 0, plain[:, 13].tolist()
        wanted = model.generate(batch["input_ids"], max_new_tokens=NEW, do_sample=False)
        several = model.generate(batch["input_ids"], max_new_tokens=NEW, do_sample=False, eos_token_id=[7, 8, 9, 10])
        with sequence_parallel(model) as spread:
            found = spread.generate(batch["input_ids"], max_new_tokens=NEW)
            others = spread.generate(batch["input_ids"], max_new_tokens=NEW, eos_token_id=[7, 8, 9, 10])
            own.repetition_penalty = 1.2
            with pytest.raises(ValueError, match=r"generation_config has \{'repetition_penalty': 1\.2\}"):
                spread.generate(batch["input_ids"], max_new_tokens=2)
        assert found.tolist() == wanted.tolist()
        assert others.tolist() == several.tolist()


def memory() -> None:
    """A process keeps its tokens' keys alone, and a new token's traffic does not grow with the sequence."""
    size, sent = dist.get_world_size(), []
    model = hosted("llama").float().eval()
    for n in (12, 24):
        batch = batch_of(n)
        with sequence_parallel(model) as spread:
            with traffic() as first:
                spread.generate(batch["input_ids"], max_new_tokens=1)
            with traffic() as both:
                spread.generate(batch["input_ids"], max_new_tokens=3)
            sent.append(both.bytes - first.bytes)
            spread.first_pass(model, {"input_ids": batch["input_ids"]})
            held = spread._memory.nbytes
            spread._memory = None
        keys = 2 * 2 * 2 * 4 * 2 * 4  # layers, k and v, heads, features, rows, bytes
        assert held == (n // size) * (keys + 2 * 8)  # and where each stands, in each layer
    # Two layers of rows x heads x (features + 1) numbers, and the chosen tokens, at each of two tokens.
    assert sent == [2 * (size - 1) * (2 * 2 * 4 * 5 * 4 + 2 * 8)] * 2


def refused() -> None:
    model, batch = ours("softmax"), batch_of(9, padded="right")
    with sequence_parallel(model) as spread:
        with pytest.raises(ValueError, match="ends in padding"):
            spread.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=2)
        with pytest.raises(ValueError, match="training mode"):
            spread.generate(batch["input_ids"], max_new_tokens=2)
        with pytest.raises(ValueError, match="max_new_tokens=0"):
            spread.generate(batch["input_ids"], max_new_tokens=0)


CASES = {
    "softmax": lambda: equal(ours("softmax", "gqa")),
    "hybrid, left": lambda: equal(ours("lightning", "softmax", "based"), padded="left"),
    "flow, aaren, left": lambda: equal(ours("flow", "aaren", "context-broadcasting", "softmax"), padded="left"),
    "lln, left": lambda: equal(ours({"name": "lln", "block": 5}, "softmax"), padded="left"),
    "windows, left": lambda: equal(ours(rope("mswa", window=4), "softmax"), padded="left"),
    "convolutions": lambda: equal(
        ours(rope("lightweight-convolution", kernel_size=9), "hedgehog", short_conv=3), 7, padded="left"
    ),
    "llama, left": lambda: equal(hosted("llama"), padded="left"),
    "mistral, window": lambda: equal(hosted("mistral", sliding_window=4)),
    # Large weights: at its own a small model says one token whatever it attends to.
    "gpt2, left": lambda: equal(
        hosted("gpt2", n_embd=16, n_head=4, n_layer=2, n_positions=64, initializer_range=0.7), padded="left"
    ),
    "ends": ends,
    "settings": settings,
    "memory": memory,
    "refused": refused,
}
