"""Types of keywords: what Python would let pass, or stop with a traceback of ours."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

from htsr_alloc.errors import HtsrError

WHOLE = ("params", "r", "rank", "top_k", "layers", "seed")
REAL = ("target_share", "beta", "spread")
COUNTS = ("groups", "experts")


def checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with numpy's numbers as Python's.

    Raises:
        HtsrError: one of another type, by its name.
    """
    found = dict(given)
    for name, value in given.items():
        if value is None:
            continue
        if name in WHOLE:
            found[name] = whole(name, value)
        elif name in REAL:
            found[name] = _real(name, value)
        elif name in COUNTS:
            found[name] = _counts(name, value)
    return found


def _real(name: str, value: Any) -> float:
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, Real):
        raise HtsrError(f"`{name}` is a number, not {value!r}.")
    return float(value)


def _counts(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise HtsrError(f"`{name}` are whole numbers, not {value!r}.", "Write (2, 4, 6, 8).")
    return tuple(whole(name, count) for count in value)


def whole(name: str, value: Any) -> int:
    """An int of any whole number's type.

    Raises:
        HtsrError: another type; True and 1e6 are no whole numbers.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise HtsrError(f"`{name}` is a whole number, not {value!r}.")
    return number
