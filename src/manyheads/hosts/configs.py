"""Modules with configs of their own for a while: several models may share one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn


class LentConfigs:
    """Copies in the place of modules' configs, until `give_back`. What is changed in them meanwhile is the user's: a
    vocabulary that grew, another pad token."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept: dict[nn.Module, Any] = {
            module: config for module in modules if (config := module.__dict__.get("config")) is not None
        }
        memo: dict[int, Any] = {}
        for module, config in self._kept.items():
            module.config = copy.deepcopy(config, memo)
        self._out = Counter(map(id, self._kept.values()))
        self._before: dict[int, Any] = {}

    def note(self) -> None:
        """What stands in the copies from here on is nobody's change."""
        lent: dict[int, Any] = {id(config): module.config for module, config in self._kept.items()}
        self._before = {key: copy.deepcopy(own) for key, own in lent.items()}

    def give_back(self, *modules: nn.Module) -> None:
        """To these, or to all; once nobody has a copy of a config any more, what was changed in it is carried over."""
        for module in modules or tuple(self._kept):
            config, own = self._kept.pop(module), module.config
            module.config = config
            self._out[id(config)] -= 1
            if not self._out[id(config)] and id(config) in self._before:
                _carry(self._before[id(config)], own, config)


def _carry(before: Any, after: Any, config: Any) -> None:
    """Writes what is no longer as before into the config that was copied, and into those within it. Names with an
    underscore in front are no settings of a user's."""
    for name, value in vars(after).items():
        if name.startswith("_"):
            continue
        was = vars(before).get(name)
        if type(value) is type(was) and hasattr(value, "model_type") and name in vars(config):
            _carry(was, value, vars(config)[name])
        elif name not in vars(before) or value != was:
            setattr(config, name, value)
