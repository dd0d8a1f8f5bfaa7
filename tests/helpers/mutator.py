"""Inputs by the ten thousand: hypothesis draws some, and a cheap mutator changes their structure.

PYTHONPATH=tests python -c 'from helpers.mutator import main; main()' TARGET COUNT
"""

from __future__ import annotations

import json
import random
import sys
from copy import deepcopy
from hashlib import sha256
from typing import Any

from hypothesis import HealthCheck, given, settings

from helpers.fuzz import LATE, places, targets, with_length

DRAWN = 300  # by hypothesis, to begin with
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1.5,
    -0.0,
    1e308,
    2**31,
    2**63,
    2**64,
    10**400,
]
VALUES += ["", "a", "\ud800", "\u202e", "=1", "h.0.a.weight", "F32", "../a", "\0", "9" * 50, [], {}]
VALUES += [[0], [[]], [1, 2], {"a": 1}, {"": None}, [[[[[[[[[]]]]]]]]], "x" * 300]
BYTES = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"NaN",
    b"1e999",
    b"\n",
    b" ",
]


def changed(data: Any, draw: random.Random, keys: list[str]) -> Any:
    """The document with one place replaced, deleted, renamed or copied to another."""
    found = places(data)[1:]
    if not found:
        return deepcopy(draw.choice(VALUES))
    *path, last = draw.choice(found)
    here = data
    for step in path:
        here = here[step]
    kind = draw.randrange(4)
    if kind == 0:
        del here[last]
    elif kind == 1 and isinstance(here, dict):
        here[draw.choice(keys)] = here.pop(last)
    elif kind == 2:
        *path, other = draw.choice(found)
        source: Any = data
        try:
            for step in path:
                source = source[step]
            here[last] = json.loads(json.dumps(source[other]))
        except (KeyError, IndexError, TypeError):  # it was inside a deleted part
            here[last] = None
    else:
        here[last] = deepcopy(draw.choice(VALUES))
    return data


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    begin = draw.randint(0, len(data))
    end = min(len(data), begin + draw.choice([0, 0, 1, 1, 4, 30]))
    return data[:begin] + draw.choice([*BYTES, data[begin:end] * 2]) + data[end:]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Its JSON changed: of the whole, of a line, or of what a length or a hash stands before or
    after, which are made right again; where there is none, its bytes."""
    if draw.random() < 0.2:
        return changed_bytes(data, draw)
    length = int.from_bytes(data[:8], "little")
    if len(data) > 8 and length <= len(data) - 8:
        text = _document(data[8 : 8 + length], draw)
        return with_length(text, max(0, len(data) - 8 - length))
    lines = data.split(b"\n")
    where = draw.randrange(len(lines))
    if data.startswith(b'{"format": "htsr.journal"') and len(lines) > 2:
        header = lines[0].rpartition(b" ")[0]
        text = _document(lines[1].rpartition(b" ")[0], draw)
        return lines[0] + b"\n" + text + b" " + sha256(header + text).hexdigest().encode() + b"\n"
    lines[where] = _document(lines[where], draw)
    return b"\n".join(lines)


def _document(text: bytes, draw: random.Random) -> bytes:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return changed_bytes(text, draw)
    keys = [str(path[-1]) for path in places(data)[1:]] or ["a"]
    for _ in range(draw.randint(1, 3)):
        data = changed(data, draw, keys)
    return json.dumps(data).encode()


def drawn(strategy: Any, count: int) -> list[bytes]:
    """The first inputs that hypothesis makes."""
    found: list[bytes] = []

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(data: bytes) -> None:
        found.append(data)

    collect()
    return found


def main() -> None:
    """TARGET COUNT: feed one target; prints its counts as JSON."""
    name, count = sys.argv[1], int(sys.argv[2])
    strategy, function = LATE[name]() if name in LATE else targets()[name]
    corpus = drawn(strategy, min(count, DRAWN))
    draw, tried, valid, why = random.Random(name), 0, 0, ""
    try:
        while tried < count:
            data = corpus[tried] if tried < len(corpus) else mutated(draw.choice(corpus), draw)
            tried += 1
            valid += function(data)
    except Exception as error:
        why = f"{type(error).__name__}: {error}; of {data[:500]!r}"[:2000]
    print(json.dumps({"tried": tried, "valid": valid, "failed": why}))
