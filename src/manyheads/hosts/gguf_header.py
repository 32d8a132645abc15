"""What a GGUF file says of itself, read without trusting it: no count or length in it is followed past the file's end.

The layout is llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): metadata, a table of tensors,
then data. Readers made for files of good will loop as often as a file tells them to, and keep what they read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

VERSIONS = (2, 3)
# Values in arrays, all arrays together: a vocabulary of 262,144 with scores, types and merges has 1.3 million, and the
# readers that follow keep some 500 bytes for each.
MOST_ITEMS = 2**21
MOST_DIMENSIONS = 4
_FIXED = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """values: metadata; of an array there is only how long it is. tensors: each name's number of elements."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, int]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    @property
    def elements(self) -> int:
        return sum(self.tensors.values())

    @property
    def own(self) -> dict[str, Any]:
        """What is said of the architecture, without the prefix that is its name."""
        start = self.architecture + "."
        return {key.removeprefix(start): value for key, value in self.values.items() if key.startswith(start)}


def read_header(path: Path) -> Header:
    """ValueError where it is no GGUF, one of another kind, cut short, or where its tensors cannot be decoded."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: its first bytes are not GGUF. Give a file that llama.cpp reads")
        if size < 24:
            raise _cut(path, size)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).header()


def _cut(path: Path, size: int) -> ValueError:
    return ValueError(f"{path} is cut short or damaged: it ends after {size:,} bytes, before all that it announces; "
                      "copy or download it again")  # fmt: skip


@dataclass
class _Reader:
    path: Path
    data: mmap.mmap
    size: int
    at: int = 4
    items: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    def header(self) -> Header:
        version, tensors, pairs = self.take("<IQQ")
        if version not in VERSIONS:
            raise ValueError(f"{self.path} is GGUF version {version}, or for the other byte order: want version "
                             "2 or 3, little-endian; convert it anew with llama.cpp")  # fmt: skip
        # The shortest pair has 13 bytes, the shortest entry of a tensor 32.
        self.room(pairs * 13 + tensors * 32)
        for _ in range(pairs):
            key = self.string()
            if key in self.values:
                raise ValueError(f"{self.path} says {key!r} twice: it is damaged, get it again")
            self.values[key] = self.value(*self.take("<I"))
        self.check_kind()
        table = [self.entry() for _ in range(tensors)]
        self.check_places(table)
        return Header(self.path, self.values, {name: count for name, count, _, _ in table})

    def room(self, count: int) -> None:
        if count > self.size - self.at:
            raise _cut(self.path, self.size)

    def take(self, form: str) -> tuple[Any, ...]:
        width = struct.calcsize(form)
        self.room(width)
        self.at += width
        return struct.unpack_from(form, self.data, self.at - width)

    def string(self) -> str:
        (length,) = self.take("<Q")
        self.room(length)
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} holds a string that is not UTF-8: it is damaged, get it again") from error

    def value(self, kind: int) -> Any:
        if kind in _FIXED:
            return self.take(_FIXED[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"{self.path} holds metadata of type {kind}, which is none of GGUF's: it is damaged")
        of, count = self.take("<IQ")
        self.items += count
        if self.items > MOST_ITEMS:
            raise ValueError(f"{self.path} announces {self.items:,} values in arrays: want at most {MOST_ITEMS:,}")
        if of in _FIXED:
            width = struct.calcsize(_FIXED[of]) * count
            self.room(width)
            self.at += width
        elif of == _STRING:
            for _ in range(count):
                (length,) = self.take("<Q")
                self.room(length)
                self.at += length
        else:
            raise ValueError(f"{self.path} holds an array of metadata type {of}: want numbers or strings")
        return f"array of {count}"

    def check_kind(self) -> None:
        if not self.values.get("general.architecture"):
            raise ValueError(f"{self.path} does not say its general.architecture: want a model converted by llama.cpp")
        kind, parts = self.values.get("general.type", "model"), self.values.get("split.count", 0)
        if kind != "model":
            raise ValueError(f"{self.path} holds a GGUF {kind}: want one that holds a model")
        if isinstance(parts, int) and parts > 1:
            raise ValueError(f"{self.path} is one of {parts} parts: join them with llama.cpp's gguf-split --merge")

    def entry(self) -> tuple[str, int, int, int]:
        """Name, elements, offset and bytes of a tensor."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.string()
        (dimensions,) = self.take("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{self.path}: tensor {name!r} has {dimensions} dimensions, want 1 to {MOST_DIMENSIONS}")
        shape = self.take(f"<{dimensions}Q")
        kind, offset = self.take("<IQ")
        known = {own.value for own in GGMLQuantizationType}
        if kind not in known or not _decodes(kind):
            shown = GGMLQuantizationType(kind).name if kind in known else f"number {kind}"
            raise ValueError(f"{self.path}: tensor {name!r} is stored as {shown}, which the gguf package cannot "
                             "decode; give a file quantised otherwise, such as Q8_0 or Q4_K_M")  # fmt: skip
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if 0 in shape or shape[0] % block:
            raise ValueError(f"{self.path}: tensor {name!r} has shape {list(shape)}, want rows in blocks of {block}")
        return name, prod(shape), offset, prod(shape) // block * width

    def check_places(self, table: list[tuple[str, int, int, int]]) -> None:
        """Every tensor lies in the file and none on another: what is decoded is in proportion to the file's size."""
        if len({name for name, *_ in table}) < len(table):
            raise ValueError(f"{self.path} holds two tensors of one name: it is damaged, get it again")
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path} says general.alignment {alignment!r}: want a power of two")
        start = -(-self.at // alignment) * alignment
        end = 0
        for name, _, offset, width in sorted(table, key=lambda own: own[2]):
            if offset < end:
                raise ValueError(f"{self.path}: tensor {name!r} lies on another one: it is damaged, get it again")
            end = offset + width
            if start + end > self.size:
                raise _cut(self.path, self.size)


def _decodes(kind: int) -> bool:
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    own = GGMLQuantizationType(kind)
    try:
        dequantize(numpy.zeros((1, GGML_QUANT_SIZES[own][1]), dtype=numpy.uint8), own)
    except NotImplementedError:
        return False
    return True
