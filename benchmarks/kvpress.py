"""The ragged cache against kvpress: kept tokens, decode steps and memory under SnapKV, StreamingLLM and key norm.

    python benchmarks/kvpress.py --make-env DIR                        # kvpress wants an older transformers: once
    python benchmarks/kvpress.py --kvpress-python DIR/bin/python       # both sides, in turns
    ... --lengths 1024 --kept-only      what every policy keeps, with no timing, in kvpress-kept.json
    ... --model smollm2                 a real model with a key in real text, contexts 512, 2048 and 7900 unless told
    ... --model smollm2 --kept-only     every policy there, at 1024 unless told: tokens kept, KL and answers, no timing
    ... --fixture                       rewrites tests/shrink/kvpress_kept.json

One Llama-shaped stack, 32 query heads on 8, d 128, batch 1, with random weights and a prompt of random embeddings (no
token twice: equal keys would tie). Each side is a process in its own environment that reads the same weights; the sides
decode in turns. The prompt passes the model once per length; each policy is then applied to what its layers were given,
by kvpress' own hook there and by the cache's own step here. Eviction follows attention in both, so a prompt of its own
gives the same; at 4k every policy runs the prompt all the same, which gives its times and peaks.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEASURES = (
    "src/manyheads/shrink",
    "src/manyheads/hosts",
)

HERE = Path(__file__).resolve().parent
# At the end: `import kvpress` must find the package and not this file (the other side runs with -P).
sys.path.append(str(HERE))
from common import _status, peak_reset, peak_since, save  # noqa: E402

KVPRESS = "0.5.5"
FIXTURE = HERE.parent / "tests" / "shrink" / "kvpress_kept.json"
SETTINGS = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2**18,
}
# kvpress' defaults. It drops at prefill only, and its StreamingLLM leaves keys where they stand in the text. Of 1000
# tokens less a ratio of 0.9 it keeps 99, by rounding; with ratios that are exact in binary both sides count alike.
CASES: dict[str, dict[str, Any]] = {
    "SnapKV": {"window_size": 64, "kernel_size": 5},
    "StreamingLLM": {"sink_size": 4},
    "KeyNorm": {},
}
# Compared by what they keep alone. Chunks and windows divide the lengths: where they do not, each docstring says how
# the two differ. base: another policy and its settings.
KEPT: dict[str, dict[str, Any]] = {
    "KeyDiff": {},
    # By ranks alone tokens of different stretches tie.
    "LagKV": {"sink_size": 4, "lag_size": 16, "cross_scoring": True},
    "ChunkKV": {"chunk_length": 16, "base": ["SnapKV", {"window_size": 64, "kernel_size": 5}]},
    "Finch": {"window_size": 32, "positions": "text"},
    "CriticalKV": {"base": ["SnapKV", {"window_size": 64, "kernel_size": 5}]},
    "KVzip": {"chunk_size": 128, "request": [7, 8, 9], "again": [7, 11, 12], "suffix": [5]},
    "QFilters": {"filters": 5},
    "Leverage": {"sketch_dimension": 48},
    "CUR": {"sink_size": 4, "local_window": 16},
    "Compactor": {"sink_size": 8, "recent_size": 8, "chunk_size": 16, "sketch_dimension": 48},
    "NonCausal": {"chunk_size": 128},
    "SimLayerKV": {"lazy_threshold": 0.2, "recent_size": 128},
}
# What tests/shrink holds on a tiny model, by windows and chunks that fit its 96 tokens. KVzip is not there: its press
# fails in float64.
STORED: list[tuple[str, dict[str, Any]]] = [
    ("SnapKV", {"window_size": 8, "kernel_size": 5}),
    ("SnapKV", {"window_size": 16, "kernel_size": 7}),
    ("StreamingLLM", {"sink_size": 4}),
    ("KeyNorm", {}),
    ("KeyDiff", {}),
    ("LagKV", {"sink_size": 0, "lag_size": 24, "cross_scoring": False}),
    ("LagKV", {"sink_size": 4, "lag_size": 8, "cross_scoring": True}),
    ("ChunkKV", {"chunk_length": 8, "base": ["KeyNorm", {}]}),
    ("ChunkKV", {"chunk_length": 8, "base": ["SnapKV", {"window_size": 8, "kernel_size": 5}]}),
    ("Finch", {"window_size": 8, "positions": "text"}),
    ("CriticalKV", {"base": ["SnapKV", {"window_size": 8, "kernel_size": 5}]}),
    ("CriticalKV", {"base": ["KeyDiff", {}]}),
    ("QFilters", {"filters": 5}),
    ("Leverage", {"sketch_dimension": 8}),
    ("CUR", {"sink_size": 4, "local_window": 16}),
    ("Compactor", {"sink_size": 8, "recent_size": 8, "chunk_size": 16, "sketch_dimension": 8}),
    ("NonCausal", {"chunk_size": 32}),
    ("SimLayerKV", {"lazy_threshold": 0.2, "recent_size": 16}),
]
# Compared on a real model alone. of: the policy, where the key is not its name; allocation, parts: others by name.
SNAP = {"window_size": 64, "kernel_size": 5}
MORE: dict[str, dict[str, Any]] = {
    "TOVA": {"shared": True},
    "ExpectedAttention": {"n_future_positions": 512, "sink_size": 4},
    "AdaKV": {"of": "SnapKV", "allocation": ["AdaKV", {}], **SNAP},
    "CriticalAdaKV": {"of": "CriticalKV", "allocation": ["AdaKV", {}], "base": ["SnapKV", SNAP]},
    "PyramidKV": {"of": "SnapKV", "allocation": ["PyramidKV", {}], **SNAP},
    "KeyRerotation": {"of": "SnapKV", "positions": "cache", **SNAP},
    "FastKVzip": {"gates": 7},
    # A quarter goes by one rule, the rest of the ratio by the other.
    "Composed": {"parts": [["SnapKV", SNAP], ["KeyDiff", {}]], "first": 0.25},
    "ThinK": {"channels": 0.5},
}
# Why kept tokens may differ where it is not for rounding of scores.
WHY = {
    "TOVA": "kvpress keeps the last token whatever its score",
    "PyramidKV": "kvpress rounds a layer's budget to the nearest and leaves the window out of the pyramid's bounds; "
    "here budgets are rounded down and none is below 1",
    "Composed": "each stage of kvpress rounds what is left down, from 255.99 to 255 where 256 are asked for",
    "ThinK": "kvpress narrows the window's keys too; here the latest 32 tokens keep all channels",
    "CriticalAdaKV": "kvpress' scores of both stages are made as large as the type holds, and shared out by place in "
    "memory among equals; here the first stage is counted for each head by the budget that it is told",
}
# Ours that no press is compared with.
ALONE = {
    "H2O": "ObservedAttentionPress averages over the queries that saw a token, H2O sums",
    "ThinK on a real model": "it keeps every token; its channels are compared on the fixture alone",
    "Duo": "its gates are fetched from a hub for models of 7B and more",
    "Razor, MoA, LoCoCo, LongHeads, TidalDecode": "kvpress has none of them",
}
# A gap between scores, as a share of their range, that rounding in float32 makes.
ROUNDING = 1e-3
# They run the context themselves, as tokens: some feed it a second time, some read what no replay has.
AGAIN = ("KVzip", "FastKVzip", "ThinK")
RATIOS = (0.5, 0.75)
STEPS, ROUNDS = 8, 7
# Up to this length every policy runs the prompt itself.
WHOLE = 4096


class Side:
    """What both processes do; `compress` fills self.cache by one of the two libraries."""

    def __init__(self, folder: str, dtype: str, attention: str) -> None:
        from safetensors.torch import load_file
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        settings = json.loads((Path(folder) / "settings.json").read_text())
        self.folder = Path(folder)
        self.model = LlamaForCausalLM(LlamaConfig(**settings, attn_implementation=attention)).to(getattr(torch, dtype))
        self.model.load_state_dict(load_file(self.folder / "weights.safetensors"))
        self.model.eval()
        # A question and its answer, where the prompt is text; else any tokens.
        self.trial: dict[str, Any] = json.loads((self.folder / "tail.json").read_text())
        self.tail: list[int] = self.trial.get("tail", [])
        self.context, self.fed = 0, 0
        self.cache: Any = None

    def embeddings(self) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self.folder / "prompt.safetensors")["prompt"][:, : self.context].to(self.model.dtype)

    def prompt(self, length: int) -> dict[str, Any]:
        """One pass of the prompt, keeping what the policies will ask for."""
        self.context = length
        start = time.perf_counter()
        self.record()
        return {"seconds": time.perf_counter() - start}

    def ids(self) -> Tensor:
        """Tokens for policies that need them; no generator of random numbers has a say in them."""
        if "prefix" in self.trial:
            return torch.tensor([self.trial["prefix"]])
        at = torch.arange(self.context)
        return ((at * at * 7919 + at * 104729) % (self.model.config.vocab_size - 1) + 1)[None]

    def prompted(self, policy: str) -> dict[str, Tensor]:
        return {"input_ids": self.ids()} if policy in AGAIN else {"inputs_embeds": self.embeddings()}

    def compressed(self, policy: str, ratio: float, whole: bool, **settings: Any) -> dict[str, Any]:
        """A cache shrunk by the policy, and the bytes that the process then holds for it."""
        self.cache, self.fed = None, 0
        self.base = self.settle()
        start = time.perf_counter()
        (self.whole if whole else self.replay)(policy, ratio, settings)
        seconds = time.perf_counter() - start
        peak = peak_since(self.base)
        self.settle()
        held = _status("VmRSS") - self.base
        found = {"bytes": self.nbytes(), "held": held}
        return {**found, "prefill_seconds": seconds, "prefill_peak": peak} if whole else found

    def kept(self) -> dict[str, Any]:
        """Positions in the prompt by layer and KV head, in a file."""
        from safetensors.torch import save_file

        path = self.folder / f"{type(self).__name__}.safetensors"
        save_file({str(i): self.positions(i).contiguous() for i in range(len(self.cache.layers))}, path)
        return {"path": str(path)}

    def decode(self, steps: int, keep: bool = True) -> dict[str, Any]:
        logits = []
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            position = torch.tensor([[self.behind() + self.fed]])
            token = self.tail[self.fed % len(self.tail)] if self.tail else 7 + self.fed % 8
            with torch.no_grad():
                out = self.model(torch.tensor([[token]]), past_key_values=self.cache, position_ids=position)
            if keep:
                logits.append(out.logits[0, -1].tolist())
            self.fed += 1
        seconds = {"ms": time.perf_counter() - start, "cpu_ms": time.process_time() - worked}
        return {name: 1e3 * own / steps for name, own in seconds.items()} | {"logits": logits}

    def behind(self) -> int:
        """The position of the first token behind the context."""
        return self.context

    def peak(self, steps: int) -> dict[str, Any]:
        """The process' peak while decoding, over what it held before there was a cache."""
        peak_reset()
        self.decode(steps, keep=False)
        return {"peak": peak_since(self.base)}

    @staticmethod
    def settle() -> int:
        import ctypes

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return peak_reset()


