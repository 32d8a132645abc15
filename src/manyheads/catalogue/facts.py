"""What a card says and what can be read off the class, as data for commands and pages."""

from __future__ import annotations

import inspect
from typing import Any

from manyheads.mechanism import Mechanism
from manyheads.registry import mechanism_class
from manyheads.softmax import changed_stages


def description(name: str) -> dict[str, Any]:
    """The card of one mechanism, the stages it changes, its docstring, arguments and an example."""
    cls = mechanism_class(name)
    card = cls.card
    return {
        "name": card.name,
        "title": card.title,
        "reference": card.reference,
        "family": str(card.family),
        "patterns": sorted(card.patterns),
        "time": card.time,
        "state": card.state,
        "decodes": card.decodes,
        "takes": dict(card.takes),
        "resizes": card.resizes,
        "parallel": card.parallel or "",
        "stages": changed_stages(cls),
        "notes": card.notes,
        "description": inspect.getdoc(cls) or "",
        "arguments": arguments(cls),
        "example": example_code(cls),
    }


def arguments(cls: type[Mechanism]) -> dict[str, str]:
    """The constructor's arguments and their defaults, as Python writes them."""
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: "required" if p.default is p.empty else repr(p.default) for p in parameters}


def _example_x(module: Mechanism, pattern: str) -> str:
    if pattern == "maps":
        sizes = module.map_sizes(8, 8)
        widths = module.map_dims or (module.dim,) * len(sizes)
        parts = (f"torch.randn(2, {h}, {w}, {wide})" for (h, w), wide in zip(sizes, widths, strict=True))
        return f"({', '.join(parts)},)"
    sides = {"grid": "6, 8", "grid-cross": "6, 8", "volume": "4, 6, 8"}.get(pattern, "16")
    return f"torch.randn({1 if module.card.takes else 2}, {sides}, {module.dim})"


def example_code(cls: type[Mechanism]) -> str:
    """A few lines that build the mechanism and call it, by the first pattern that its card declares."""
    pattern = min(cls.card.patterns, key=lambda p: (p != "causal-self", p.cross, p))
    arguments = {"dim": 64, "heads": 4, **cls.card.example}
    dim, heads = arguments.pop("dim"), arguments.pop("heads")
    more = "".join(f", {key}={value!r}" for key, value in {**arguments, "causal": pattern.causal}.items())
    module = cls(dim, heads, **arguments, causal=pattern.causal)
    lines = [
        "import torch",
        "from manyheads import create_attention",
        "",
        f"attention = create_attention({cls.card.name!r}, {dim}, {heads}{more})",
        f"x = {_example_x(module, pattern)}",
    ]
    call = "x"
    if pattern.cross:
        size = "1, 16" if module.card.takes else "2, 12"
        sources, one = module.sources, f"torch.randn({size}, {module.source_dim or dim})"
        lines.append(f"context = {one}" if sources == 1 else f"context = ({', '.join([one] * sources)})")
        call = "x, context"
    if pattern == "graph":
        lines.append("edges = torch.tensor([[0, 1, 2, 3], [1, 2, 0, 0]])  # sources above targets")
        call = "x, edges=edges"
    if module.card.takes:
        lines.append(f"# reads {'; '.join(f'{k}: {what}' for k, what in module.card.takes.items())}")
        call += f", **attention.example_inputs(16{', edges' * (pattern == 'graph')})"
    if pattern == "maps" and isinstance(module.result_size(*module.map_sizes(8, 8))[0], tuple):
        return "\n".join([*lines, f"print([part.shape for part in attention({call}).output])"])
    return "\n".join([*lines, f"print(attention({call}).output.shape)"])
