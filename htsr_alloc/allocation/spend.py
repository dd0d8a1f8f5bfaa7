"""A budget in parameters where counts cost unequally: met exactly, or the closest below."""

from __future__ import annotations

import math
from collections.abc import Sequence

from htsr_alloc.allocation.rounding import Bounds
from htsr_alloc.allocation.units import ExpertCost
from htsr_alloc.errors import HtsrError

HALVINGS = 200  # of an interval of floats: until nothing is between its ends
LARGEST = 1e300


def spend(
    weights: Sequence[float], costs: Sequence[ExpertCost], params: int, bounds: Bounds
) -> tuple[list[float], list[int]]:
    """Counts in proportion to ``weights`` for ``params`` parameters.

    The quotas are q_i = tau w_i, brought within the bounds, with the tau at which they cost
    ``params`` (costs interpolated between whole numbers). Each count is its quota rounded down,
    or one more. Among all such counts the costs come closest to ``params`` from below; of
    several that come as close, the one that rounds up the largest remainders first; on ties the
    larger weight, then the first.

    Args:
        weights: not negative, one a unit (a layer, or a linear).
        costs: of N experts on that unit.
        bounds: of every count.

    Returns:
        Quotas and counts.

    Raises:
        HtsrError: less than the lower bounds cost, or more than the upper ones do.
    """
    bounds.check_sides()
    least = sum(cost.of(bounds.low) for cost in costs)
    if params < max(least, 1):
        raise HtsrError(
            f"{params:,} parameters cannot give every count at least {bounds.low}, which takes "
            f"{least:,}.",
            f"Use `params` {max(least, 1)} or more, or a smaller `low` or `r`.",
        )
    if bounds.high is not None:
        most = sum(cost.of(bounds.high) for cost in costs)
        if params > most:
            raise HtsrError(
                f"{params:,} parameters are more than {bounds.high} experts everywhere, {most:,}.",
                f"Use `params` {most} or less, or a larger `high`.",
            )
    quota = _quotas(weights, costs, params, bounds)
    floors = [math.floor(q) for q in quota]
    gap = params - sum(cost.of(n) for cost, n in zip(costs, floors, strict=True))
    able = [i for i, n in enumerate(floors) if weights[i] > 0 and bounds.allow(n + 1)]
    able.sort(key=lambda i: (floors[i] - quota[i], -weights[i], i))
    steps = [costs[i].of(floors[i] + 1) - costs[i].of(floors[i]) for i in able]
    counts = list(floors)
    for i, up in zip(able, _closest(steps, gap), strict=True):
        counts[i] += up
    return quota, counts


def _quotas(
    weights: Sequence[float], costs: Sequence[ExpertCost], params: int, bounds: Bounds
) -> list[float]:
    """Quotas that cost ``params`` at most, and no less than rounding errors allow."""
    high = math.inf if bounds.high is None else bounds.high

    def at(tau: float) -> list[float]:
        return [min(max(tau * weight, bounds.low), high) for weight in weights]

    def cost(tau: float) -> float:
        return math.fsum(cost.at(q) for cost, q in zip(costs, at(tau), strict=True))

    below, above = 0.0, 1.0
    while cost(above) <= params and above < LARGEST:
        below, above = above, above * 2
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        if cost(middle) <= params:
            below = middle
        else:
            above = middle
    return at(below)


def _closest(steps: Sequence[int], gap: int) -> list[bool]:
    """Which steps to take so that their sum is the largest not above ``gap``.

    Of several choices the lexicographically first, True before False. Subset sums are bits of an
    integer, in units of the steps' common divisor: half a second for the 560 linears of an 80-layer
    model, whose widths share a power of two.
    """
    unit = math.gcd(*steps) or 1
    room = min(gap, sum(steps)) // unit
    reach = [1]  # reach[k]: which sums the last k steps can make
    mask = (1 << (room + 1)) - 1
    for step in reversed(steps):
        reach.append((reach[-1] | reach[-1] << (step // unit)) & mask)
    left = reach[-1].bit_length() - 1
    taken: list[bool] = []
    for k, step in enumerate(steps, 1):
        rest = left - step // unit
        taken.append(rest >= 0 and bool(reach[-1 - k] >> rest & 1))
        left = rest if taken[-1] else left
    return taken
