"""A view: what it shows, as a page, a file, a widget, or in a notebook."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .page import page, write_page
from .widget import widget


@dataclass(frozen=True)
class View:
    """A view and what it shows. kind: which script shows it. blobs: deflated bytes, opened when they are looked at."""

    kind: str
    title: str
    payload: dict[str, Any] = field(repr=False)
    blobs: dict[str, bytes] = field(default_factory=dict, repr=False)
    theme: str = "auto"

    @property
    def data(self) -> str:
        """The page, by the name that IPython's HTML objects have for it."""
        return self.html()

    def html(self) -> str:
        return page([self], title=self.title, theme=self.theme)

    def write(self, path: str | Path) -> Path:
        return write_page(path, [self], title=self.title, theme=self.theme)

    def widget(self) -> Any:
        """The same view as an anywidget, for notebooks."""
        return widget(self)

    def _repr_html_(self) -> str:
        """For notebooks without widgets: the page in a frame of its own, which may run scripts and nothing else."""
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:640px;border:0" '
            f'title="{html.escape(self.title)}" srcdoc="{html.escape(self.html())}"></iframe>'
        )
