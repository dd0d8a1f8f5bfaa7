"""Strict JSON into frozen dataclasses: every error is a ValueError that names the place."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def decode(kind: Any, data: Any, where: str = "") -> Any:
    """``data`` as an instance of ``kind``: a dataclass, a tuple, an optional or a scalar."""
    name = where or "the file"
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise ValueError(f"{name}: expected an object")
        hints = _hints(typing.cast(type, kind))
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise ValueError(f"{name}: unknown key {unknown[0]!r}")
        for field in dataclasses.fields(kind):
            if field.name not in data and field.default is dataclasses.MISSING:
                raise ValueError(f"{name}: key {field.name!r} is missing")
        prefix = f"{where}." if where else ""
        fields = {key: decode(hints[key], value, prefix + key) for key, value in data.items()}
        return typing.cast(Any, kind)(**fields)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # only "X | None" is used here
        return None if data is None else decode(args[0], data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{name}: expected a list")
        if args[-1] is not ... and len(data) != len(args):
            raise ValueError(f"{name}: expected {len(args)} entries, found {len(data)}")
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if kind is float:
        if isinstance(data, bool) or not isinstance(data, (int, float)):
            raise ValueError(f"{name}: expected a number")
        try:
            value = float(data)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise ValueError(f"{name}: the number is out of range")
        return value
    if type(data) is not kind:
        wanted = {int: "an integer", str: "a string", bool: "true or false"}[kind]
        raise ValueError(f"{name}: expected {wanted}")
    return data
