"""``allocate``: a request to an Allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from htsr_alloc import files
from htsr_alloc.allocation.budget import Experts, Params, Rank, Share, Stacks
from htsr_alloc.allocation.request import Request
from htsr_alloc.allocation.rounding import Bounds, repair_remainder
from htsr_alloc.allocation.scope import EVERYTHING, OVER, joined, of_stack
from htsr_alloc.allocation.scorefile import Scores
from htsr_alloc.allocation.scores import Metric
from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.allocation.strategies import Plan
from htsr_alloc.allocation.units import Unit, costed_layers, layer_units, linear_units, selected
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import (
    EXPERTS,
    RANKS,
    Allocation,
    Evidence,
    File,
    Metrics,
    Module,
    Parameters,
    Tool,
    loads,
)

NOTHING_ADAPTED = "no linear of this layer is adapted"


def allocate(
    metrics: Metrics | str | Path | None,
    request: Request | None = None,
    *,
    source: File | None = None,
    tool: Tool | None = None,
    **keywords: Any,
) -> Allocation:
    """Decide how many experts each layer, or each linear, gets.

    ``allocate(metrics, T=160, beta=2.5)`` is
    ``allocate(metrics, Request(AlphaLora(beta=2.5), Experts(160)))``.

    Args:
        metrics: what ``analyze`` found, or the path of its file; may be None where the strategy
            uses no score, or the scores are a file's, by layers.
        request: what is asked for.
        source: the metrics file, for the record.
        tool: what allocates, for the record.
        keywords: those of ``Request.of``, in place of ``request``.

    Raises:
        HtsrError: an impossible request, with what would work.
    """
    if request is None:
        request = Request.of(**keywords)
    elif keywords:
        raise TypeError(f"a Request, and {', '.join(keywords)} besides: give one of them")
    if isinstance(metrics, (str, Path)):
        path = Path(metrics)
        source = source or File(path.name, files.sha256(path))
        metrics = loads(Metrics, files.read_bytes(path), path.name)
    strategy, asked = request.strategy, request.budget
    if isinstance(asked, Stacks):
        each = [replace(request, budget=Experts(t), stack=name) for name, t in asked.totals]
        parts = [allocate(metrics, own, source=source, tool=tool) for own in each]
        return joined(parts, str(asked))
    metrics = scoped(metrics, request)
    if isinstance(asked, Rank):
        budget = asked.params(metrics, request.targets, request.linears)
    else:
        budget = asked.params(metrics) if isinstance(asked, Share) else asked
    metrics, signal = strategy.prepared(metrics, request.scores)
    prefixes = _prefixes(metrics, request)
    units = _units(metrics, prefixes, request, budget)
    ranks = isinstance(asked, Rank)
    facts: dict[str, Any] = {"targets": request.targets or None, "signal": signal}
    facts |= {"stack": request.stack}
    facts["score_over"] = None if request.score_over == EVERYTHING else request.score_over
    if ranks and metrics is not None and not request.targets:  # for exports: ranks need names
        facts["targets"] = tuple(sorted({matrix.role for matrix in selected(metrics, ())}))
    if request.scores is not None:
        values = _scores(request.scores, units, metrics, prefixes)
        units = [replace(unit, score=v) for unit, v in zip(units, values, strict=True)]
        facts |= request.scores.record(metrics)
    plan = strategy.plan(
        Sharing(units, len(prefixes), budget, request.pool, request.repair, request.bounds)
    )
    evidence = (_rows if request.pool is None else _means)(units, plan, prefixes)
    most = max(plan.counts) if ranks else request.top_k  # every rank works on every token
    modules = () if request.pool is None else _modules(units, plan, most)
    spent = None
    if isinstance(budget, Params):
        share = asked.part if isinstance(asked, Share) else None
        r = asked.r if isinstance(asked, Rank) else budget.r
        on = "metrics" if request.linears is None else "model"
        spent = Parameters(budget.total, _cost(units, plan), r, share, on)
    return Allocation(
        format=Allocation.FORMAT,
        version=Allocation.VERSION,
        budget=sum(row.experts for row in evidence),
        experts=tuple(row.experts for row in evidence),
        top_k=tuple(min(most, row.experts) for row in evidence),
        unit=RANKS if ranks else EXPERTS,
        tool=tool,
        model=metrics.model if metrics else None,
        metrics=source,
        strategy=replace(plan.record, **facts),
        evidence=tuple(evidence),
        modules=modules,
        parameters=spent,
    )


def scoped(metrics: Metrics | None, request: Request) -> Metrics | None:
    """The part of the metrics that the request is about.

    Raises:
        HtsrError: a stack that they do not have; a target that no matrix has.
    """
    if metrics is None:
        return None
    if request.stack is not None:
        metrics = of_stack(metrics, request.stack)
    return OVER[request.score_over](metrics, request.targets)


def _prefixes(metrics: Metrics | None, request: Request) -> Sequence[str | None]:
    """The blocks' names, None where they are unknown."""
    asked = request.layers
    if metrics is not None:
        known, what = [layer.prefix for layer in metrics.layers], "metrics"
    elif isinstance(request.scores, Scores):
        known, what = request.scores.prefixes, "scores"
    else:
        known, what = [None] * (asked or request.strategy.layers or 0), "request"
    if not known:
        raise HtsrError("The number of layers is unknown.", "Give `layers`, or metrics that do.")
    if asked not in (None, len(known)):
        raise HtsrError(f"`layers` {asked} contradicts the {len(known)} layers of the {what}.")
    return known