class Ours(Side):
    def __init__(self, folder: str, dtype: str) -> None:
        super().__init__(folder, dtype, "sdpa")
        self.given: list[tuple[Tensor, Tensor, Any]] = []

    def policy(self, name: str, ratio: float, settings: dict[str, Any]) -> Any:
        import manyheads.shrink as shrink

        given: dict[str, Any] = {"compression_ratio": ratio, "when": "prefill", **settings}
        if "channels" in given:
            return shrink.Full(storage=shrink.ThinK(key_channel_compression_ratio=given["channels"]))
        if "parts" in given:
            ratios = (given["first"], ratio)
            return shrink.Composed(
                *(
                    getattr(shrink, part)(compression_ratio=own, when="prefill", **more)
                    for (part, more), own in zip(given["parts"], ratios, strict=True)
                )
            )
        name = given.pop("of", name)
        if "allocation" in given:
            allocation, own = given["allocation"]
            given["allocation"] = getattr(shrink, allocation)(**own)
        if "gates" in given:
            given["gates"] = gates(self.model.config, given["gates"])
        if name == "StreamingLLM":
            given["positions"] = "text"
        if "base" in settings:
            base, own = settings["base"]
            given["base"] = getattr(shrink, base)(**own)
        if "filters" in settings:
            given["filters"] = directions(self.model.config.to_dict(), settings["filters"])
        if name == "SimLayerKV":
            del given["compression_ratio"]
        return getattr(shrink, name)(**given)

    @torch.no_grad()
    def record(self) -> None:
        from manyheads.hosts.attend import pack
        from manyheads.shrink import Full
        from manyheads.shrink.compress import Pass
        from manyheads.shrink.layer import RaggedLayer

        self.given = []
        attend = RaggedLayer.attend

        def watched(layer: Any, query: Tensor, scoring: Any, seen: Any) -> Tensor:
            group = layer.store.groups[0]
            done = Pass(pack(query, len(group.heads)), scoring, seen)
            self.given.append((group.rows["keys"], group.rows["values"], done))
            return attend(layer, query, scoring, seen)

        RaggedLayer.attend = watched
        try:
            self.model(inputs_embeds=self.embeddings(), past_key_values=Full().make_cache(self.model), logits_to_keep=1)
        finally:
            RaggedLayer.attend = attend

    @torch.no_grad()
    def whole(self, name: str, ratio: float, settings: dict[str, Any]) -> None:
        self.cache = self.policy(name, ratio, settings).make_cache(self.model)
        self.model(**self.prompted(name), past_key_values=self.cache, logits_to_keep=1)

    @torch.no_grad()
    def replay(self, name: str, ratio: float, settings: dict[str, Any]) -> None:
        if name in AGAIN:
            self.whole(name, ratio, settings)
            return
        from manyheads.shrink.compress import shrink

        self.cache = self.policy(name, ratio, settings).make_cache(self.model)
        for layer, (keys, values, done) in zip(self.cache.layers, self.given, strict=True):
            layer.update(keys, values)
            shrink(layer, [done])
            layer.store.own(layer.spare)

    def positions(self, index: int) -> Tensor:
        groups = self.cache.layers[index].store.groups
        rows = {
            head: group.slots().expand(1, len(group.heads), -1)[0, i].long()
            for group in groups
            for i, head in enumerate(group.heads)
        }
        return _side_by_side([rows[head] for head in sorted(rows)])

    def narrow(self) -> dict[str, Any]:
        """Channels that keys were left, by layer and KV head."""
        return {"kept": [layer.store.codec.kept["channels"][0].tolist() for layer in self.cache.layers]}

    @torch.no_grad()
    def scores(self, policy: str, ratio: float, **settings: Any) -> dict[str, Any]:
        """The rule's scores of every token, by layer and KV head, in a file."""
        from safetensors.torch import save_file

        from manyheads.shrink.compress import _views

        own = self.policy(policy, ratio, settings)
        made = {}
        for i, (keys, values, done) in enumerate(self.given):
            cache = own.make_cache(self.model)  # its layers do not keep it
            layer = cache.layers[i]
            layer.update(keys, values)
            view = _views(layer, [done])[0]
            own.observe(view)
            view.targets = own.targets(own.mean_target(layer, view), layer, keys.shape[1])
            made[str(i)] = own.score(view)[0].double().contiguous()
        path = self.folder / "scores.safetensors"
        save_file(made, path)
        return {"path": str(path)}

    def nbytes(self) -> int:
        return int(self.cache.nbytes)

    def about(self) -> dict[str, Any]:
        return {}


