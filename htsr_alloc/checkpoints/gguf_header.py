"""The header of a GGUF file, checked before it is believed.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian. It is read here and not
by ``gguf.GGUFReader``, which maps the file and believes every count in it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

MAX_HEADER = 1 << 28  # bytes; a vocabulary of 256,000 tokens takes some 10 MB
MAX_TENSORS = 1_000_000
MAX_DIMS = 4
PIECE = 1 << 16
# The kinds of metadata: struct's letter, by the file's number; 8 is text and 9 a list.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a header: ``kind`` is ggml's number of its type, ``begin`` its first byte."""

    name: str
    kind: int
    shape: tuple[int, ...]
    begin: int


class Cursor:
    """Reads a header from its start; ValueError where it does not end in time.

    ``digest`` is over the header and what is read with its last piece.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.read, self.limit = read, min(size, MAX_HEADER)
        self.data, self.begin, self.place = b"", 0, 0  # what was read, from where; where we are
        self.digest = hashlib.sha256()

    def take(self, count: int) -> bytes:
        if count > self.limit - self.place:
            raise ValueError("its header does not end within the file")
        start = self.place - self.begin
        if start + count > len(self.data):
            end = self.begin + len(self.data)
            more = min(max(start + count - len(self.data), PIECE), self.limit - end)
            new = self.read(end, more)
            self.digest.update(new)
            self.data, self.begin, start = self.data[start:] + new, self.place, 0
        self.place += count
        return self.data[start : start + count]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


def read_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict, list[GgufTensor], str]:
    """The metadata (lists left out), the tensors and the header's SHA-256.

    Args:
        read: (begin, length) -> exactly that many bytes.
        size: of the whole file, in bytes.

    Raises:
        ValueError: no header of GGUF, or one that does not describe a file of this size.
    """
    at = Cursor(read, size)
    if size < 24 or at.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = at.number("I")
    if version not in (2, 3):
        raise ValueError(f"its version is {version}, not 2 or 3 in little-endian order")
    tensors, keys = at.number("Q"), at.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_TENSORS:
        raise ValueError(f"it would hold {tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = at.text()
        if key in metadata:
            raise ValueError(f"duplicate key {key!r}")
        metadata[key] = _value(at, at.number("I"))
    infos = [_info(at) for _ in range(tensors)]
    alignment = alignment_of(metadata)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"its alignment is {alignment!r}")
    start = padded(at.place, alignment)
    for name, _, _, offset in infos:
        if offset % alignment:
            raise ValueError(f"{name[:60]!r} does not begin at a multiple of {alignment} bytes")
    if min((info[3] for info in infos), default=0):
        raise ValueError("no tensor begins where its data does")
    if not infos and size > start:
        raise ValueError("it holds bytes of no tensor")
    placed = [GgufTensor(*info[:3], begin=start + info[3]) for info in infos]
    if len({tensor.name for tensor in placed}) != len(placed):
        raise ValueError("a tensor's name stands in it twice")
    return metadata, placed, at.digest.hexdigest()


def alignment_of(metadata: dict[str, Any]) -> Any:
    """What each tensor's place is a multiple of, as a file's metadata say."""
    return metadata.get("general.alignment", 32)


def padded(place: int, alignment: int) -> int:
    """The first multiple of ``alignment`` that is not before ``place``."""
    return -(-place // alignment) * alignment


def check_places(extents: Iterable[tuple[int, int, str]], size: int, alignment: int) -> None:
    """Check that tensors lie one after the other, each padded to ``alignment``, up to the end.

    Args:
        extents: (begin, end, name) of each, begin a multiple of ``alignment``.
        size: of the whole file, in bytes.

    Raises:
        ValueError: they overlap, leave a gap, or do not end where the file does.
    """
    last = None
    for begin, end, name in sorted(extents):
        if last is not None and begin != padded(last, alignment):
            raise ValueError(f"the bytes of {name[:60]!r} overlap others or leave a gap")
        last = end
    if last is not None and not last <= size <= padded(last, alignment):
        raise ValueError(f"its tensors end at byte {last}, the file at {size}")


def _value(at: Cursor, kind: int) -> Any:
    """A value of the metadata; of a list only that it was one."""
    if kind == TEXT:
        return at.text()
    if kind in SCALARS:
        return at.number(SCALARS[kind])
    if kind != LIST:
        raise ValueError(f"its metadata holds a value of the unknown kind {kind}")
    kind, count = at.number("I"), at.number("Q")
    if kind in SCALARS:
        at.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
    elif kind == TEXT:
        for _ in range(count):
            at.take(at.number("Q"))
    else:
        raise ValueError("its metadata holds a list of lists")
    return None


def _info(at: Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name, dims = at.text(), at.number("I")
    if dims > MAX_DIMS:
        raise ValueError(f"{name[:60]!r} would have {dims} dimensions")
    shape = tuple(at.number("Q") for _ in range(dims))[::-1]
    return name, at.number("I"), shape, at.number("Q")
