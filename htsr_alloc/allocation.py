"""From layer scores to whole numbers of experts (AlphaLoRA eq. 6 and 7). Standard library only.

q_i = v_i^beta / sum(v^beta) * T          the quota (eq. 6)
s_i = round-half-even(q_i), repaired until sum(s) = T (eq. 7)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import METRICS, Allocation, Evidence, File, Metrics, Strategy, Tool

STRATEGIES = ("alphalora", "uniform", "mola", "explicit")


@dataclass(frozen=True)
class Bounds:
    """Least and most experts a layer may get; ``high`` None is no limit."""

    low: int = 1
    high: int | None = None

    def check(self, budget: int, layers: int) -> None:
        """Raise HtsrError when no allocation of ``budget`` can keep them."""
        if self.low < 0 or (self.high is not None and self.high < max(self.low, 1)):
            raise HtsrError(f"--min {self.low} --max {self.high} leaves nothing to choose.")
        if budget < 1:
            raise HtsrError(f"A budget of {budget} experts allocates nothing.", "Raise --T.")
        if budget < layers * self.low:
            raise HtsrError(
                f"{budget} experts cannot give {layers} layers at least {self.low} each.",
                f"Use --T {layers * self.low} or more, or --min {budget // layers}.",
            )
        if self.high is not None and budget > layers * self.high:
            raise HtsrError(
                f"{budget} experts do not fit {layers} layers of at most {self.high} each.",
                f"Use --T {layers * self.high} or less, or --max {-(-budget // layers)}.",
            )

    def allow(self, count: int) -> bool:
        """Whether a layer may have this many."""
        return count >= self.low and (self.high is None or count <= self.high)


def quotas(scores: Sequence[float], budget: int, beta: float) -> list[float]:
    """Eq. 6: q_i = v_i^beta / sum(v^beta) * T.

    Args:
        scores: v > 0, one a layer.
        budget: T, the experts of all layers together.
        beta: any finite exponent; 0 is uniform, a negative one inverts the order.

    Raises:
        HtsrError: a score that is not positive and finite, or a beta that is not finite.
    """
    if not math.isfinite(beta):
        raise HtsrError(f"beta must be a finite number, not {beta}.")
    for layer, score in enumerate(scores):
        if not (math.isfinite(score) and score > 0):
            raise HtsrError(
                f"Layer {layer} scores {score:.6g}, and eq. 6 needs scores above zero.",
                "Use another --metric; pl_alpha_hill and stable_rank are always positive.",
            )
    # Logs relative to the largest weight: v^beta alone overflows at large beta.
    logs = [beta * math.log(score) for score in scores]
    weights = [math.exp(value - max(logs)) for value in logs]
    total = math.fsum(weights)
    return [weight / total * budget for weight in weights]


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
        best = max(layers, key=lambda i: step * (quota[i] - counts[i]))
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
            f"The official repair needs v^{beta:g}, which is too large.", "Use --repair remainder."
        ) from None
    counts = [round(q) for q in quota]
    layers = range(len(counts))
    while sum(counts) < budget:
        counts[min(layers, key=lambda i: powers[i] - counts[i])] += 1
    while sum(counts) > budget:
        counts[max(layers, key=lambda i: powers[i] - counts[i])] -= 1
    return counts


def _remainder(scores, quota, budget, beta, bounds) -> list[int]:
    return repair_remainder(quota, budget, bounds)


def _official(scores, quota, budget, beta, bounds) -> list[int]:
    bounds.check(budget, len(scores))
    counts = repair_official(scores, quota, budget, beta)
    for layer, count in enumerate(counts):
        if count < 0 or not bounds.allow(count):
            wrong = "negative" if count < 0 else f"outside --min {bounds.low} --max {bounds.high}"
            raise HtsrError(
                f"The official repair gives layer {layer} a count of {count}, which is {wrong}.",
                "Use --repair remainder"
                + (", or --min 0." if 0 <= count < bounds.low else ", or a larger --T."),
            )
    return counts


REPAIRS: dict[str, Callable[..., list[int]]] = {"remainder": _remainder, "official": _official}


def mola_counts(groups: Sequence[int], layers: int) -> list[int]:
    """MoLA: each group of consecutive layers has one count of experts.

    Layer i of L belongs to group floor(i * G / L), so that group sizes differ by at most one
    when L is not divisible by G.

    Raises:
        HtsrError: no group, a negative count, or more groups than layers.
    """
    if not groups or min(groups) < 0:
        raise HtsrError("--groups needs counts such as 2468 or 4-6-8-10.")
    if len(groups) > layers:
        raise HtsrError(f"{len(groups)} groups do not fit {layers} layers.")
    return [groups[i * len(groups) // layers] for i in range(layers)]


def parse_groups(text: str) -> tuple[int, ...]:
    """``2468`` as 2, 4, 6, 8; ``4-6-8-10`` (or commas) as 4, 6, 8, 10.

    Without separators every digit is a group, except for the published ``46810``.

    Raises:
        HtsrError: anything else.
    """
    if text == "46810":  # MoLA's own name for 4, 6, 8, 10
        return 4, 6, 8, 10
    words = text.replace(",", "-").split("-") if "-" in text or "," in text else list(text)
    if not words or not all(word.isdecimal() for word in words):
        raise HtsrError(f"--groups {text!r} is not like 2468 or 4-6-8-10.")
    return tuple(int(word) for word in words)


def parse_counts(text: str) -> tuple[int, ...]:
    """``1,3,5`` as 1, 3, 5.

    Raises:
        HtsrError: anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise HtsrError(f"--experts {text!r} is not like 1,3,5.")
    return tuple(int(word) for word in words)