class Theirs(Side):
    def __init__(self, folder: str, dtype: str) -> None:
        # First: it wraps the attention functions that a model looks up.
        import kvpress  # noqa: F401

        super().__init__(folder, dtype, "sdpa")
        self.given: list[tuple[Any, dict[str, Any]]] = []
        # The same cache with its keys where they stood, where a press turns them.
        self.plain: Any = None

    def press(self, name: str, ratio: float, settings: dict[str, Any]) -> Any:
        return presses(self.model)[name](ratio, settings)

    def fresh(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    @torch.no_grad()
    def record(self) -> None:
        self.given, self.full = [], self.fresh()

        def watch(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            self.given.append((module, {k: v for k, v in kwargs.items() if k != "past_key_values"}))

        hooks = [layer.self_attn.register_forward_hook(watch, with_kwargs=True) for layer in self.model.model.layers]
        self.model.model(inputs_embeds=self.embeddings(), past_key_values=self.full)
        for hook in hooks:
            hook.remove()

    @torch.no_grad()
    def whole(self, name: str, ratio: float, settings: dict[str, Any]) -> None:
        # As in KVPressTextGenerationPipeline: the context goes through the model without its head, under the press.
        self.cache, self.plain = self.fresh(), None
        for module, _ in self.given:
            module.masked_key_indices = None
        with self.press(name, ratio, settings)(self.model), sketched(self.model.config):
            self.model.model(**self.prompted(name), past_key_values=self.cache)

    @torch.no_grad()
    def replay(self, name: str, ratio: float, settings: dict[str, Any]) -> None:
        for module, _ in self.given:
            module.masked_key_indices = None
        if name in AGAIN:
            self.whole(name, ratio, settings)
            return
        self.plain = None
        if settings.get("positions") == "cache":
            self.replay(name, ratio, {key: own for key, own in settings.items() if key != "positions"})
            self.plain = self.cache
        press, self.cache = self.press(name, ratio, settings), self.fresh()
        with sketched(self.model.config):
            for i, (module, kwargs) in enumerate(self.given):
                self.cache.update(self.full.layers[i].keys, self.full.layers[i].values, i)
                press.forward_hook(module, [], {**kwargs, "past_key_values": self.cache}, [None, None])

    def positions(self, index: int) -> Tensor:
        """What is not masked, where a press masks; else found by the bits of the keys: it tells nobody what it kept."""
        masked = getattr(self.model.model.layers[index].self_attn, "masked_key_indices", None)
        if masked is not None:
            keep = torch.ones(self.cache.layers[index].keys.shape[1:3], dtype=torch.bool)
            keep[masked[1], masked[2]] = False
            return _side_by_side([row.nonzero()[:, 0] for row in keep])
        held = self.plain or self.cache
        full, kept = (_marks(layer.keys[0]) for layer in (self.full.layers[index], held.layers[index]))
        order = full.argsort(-1)
        ranked = full.gather(-1, order)
        assert bool((ranked[:, 1:] != ranked[:, :-1]).all()), "two tokens have the same key"
        at = torch.searchsorted(ranked, kept).clamp_max(full.shape[1] - 1)
        assert torch.equal(ranked.gather(-1, at), kept), "a kept key is none of the prompt's"
        return order.gather(-1, at).sort(-1).values

    def narrow(self) -> dict[str, Any]:
        some = [(layer.keys[0] != 0).any(1) for layer in self.cache.layers]
        return {"kept": [[row.nonzero()[:, 0].tolist() for row in heads] for heads in some]}

    def behind(self) -> int:
        """Turned keys stand at 0, 1, 2, ..., and a query behind them."""
        return self.context if self.plain is None else int(self.plain.layers[0].keys.shape[2])

    @torch.no_grad()
    def channels(self, ratio: float, window_size: int) -> dict[str, Any]:
        """Channels that its ThinK leaves keys, by layer and KV head: the others are zeros."""
        import kvpress

        self.cache = self.fresh()
        with kvpress.ThinKPress(ratio, window_size)(self.model):
            self.model.model(inputs_embeds=self.embeddings(), past_key_values=self.cache)
        some = [(layer.keys[0] != 0).any(1) for layer in self.cache.layers]
        return {"kept": [[row.nonzero()[:, 0].tolist() for row in heads] for heads in some]}

    @torch.no_grad()
    def turned(self, ratio: float, window_size: int) -> dict[str, Any]:
        """What is left of SnapKV's keys after they were turned to 0, 1, 2, ..., as one number for each."""
        import kvpress

        sys.path.append(str(FIXTURE.parent))
        from formula_llama import numbers

        self.cache = self.fresh()
        with kvpress.KeyRerotationPress(kvpress.SnapKVPress(ratio, window_size))(self.model):
            self.model.model(inputs_embeds=self.embeddings(), past_key_values=self.cache)
        along = numbers((self.cache.layers[0].keys.shape[-1],), 5)
        return {"keys": [(layer.keys[0] @ along).tolist() for layer in self.cache.layers]}

    def nbytes(self) -> int:
        rows = [row for layer in self.cache.layers for row in (layer.keys, layer.values)]
        return sum(row.untyped_storage().nbytes() for row in rows)

    def about(self) -> dict[str, Any]:
        import platform
        from importlib.metadata import version

        found = {name: version(name) for name in ("kvpress", "transformers", "torch", "numpy")}
        return {"python": platform.python_version(), **found, "threads": str(torch.get_num_threads())}


def presses(model: Any) -> dict[str, Any]:
    """kvpress' own of the same rule, made of a ratio and our settings."""
    import kvpress
    from kvpress.presses import fastkvzip_press, kvzip_press

    class Filters(kvpress.QFilterPress):
        def post_init_from_model(self, model: Any) -> None:
            """Nothing is fetched."""

    def filters(ratio: float, own: dict[str, Any]) -> Any:
        press = Filters(ratio)
        press.q_filters = directions(model.config.to_dict(), own["filters"]).to(model.dtype)
        return press

    def finch(ratio: float, own: dict[str, Any]) -> Any:
        # The delimiter is looked for among tokens, and embeddings are fed.
        press = kvpress.FinchPress(ratio, rerotate_keys=False)
        press.window_size, press.delimiter_token_id = own["window_size"], -1
        return press

    def kvzip(ratio: float, own: dict[str, Any]) -> Any:
        kvzip_press.AutoTokenizer = Words(own)
        return kvpress.KVzipPress(ratio, chunk_size=own["chunk_size"])

    def fast(ratio: float, own: dict[str, Any]) -> Any:
        press, config = kvpress.FastKVzipPress(ratio), model.config
        press.gates = []
        for i, state in enumerate(gates(config, own["gates"])):
            heads, repeat = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
            gate = fastkvzip_press.FastKVzipGate(i, config.hidden_size, heads, repeat, model.dtype)
            gate.load_state_dict(state)
            press.gates.append(gate.eval())
        return press

    def composed(ratio: float, own: dict[str, Any]) -> Any:
        ratios = (own["first"], 1 - (1 - ratio) / (1 - own["first"]))
        return kvpress.ComposedPress(
            [known[name](part, more) for (name, more), part in zip(own["parts"], ratios, strict=True)]
        )

    def turned(ratio: float, own: dict[str, Any]) -> Any:
        press = known["SnapKV"](ratio, own)
        return kvpress.KeyRerotationPress(press) if own.get("positions") == "cache" else press

    def based(ratio: float, own: dict[str, Any]) -> Any:
        name, settings = own["base"]
        return known[name](ratio, settings)

    known = {
        "SnapKV": lambda ratio, own: kvpress.SnapKVPress(ratio, own["window_size"], own["kernel_size"]),
        "StreamingLLM": lambda ratio, own: kvpress.StreamingLLMPress(ratio, own["sink_size"]),
        "KeyNorm": lambda ratio, own: kvpress.KnormPress(ratio),
        "KeyDiff": lambda ratio, own: kvpress.KeyDiffPress(ratio),
        "LagKV": lambda ratio, own: kvpress.LagKVPress(ratio, own["sink_size"], own["lag_size"], own["cross_scoring"]),
        "ChunkKV": lambda ratio, own: kvpress.ChunkKVPress(based(ratio, own), own["chunk_length"]),
        "Finch": finch,
        "CriticalKV": lambda ratio, own: kvpress.CriticalKVPress(based(ratio, own)),
        "KVzip": kvzip,
        "QFilters": filters,
        "Leverage": lambda ratio, own: kvpress.LeverageScorePress(ratio, own["sketch_dimension"]),
        "CUR": lambda ratio, own: kvpress.CURPress(
            ratio, num_sinks=own["sink_size"], local_window_size=own["local_window"]
        ),
        "Compactor": lambda ratio, own: kvpress.CompactorPress(
            ratio, own["sink_size"], own["recent_size"], own["chunk_size"], own["sketch_dimension"]
        ),
        "NonCausal": lambda ratio, own: kvpress.NonCausalAttnPress(ratio, own["chunk_size"]),
        "TOVA": lambda ratio, own: kvpress.TOVAPress(ratio),
        "ExpectedAttention": lambda ratio, own: kvpress.ExpectedAttentionPress(
            ratio, own["n_future_positions"], own["sink_size"]
        ),
        "AdaKV": lambda ratio, own: kvpress.AdaKVPress(known["SnapKV"](ratio, own)),
        "CriticalAdaKV": lambda ratio, own: kvpress.CriticalAdaKVPress(based(ratio, own)),
        "PyramidKV": lambda ratio, own: kvpress.PyramidKVPress(ratio, own["window_size"], own["kernel_size"]),
        "KeyRerotation": turned,
        "FastKVzip": fast,
        "Composed": composed,
        "ThinK": lambda ratio, own: kvpress.ThinKPress(own["channels"], 32),
        "SimLayerKV": lambda ratio, own: kvpress.SimLayerKVPress(
            own["lazy_threshold"], n_recent=own["recent_size"], n_initial=own.get("sink_size", 4)
        ),
    }
    return known


class Words:
    """In a tokenizer's place: kvpress' requests to repeat, as the tokens that the other side is given."""

    chat_template = None

    def __init__(self, own: dict[str, Any]) -> None:
        self.own = own

    def from_pretrained(self, name: str) -> Words:
        return self

    def encode(self, text: str, **kwargs: Any) -> Tensor:
        known = {"": [], "\n": self.own["suffix"], "\n\nRepeat the previous context exactly.": self.own["request"]}
        return torch.tensor([known.get(text, self.own["again"])], dtype=torch.long)


def directions(config: dict[str, Any], given: Any) -> Tensor:
    """A table [layers, KV heads, head dim]: as given, or made of a number so that both sides can."""
    if not isinstance(given, int):
        return torch.tensor(given)
    shape = config["num_hidden_layers"], config["num_key_value_heads"], config["head_dim"]
    return (torch.arange(math.prod(shape), dtype=torch.float64) * given).sin().view(shape).float()


def gates(config: Any, seed: int) -> list[dict[str, Tensor]]:
    """Gates as Fast KVzip has them, drawn so that both sides can."""
    draw, width, sinks = torch.Generator().manual_seed(seed), 16, 16
    heads = config.num_key_value_heads
    sizes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (config.num_attention_heads * width, config.hidden_size),
        "q_proj.bias": (config.num_attention_heads * width,),
        "k_proj.weight": (heads * width, config.hidden_size),
        "q_norm.weight": (width,),
        "k_norm.weight": (width,),
        "k_base": (heads, 1, sinks, width),
        "b": (heads, 1, config.num_attention_heads // heads),
    }
    return [
        {name: torch.randn(shape, generator=draw) for name, shape in sizes.items()}
        for _ in range(config.num_hidden_layers)
    ]


@contextmanager
def sketched(config: Any) -> Iterator[None]:
    """kvpress draws another sketch at every call; for as long as this lasts it draws ours, layer after layer."""
    drawn, randn = itertools.count(), torch.randn

    def ours(*shape: int, **kwargs: Any) -> Tensor:
        # As manyheads.shrink.outliers.sketches, which that environment has not; the press divides by the root itself.
        _, heads, size, width = shape
        draw = torch.Generator().manual_seed(7919 * (next(drawn) % config.num_hidden_layers))
        return randn(heads, size, width, generator=draw, dtype=torch.float64)[None].to(kwargs["dtype"])

    torch.randn = ours
    try:
        yield
    finally:
        torch.randn = randn


def _side_by_side(rows: list[Tensor]) -> Tensor:
    """Positions [g, m] of each head in order; where a head keeps fewer, -1 stands before them."""
    most = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_full((most - len(row),), -1), row.sort().values]) for row in rows])


