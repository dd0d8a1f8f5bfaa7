"""What a strategy is, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from htsr_alloc.allocation.scorefile import Scores
from htsr_alloc.allocation.scores import Metric
from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.records import Metrics, Signal, StrategyRecord


@dataclass(frozen=True)
class Plan:
    """One quota and count a unit; ``reason`` says why there are no scores or quotas, if so."""

    record: StrategyRecord
    quotas: Sequence[float | None]
    counts: Sequence[int]
    reason: str | None = None


@dataclass(frozen=True)
class Strategy(ABC):
    """A rule from units and a budget to counts; a dataclass whose fields are its settings.

    Attributes:
        name: its name in ``STRATEGIES`` and in the allocation file.
        uses_scores: whether each unit comes with a score.
        uses_errors: whether it needs the alphas' standard errors.
    """

    name: ClassVar[str]
    uses_scores: ClassVar[bool] = False
    uses_errors: ClassVar[bool] = False

    @property
    def layers(self) -> int | None:
        """How many layers the settings are for; None where they do not say."""
        return None

    def prepared(
        self, metrics: Metrics | None, scores: Metric | Scores | None
    ) -> tuple[Metrics | None, Signal | None]:
        """The metrics that scores are taken from; with a signal where they were changed."""
        return metrics, None

    @abstractmethod
    def plan(self, sharing: Sharing) -> Plan:
        """The counts. HtsrError where the settings or the budget cannot be met."""
