"""A model's modules with configs of their own for a while: several models may share one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


class LentConfigs:
    """Copies in the place of a model's configs, until `give_back`. What is changed in them meanwhile is the user's:
    a vocabulary that grew, another pad token."""

    def __init__(self, model: nn.Module, wanted: Callable[[nn.Module], bool] = lambda module: True) -> None:
        self._kept: list[tuple[nn.Module, Any]] = []
        memo: dict[int, Any] = {}
        for module in model.modules():
            config = module.__dict__.get("config")
            if config is not None and wanted(module):
                self._kept.append((module, config))
                module.config = copy.deepcopy(config, memo)
        self._lent = {id(config): (config, module.config) for module, config in self._kept}
        self._before: dict[int, Any] = {}

    def note(self) -> None:
        """What stands in the copies from here on is nobody's change."""
        self._before = {key: copy.deepcopy(own) for key, (_, own) in self._lent.items()}

    def give_back(self) -> None:
        for module, config in self._kept:
            module.config = config
        for key, (config, own) in self._lent.items():
            if key in self._before:
                _carry(self._before[key], own, config)


def _carry(before: Any, after: Any, config: Any) -> None:
    """Writes what is no longer as before into the config that was copied, and into those within it."""
    for name, value in vars(after).items():
        was = vars(before).get(name)
        if type(value) is type(was) and hasattr(value, "model_type") and name in vars(config):
            _carry(was, value, vars(config)[name])
        elif name not in vars(before) or value != was:
            setattr(config, name, value)
