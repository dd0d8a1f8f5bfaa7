"""Counts as the user gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from htsr_alloc.allocation.budget import Experts, Params
from htsr_alloc.allocation.rounding import Bounds
from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.allocation.strategies.base import Plan, Strategy
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import StrategyRecord


@dataclass(frozen=True)
class Explicit(Strategy):
    """The counts as given.

    Attributes:
        experts: one count a layer.
    """

    experts: tuple[int, ...] = ()

    name: ClassVar[str] = "explicit"

    @property
    def layers(self) -> int | None:
        """As many as there are counts."""
        return len(self.experts)

    def plan(self, sharing: Sharing) -> Plan:
        """Checks only: nothing is rounded."""
        layers, total = sharing.layers, sum(self.experts)
        if len(self.experts) != layers:
            raise HtsrError(f"`experts` lists {len(self.experts)} counts for {layers} layers.")
        if min(self.experts) < 0:
            raise HtsrError("`experts` holds a negative count.")
        if isinstance(sharing.budget, Params):
            raise HtsrError("`experts` are given, so that no parameter budget can choose them.")
        if isinstance(sharing.budget, Experts) and sharing.budget.total != total:
            raise HtsrError(f"`experts` sums to {total}, not to `T` {sharing.budget.total}.")
        if sharing.bounds != Bounds():
            raise HtsrError("`experts` are given, so that `low` and `high` mean nothing.")
        return Plan(
            StrategyRecord(self.name), [None] * layers, self.experts, "the counts were given"
        )


STRATEGY = Explicit


def parse_counts(text: str) -> tuple[int, ...]:
    """``1,3,5`` as 1, 3, 5.

    Raises:
        HtsrError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise HtsrError(f"`experts` {text!r} is not like 1,3,5.")
    return tuple(int(word) for word in words)
