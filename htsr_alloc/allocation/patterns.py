"""Counts that need no score: MoLA's groups, and counts as given."""

from __future__ import annotations

from collections.abc import Sequence

from htsr_alloc.errors import HtsrError


def mola_counts(groups: Sequence[int], layers: int) -> list[int]:
    """MoLA: each group of consecutive layers has one count of experts.

    Layer i of L belongs to group floor(i * G / L), so that group sizes differ by at most one
    when L is not divisible by G.

    Raises:
        HtsrError: no group, a negative count, or more groups than layers.
    """
    if not groups or min(groups) < 0:
        raise HtsrError("--groups needs counts such as 2468 or 4-6-8-10.")
    if len(groups) > layers:
        raise HtsrError(f"{len(groups)} groups do not fit {layers} layers.")
    return [groups[i * len(groups) // layers] for i in range(layers)]


def parse_groups(text: str) -> tuple[int, ...]:
    """``2468`` as 2, 4, 6, 8; ``4-6-8-10`` (or commas) as 4, 6, 8, 10.

    Without separators every digit is a group, except for the published ``46810``.

    Raises:
        HtsrError: anything else.
    """
    if text == "46810":  # MoLA's own name for 4, 6, 8, 10
        return 4, 6, 8, 10
    words = text.replace(",", "-").split("-") if "-" in text or "," in text else list(text)
    if not words or not all(word.isdecimal() for word in words):
        raise HtsrError(f"--groups {text!r} is not like 2468 or 4-6-8-10.")
    return tuple(int(word) for word in words)


def parse_counts(text: str) -> tuple[int, ...]:
    """``1,3,5`` as 1, 3, 5.

    Raises:
        HtsrError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise HtsrError(f"--experts {text!r} is not like 1,3,5.")
    return tuple(int(word) for word in words)
