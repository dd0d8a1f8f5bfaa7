"""Equal shares: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.allocation.strategies.base import Plan, Strategy


@dataclass(frozen=True)
class Uniform(Strategy):
    """As many experts in every layer; one more or less in the first ones if T does not divide."""

    name: ClassVar[str] = "uniform"

    def plan(self, sharing: Sharing) -> Plan:
        """Equal weights."""
        quotas, counts = sharing.by(self.name, [1.0] * len(sharing.units))
        return Plan(sharing.record(self.name), quotas, counts, "uniform uses no score")


STRATEGY = Uniform
