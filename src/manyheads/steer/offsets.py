"""Head steering: a vector is added to the output of chosen heads; LoFiT learns the vectors in seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.hosts.positions import placed
from manyheads.hosts.sites import only_stack, text_stack
from manyheads.hosts.taps import AttentionCall
from manyheads.steer.common import Heads, changed, parse_heads, some_heads
from manyheads.steer.method import Prompt, steering

Offsets = Mapping[tuple[int, int], Tensor]
# A vector per head of a large model is some 4 MB.
_MOST_OFFSETS = 256_000_000


@contextmanager
def steer(model: nn.Module, offsets: Offsets, scale: float = 1.0, *, stack: str | None = None) -> Iterator[None]:
    """o_h' = o_h + scale v_h for every (layer, head) in offsets, v_h [head dim], at every token; scale 0: no change.
    stack: whose heads, where the model has several.

    Source: the offsets of LoFiT, arXiv 2406.01563, fc2869/lo-fit; head steering in arXiv 2306.03341 (ITI) and others
    differs in where the vectors come from.
    """

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        if scale == 0:
            return None
        chosen = call.check_heads(own)
        vectors = torch.stack([offsets[call.layer, head] for head in chosen]).to(call.output)
        if vectors.shape[-1] != call.output.shape[-1]:
            raise ValueError(
                f"{call.site.path}: offsets have {vectors.shape[-1]} features, head outputs {call.output.shape[-1]}"
            )
        return call.replaced(call.output[:, chosen] + scale * vectors[None, :, None], chosen)

    if not offsets:
        raise ValueError("steer: offsets is empty; give {(layer, head): vector}, from fit_offsets for instance")
    with changed(model, list(offsets), change, stack):
        yield


@contextmanager
def scaled(
    model: nn.Module, factors: Mapping[tuple[int, int], Tensor | float], *, stack: str | None = None
) -> Iterator[None]:
    """o_h' = f_h o_h for every (layer, head) in factors: 1 changes nothing, 0 silences. Factors may carry gradients.
    stack: whose heads, where the model has several."""

    def change(call: AttentionCall, own: list[int] | None) -> Tensor | None:
        chosen = call.check_heads(own)
        each = [torch.as_tensor(factors[call.layer, head]).to(call.output) for head in chosen]
        if all(not factor.requires_grad and float(factor) == 1 for factor in each):
            return None
        return call.replaced(call.output[:, chosen] * torch.stack(each)[None, :, None, None], chosen)

    with changed(model, list(factors), change, stack):
        yield


def fit_offsets(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    heads: Heads,
    *,
    steps: int = 100,
    lr: float = 0.01,
    attention_mask: Tensor | None = None,
    stack: str | None = None,
) -> dict[tuple[int, int], Tensor]:
    """LoFiT's second step: offsets of the given heads that minimise the language-model loss on labels [b, n] (-100 is
    not counted), the model frozen. AdamW. Returns {(layer, head): [head dim]}; `pick_heads` is the first step.
    stack: whose heads, where the model has several."""
    device, where = input_ids.device, only_stack(model, stack)
    fed = placed(model, {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    width = _head_width(model, input_ids[:1, :1], where)
    vectors = {(int(layer), int(head)): torch.zeros(width, device=device, requires_grad=True) for layer, head in heads}
    frozen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(vectors.values(), lr=lr, weight_decay=0.0)
    with ExitStack() as left:
        for parameter in frozen:
            left.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for _ in range(steps):
            optimizer.zero_grad()
            with steer(model, vectors, stack=where):
                loss = model(**fed, use_cache=False).loss
            torch.autograd.backward(loss)
            optimizer.step()
    return {place: vector.detach() for place, vector in vectors.items()}


def pick_heads(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    count: int,
    *,
    steps: int = 30,
    lr: float = 0.01,
    penalty: float = 1e-3,
    attention_mask: Tensor | None = None,
    stack: str | None = None,
) -> list[tuple[int, int]]:
    """LoFiT's first step: a learned scale per head, o' = (1 + a_h) o_h, with an L1 penalty on a; the heads of greatest
    |a_h|. The paper scales every feature of a head and takes the vector's norm; here one number stands for the head.
    stack: whose heads; those of the stack that reads text."""
    from manyheads.hosts.taps import record

    where = text_stack(model, stack)
    with torch.no_grad(), record(model, stack=where, kind="self") as calls:
        model(input_ids[:1, :1], use_cache=False)
    places = [(call.layer, head) for call in calls for head in range(call.heads)]
    if not 1 <= count <= len(places):
        raise ValueError(f"pick_heads: count={count}; the model has {len(places)} heads")
    fed = placed(model, {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
    amounts = torch.zeros(len(places), device=input_ids.device, requires_grad=True)
    optimizer = torch.optim.AdamW([amounts], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        with scaled(model, {place: 1 + amounts[i] for i, place in enumerate(places)}, stack=where):
            loss = model(**fed, use_cache=False).loss
        (grad,) = torch.autograd.grad(loss + penalty * amounts.abs().sum(), [amounts])
        amounts.grad = grad
        optimizer.step()
    order = amounts.detach().abs().argsort(descending=True)[:count]
    return [places[i] for i in order.tolist()]


@torch.no_grad()
def _head_width(model: Any, token: Tensor, stack: str) -> int:
    from manyheads.hosts.taps import record

    with record(model, stack=stack, kind="self", layers=[0]) as calls:
        model(token, use_cache=False)
    return int(calls[0].output.shape[-1])


def save_offsets(offsets: Offsets, path: str | Path) -> Path:
    """A safetensors file with one vector per head, named LAYER.HEAD."""
    from safetensors.torch import save

    from manyheads.runs.files import write_atomically

    if not offsets:
        raise ValueError("save_offsets: offsets is empty; give {(layer, head): vector}")
    tensors = {f"{layer}.{head}": vector.detach().cpu().contiguous() for (layer, head), vector in offsets.items()}
    return write_atomically(Path(path), save(tensors))


def load_offsets(path: str | Path) -> dict[tuple[int, int], Tensor]:
    """What `save_offsets` wrote. ValueError where the file is something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from manyheads.runs.given import read_bytes

    try:
        tensors = load(read_bytes(path, most=_MOST_OFFSETS))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a file of save_offsets") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}): give a file of save_offsets") from None
    found = {}
    for name, vector in tensors.items():
        pairs = parse_heads(name)
        if pairs is None or len(pairs) != 1 or vector.dim() != 1 or not bool(vector.isfinite().all()):
            raise ValueError(f"{path}: {name!r} {list(vector.shape)} is no finite vector of a head named LAYER.HEAD")
        found[pairs[0]] = vector
    if not found:
        raise ValueError(f"{path} has no vectors: give a file of save_offsets")
    return found


@steering(
    "steer",
    title="a vector added to the output of chosen heads",
    source="arXiv 2406.01563, 2306.03341",
    kinds=("language", "vision-language"),
    neutral={"scale": 0.0},
    strength="scale",
    reach=(0.0, 4.0),
)
def _open_steer(model: nn.Module, prompt: Prompt, *, file: str, scale: float = 1.0) -> AbstractContextManager[None]:
    """file: what save_offsets wrote."""
    return steer(model, load_offsets(file), scale, stack=text_stack(model))


@steering(
    "scaled",
    title="the output of chosen heads scaled, or silenced",
    source="arXiv 2406.01563 (the first step of LoFiT)",
    kinds=("language", "vision-language"),
    neutral={"factor": 1.0},
    strength="factor",
    reach=(-2.0, 5.0),
)
def _open_scaled(model: nn.Module, prompt: Prompt, *, heads: str, factor: float = 0.0) -> AbstractContextManager[None]:
    return scaled(model, dict.fromkeys(some_heads(heads, "scaled"), factor), stack=text_stack(model))
