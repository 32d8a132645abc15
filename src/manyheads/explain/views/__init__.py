"""Views: attention and what is made of it, as self-contained pages and notebook widgets.

store = read_store(model, inputs)
write_page("page.html", [view_heads(Panel(store, tokens)), view_maps(store)])
"""

from .attention import Panel, head_view, model_view, prettify, view_heads, view_model
from .drawing import view_drawing
from .figures import maps_of, view_flow, view_image, view_maps, view_table, view_text
from .page import page, write_page
from .store import AttentionStore, read_store
from .vectors import align, view_embedding, view_neurons
from .view import View

__all__ = [
    "AttentionStore", "Panel", "View", "align", "head_view", "maps_of", "model_view", "page", "prettify", "read_store",
    "view_drawing", "view_embedding", "view_flow", "view_heads", "view_image", "view_maps", "view_model",
    "view_neurons", "view_table", "view_text", "write_page",
]  # fmt: skip