def _marks(keys: Tensor) -> Tensor:
    """[g, m] whole numbers that tell keys [g, m, d] apart, whatever order they are added in."""
    bits = keys.contiguous().view(torch.int32).long()
    factors = torch.randint(2**62, (bits.shape[-1],), generator=torch.Generator().manual_seed(3)) | 1
    return (bits * factors).sum(-1)


def work(side: str, folder: str, dtype: str) -> None:
    """Reads one JSON command a line, answers with one line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    own = {"ours": Ours, "kvpress": Theirs}[side](folder, dtype)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(own, command.pop("do"))(**command)), file=answers, flush=True)


class Remote:
    """The other end of `work`."""

    def __init__(self, python: str, side: str, folder: str, dtype: str) -> None:
        command = [python, "-P", str(Path(__file__).resolve()), "--worker", side, folder, dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, **arguments}), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args[0]} ended with code {self.process.wait()}: see its message above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.communicate()


class Both:
    """A folder of weights, and the two sides that read it."""

    def __init__(
        self, python: str, folder: str, settings: dict[str, Any], weights: Any, prompt: Tensor, dtype: str,
        trial: dict[str, Any] | None = None,
    ):  # fmt: skip
        from safetensors.torch import save_file

        self.trial = trial or {}
        (Path(folder) / "tail.json").write_text(json.dumps(self.trial))
        (Path(folder) / "settings.json").write_text(json.dumps(settings))
        save_file({name: own.contiguous() for name, own in weights.items()}, Path(folder) / "weights.safetensors")
        save_file({"prompt": prompt}, Path(folder) / "prompt.safetensors")
        self.ours, self.theirs = (
            Remote(own, side, folder, dtype) for own, side in ((sys.executable, "ours"), (python, "kvpress"))
        )

    def __call__(self, do: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.ours(do, **arguments), self.theirs(do, **arguments)

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


def shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return {name: tuple(own.shape) for name, own in LlamaForCausalLM(LlamaConfig(**settings)).named_parameters()}


def random_weights(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Large enough that attention is far from even."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape) if len(shape) == 1 else 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes(settings).items()
    }


def agreement(both: Both, policy: str, ratio: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Kept tokens as sets. Where they differ: how far apart the scores are that were taken for one another, as a share
    of the head's own range of scores."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(found["path"]) for found in both("kept"))
    found = {"kept": ours["0"].shape[1], "heads": 0, "heads_equal": 0, "tokens_differing": 0, "widest_gap": 0.0}
    scores: dict[str, Tensor] = {}
    for index, (a, b) in ((i, (ours[i], theirs[i])) for i in ours):
        for head in range(a.shape[0]):
            differing = sorted((set(a[head].tolist()) ^ set(b[head].tolist())) - {-1})
            found["heads"] += 1
            found["heads_equal"] += not differing
            found["tokens_differing"] += -(-len(differing) // 2)
            if not differing or policy in AGAIN or "parts" in settings:
                continue
            scores = scores or load_file(both.ours("scores", policy=policy, ratio=ratio, **settings)["path"])
            own = scores[index][head]
            real = own[own.isfinite()]
            gap = (own[differing].max() - own[differing].min()) / (real.max() - real.min())
            found["widest_gap"] = max(found["widest_gap"], float(gap))
    return found


def in_turns(both: Both) -> dict[str, float]:
    """As common.pair, across two processes, each timing itself. ratio: median of ours / theirs. cpu_ratio: the same of
    the processors' time, which a busy machine disturbs less."""
    both("decode", steps=2, keep=False)
    a, b = [], []
    for turn in range(ROUNDS):
        first = [(a, both.ours), (b, both.theirs)]
        for times, side in first if turn % 2 else reversed(first):
            times.append(side("decode", steps=STEPS, keep=False))
    found = {}
    for clock in ("", "cpu_"):
        ours, theirs = ([own[f"{clock}ms"] for own in times] for times in (a, b))
        found[f"ours_{clock}ms"], found[f"theirs_{clock}ms"] = statistics.median(ours), statistics.median(theirs)
        found[f"{clock}ratio"] = statistics.median(x / y for x, y in zip(ours, theirs, strict=True))
    return found


