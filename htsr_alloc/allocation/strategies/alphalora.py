"""AlphaLoRA: experts by eq. 6 and 7 on scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from htsr_alloc.allocation.quotas import beta_of_spread, weights_of
from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.allocation.strategies.base import Plan, Strategy
from htsr_alloc.errors import HtsrError

BETA = 2.5  # the released command's default


@dataclass(frozen=True)
class AlphaLora(Strategy):
    """AlphaLoRA (https://arxiv.org/abs/2410.10054), eq. 6 and 7: N in proportion to v^beta.

    Attributes:
        beta: exponent of eq. 6; 2.5 unless ``spread`` is given.
        spread: largest over smallest quota, for which beta is then solved.
    """

    beta: float | None = None
    spread: float | None = None

    name: ClassVar[str] = "alphalora"
    uses_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta is not None and self.spread is not None:
            raise HtsrError("`spread` computes `beta`, so that both cannot be given.")

    def plan(self, sharing: Sharing) -> Plan:
        """Eq. 6 and 7 on the units' scores, in each group."""
        units, groups = sharing.units, sharing.groups
        scores = [unit.score for unit in units if unit.score is not None]
        beta = BETA if self.beta is None else self.beta
        if self.spread is not None:
            beta = beta_of_spread(([scores[i] for i in group] for group in groups), self.spread)
        names = [f"Layer {unit.layer}" if unit.matrix is None else unit.name for unit in units]
        weights = [0.0] * len(units)
        for group in groups:
            own = weights_of([scores[i] for i in group], beta, [names[i] for i in group])
            for i, weight in zip(group, own, strict=True):
                weights[i] = weight
        quotas, counts = sharing.by(self.name, weights, scores, beta)
        record = sharing.record(self.name, beta=beta, spread=self.spread, pool=sharing.pool)
        return Plan(record, quotas, counts)


STRATEGY = AlphaLora
