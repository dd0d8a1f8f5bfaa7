"""Why a layer has its count: what it would get if its mean left out one matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from htsr_alloc.allocation import AlphaLora, Bounds, Experts, Params, Rank, Request
from htsr_alloc.allocation import allocate as allocated
from htsr_alloc.allocation.decide import scoped
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics, StrategyRecord
from htsr_alloc.reports.explain import LayerParts, explain


@dataclass(frozen=True)
class Counted:
    """A layer's quota and count, and by tensor its count without it, the budget being the same.

    ``without`` is empty unless it was asked for.
    """

    quota: float
    count: int
    without: dict[str, int]


def explain_counts(
    allocation: Allocation, metrics: Metrics, layer: int | None = None
) -> tuple[tuple[LayerParts, ...], tuple[Counted, ...]]:
    """The parts of every layer's mean, or of one layer's, with its quota and count.

    The allocation is computed again from the metrics. ``layer`` is a number of the allocation's;
    where one is given, each of its matrices is left out of its mean in turn.

    Raises:
        HtsrError: counts that are not eq. 6 and 7 on layers' PL_Alpha_Hill, metrics that give
            other counts, or no such layer.
    """
    request = _request(allocation)
    metrics, request = scoped(metrics, request) or metrics, request.unscoped
    made = allocated(metrics, request)
    if made.experts != allocation.experts:
        raise HtsrError(
            "The allocation does not follow from these metrics.",
            "Give those that it was made from as `metrics`.",
        )
    parts = explain(metrics, layer)
    found: list[Counted] = []
    for row in parts:
        left_out = {} if layer is None else {part.tensor: part.without for part in row.parts}
        without = {
            tensor: allocated(_with(metrics, row.layer, mean), request).experts[row.layer]
            for tensor, mean in left_out.items()
            if mean is not None
        }
        found.append(
            Counted(made.evidence[row.layer].quota or 0.0, made.experts[row.layer], without)
        )
    return parts, tuple(found)


def _with(metrics: Metrics, layer: int, mean: float) -> Metrics:
    layers = list(metrics.layers)
    layers[layer] = replace(layers[layer], pl_alpha_hill=mean)
    return replace(metrics, layers=tuple(layers))


def _request(allocation: Allocation) -> Request:
    """What the allocation was asked for.

    Raises:
        HtsrError: its counts do not go by the layers' means of PL_Alpha_Hill, or by a model.
    """
    made = allocation.strategy
    if made is None or not _by_means(made):
        told = "no strategy" if made is None else f"{made.name} by {made.metric or 'no metric'}"
        raise HtsrError(
            "Only a count for each layer, by alphalora on pl_alpha_hill, is explained; this "
            f"allocation has {told}" + (", linear by linear." if allocation.modules else "."),
            "Explain its metrics alone: htsr explain METRICS.",
        )
    money = allocation.parameters
    if money is not None and money.counted_on == "model":
        raise HtsrError(
            "Its parameters were counted on the model's linears, which are not in the metrics.",
            "Explain its metrics alone: htsr explain METRICS.",
        )
    budget: Experts | Params | Rank = Experts(allocation.budget)
    if money is not None:
        rank = allocation.holds_ranks
        budget = Rank(money.r) if rank else Params(money.asked, money.r)
    return Request(
        AlphaLora(spread=made.spread) if made.spread is not None else AlphaLora(made.beta),
        budget,
        targets=made.targets or (),
        repair=made.repair or "remainder" if money is None else "remainder",
        bounds=Bounds(1 if made.min is None else made.min, made.max),
        stack=made.stack,
        score_over=made.score_over or "all",
    )


def _by_means(made: StrategyRecord) -> bool:
    by_alpha = made.name == "alphalora" and made.metric == "pl_alpha_hill" and made.scores is None
    return by_alpha and made.pool is None and "=" not in (made.stack or "")
