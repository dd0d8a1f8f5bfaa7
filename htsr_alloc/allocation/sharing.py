"""A budget, in experts or in parameters, shared among units: quotas, then counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.costs import Cost
from htsr_alloc.allocation.quotas import split
from htsr_alloc.allocation.repair import REPAIRS, Bounds
from htsr_alloc.allocation.spend import spend
from htsr_alloc.errors import HtsrError


@dataclass(frozen=True)
class Budget:
    """T experts of all layers together, or ``params`` trainable parameters at rank ``r``.

    Exactly one of the two is not None. ``share`` is what ``params`` was computed from, if so.
    """

    experts: int | None = None
    params: int | None = None
    r: int = 8
    share: float | None = None


@dataclass(frozen=True)
class Shares:
    """Who shares, and by what.

    Attributes:
        weights: v^beta, or any other weights, one a unit.
        groups: indices of units that share among themselves: all layers, or the linears of one
            role.
        layers: L. A group of n units gets n / L of T, which is T for a role that each layer has
            once.
        scores, beta: what the weights were made of, which the official repair needs.
    """

    weights: Sequence[float]
    groups: Sequence[Sequence[int]]
    layers: int
    scores: Sequence[float] = ()
    beta: float = 0.0


def by_experts(
    shares: Shares, budget: int, repair: str, bounds: Bounds
) -> tuple[list[float], list[int]]:
    """Eq. 6 and 7 in every group.

    Raises:
        HtsrError: bounds that cannot be kept.
    """
    quota, counts = [0.0] * len(shares.weights), [0] * len(shares.weights)
    for group in shares.groups:
        own = round(budget * len(group) / shares.layers)
        shared = split([shares.weights[i] for i in group], own)
        scores = [shares.scores[i] for i in group] if shares.scores else shared
        whole = REPAIRS[repair](scores, shared, own, shares.beta, bounds)
        for i, q, n in zip(group, shared, whole, strict=True):
            quota[i], counts[i] = q, n
    return quota, counts


def by_params(
    shares: Shares, costs: Sequence[Cost], params: int, bounds: Bounds
) -> tuple[list[float], list[int]]:
    """As eq. 6 shares experts, for as many of them as the parameters pay for.

    Raises:
        HtsrError: bounds that the parameters cannot keep.
    """
    if not costs or not any(cost.lora for cost in costs):
        raise HtsrError("There is no linear to spend parameters on.")
    weights = [0.0] * len(shares.weights)
    for group in shares.groups:
        total = math.fsum(shares.weights[i] for i in group)
        for i in group:
            weights[i] = shares.weights[i] / total * len(group) / shares.layers
    return spend(weights, costs, params, bounds)
