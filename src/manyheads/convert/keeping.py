"""Where a stopped training goes on from: one file of weights, moments and buffers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyheads.convert.ranks import is_first
from manyheads.runs.files import write_atomically

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Keeping:
    """path: of the file. of: what the training is, as JSON; a file of another training is not gone on from."""

    path: Path
    of: str

    def save(self, model: Any, state: Mapping[Any, Any], step: int) -> None:
        """state: of the optimizer, empty where no step follows."""
        from safetensors.torch import save

        if not is_first():
            return
        tensors = {f"buffer.{name}": buffer.contiguous() for name, buffer in model.named_buffers()}
        for name, parameter in _trained(model):
            tensors[f"model.{name}"] = parameter.detach().contiguous()
            held = state.get(parameter, {})
            for kind in _MOMENTS if held else ():
                tensors[f"{kind}.{name}"] = held[kind].contiguous()
        # Two layers may share a buffer, which the format does not take.
        tensors = {name: tensor.clone() if name.startswith("buffer.") else tensor for name, tensor in tensors.items()}
        # One file holds all of it: a kill between two files would mix two moments.
        write_atomically(self.path, save(tensors, {"step": str(step), "of": self.of}))

    def load(self, model: Any, optimizer: Any) -> int:
        """The steps that are done, 0 where there is nothing to go on from."""
        if not self.path.is_file():
            return 0
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file, torch.no_grad():
                facts = file.metadata() or {}
                if facts.get("of") != self.of:
                    return 0
                step, names = int(facts["step"]), set(file.keys())
                for name, buffer in model.named_buffers():
                    buffer.copy_(file.get_tensor(f"buffer.{name}"))
                for name, parameter in _trained(model):
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                    if f"{_MOMENTS[0]}.{name}" in names:
                        moments = {k: file.get_tensor(f"{k}.{name}").to(parameter.device) for k in _MOMENTS}
                        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        except (SafetensorError, OSError):  # half a file that something else has left
            return 0
        return step


def _trained(model: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def facts(model: Any, teacher: Any, text: str, plan: dict[str, Any]) -> str:
    """What a training is of: models (a window, say, is in no weight), where the weights start, who teaches, what is
    read, and the plan."""
    from manyheads.hosts.fingerprint import fingerprint

    given = [each for each in (model, teacher) if each is not None]
    weights = [fingerprint(each, "").weights for each in given]
    shapes = json.dumps([each.config.to_dict() for each in given], sort_keys=True, default=str)
    return json.dumps([*weights, *(hashlib.sha256(told.encode()).hexdigest() for told in (shapes, text)), plan])


def kept_file(keep: Path) -> Path:
    return keep.with_name(keep.name + ".safetensors")


def forget(keep: Path) -> None:
    if is_first():
        kept_file(keep).unlink(missing_ok=True)
