"""Head view and model view: where each head looks, from a store or from bertviz' arguments.

Rows are tokens that look (queries), columns tokens that are looked at (keys). Manner of call: jessevig/bertviz 1.4,
head_view.py and model_view.py; the pages share nothing with it. Divergence: display_mode follows the reader's system
unless it is given, and rows that were not kept whole say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .page import THEMES
from .store import AttentionStore
from .view import View

# What byte-level and sentencepiece vocabularies write in the place of spaces and of control characters.
SPACES = {"Ġ": " ", "▁": " "}
CONTROLS = {"Ċ": "\n", "ĉ": "\t", "č": "\r"}


@dataclass(frozen=True)
class Panel:
    """One store with its tokens [n], and those that are looked at [m] where they are others (cross-attention).

    second: where a second sentence begins, so that the view can be narrowed to either.
    """

    store: AttentionStore
    tokens: Sequence[str]
    key_tokens: Sequence[str] | None = None
    name: str = "Attention"
    second: int | None = None

    def spec(self, key: str) -> dict[str, Any]:
        rows = checked_tokens(self.tokens, self.store.n, "queries")
        columns = rows if self.key_tokens is None and self.store.n == self.store.m else None
        if columns is None:
            columns = checked_tokens(self.key_tokens or [], self.store.m, "keys")
        filters = [{"name": "All", "rows": [0, self.store.n], "columns": [0, self.store.m]}]
        if self.second is not None:
            filters += self._sentences(self.second)
        same = columns is rows
        return {
            "name": self.name, "store": self.store.spec(key), "rows": rows, "columns": None if same else columns,
            "filters": filters,
        }  # fmt: skip

    def _sentences(self, second: int) -> list[dict[str, Any]]:
        if not 0 < second < self.store.n or self.store.n != self.store.m:
            raise ValueError(f"a second sentence from token {second} on needs 0 < {second} < {self.store.n} tokens")
        parts = {"A": [0, second], "B": [second, self.store.n]}
        return [
            {"name": f"Sentence {left} → sentence {right}", "rows": parts[left], "columns": parts[right]}
            for left, right in ("AA", "BB", "AB", "BA")
        ]


def view_heads(
    panels: Panel | Sequence[Panel],
    *,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    title: str = "Head view",
    theme: str = "auto",
) -> View:
    """Tokens left and right, with a line for what a token looks at, in a colour for each head.

    layer, heads: what is shown first, by the store's numbers; by default the first layer, and all heads if few.
    """
    return _view("head", panels, title, theme, {"layer": layer, "heads": None if heads is None else list(heads)})


def view_model(panels: Panel | Sequence[Panel], *, title: str = "Model view", theme: str = "auto") -> View:
    """A small picture of every head, layers down and heads across; one that is chosen opens in a head view."""
    return _view("model", panels, title, theme, {"layer": None, "heads": None})


def _view(kind: str, panels: Panel | Sequence[Panel], title: str, theme: str, start: dict[str, Any]) -> View:
    every = [panels] if isinstance(panels, Panel) else list(panels)
    if not every:
        raise ValueError(f"{title}: give at least one panel, a store and its tokens")
    _check_start(every[0].store, start["layer"], start["heads"])
    keys = [panel.store.key for panel in every]
    blobs: dict[str, bytes] = {}
    for panel, key in zip(every, keys, strict=True):
        blobs |= panel.store.blobs(key)
    specs = [panel.spec(key) for panel, key in zip(every, keys, strict=True)]
    return View(kind, title, {"panels": specs, **start}, blobs, theme)


def _check_start(store: AttentionStore, layer: int | None, heads: Sequence[int] | None) -> None:
    if layer is not None and layer not in store.layers:
        raise ValueError(f"layer {layer} is not in the view; it has layers {list(store.layers)}")
    missing = [head for head in heads or () if head not in store.heads]
    if missing:
        raise ValueError(f"head {missing[0]} is not in the view; it has heads {list(store.heads)}")


def head_view(
    attention: Any = None,
    tokens: Sequence[str] | None = None,
    sentence_b_start: int | None = None,
    prettify_tokens: bool = True,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    encoder_attention: Any = None,
    decoder_attention: Any = None,
    cross_attention: Any = None,
    encoder_tokens: Sequence[str] | None = None,
    decoder_tokens: Sequence[str] | None = None,
    include_layers: Sequence[int] | None = None,
    html_action: str = "view",
    budget_mb: float = 64,
) -> View | None:
    """bertviz' head_view: attention is one tensor [1, h, n, n] per layer, or an AttentionStore.

    html_action: "view" shows it in a notebook; "return" gives the view, whose `.data` is the page and whose
    `write(path)` saves it. budget_mb: what the page may take; longer inputs keep fewer weights of each row.
    """
    panels = _panels(
        attention, tokens, sentence_b_start, prettify_tokens,
        {"Encoder": encoder_attention, "Decoder": decoder_attention, "Cross": cross_attention},
        encoder_tokens, decoder_tokens, include_layers, None, budget_mb,
    )  # fmt: skip
    return _act(view_heads(panels, layer=layer, heads=heads), html_action)


def model_view(
    attention: Any = None,
    tokens: Sequence[str] | None = None,
    sentence_b_start: int | None = None,
    prettify_tokens: bool = True,
    display_mode: str | None = None,
    encoder_attention: Any = None,
    decoder_attention: Any = None,
    cross_attention: Any = None,
    encoder_tokens: Sequence[str] | None = None,
    decoder_tokens: Sequence[str] | None = None,
    include_layers: Sequence[int] | None = None,
    include_heads: Sequence[int] | None = None,
    html_action: str = "view",
    budget_mb: float = 64,
) -> View | None:
    """bertviz' model_view; see head_view. display_mode: "dark", "light", or None for what the reader's system says."""
    theme = display_mode or "auto"
    if theme not in THEMES:
        raise ValueError(f"display_mode must be 'dark', 'light' or None; got {display_mode!r}")
    panels = _panels(
        attention, tokens, sentence_b_start, prettify_tokens,
        {"Encoder": encoder_attention, "Decoder": decoder_attention, "Cross": cross_attention},
        encoder_tokens, decoder_tokens, include_layers, include_heads, budget_mb,
    )  # fmt: skip
    return _act(view_model(panels, theme=theme), html_action)


def _panels(
    attention: Any,
    tokens: Sequence[str] | None,
    second: int | None,
    prettify: bool,
    parts: dict[str, Any],
    encoder_tokens: Sequence[str] | None,
    decoder_tokens: Sequence[str] | None,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    budget_mb: float,
) -> list[Panel]:
    given = {name: weights for name, weights in parts.items() if weights is not None}
    if attention is not None:
        if tokens is None:
            raise ValueError("attention needs tokens: one string for each position")
        if given or encoder_tokens is not None or decoder_tokens is not None:
            raise ValueError("give either attention and tokens, or the encoder's and decoder's, not both")
        store = _store(attention, layers, heads, budget_mb)
        return [Panel(store, _shown(tokens, prettify), second=second)]
    if not given:
        raise ValueError("no attention was given: pass attention=, or encoder_, decoder_ or cross_attention=")
    sides = {
        "Encoder": (encoder_tokens, encoder_tokens),
        "Decoder": (decoder_tokens, decoder_tokens),
        "Cross": (decoder_tokens, encoder_tokens),
    }
    panels = []
    for name, weights in given.items():
        rows, columns = sides[name]
        if rows is None or columns is None:
            raise ValueError(f"{name.lower()}_attention needs the tokens of both its sides (encoder_, decoder_tokens)")
        store = _store(weights, layers, heads, budget_mb / len(given))
        panels.append(Panel(store, _shown(rows, prettify), _shown(columns, prettify), name))
    return panels


def _store(
    attention: Any, layers: Sequence[int] | None, heads: Sequence[int] | None, budget_mb: float
) -> AttentionStore:
    if not isinstance(attention, AttentionStore):
        return AttentionStore.from_attention(attention, layers=layers, heads=heads, budget_mb=budget_mb)
    if layers is not None or heads is not None:
        raise ValueError("include_layers and include_heads choose when a store is made; this one is made already")
    return attention


def _act(view: View, action: str) -> View | None:
    if action not in ("view", "return"):
        raise ValueError(f"html_action must be 'view' or 'return'; got {action!r}")
    if action == "return":
        return view
    display(view)
    return None


def display(view: View) -> None:
    """Shows the view in the notebook that runs this: as a widget, or in a frame where there are no widgets."""
    if not _in_notebook():
        raise ValueError("html_action='view' shows in a notebook, and none runs this; use 'return' and .write(path)")
    from IPython.display import display as show

    try:
        shown = view.widget()
    except ImportError:
        shown = view
    show(shown)


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return get_ipython() is not None


def checked_tokens(tokens: Sequence[str], count: int, what: str) -> list[str]:
    """Tokens as strings, one per position."""
    if isinstance(tokens, str):
        raise ValueError(f"tokens of the {what} are one string; give a list with one string per position")
    found = [str(token) for token in tokens]
    if len(found) != count or not found:
        raise ValueError(f"{len(found)} tokens for {count} {what}; give one for each position")
    return found


def prettify(tokens: Sequence[str]) -> list[str]:
    """Tokens with the spaces that a vocabulary writes as other letters."""
    return [CONTROLS.get(token) or _spaced(token) for token in tokens]


def _spaced(token: str) -> str:
    for mark, space in SPACES.items():
        token = token.replace(mark, space)
    return token


def _shown(tokens: Sequence[str], pretty: bool) -> list[str]:
    if isinstance(tokens, str):
        raise ValueError("tokens are one string; give a list with one string per position")
    return prettify([str(token) for token in tokens]) if pretty else list(tokens)
