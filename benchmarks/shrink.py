"""The ragged cache against transformers' DynamicCache with sdpa: decode steps, bytes, prefill; a Llama-shaped stack.

32 query heads on 8, d 128, batch 1. The stack around attention is narrow, so that attention and cache are what is
timed. Caches are filled with random keys and values, not by a prompt, so that long contexts take seconds; prefill has
rows of its own. `--device cuda` reports the same table on a GPU.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from common import device_argument, once, pair, peak_bytes, save
from manyheads.hosts.attend import Scoring
from manyheads.hosts.visibility import Visibility
from manyheads.shrink import H2O, TOVA, AdaKV, Duo, Full, KeyNorm, Policy, SnapKV, StreamingLLM
from manyheads.shrink.compress import Pass, shrink

MEASURES = (
    "src/manyheads/shrink",
    "src/manyheads/hosts",
)

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 32, 8, 128
GATES = [[float(head % 2) for head in range(KV_HEADS)]] * LAYERS


def stack(device: str, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2**18,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(device).eval()


def fill(cache: Any, length: int, device: str) -> Any:
    """Random keys and values for every layer; ours then drop what their policy says."""
    generator = torch.Generator(device).manual_seed(1)
    for index in range(LAYERS):
        keys, values = (
            torch.randn(1, KV_HEADS, length, HEAD_DIM, device=device, generator=generator) for _ in range(2)
        )
        cache.update(keys, values, index)
        if not isinstance(cache, DynamicCache):
            layer = cache.layers[index]
            queries = torch.randn(1, KV_HEADS, HEADS // KV_HEADS, 64, HEAD_DIM, device=device, generator=generator)
            shrink(layer, [Pass(queries, Scoring(HEAD_DIM**-0.5), Visibility(None, None, length - 64))])
            layer.store.own(layer.spare)
            layer.last = None
        del keys, values
    return cache


class Decoder:
    """Single tokens, one after the other, on one model and cache."""

    def __init__(self, policy: Policy | None, length: int, device: str, model: LlamaForCausalLM | None = None) -> None:
        self.model = stack(device) if model is None else model
        self.cache = policy.make_cache(self.model) if policy else DynamicCache(config=self.model.config)
        fill(self.cache, length, device)
        self.token = torch.tensor([[7]], device=device)

    @torch.no_grad()
    def __call__(self) -> None:
        self.model(self.token, past_key_values=self.cache, use_cache=True)

    @property
    def nbytes(self) -> int:
        if not isinstance(self.cache, DynamicCache):
            return int(self.cache.nbytes)
        return sum(
            row.numel() * row.element_size() for layer in self.cache.layers for row in (layer.keys, layer.values)
        )


def quarter(length: int, layers: int = LAYERS) -> Duo:
    """Half of the heads streaming, the others sharing what a quarter leaves."""
    return Duo(gates=GATES[:layers], sink_size=64, recent_size=256, budget_tokens=length // 4)


def decoding(device: str) -> list[dict[str, Any]]:
    rows = []
    for length in (4096, 32768):
        for name, policy, target in (
            ("full", Full(), 1 / 5),
            ("ragged quarter", quarter(length), 1 / 12),
            ("streaming 1024", StreamingLLM(budget_tokens=1024), None),
            ("snapkv quarter", SnapKV(compression_ratio=0.75), None),
            ("snapkv quarter, adakv", SnapKV(compression_ratio=0.75, allocation=AdaKV()), None),
            ("tova 1024", TOVA(budget_tokens=1024), None),
        ):
            ours, theirs = Decoder(policy, length, device), Decoder(None, length, device)
            found = pair(ours, theirs, rounds=5, device=device)
            share = ours.nbytes / theirs.nbytes
            row = {"what": "decode", "policy": name, "context": length, **found, "bytes_share": share}
            rows.append(row if target is None or length < 32768 else {**row, "target": target})
            del ours, theirs
            gc.collect()
    return rows


def flatness(device: str) -> dict[str, Any]:
    """StreamingLLM: milliseconds and bytes per token after 1k and after 128k tokens."""
    found: dict[str, Any] = {"what": "streaming is flat"}
    decoder = Decoder(StreamingLLM(budget_tokens=1024), 1024, device)
    for name in ("1k", "128k"):
        if name == "128k":
            for layer in decoder.cache.layers:
                for group in layer.store.groups:
                    # The sinks stay the first tokens.
                    slots = group.view("slots")
                    slots.add_((slots >= 4) * (2**17 - layer.seen))
                layer.seen = 2**17
        for _ in range(5):
            decoder()
        found[f"ms_{name}"] = 1e3 * sorted(once(decoder, device) for _ in range(41))[20]
        found[f"bytes_{name}"] = decoder.nbytes
    found["ratio"] = found["ms_128k"] / found["ms_1k"]
    return found


def prefilling(device: str, length: int = 2048) -> list[dict[str, Any]]:
    rows = []
    tokens = torch.randint(0, 64, (1, length), device=device)
    model, dense = stack(device, 1), stack(device, 1)
    for policy, target in (
        (Full(), 1.15),
        (StreamingLLM(budget_tokens=512), 1.15),
        (KeyNorm(compression_ratio=0.75), 1.15),
        (quarter(length, 1), 1.15),
        (SnapKV(compression_ratio=0.75), 1.5),
        (TOVA(budget_tokens=512), 1.5),
        (H2O(budget_tokens=512), 1.5),
    ):

        @torch.no_grad()
        def ours(policy: Policy = policy) -> None:
            model(tokens, past_key_values=policy.make_cache(model), logits_to_keep=1)

        @torch.no_grad()
        def theirs() -> None:
            dense(tokens, past_key_values=DynamicCache(config=dense.config), logits_to_keep=1)

        found = pair(ours, theirs, rounds=3, device=device)
        rows.append({"what": "prefill", "policy": type(policy).__name__, "context": length, **found, "target": target})
    return rows


PEAK = """
import sys, torch
sys.path.insert(0, {path!r})
from common import peak_reset, peak_since
from shrink import Decoder, quarter, stack
from manyheads.shrink import Full
side, length = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
model = stack("cpu")  # weights, and what libraries load on first use, are no part of a cache
Decoder(Full(), 64, "cpu", model)()
import gc; gc.collect()
import ctypes; ctypes.CDLL("libc.so.6").malloc_trim(0)
baseline = peak_reset()
decoder = Decoder({{"full": Full(), "quarter": quarter(length), "dense": None}}[side], length, "cpu", model)
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
from common import _status
if sys.argv[3] == "held":
    print(_status("VmRSS") - baseline)
else:
    peak_reset()
    for _ in range(40):
        decoder()
    print(peak_since(baseline))
"""


def memory(length: int = 32768) -> list[dict[str, Any]]:
    """Resident bytes of fresh processes: after filling, and at the peak of 40 decode steps."""
    from pathlib import Path

    script = PEAK.format(path=str(Path(__file__).parent))
    rows = []
    for kind in ("held", "peak"):
        dense = peak_bytes(script, "dense", str(length), kind)
        for side in ("full", "quarter"):
            own = peak_bytes(script, side, str(length), kind)
            rows.append({"what": f"memory {kind}", "policy": side, "ours": own, "theirs": dense, "ratio": own / dense})
    return rows


def main() -> None:
    device = device_argument()
    rows = [*decoding(device), flatness(device), *prefilling(device)]
    if device == "cpu":
        rows += memory()
    save("shrink", device, rows)


if __name__ == "__main__":
    main()
