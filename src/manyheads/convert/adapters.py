"""Low-rank adapters on the projections of attention, by PEFT: trained for a while, then part of the weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

INSTALL = "pip install 'manyheads[lora]'"
RANK, SCALE = 8, 16


def projections(model: Any) -> list[str]:
    """Names of the Linear layers inside the model's attention. ValueError where there are none."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "self_attn" in name.split(".")
    ]
    if not found:
        raise ValueError(f"--healing lora: {type(model).__name__} has no Linear layers in a self_attn: heal it in full")
    return found


def check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"--healing lora needs peft: {INSTALL}, or take --healing full")


@contextmanager
def adapted(model: Any, seed: int) -> Iterator[Any]:
    """The model with adapters W + scale / rank B A on the projections of its attention, only they trained; B = 0 at
    first, so that nothing changes. At the end they are added to the weights and gone; after an exception they are gone
    and the weights are as before. Rank 8 and scale 16: LoLCATs' healing, arXiv:2410.10254.
    """
    check_peft()
    from peft import LoraConfig, LoraModel

    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    config = LoraConfig(r=RANK, lora_alpha=SCALE, lora_dropout=0.0, bias="none", target_modules=projections(model))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        held = LoraModel(model, {"default": config}, "default")
    try:
        yield model
    except BaseException:
        held.unload()
        raise
    else:
        held.merge_and_unload()
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        vars(model).pop("peft_config", None)


def check_reached(model: Any) -> None:
    """ValueError for an adapter without a gradient: some mechanisms read a projection's weight and never call it."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.grad is None:
            where = name.split(".lora_B")[0]
            raise ValueError(f"--healing lora does not reach {where}, which is read without being called: heal in full")
