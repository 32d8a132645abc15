"""Names of other packages: an error that says the name here."""

from __future__ import annotations

import inspect
from typing import Any

# Arguments as kvpress, KVCache-Factory, streaming-llm and H2O have them.
_ARGUMENTS = {
    "n_sink": "sink_size",
    "sink_tokens": "sink_size",
    "start_size": "sink_size",
    "n_local": "recent_size",
    "n_recent": "recent_size",
    "hh_size": "budget_tokens",
    "max_capacity_prompt": "budget_tokens",
    "max_capacity_prompts": "budget_tokens",
    "target_size": "budget_tokens",
    "token_budget": "budget_tokens",
    "head_compression_ratio": "compression_ratio",
    "compression_ratios": "compression_ratio, a list with one number for each layer",
    "alpha_safeguard": "floor",
    "floor_alpha": "floor",
    "compression_interval": "interval",
    "n_future": "n_future_positions",
}
_TO_ALLOCATE = "{name} shares out a budget by a policy's scores: write {policy}(..., allocation={name}())"
_PRESSES = {
    "KnormPress": "KeyNorm(...)",
    "ObservedAttentionPress": "H2O(...)",
    "DuoAttentionPress": "Duo(...), with gates from a profile",
    "AdaKVPress": "SnapKV(..., allocation=AdaKV()), or any policy that scores in SnapKV's place",
    "PyramidKVPress": "SnapKV(..., allocation=PyramidKV())",
    "PerLayerCompressionPress": "compression_ratio=[...] of a policy, one number for each layer",
    "DecodingPress": "when='decode', budget_tokens=... and interval=... of a policy",
    "PrefillDecodingPress": "Composed(SnapKV(...), TOVA(..., when='decode'))",
    "KeyRerotationPress": "positions='cache' of a policy",
    "ThinKPress": "storage=ThinK(...) of any policy, such as Full(storage=ThinK())",
    "ComposedPress": "Composed(first, second)",
}


class Hinted:
    """Arguments are given by name; a name that is not there is told from those that are."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise ValueError(_of_places(cls, args))
        known = {k: own for k, own in inspect.signature(cls).parameters.items() if k not in ("args", "kwargs")}
        for name, value in kwargs.items():
            if name not in known:
                raise ValueError(_of_name(cls, name, list(known)))
            _check_kind(f"{cls.__name__}: {name}={value!r}", value, known[name].default)
        return super().__new__(cls)


def _check_kind(told: str, value: Any, default: Any) -> None:
    """Settings often come out of a file or a form, where numbers are text and "no" would count as yes."""
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ValueError(f"{told} is neither True nor False")
    for own in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(own, str) and _is_number(own):
            raise ValueError(f"{told}: {own!r} is text; give the number {own.strip()} without quotes")
        if isinstance(own, float) and own != own:
            raise ValueError(f"{told} is no number")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _of_places(cls: type, args: tuple[Any, ...]) -> str:
    name, first = cls.__name__, args[0]
    if isinstance(first, Hinted):
        inner = type(first).__name__
        if hasattr(cls, "of_heads"):
            return f"{name}({inner}(...)): " + _TO_ALLOCATE.format(name=name, policy=inner)
        return f"{name}({inner}(...)): a policy is not put around another; Composed({inner}(...), {name}(...)) has both"
    if hasattr(cls, "of_heads"):
        return f"{name}({first!r}): arguments are given by name: {', '.join(inspect.signature(cls).parameters)}"
    ratio = isinstance(first, float) and 0 <= first < 1
    way = f"compression_ratio={first!r}" if ratio else f"budget_tokens={first!r}"
    return f"{name}({first!r}): arguments are given by name, such as {name}({way})"


def _of_name(cls: type, name: str, known: list[str]) -> str:
    here = _ARGUMENTS.get(name, "")
    if here.split(",")[0] in known:
        return f"{cls.__name__}: {name!r} is {here} here"
    if name in ("press", "base_press"):
        return (
            f"{cls.__name__}: no policy is put around another; allocation=AdaKV() is given to a policy, and "
            "Composed(...) has several"
        )
    return f"{cls.__name__} has no argument {name!r}; it has {', '.join(known)}"


def of_press(name: str, exported: list[str]) -> str | None:
    """What a class of kvpress is called here."""
    if name in _PRESSES:
        return f"{name} is {_PRESSES[name]} here"
    plain = name.removesuffix("Press")
    return f"{name} is {plain} here" if plain != name and plain in exported else None