def case(both: Both, policy: str, ratio: float, length: int, whole: bool, timed: bool) -> dict[str, Any]:
    settings = (CASES | KEPT | MORE)[policy]
    row: dict[str, Any] = {
        "what": "decode" if timed else "kept",
        "policy": policy,
        "context": length,
        "compression_ratio": ratio,
    }
    sizes = both("compressed", policy=policy, ratio=ratio, whole=whole, **settings)
    row |= agreement(both, policy, ratio, settings)
    if "channels" in settings:
        a, b = (own["kept"] for own in both("narrow"))
        row["channels_equal"] = sum(x == y for own in zip(a, b, strict=True) for x, y in zip(*own, strict=True))
    row["difference"] = told(policy, row)
    tail = both.trial.get("tail", [])
    a, b = (torch.tensor(found["logits"]) for found in both("decode", steps=max(4, len(tail) - 1)))
    row["logits_apart"] = float((a - b).abs().max() / b.abs().max())
    if tail:
        row |= answers(both.trial, a, b)
    if not timed:
        return row
    row |= in_turns(both) | {"target": 1 / 3}
    for name in sizes[0]:
        row |= {f"{side}_{name}": found[name] for side, found in zip(("ours", "theirs"), sizes, strict=True)}
    for side, found in zip(("ours", "theirs"), both("peak", steps=16), strict=True):
        row[f"{side}_decode_peak"] = found["peak"]
    return row


