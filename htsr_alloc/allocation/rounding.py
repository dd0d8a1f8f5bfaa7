"""Quotas to whole numbers within bounds (AlphaLoRA eq. 7).

s_i = round-half-even(q_i), repaired until sum(s) = T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError


@dataclass(frozen=True)
class Bounds:
    """Least and most experts a layer may get; ``high`` None is no limit."""

    low: int = 1
    high: int | None = None

    @property
    def words(self) -> str:
        """As errors name them."""
        return f"`low` {self.low}" + ("" if self.high is None else f" and `high` {self.high}")

    def check(self, budget: int, layers: int) -> None:
        """Raise HtsrError when no allocation of ``budget`` can keep them."""
        self.check_sides()
        if budget < 1:
            raise HtsrError(f"A budget of {budget} experts allocates nothing.", "Raise `T`.")
        if budget < layers * self.low:
            raise HtsrError(
                f"{budget} experts cannot give {layers} layers at least {self.low} each.",
                f"Use `T` {layers * self.low} or more, or `low` {budget // layers}.",
            )
        if self.high is not None and budget > layers * self.high:
            raise HtsrError(
                f"{budget} experts do not fit {layers} layers of at most {self.high} each.",
                f"Use `T` {layers * self.high} or less, or `high` {-(-budget // layers)}.",
            )

    def check_sides(self) -> None:
        """Raise HtsrError when they leave nothing to choose."""
        if self.low < 0 or (self.high is not None and self.high < max(self.low, 1)):
            raise HtsrError(f"There is no count within {self.words}.")

    def allow(self, count: int) -> bool:
        """Whether a layer may have this many."""
        return count >= self.low and (self.high is None or count <= self.high)


def repair_remainder(quota: Sequence[float], budget: int, bounds: Bounds) -> list[int]:
    """Eq. 7 on the scaled quota: +1 where q - s is largest, -1 where it is least.

    Without bounds this is the largest-remainder (Hamilton) method, and no count strays 1 or
    more from its quota. With bounds each count starts at the nearest allowed one. The first
    layer wins ties.

    Returns:
        Counts that sum to ``budget`` and keep ``bounds``.

    Raises:
        HtsrError: no such counts exist.
    """
    bounds.check(budget, len(quota))
    high = budget if bounds.high is None else bounds.high
    counts = [min(max(round(q), bounds.low), high) for q in quota]
    while (short := budget - sum(counts)) != 0:
        step = 1 if short > 0 else -1
        layers = [i for i, s in enumerate(counts) if bounds.allow(s + step)]
        # of quotas too small to change the difference the larger one is served first
        best = max(layers, key=lambda i: (step * (quota[i] - counts[i]), step * quota[i]))
        counts[best] += step
    return counts


def repair_official(
    scores: Sequence[float], quota: Sequence[float], budget: int, beta: float
) -> list[int]:
    """Eq. 7 as the released script has it: by v^beta - s with v^beta **unscaled**.

    While sum(s) < T: s[argmin(v^beta - s)] += 1; while it is larger: s[argmax(v^beta - s)] -= 1;
    the first layer wins ties. All corrections tend to land on one layer, whose count can even go
    negative.

    Returns:
        One count a layer, summing to ``budget``.

    Raises:
        HtsrError: v^beta overflows.
    """
    try:
        powers = [score**beta for score in scores]
    except OverflowError:
        raise HtsrError(
            f"The official repair needs v^{beta:g}, which is too large.", "Use `repair` remainder."
        ) from None
    counts = [round(q) for q in quota]
    layers = range(len(counts))
    while sum(counts) < budget:
        counts[min(layers, key=lambda i: powers[i] - counts[i])] += 1
    while sum(counts) > budget:
        counts[max(layers, key=lambda i: powers[i] - counts[i])] -= 1
    return counts


Numbers = Sequence[float]
Repair = Callable[[Numbers, Numbers, int, float, Bounds], list[int]]  # (v, q, T, beta, bounds)


def _remainder(
    scores: Numbers, quota: Numbers, budget: int, beta: float, bounds: Bounds
) -> list[int]:
    return repair_remainder(quota, budget, bounds)


def _official(
    scores: Numbers, quota: Numbers, budget: int, beta: float, bounds: Bounds
) -> list[int]:
    bounds.check(budget, len(scores))
    counts = repair_official(scores, quota, budget, beta)
    for layer, count in enumerate(counts):
        if count < 0 or not bounds.allow(count):
            wrong = "negative" if count < 0 else f"outside {bounds.words}"
            raise HtsrError(
                f"The official repair gives layer {layer} a count of {count}, which is {wrong}.",
                "Use `repair` remainder"
                + (", or `low` 0." if 0 <= count < bounds.low else ", or a larger `T`."),
            )
    return counts


REMAINDER = "remainder"  # the default
REPAIRS: dict[str, Repair] = {REMAINDER: _remainder, "official": _official}