def layer_scores(metrics: Metrics, metric: str) -> list[float]:
    """One score a layer.

    Raises:
        HtsrError: unknown metric, or layers without a value.
    """
    if metric not in METRICS:
        raise HtsrError(f"There is no metric {metric!r}.", f"Choose from {', '.join(METRICS)}.")
    scores = [getattr(layer, metric) for layer in metrics.layers]
    missing = [layer for layer, v in zip(metrics.layers, scores, strict=True) if v is None]
    if missing:
        raise HtsrError(
            f"{len(missing)} of {len(scores)} layers have no {metric}; the first is "
            f"{missing[0].prefix}: {missing[0].reason}.",
            "Analyze the whole checkpoint, without --include or --exclude that empties a layer.",
        )
    if not scores:
        raise HtsrError("The metrics hold no layers.")
    return scores


def allocate(
    metrics: Metrics | None,
    *,
    strategy: str = "alphalora",
    budget: int | None = None,
    beta: float = 2.5,
    metric: str = "pl_alpha_hill",
    repair: str = "remainder",
    bounds: Bounds | None = None,
    top_k: int = 2,
    groups: Sequence[int] = (),
    experts: Sequence[int] = (),
    layers: int | None = None,
    source: File | None = None,
    tool: Tool | None = None,
) -> Allocation:
    """Decide how many experts each layer gets.

    Args:
        metrics: what ``analyze`` found; may be None for all strategies but ``alphalora``.
        strategy: ``alphalora`` (eq. 6 and 7 on ``metric``), ``uniform`` (equal scores),
            ``mola`` (``groups``; with a budget they are scaled to it) or ``explicit``
            (``experts`` as given).
        budget: T, experts of all layers together. Optional for ``mola`` and ``explicit``.
        beta, metric, repair, bounds: of eq. 6 and 7.
        top_k: K; a layer's own is min(K, its experts).
        layers: the number of layers, when there are no metrics.
        source: the metrics file, for the record.

    Raises:
        HtsrError: an impossible request, with what would work.
    """
    if top_k < 1:
        raise HtsrError(f"--top-k must be at least 1, not {top_k}.")
    count = len(metrics.layers) if metrics else (layers or len(experts))
    if count < 1:
        raise HtsrError("The number of layers is unknown.", "Give a metrics file or --layers.")
    if metrics and layers not in (None, count):
        raise HtsrError(f"--layers {layers} contradicts the {count} layers of the metrics.")
    chosen_bounds = bounds or Bounds()
    if strategy == "alphalora":
        plan = _alphalora(metrics, budget, beta, metric, repair, chosen_bounds)
    elif strategy == "uniform":
        plan = _by_weight([1.0] * count, _needed(budget, strategy), chosen_bounds, strategy)
    elif strategy == "mola":
        plan = _mola(groups, count, budget, chosen_bounds)
    elif strategy == "explicit":
        plan = _explicit(experts, count, budget)
    else:
        raise HtsrError(
            f"There is no strategy {strategy!r}.", f"Choose from {', '.join(STRATEGIES)}."
        )
    prefixes = [layer.prefix for layer in metrics.layers] if metrics else [None] * count
    return Allocation(
        format=Allocation.FORMAT,
        version=Allocation.VERSION,
        budget=sum(plan.counts),
        experts=tuple(plan.counts),
        top_k=tuple(min(top_k, n) for n in plan.counts),
        tool=tool,
        model=metrics.model if metrics else None,
        metrics=source,
        strategy=plan.strategy,
        evidence=tuple(
            Evidence(i, prefixes[i], plan.scores[i], plan.quotas[i], plan.counts[i], plan.reason)
            for i in range(count)
        ),
    )


