"""Where tokens stand on a page, looked up in tables: LayoutLM, arXiv:1912.13318."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TABLES = 4  # by x, y, height, width


def box_rows(name: str, boxes: Any, x: Tensor, padding: Tensor | None, places: int) -> Tensor:
    """x0, y0, x1, y1, y1 - y0, x1 - x0 of boxes [b, n, 4] for the tokens of x [b, n, e]: [6, b, n], 0 to places - 1;
    zeros for padding. ValueError for another shape, type or device, or a box that is turned round or off the page."""
    whole = isinstance(boxes, Tensor) and not boxes.is_floating_point() and boxes.device == x.device
    if not whole or boxes.shape != (*x.shape[:2], 4):
        what = f"{boxes.dtype} {list(boxes.shape)} on {boxes.device}" if isinstance(boxes, Tensor) else repr(boxes)
        raise ValueError(f"{name}: boxes are {what[:80]}; want integers {[*x.shape[:2], 4]} on {x.device}")
    boxes = boxes.long() if padding is None else boxes.long().masked_fill(~padding[..., None], 0)
    x0, y0, x1, y1 = boxes.unbind(-1)
    rows = torch.stack([x0, y0, x1, y1, y1 - y0, x1 - x0])
    if not (torch.compiler.is_compiling() or rows.is_meta) and bool(((rows < 0) | (rows >= places)).any()):
        raise ValueError(
            f"{name}: boxes go from {int(boxes.min())} to {int(boxes.max())}; want x0 <= x1, y0 <= y1, and all of 0 "
            f"to {places - 1}: scale them to the page, or build it with more places"
        )
    return rows


def layout_of(tables: Tensor, rows: Tensor) -> Tensor:
    """The sum of the features of the six rows, tables [4, places, e], rows [6, b, n] -> [b, n, e]: left and right share
    a table, and so do top and bottom."""
    table = torch.tensor([0, 1, 0, 1, 2, 3], device=rows.device)[:, None, None]
    return tables[table, rows].sum(0)
