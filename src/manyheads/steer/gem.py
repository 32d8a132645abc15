"""GEM: a CLIP-shaped model that says where in the picture a text is, by tokens that attend to tokens like them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.calls import AttentionCall, opened
from manyheads.hosts.sites import choose
from manyheads.hosts.taps import tap
from manyheads.steer.method import Prompt, steering


@contextmanager
def gem(model: Any, *, depth: int = 7, iterations: int = 1, temperature: float | None = None) -> Iterator[None]:
    """Claim: CLIP's patches know what they show, but its last blocks mix them by queries and keys that were trained for
    the class token; mixed by likeness they can be named.

    In the vision tower's last depth - 1 blocks, x = ln1 of the block's input, for s in {q, k, v} per head, `iterations`
    times: s <- softmax(t s s^T) s with s <- s / |s|; then o_s = softmax(t s s^T) v with s <- s / |s| again. t =
    mean over tokens of |x|_2 / sqrt(head dim), one number per picture, or `temperature`. A second stream starts at the
    first of these blocks and adds Wo (o_q + o_k + o_v) / 3 in each, no MLP; it takes the place of the tower's
    last_hidden_state, while the ordinary stream runs on and gives the pooled output. depth 1: no block, nothing
    changes. No matrix outlives its block.
    Source: arXiv 2312.00878, WalBouss/GEM `gem_utils.py` (depth 7 of 12 or 24 blocks).
    """
    where = choose(model, None, "vision", "self")
    if not 1 <= depth <= len(where) + 1:
        raise ValueError(f"gem: depth {depth}; the vision tower has {len(where)} blocks: want 1 to {len(where) + 1}")
    if iterations < 0 or (temperature is not None and not temperature >= 0):
        raise ValueError(f"gem: want iterations and temperature of at least 0; got {iterations}, {temperature}")
    if depth == 1:
        yield
        return
    used = where[len(where) - depth + 1 :]
    tower = _tower(model, used[0].path)
    stream: dict[str, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def block_before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream["x"] = args[0] if args else kwargs["hidden_states"]

    def attention_before(layer: int) -> Any:
        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = args[0] if args else kwargs["hidden_states"]

        return before

    def reader(call: Any) -> None:
        own = opened(call, "gem")
        added = _self_self(own, inputs.pop(own.layer), iterations, temperature)
        output = added.transpose(1, 2).flatten(2)
        stream["x"] = stream["x"] + _projection(own.site.module)(output)

    def after(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = stream.pop("x")
        return output

    with ExitStack() as open_:
        block = model.get_submodule(used[0].path.rpartition(".")[0])
        hooks = [block.register_forward_pre_hook(block_before, with_kwargs=True)]
        hooks += [s.module.register_forward_pre_hook(attention_before(s.layer), with_kwargs=True) for s in used]
        hooks.append(tower.register_forward_hook(after, with_kwargs=True))
        for hook in hooks:
            open_.callback(hook.remove)
        open_.enter_context(tap(model, reader, layers=[s.layer for s in used], stack="vision", kind="self"))
        yield


def _self_self(call: AttentionCall, x: Tensor, iterations: int, temperature: float | None) -> Tensor:
    """[b, h, n, e]: (o_q + o_k + o_v) / 3."""
    if call.key.shape[1] != call.heads or call.mask is not None:
        raise ValueError(f"{call.site.path}: gem wants as many keys' heads as queries', and no mask")
    t: Tensor | float
    if temperature is None:
        t = (x.norm(dim=-1).mean(-1) * call.query.shape[-1] ** -0.5)[:, None, None, None]
    else:
        t = temperature
    out = torch.zeros_like(call.value)
    for own in (call.query, call.key, call.value):
        s = own
        for _ in range(iterations):
            s = nn.functional.normalize(s, dim=-1)
            s = (t * s @ s.transpose(2, 3)).softmax(-1) @ s
        s = nn.functional.normalize(s, dim=-1)
        out = out + (t * s @ s.transpose(2, 3)).softmax(-1) @ call.value
    return out / 3


def _tower(model: Any, path: str) -> Any:
    """The part above the blocks that gives last_hidden_state and has the norm and the class token."""
    parts = path.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if hasattr(module, "post_layernorm") and hasattr(module, "embeddings"):
            return module
    raise ValueError(f"{type(model).__name__} has no CLIP-shaped vision tower (embeddings, blocks, post_layernorm)")


def _projection(attention: Any) -> Any:
    if not hasattr(attention, "out_proj"):
        raise ValueError(f"{type(attention).__name__} has no out_proj: gem knows CLIP-shaped attention")
    return attention.out_proj


@torch.no_grad()
def word_maps(model: Any, inputs: Mapping[str, Any], **options: Any) -> Tensor:
    """[pictures, texts, rows, columns] in [0, 1]: cosine of each patch's GEM feature with each text of inputs
    (pixel_values, input_ids, attention_mask, as the processor makes them), scaled to [0, 1] over the picture; 0 where
    it is the same everywhere. options: as of `gem`."""
    pixels = inputs.get("pixel_values")
    if pixels is None or inputs.get("input_ids") is None:
        raise ValueError("word_maps: give pixel_values and input_ids")
    patch = model.config.vision_config.patch_size
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    with gem(model, **options):
        states = model.vision_model(pixel_values=pixels).last_hidden_state
    patches = model.visual_projection(model.vision_model.post_layernorm(states))[:, 1:]
    if patches.shape[1] != rows * columns:
        raise ValueError(f"word_maps: {patches.shape[1]} tokens behind the class token, not {rows} x {columns} patches")
    text = {key: own for key, own in inputs.items() if key in ("input_ids", "attention_mask")}
    words = model.text_projection(model.text_model(**text).pooler_output)
    likeness = nn.functional.normalize(patches, dim=-1) @ nn.functional.normalize(words, dim=-1).T
    maps = likeness.transpose(1, 2)
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    scaled = torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-12), 0.0)
    return scaled.unflatten(-1, (rows, columns))


@steering(
    "gem",
    title="patches that attend to patches like them, so that texts find their place",
    source="arXiv 2312.00878",
    kinds=("dual-encoder",),
    neutral={"depth": 1},
    strength="depth",
    reach=(1, 8),
    towers=("image",),
)
def _open(model: Any, prompt: Prompt, *, depth: int = 7, iterations: int = 1) -> AbstractContextManager[None]:
    return gem(model, depth=depth, iterations=iterations)