@dataclass(frozen=True)
class _Plan:
    counts: Sequence[int]
    strategy: Strategy
    scores: Sequence[float | None]
    quotas: Sequence[float | None]
    reason: str | None


def _alphalora(metrics, budget, beta, metric, repair, bounds) -> _Plan:
    if metrics is None:
        raise HtsrError("The alphalora strategy needs metrics.", "Run htsr analyze first.")
    if repair not in REPAIRS:
        raise HtsrError(f"There is no repair {repair!r}.", f"Choose from {', '.join(REPAIRS)}.")
    budget = _needed(budget, "alphalora")
    scores = layer_scores(metrics, metric)
    quota = quotas(scores, budget, beta)
    counts = REPAIRS[repair](scores, quota, budget, beta, bounds)
    estimator = None if metric == "stable_rank" else metrics.settings.estimator
    strategy = Strategy("alphalora", metric, estimator, beta, repair, bounds.low, bounds.high)
    return _Plan(counts, strategy, scores, quota, None)


def _by_weight(weights, budget, bounds, name, groups=None) -> _Plan:
    """Shares proportional to ``weights``, which are no scores of the model."""
    total = math.fsum(weights)
    quota = [weight / total * budget for weight in weights]
    counts = repair_remainder(quota, budget, bounds)
    strategy = Strategy(name, repair="remainder", min=bounds.low, max=bounds.high, groups=groups)
    return _Plan(counts, strategy, [None] * len(counts), quota, f"{name} uses no score")


def _mola(groups, layers, budget, bounds) -> _Plan:
    counts = mola_counts(groups, layers)
    if budget is None or budget == sum(counts):
        for layer, count in enumerate(counts):
            if not bounds.allow(count):
                raise HtsrError(
                    f"MoLA gives layer {layer} {count} experts, outside --min {bounds.low} "
                    f"--max {bounds.high}."
                )
        strategy = Strategy("mola", min=bounds.low, max=bounds.high, groups=tuple(groups))
        quota = [float(count) for count in counts]
        return _Plan(counts, strategy, [None] * layers, quota, "mola uses no score")
    return _by_weight([float(c) for c in counts], budget, bounds, "mola", tuple(groups))


def _explicit(experts, layers, budget) -> _Plan:
    if len(experts) != layers:
        raise HtsrError(f"--experts lists {len(experts)} counts for {layers} layers.")
    if min(experts) < 0:
        raise HtsrError("--experts holds a negative count.")
    if budget not in (None, sum(experts)):
        raise HtsrError(f"--experts sums to {sum(experts)}, not to --T {budget}.")
    nothing = [None] * layers
    return _Plan(experts, Strategy("explicit"), nothing, nothing, "the counts were given")


def _needed(budget: int | None, strategy: str) -> int:
    if budget is None:
        raise HtsrError(f"The {strategy} strategy needs a budget.", "Give --T, as in --T 160.")
    return budget
