"""Records to JSON text and back, strictly."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar, cast

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import parse_json
from htsr_alloc.records.convert import convert
from htsr_alloc.records.decisions import Allocation
from htsr_alloc.records.facts import Metrics
from htsr_alloc.records.text import printable

Record = TypeVar("Record", bound=Metrics | Allocation)


def dumps(record: Metrics | Allocation) -> str:
    """The JSON text, indented, ending in a newline.

    Raises:
        ValueError: a number is NaN or infinite, or the record breaks its own rules.
    """
    text = json.dumps(as_json(record), indent=1, allow_nan=False) + "\n"
    _read(type(record), parse_json(text))
    return text


def as_json(value: Any) -> Any:
    """A record as dicts and lists; keys that came within a version only off their default."""
    if isinstance(value, tuple):
        return [as_json(item) for item in cast(tuple[Any, ...], value)]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: field for field in dataclasses.fields(value)}
    return {
        name: as_json(getattr(value, name))
        for name, field in fields.items()
        if not ("added" in field.metadata and getattr(value, name) == field.default)
    }


def loads(kind: type[Record], text: str | bytes, source: str) -> Record:
    """Parse and validate a metrics or allocation file.

    Args:
        kind: ``Metrics`` or ``Allocation``.
        text: the file's contents, UTF-8 when bytes.
        source: what to call the file in an error.

    Raises:
        HtsrError: not JSON, another format, a newer version, an unknown or missing key, a
            wrong type, NaN, or numbers that contradict each other; the sentence names where.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return _read(kind, parse_json(text))
    except RecursionError:
        raise HtsrError(f"{source} is nested too deeply to be {kind.FORMAT}.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        said = printable(error)
        raise HtsrError(f"{source} is not a valid {kind.FORMAT} file: {said}.", kind.HINT) from None


def _read(kind: type[Record], data: Any) -> Record:
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError('no "format" key')
    if data["format"] != kind.FORMAT:
        raise ValueError(f"its format is {data['format']!r}")
    version: Any = cast(dict[str, Any], data).get("version")
    if isinstance(version, int) and version > kind.VERSION:
        raise ValueError(
            f"version {version} is newer than this htsr reads ({kind.VERSION}); upgrade htsr"
        )
    if isinstance(version, bool) or version != kind.VERSION:
        raise ValueError(f"version: expected {kind.VERSION}, found {version!r}")
    record = convert(kind, data)
    record.check()
    return record