def told(policy: str, row: dict[str, Any]) -> str:
    """What a row's difference is from, in words."""
    if policy in WHY and (row["tokens_differing"] or policy == "ThinK"):
        return WHY[policy]
    if not row["tokens_differing"]:
        return "none"
    return "rounding" if 0 < row["widest_gap"] < ROUNDING else "unexplained"


def answers(trial: dict[str, Any], ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Of logits [n, vocabulary] after each token of a question with its answer: whether the answer is right, token by
    token, and how far the two sides' expectations are apart."""
    start, stop = trial["answer"]
    wanted = torch.tensor(trial["tail"][start:stop])
    a, b = (own.log_softmax(-1) for own in (ours, theirs))
    return {
        "kl_bits": float((b.exp() * (b - a)).sum(-1).mean().clamp_min(0)) / math.log(2),
        **{
            f"{side}_answers": bool((own[start - 1 : stop - 1].argmax(-1) == wanted).all())
            for side, own in (("ours", ours), ("theirs", theirs))
        },
    }


def real_rows(both: Both, length: int, timed: bool) -> Iterator[dict[str, Any]]:
    for policy in CASES if timed else CASES | KEPT | MORE:
        if policy == "ThinK":  # it keeps every token, and its keys are no longer the prompt's
            continue
        for ratio in RATIOS:
            yield case(both, policy, ratio, length, False, timed)


def compare_real(python: str, name: str, lengths: list[int], dtype: str, timed: bool) -> None:
    """The same on a real model: a key told in the middle of real text of so many tokens, and asked for."""
    from manyheads.hosts.loading import load_model
    from manyheads.hosts.questions import Questions

    loaded = load_model(name)
    config = loaded.model.config.to_dict()
    settings = {key: config[key] for key in (*SETTINGS, "rms_norm_eps", "rope_parameters", "tie_word_embeddings")}
    weights = {key: own.clone() for key, own in loaded.model.state_dict().items()}
    alone = [{"what": "not compared", "policy": own, "why": why} for own, why in ALONE.items()]
    rows: list[dict[str, Any]] = []
    for length in lengths:
        asked = Questions(loaded)
        # Chunks and windows divide the text.
        trial = asked.passkey(length + len(asked.passkey(length, 0.5, 0).tail), 0.5, 0)
        assert len(trial.prefix) == length
        told = {"tail": trial.tail, "answer": trial.answers[0], "prefix": trial.prefix}
        with torch.no_grad():
            prompt = loaded.model.get_input_embeddings()(torch.tensor([trial.prefix]))
        with tempfile.TemporaryDirectory() as folder:
            both = Both(python, folder, settings, weights, prompt, dtype, told)
            if not rows:
                rows.append({"what": "kvpress' environment", "model": name, **both.theirs("about")})
            both("prompt", length=len(trial.prefix))
            for row in real_rows(both, length, timed):
                rows.append(row)
                print(json.dumps(row), flush=True)
                save("kvpress-real" if timed else "kvpress-real-kept", "cpu", rows + ([] if timed else alone))
            both.close()


def compare(python: str, lengths: list[int], dtype: str, timed: bool) -> None:
    rows = []
    prompt = torch.randn(1, max(lengths), SETTINGS["hidden_size"], generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        both = Both(python, folder, SETTINGS, random_weights(SETTINGS), prompt, dtype)
        rows.append({"what": "kvpress' environment", **both.theirs("about")})
        for length in lengths:
            both("prompt", length=length)
            for policy in CASES if timed else CASES | KEPT:
                for ratio in RATIOS:
                    rows.append(case(both, policy, ratio, length, timed and length <= WHOLE, timed))
                    print(json.dumps(rows[-1]), flush=True)
        both.close()
    save("kvpress" if timed else "kvpress-kept", "cpu", rows)


def fixture(python: str) -> None:
    """Kept positions of kvpress on the tiny model of tests/shrink/formula_llama.py."""
    sys.path.append(str(FIXTURE.parent))
    from formula_llama import PROMPT, SETTINGS, prompt, weights

    cases = []
    with tempfile.TemporaryDirectory() as folder:
        both = Both(python, folder, SETTINGS, weights(shapes(SETTINGS)), prompt(), "float64")
        both("prompt", length=PROMPT)
        for policy, settings in STORED:
            if "filters" in settings:
                settings = {"filters": directions(SETTINGS, settings["filters"]).tolist()}
            for ratio in RATIOS:
                both("compressed", policy=policy, ratio=ratio, whole=True, **settings)
                print(policy, settings, ratio, agreement(both, policy, ratio, settings))
                cases.append({"policy": policy, "settings": settings, "compression_ratio": ratio, "kept": _lists(both)})
        about = both.theirs("about")
        store_keys(both, about)
        both.close()
    text = json.dumps({"made_by": "benchmarks/kvpress.py --fixture", **about, "cases": cases})
    FIXTURE.write_text(text.replace('{"policy"', '\n{"policy"') + "\n")


def store_keys(both: Both, about: dict[str, Any]) -> None:
    """What its ThinK leaves of keys, and where its turned keys stand."""
    ratios = [{"ratio": ratio, "window_size": size} for ratio in (0.25, 0.5) for size in (8, 32)]
    narrow = [own | both.theirs("channels", **own) for own in ratios]
    ratios = [{"ratio": ratio, "window_size": 8} for ratio in RATIOS]
    turned = [own | both.theirs("turned", **own) for own in ratios]
    for name, found in (("kvpress_channels.json", narrow), ("kvpress_turned.json", turned)):
        told = {"made_by": "benchmarks/kvpress.py --fixture", **about, "cases": found}
        FIXTURE.with_name(name).write_text(json.dumps(told) + "\n")


def _lists(both: Both) -> list[list[list[int]]]:
    from safetensors.torch import load_file

    found = load_file(both.theirs("kept")["path"])
    return [[[at for at in row if at >= 0] for row in found[str(i)].tolist()] for i in range(len(found))]


def make_environment(folder: str) -> None:
    """The version of torch that is here, from where pip found it (any other brings gigabytes), then kvpress."""
    torch_pin = f"torch=={torch.__version__.partition('+')[0]}"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "install", torch_pin]
    subprocess.run(pip, check=True)
    subprocess.run([*pip, f"kvpress=={KVPRESS}"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-env", metavar="DIR")
    parser.add_argument("--kvpress-python", metavar="PATH")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--model", metavar="MODEL", help="a real model, as `manyheads shrink` takes one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--kept-only", action="store_true")
    parser.add_argument("--fixture", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(*given.worker)
    elif given.make_env:
        make_environment(given.make_env)
    elif not given.kvpress_python:
        parser.error("give --kvpress-python DIR/bin/python, the environment that --make-env DIR makes")
    elif given.fixture:
        fixture(given.kvpress_python)
    elif given.model:
        lengths = given.lengths or ([1024] if given.kept_only else [512, 2048, 7900])
        compare_real(given.kvpress_python, given.model, lengths, given.dtype, not given.kept_only)
    else:
        compare(given.kvpress_python, given.lengths or [4096, 16384], given.dtype, not given.kept_only)


if __name__ == "__main__":
    main()
