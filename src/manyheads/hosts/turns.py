"""What a tokenizer's chat template puts around the words of a conversation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyheads.hosts.loading import Loaded

# Words that no template holds.
_MARK = "\ue0f0words\ue0f1"


def around(tokenizer: Any, roles: list[str]) -> list[str]:
    """What stands before, between and behind the words of turns by these roles."""
    turns = [{"role": role, "content": _MARK} for role in roles]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=roles[-1] == "user", tokenize=False)
    parts: list[str] = text.split(_MARK)
    if len(parts) != len(roles) + 1:
        raise ValueError(f"{type(tokenizer).__name__}: its chat template does not show the words of every turn")
    return parts


def asked_turn(loaded: Loaded) -> tuple[list[int], list[int]]:
    """Token ids before the words of a conversation's first turn, and those behind it, an answer begun.

    ValueError where the model's tokenizer has no chat template."""
    if getattr(loaded.tokenizer, "chat_template", None) is None:
        raise ValueError(f"{loaded.name} has no chat template: take a chat model, or give its text without one")
    before, behind = around(loaded.tokenizer, ["user"])
    return loaded.encode(before), loaded.encode(behind)
