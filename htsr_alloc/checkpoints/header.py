"""The header of a safetensors file: read by any reader of ranges, checked before it is believed.

The checks are the safetensors library's own (tests compare the two), made here because only the
header of a remote file is available, and because a mapped file that shrinks kills the process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import unique_keys

MAX_HEADER = 100_000_000  # bytes; the format's own bound
KEYS = {"dtype", "shape", "data_offsets"}
# Bits an element takes, by the code in a header.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Extent(NamedTuple):
    """One tensor: its dtype's code, its shape, and its bytes' place in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """Every tensor of a file in the order of its bytes, and the header's own SHA-256."""

    entries: dict[str, Extent]
    sha256: str


def read_header(read: Callable[[int, int], bytes], size: int, name: str) -> Header:
    """Read and check the header of a file of ``size`` bytes.

    Args:
        read: (begin, length) -> exactly that many bytes.
        size: of the whole file, in bytes.
        name: what to call the file in an error.

    Raises:
        HtsrError: no safetensors header, or one that does not describe a file of this size:
            too long, not JSON, a duplicate name, one that is not Unicode, an unknown dtype, offsets
            that overlap,
            leave a gap or leave the file, or that do not fit the shape.
    """
    try:
        if size < 8:
            raise ValueError("it is shorter than a header")
        length = int.from_bytes(read(0, 8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"its header would be of {length} bytes")
        if 8 + length > size:
            raise ValueError("its header does not end within the file")
        text = read(8, length)
        entries = _parse(text, 8 + length, size)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise HtsrError(
            f"{name} is not a whole safetensors file: {why}.", "Fetch it again."
        ) from None
    return Header(entries, hashlib.sha256(text).hexdigest())


def _parse(text: bytes, start: int, size: int) -> dict[str, Extent]:
    """The tensors of a header whose data lies from ``start`` to ``size``; ValueError if wrong."""
    if not text.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    found = json.loads(text.decode("utf-8"), object_pairs_hook=_compact)
    if not isinstance(found, dict):
        raise ValueError("its header describes no tensors")
    if b"\\u" in text:
        check_unicode(list(found))
    metadata = found.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise ValueError("its __metadata__ is not an object")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ holds more than text")
    if b"\\u" in text:
        check_unicode([*metadata, *metadata.values()])
    place = start
    entries: dict[str, Extent] = {}
    for name, entry in sorted(found.items(), key=_offset):
        _check(name, entry)
        moved = entry._replace(begin=start + entry.begin, end=start + entry.end)
        if moved.begin != place:
            raise ValueError(f"the bytes of {name!r} overlap others or leave a gap")
        place = moved.end
        entries[name] = moved
    if place != size:
        raise ValueError(f"its tensors end at byte {place}, the file at {size}")
    return entries


def check_unicode(names: Iterable[str]) -> None:
    """Raise ValueError on an escaped half of a surrogate pair, which UTF-8 cannot hold."""
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"the name {name!r} is not Unicode")


def _compact(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Extent:
    """An object of the header, a tensor's as an ``Extent``: a tenth of the memory of dicts."""
    found = unique_keys(pairs)
    if not found.keys() >= KEYS:
        return found
    dtype, shape, offsets = (found[key] for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and _counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise ValueError("a tensor's dtype, shape or data_offsets are of a wrong type")
    return Extent(dtype, tuple(shape), *offsets)


def _counts(values: Any) -> bool:
    """Whether it is a list of whole numbers that fit 64 bits."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**64 for v in values)


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    name, entry = item
    if not isinstance(entry, Extent):
        raise ValueError(f"{name!r} does not describe a tensor")
    return entry.begin, entry.end


def _check(name: str, entry: Extent) -> None:
    if entry.dtype not in BITS:
        raise ValueError(f"{name!r} is of an unknown dtype {entry.dtype!r}")
    bits = BITS[entry.dtype]
    for length in entry.shape:
        bits *= length
        if bits >= 2**67:  # more bytes than 64 bits count
            raise ValueError(f"the shape of {name!r} is too large")
    if bits % 8 or bits // 8 != entry.end - entry.begin:
        raise ValueError(f"the shape of {name!r} does not fit its bytes")
