"""A budget shared among units in proportion to weights: quotas, then counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from htsr_alloc.allocation.budget import Experts, Params
from htsr_alloc.allocation.quotas import split
from htsr_alloc.allocation.rounding import REMAINDER, REPAIRS, Bounds
from htsr_alloc.allocation.spend import spend
from htsr_alloc.allocation.units import Unit, groups_of
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import StrategyRecord


@dataclass(frozen=True)
class Sharing:
    """Who shares, what, and how it is rounded. What a strategy sees of a request.

    Attributes:
        units: the layers, or the linears, with their scores where the strategy uses them. Under a
            budget in parameters a layer in which nothing is adapted is not among them.
        layers: L. Of T experts a group of n units gets n / L, which is T for a role that each
            layer has once.
        budget: None where none was given.
        pool: which linears share among themselves, by ``POOLS``; None where units are layers.
    """

    units: Sequence[Unit]
    layers: int
    budget: Experts | Params | None
    pool: str | None = None
    repair: str = REMAINDER
    bounds: Bounds = field(default_factory=Bounds)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Indices of the units that share among themselves."""
        return groups_of(self.units, self.pool)

    def by(
        self, name: str, weights: Sequence[float], scores: Sequence[float] = (), beta: float = 0.0
    ) -> tuple[list[float], list[int]]:
        """Quotas and counts, one a unit, in proportion to ``weights``.

        Args:
            name: the strategy's, for the error's sentence.
            weights: v^beta, or any others that are not negative.
            scores: v; only the official repair asks for them and for ``beta``.

        Raises:
            HtsrError: no budget, or bounds that it cannot keep.
        """
        if self.budget is None:
            raise HtsrError(
                f"The {name} strategy needs a budget.",
                "Give `T` 160 for 160 experts of all layers together, or `params`.",
            )
        if isinstance(self.budget, Params):
            return self._by_params(weights, self.budget.total)
        return self._by_experts(weights, self.budget.total, scores, beta)

    def record(self, name: str, **own: Any) -> StrategyRecord:
        """What the allocation file says of a strategy that shares ``by`` weights."""
        rounded = None if isinstance(self.budget, Params) else self.repair
        limits = {"min": self.bounds.low, "max": self.bounds.high}
        said: dict[str, Any] = {"repair": rounded, **limits}
        return StrategyRecord(name, **(said | own))

    def _by_experts(
        self, weights: Sequence[float], budget: int, scores: Sequence[float], beta: float
    ) -> tuple[list[float], list[int]]:
        """Eq. 6 and 7 in every group."""
        quota, counts = [0.0] * len(weights), [0] * len(weights)
        for group in self.groups:
            own = round(budget * len(group) / self.layers)
            shared = split([weights[i] for i in group], own)
            values = [scores[i] for i in group] if scores else shared
            whole = REPAIRS[self.repair](values, shared, own, beta, self.bounds)
            for i, q, n in zip(group, shared, whole, strict=True):
                quota[i], counts[i] = q, n
        return quota, counts

    def _by_params(self, weights: Sequence[float], params: int) -> tuple[list[float], list[int]]:
        """As eq. 6 shares experts, for as many of them as the parameters pay for."""
        costs = [unit.cost for unit in self.units if unit.cost is not None]
        if not any(cost.lora for cost in costs):
            raise HtsrError("There is no linear to spend parameters on.")
        parts = [0.0] * len(weights)
        for group in self.groups:
            total = math.fsum(weights[i] for i in group)
            for i in group:
                parts[i] = weights[i] / total * len(group) / self.layers
        return spend(parts, costs, params, self.bounds)
