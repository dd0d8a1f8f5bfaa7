"""Plain data (from JSON or YAML) into the dataclasses that say what it must be, by msgspec."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")
Hook = Callable[[type, Any], Any]
PLAIN: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (  # msgspec's words, and ours
    (r"(?s)^Object contains unknown field `(.*)`$", r"unknown key '\1'"),
    (r"^Object missing required field `(.*)`$", r"missing key '\1'"),
    (r"^Invalid enum value ", "unknown value "),
    (r"^(Expected|Number)", lambda found: found[0].lower()),
    (r"`", ""),
)


def convert(
    kind: type[T], data: Any, place: str = "", hook: Hook | None = None, lax: bool = False
) -> T:
    """``data`` as the dataclass ``kind``.

    Args:
        place: where the data stands in its file.
        hook: makes what msgspec has no type for, such as a ``Path``, of plain data.
        lax: also take numbers and truth values written as text.

    Raises:
        ValueError: a wrong type, an unknown or missing key, a number out of range. The message
            begins with the place, e.g. ``matrices[3].k: expected int``.
    """
    try:
        msgspec.convert(data, strict(kind), dec_hook=hook, strict=not lax)
        return msgspec.convert(data, kind, dec_hook=hook, strict=not lax)
    except msgspec.ValidationError as error:
        found: Any = re.fullmatch(r"(?s)(.*?)(?: - at (`key` in )?`\$(.*)`)?", str(error))
        said, key, path = found.groups("")
        said = "Expected keys of type `str`" if key else said
        for words, plain in PLAIN:
            said = re.sub(words, plain, said)
        place = f"{place}.{path.lstrip('.')}".strip(".").replace(".[", "[")
        raise ValueError(f"{place}: {said}" if place else said) from None


def strict(kind: Any) -> Any:
    """The type with a Struct in place of each dataclass.

    msgspec ignores the unknown keys of a dataclass; it can refuse those of a Struct.
    """
    if dataclasses.is_dataclass(kind):
        return _struct(kind)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return Annotated[(strict(args[0]), *args[1:])]
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(map(strict, args))]  # noqa: UP007
    if origin in (None, typing.Literal):
        return kind
    return origin[tuple(map(strict, args))]


@functools.cache
def _struct(kind: Any) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        default: Any = msgspec.NODEFAULT if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = msgspec.field(default_factory=field.default_factory)
        fields.append((field.name, strict(hints[field.name]), default))
    return msgspec.defstruct(
        kind.__name__,
        fields,
        namespace={"__doc__": inspect.cleandoc(kind.__doc__)},
        kw_only=True,
        forbid_unknown_fields=True,
    )
