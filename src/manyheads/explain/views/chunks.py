"""A chunk: the attention weights of one head as bytes, quantised and sparse.

Of a row of weights w [m] the entries with the largest |w| are kept, each as a code of 8 bits beside the row's scale:
    s = max |w|, code = round(255 sqrt(|w| / s)), shown as s (code / 255)^2
so that a weight is off by at most s (sqrt(|w| / s) + 1/1020) / 255, and one of 1/250,000 of the largest is still seen;
s itself is rounded to one part in 512. (Where weights may be negative, codes are signed, and 127 stands for 255.)
Beside every row stands the share of its mass, sum |w| over entries with a code other than 0 / sum |w|, to a tenth of a
percent, so that what is left out can be shown.

A chunk is raw deflate of byte planes (all low bytes, then all high bytes), for n rows:
    scale int16 [n]      s = exp(scale / 256); -32768: a row of zeros
    share uint16 [n]     share of mass = share / 1000
    whole: codes uint8 [n m]
    top-k: counts uint16 [n] (k <= 65535), gaps uint16 or uint32 [sum of counts] (a row's columns in rising order, each
           less the one before it), codes uint8 [sum of counts]
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOG_STEPS, NO_SCALE, SHARES = 256, -32768, 1000
# Entries of a row beyond this share of its mass are not worth their bytes, unless the row is kept whole.
ENOUGH = 0.995


@dataclass(frozen=True)
class Rows:
    """Entries of a chunk in order of rows and columns: row, column, weight [entries]; scale, share [n]."""

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    code: NDArray[np.int64]
    weight: NDArray[np.float32]
    scale: NDArray[np.float64]
    share: NDArray[np.float64]


@dataclass(frozen=True)
class Block:
    scale: NDArray[np.int16]
    share: NDArray[np.uint16]
    counts: NDArray[np.int64]
    gaps: NDArray[np.int64]
    codes: NDArray[np.uint8]


def encode(block: Tensor, kept: int, signed: bool) -> Block:
    """Codes of the kept entries of some rows; kept = 0: of all."""
    size = block.abs()
    total = size.sum(1)
    if kept:
        top, column = size.topk(kept, dim=1)
        useful = (top.cumsum(1) - top) < ENOUGH * total[:, None]
        column, order = column.sort(1)
        value, useful = block.gather(1, column), useful.gather(1, order)
    else:
        value, column, useful = block, None, None
    largest = size.amax(1)
    scale = torch.where(largest > 0, (largest.double().log() * LOG_STEPS).round().clamp(-32767, 32767), NO_SCALE)
    codes = _codes(value, scale, 127 if signed else 255)
    if useful is not None:
        codes = codes * useful
    seen = (value.abs() * (codes != 0)).sum(1)
    share = torch.where(total > 0, seen.double() / total.double(), 1.0).mul(SHARES).round()
    return _finish(scale, share, codes, column)


def _codes(value: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Codes in float of weights [rows, entries] beside their rows' scales."""
    unit = torch.exp(scale / LOG_STEPS).to(value.dtype)[:, None]
    return (value.abs() / unit).sqrt().mul(steps).round().clamp(max=steps) * value.sign()


def _finish(scale: Tensor, share: Tensor, codes: Tensor, column: Tensor | None) -> Block:
    flat = codes.to(torch.int16).cpu().numpy()
    counts, gaps = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if column is not None:
        there = flat != 0
        counts = there.sum(1)
        flat, where = flat[there], column.cpu().numpy()[there]
        gaps = np.diff(where, prepend=0)
        first = (np.cumsum(counts) - counts)[counts > 0]
        gaps[first] = where[first]
    return Block(
        scale.cpu().numpy().astype(np.int16), share.cpu().numpy().astype(np.uint16), counts, gaps,
        flat.astype(np.int8).view(np.uint8).ravel() if (flat < 0).any() else flat.astype(np.uint8).ravel(),
    )  # fmt: skip


def pack(parts: list[Block], kept: int, index: int) -> tuple[bytes, NDArray[np.float64]]:
    """The chunk of all rows, and their shares [n]. kept = 0: whole; index: bytes of a column."""
    share = np.concatenate([part.share for part in parts])
    parted = [planes(np.concatenate([part.scale for part in parts]).view(np.uint16), 2), planes(share, 2)]
    if kept:
        parted.append(planes(np.concatenate([part.counts for part in parts]), 2))
        parted.append(planes(np.concatenate([part.gaps for part in parts]), index))
    parted.append(np.concatenate([part.codes for part in parts]).tobytes())
    return deflate(b"".join(parted)), share / SHARES


def planes(numbers: NDArray[Any], width: int) -> bytes:
    """All lowest bytes, then all next ones: alike bytes stand together, and deflate finds them."""
    wide = numbers.astype(f"<u{width}").view(np.uint8).reshape(-1, width)
    return wide.T.tobytes()


def open_chunk(chunk: bytes, n: int, m: int, sparse: bool, signed: bool) -> Rows:
    data = np.frombuffer(zlib.decompress(chunk, -15), np.uint8)
    place = 0

    def take(count: int, width: int) -> NDArray[np.int64]:
        nonlocal place
        found = data[place : place + count * width].reshape(width, count).astype(np.int64)
        place += count * width
        return (found << (8 * np.arange(width)[:, None])).sum(0)

    scale, share = take(n, 2).astype(np.uint16).view(np.int16), take(n, 2) / SHARES
    if sparse:
        counts = take(n, 2)
        entries = int(counts.sum())
        row, gaps = np.repeat(np.arange(n), counts), take(entries, 2 if m <= 65536 else 4)
        running = np.cumsum(gaps)
        starts = np.cumsum(counts) - counts
        before = np.where(starts > 0, running[np.maximum(starts, 1) - 1], 0)
        column = running - before[row]
    else:
        row, column = (each.ravel() for each in np.indices((n, m)))
    code = data[place:].view(np.int8 if signed else np.uint8).astype(np.int64)
    unit = np.where(scale == NO_SCALE, 0, np.exp(scale / LOG_STEPS))
    weight = unit[row] * (code / (127 if signed else 255)) ** 2 * np.sign(code)
    return Rows(row, column, code, weight.astype(np.float32), unit, share)


def deflate(data: bytes) -> bytes:
    squeeze = zlib.compressobj(5, zlib.DEFLATED, -15)
    return squeeze.compress(data) + squeeze.flush()