def _units(
    metrics: Metrics | None,
    prefixes: Sequence[str | None],
    request: Request,
    budget: Experts | Params | None,
) -> list[Unit]:
    r, routers = (budget.r, budget.routers) if isinstance(budget, Params) else (None, True)
    if request.pool is None and r is None:
        return layer_units(prefixes)
    if metrics is None:
        raise HtsrError(
            "Single linears and their parameters are known from metrics only.",
            "Run htsr analyze first, and name its file.",
        )
    if request.pool is not None:
        return linear_units(metrics, request.targets, r, routers)
    assert r is not None
    return costed_layers(metrics, request.targets, r, routers, request.linears)


def _scores(
    scores: Metric | Scores,
    units: Sequence[Unit],
    metrics: Metrics | None,
    prefixes: Sequence[str | None],
) -> list[float]:
    """The score of each unit; a layer that has none needs no score by a metric."""
    if units[0].matrix is not None or len(units) == len(prefixes):
        return scores.of(units, metrics)
    own = [unit.layer for unit in units]
    if isinstance(scores, Metric) and metrics is not None:
        return scores.of(units, replace(metrics, layers=tuple(metrics.layers[i] for i in own)))
    values = scores.of(layer_units(prefixes), metrics)
    return [values[i] for i in own]


def _rows(units: Sequence[Unit], plan: Plan, prefixes: Sequence[str | None]) -> list[Evidence]:
    rows = [
        Evidence(i, prefix, None, None, 0, NOTHING_ADAPTED) for i, prefix in enumerate(prefixes)
    ]
    for unit, quota, count in zip(units, plan.quotas, plan.counts, strict=True):
        prefix = prefixes[unit.layer]
        rows[unit.layer] = Evidence(unit.layer, prefix, unit.score, quota, count, plan.reason)
    return rows


def _modules(units: Sequence[Unit], plan: Plan, top_k: int) -> tuple[Module, ...]:
    rows = zip(units, plan.quotas, plan.counts, strict=True)
    return tuple(
        Module(unit.layer, unit.name, unit.matrix.role, unit.score, quota, n, min(top_k, n))
        for unit, quota, n in rows
        if unit.matrix is not None and unit.score is not None and quota is not None
    )


def _means(units: Sequence[Unit], plan: Plan, prefixes: Sequence[str | None]) -> list[Evidence]:
    """Each layer's mean count, rounded as eq. 7 rounds, so that the sum is kept."""
    columns: Any = ([unit.score for unit in units], plan.quotas, plan.counts)
    rows: list[tuple[int, str | None, list[float | None]]] = []
    for layer, prefix in enumerate(prefixes):
        own = [i for i, unit in enumerate(units) if unit.layer == layer]
        means = [math.fsum(c[i] for i in own) / len(own) if own else None for c in columns]
        rows.append((layer, prefix, means))
    counts = [means[-1] or 0.0 for *_, means in rows]
    total = round(math.fsum(counts))
    whole = repair_remainder(counts, total, Bounds(0)) if total else [0] * len(counts)
    return [
        Evidence(layer, prefix, score, quota, n, None if score is not None else NOTHING_ADAPTED)
        for (layer, prefix, (score, quota, _)), n in zip(rows, whole, strict=True)
    ]


def _cost(units: Sequence[Unit], plan: Plan) -> int:
    """Trainable parameters of the counts."""
    pairs = zip(units, plan.counts, strict=True)
    return sum(unit.cost.of(n) for unit, n in pairs if unit.cost is not None)
