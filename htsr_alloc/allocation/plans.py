"""The strategies: units to quotas and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.patterns import mola_counts
from htsr_alloc.allocation.quotas import beta_of_spread, weights_of
from htsr_alloc.allocation.repair import REPAIRS, Bounds
from htsr_alloc.allocation.sharing import Budget, Shares, by_experts, by_params
from htsr_alloc.allocation.units import Unit, groups_of
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Strategy

BETA = 2.5  # the released command's default


@dataclass(frozen=True)
class Plan:
    """``reason`` says why there are no scores, if so."""

    strategy: Strategy
    quotas: Sequence[float | None]
    counts: Sequence[int]
    reason: str | None = None


def alphalora(
    units: Sequence[Unit],
    layers: int,
    budget: Budget,
    beta: float | None,
    spread: float | None,
    repair: str,
    bounds: Bounds,
    pool: str,
) -> Plan:
    """Eq. 6 and 7 on the units' scores, in each group of ``pool``."""
    if repair not in REPAIRS:
        raise HtsrError(f"There is no repair {repair!r}.", f"Choose from {', '.join(REPAIRS)}.")
    if beta is not None and spread is not None:
        raise HtsrError("--spread computes beta, so that --beta cannot be given too.")
    scores = [unit.score for unit in units if unit.score is not None]
    groups = groups_of(units, pool)
    if spread is not None:
        beta = beta_of_spread(([scores[i] for i in group] for group in groups), spread)
    beta = BETA if beta is None else beta
    weights = [0.0] * len(units)
    names = [f"Layer {unit.layer}" if unit.matrix is None else unit.name for unit in units]
    for group in groups:
        own = weights_of([scores[i] for i in group], beta, [names[i] for i in group])
        for i, weight in zip(group, own, strict=True):
            weights[i] = weight
    shares = Shares(weights, groups, layers, scores, beta)
    quota, counts = _share(shares, units, budget, repair, bounds)
    rule = repair if budget.params is None else None
    strategy = Strategy(
        "alphalora",
        beta=beta,
        repair=rule,
        min=bounds.low,
        max=bounds.high,
        spread=spread,
        pool=pool if units[0].matrix is not None else None,
    )
    return Plan(strategy, quota, counts)


def uniform(units: Sequence[Unit], budget: Budget, bounds: Bounds) -> Plan:
    """Equal weights."""
    return _by_weight([1.0] * len(units), units, budget, bounds, "uniform", None)


def mola(groups: Sequence[int], units: Sequence[Unit], budget: Budget, bounds: Bounds) -> Plan:
    """MoLA's counts as they are, or scaled to a budget."""
    counts = mola_counts(groups, len(units))
    if budget.params is not None or budget.experts not in (None, sum(counts)):
        weights = [float(count) for count in counts]
        return _by_weight(weights, units, budget, bounds, "mola", tuple(groups))
    for layer, count in enumerate(counts):
        if not bounds.allow(count):
            raise HtsrError(
                f"MoLA gives layer {layer} {count} experts, outside --min {bounds.low} "
                f"--max {bounds.high}."
            )
    strategy = Strategy("mola", min=bounds.low, max=bounds.high, groups=tuple(groups))
    return Plan(strategy, [float(count) for count in counts], counts, "mola uses no score")


def explicit(experts: Sequence[int], layers: int, budget: Budget) -> Plan:
    """The counts as given."""
    if len(experts) != layers:
        raise HtsrError(f"--experts lists {len(experts)} counts for {layers} layers.")
    if min(experts) < 0:
        raise HtsrError("--experts holds a negative count.")
    if budget.params is not None:
        raise HtsrError("--experts are given, so that no parameter budget can choose them.")
    if budget.experts not in (None, sum(experts)):
        raise HtsrError(f"--experts sums to {sum(experts)}, not to --T {budget.experts}.")
    return Plan(Strategy("explicit"), [None] * layers, experts, "the counts were given")


def _by_weight(weights, units, budget, bounds, name, groups) -> Plan:
    """Shares proportional to ``weights``, which are no scores of the model."""
    shares = Shares(weights, [list(range(len(units)))], len(units))
    quota, counts = _share(shares, units, budget, "remainder", bounds, name)
    rule = "remainder" if budget.params is None else None
    strategy = Strategy(name, repair=rule, min=bounds.low, max=bounds.high, groups=groups)
    return Plan(strategy, quota, counts, f"{name} uses no score")


def _share(shares, units, budget, repair, bounds, name="alphalora"):
    if budget.params is not None:
        if repair != "remainder":
            raise HtsrError(f"--repair {repair} repairs a sum of experts.", "Give --T.")
        return by_params(shares, [unit.cost for unit in units], budget.params, bounds)
    if budget.experts is None:
        raise HtsrError(
            f"The {name} strategy needs a budget.", "Give --T, as in --T 160, or --params 100M."
        )
    return by_experts(shares, budget.experts, repair, bounds)
