"""The one exception that users see: a sentence and the next thing to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

MARKED = re.compile(r"`(\w+)`")


class HtsrError(Exception):
    """A known failure.

    A name of the caller's argument is written in backticks: "`top_k` must be at least 1". From
    Python it reads as it is, without them; ``renamed`` gives it another name.

    Args:
        message: one sentence that says what is wrong and where.
        hint: what the user can do about it; printed on a line of its own.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        self._marked = message, hint
        self.message = MARKED.sub(r"\1", message)
        self.hint = None if hint is None else MARKED.sub(r"\1", hint)
        super().__init__(self.message)

    def renamed(self, name: Callable[[str], str]) -> HtsrError:
        """The same failure with ``name(argument)`` in place of each argument's name."""
        message, hint = (
            None if text is None else MARKED.sub(lambda found: name(found[1]), text)
            for text in self._marked
        )
        return HtsrError(message or "", hint)


def check_choice(kind: str, name: str, known: Collection[str]) -> None:
    """Raise HtsrError unless ``name`` is one of the known ones."""
    if name not in known:
        raise HtsrError(f"There is no {kind} {name!r}.", f"Choose from {', '.join(known)}.")
