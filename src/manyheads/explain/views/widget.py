"""Views in notebooks: the pages' own scripts as an anywidget module, and the bytes as its traits."""

from __future__ import annotations

from functools import cache
from typing import Any

from .page import KINDS, View, page_spec, safe_json, script, style

# Tells anywidget how to put a page on the element that a notebook gives.
RENDER = """
export default {
  render({ model, el }) {
    const blobs = model.get("blobs");
    const source = async (name) => {
      const found = blobs[name];
      if (!found) throw new Error("The widget has no " + name);
      return new Uint8Array(found.buffer, found.byteOffset, found.byteLength);
    };
    const root = document.createElement("div");
    el.append(root);
    manyheads.mount(root, JSON.parse(model.get("spec")), source);
  },
};
"""


def widget(view: View) -> Any:
    """The view as a widget; needs the anywidget package."""
    spec = page_spec([view], title=view.title, theme=view.theme)
    return widget_class()(spec=safe_json(spec), blobs=view.blobs)


@cache
def widget_class() -> type[Any]:
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError("notebook widgets need anywidget: pip install anywidget") from error

    class ViewWidget(anywidget.AnyWidget):
        _esm = script(KINDS) + RENDER
        _css = style()
        spec = traitlets.Unicode().tag(sync=True)
        blobs = traitlets.Dict().tag(sync=True)

    return ViewWidget
