"""Text that came from files, made harmless."""

from __future__ import annotations


def printable(text: object) -> str:
    """The text with ``?`` for each character that is not printed but does something: controls,
    line breaks, changes of writing direction, lone surrogates."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
