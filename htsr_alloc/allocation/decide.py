"""``allocate``: a request to an Allocation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.allocation import plans
from htsr_alloc.allocation.repair import Bounds, repair_remainder
from htsr_alloc.allocation.scorefile import Scores
from htsr_alloc.allocation.scores import layer_scores, linear_scores, parse_metric
from htsr_alloc.allocation.sharing import Budget
from htsr_alloc.allocation.units import Unit, costed_layers, layer_units, linear_units
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import (
    Allocation,
    Evidence,
    File,
    Metrics,
    Module,
    Parameters,
    Strategy,
    Tool,
    loads,
)

STRATEGIES = ("alphalora", "uniform", "mola", "explicit")
POOLS = ("role", "all")


def allocate(
    metrics: Metrics | str | Path | None,
    *,
    T: int | None = None,
    beta: float | None = None,
    strategy: str = "alphalora",
    budget: int | None = None,
    params: int | None = None,
    target_share: float | None = None,
    r: int = 8,
    spread: float | None = None,
    metric: str = "pl_alpha_hill",
    scores: Scores | None = None,
    per_module: bool = False,
    pool: str = "role",
    targets: Sequence[str] = (),
    repair: str = "remainder",
    bounds: Bounds | None = None,
    top_k: int = 2,
    groups: Sequence[int] = (),
    experts: Sequence[int] = (),
    layers: int | None = None,
    source: File | None = None,
    tool: Tool | None = None,
) -> Allocation:
    """Decide how many experts each layer, or each linear, gets.

    Args:
        metrics: what ``analyze`` found, or the path of its file; may be None for all strategies
            but ``alphalora``, and for that one where ``scores`` are by layers.
        T: experts of all layers together; optional for ``mola`` and ``explicit``.
        beta: exponent of eq. 6, 2.5 unless ``spread`` is given.
        strategy: ``alphalora`` (eq. 6 and 7 on ``metric``), ``uniform`` (equal scores),
            ``mola`` (``groups``; with a budget they are scaled to it) or ``explicit``
            (``experts`` as given).
        budget: another name of T.
        params: trainable parameters in place of T: spent exactly, or the closest below.
        target_share: the same as a share of the base's parameters, 0.01 for 1 %.
        r: rank of one expert, on which its parameters depend.
        spread: largest over smallest quota, for which beta is then solved.
        metric: a metric, or several as ``pl_alpha_hill:0.5,stable_rank:0.5``.
        scores: of a file (``read_scores``), in place of a metric.
        per_module: a count for each linear. T is then the experts of each role's linears
            together, so that T experts cost what they cost by layers.
        pool: ``role`` compares a linear with those of its role only, ``all`` with every other.
        targets: roles (``q_proj``) that are adapted, for ``params`` and ``per_module``; all by
            default.
        repair, bounds: of eq. 7; a parameter budget has a rounding of its own
            (``allocation.spend``).
        top_k: K; a layer's own is min(K, its experts).
        layers: the number of layers, when there are no metrics.
        source: the metrics file, for the record.

    Raises:
        HtsrError: an impossible request, with what would work.
    """
    if isinstance(metrics, (str, Path)):
        path = Path(metrics)
        source = source or File(path.name, files.sha256(path))
        metrics = loads(Metrics, files.read_bytes(path), path.name)
    if top_k < 1:
        raise HtsrError(f"--top-k must be at least 1, not {top_k}.")
    chosen = Budget(_one_budget(T, budget), _params(metrics, params, target_share), r, target_share)
    _check_budget(chosen)
    if strategy != "alphalora" and (per_module or scores is not None or spread is not None):
        raise HtsrError(
            f"The {strategy} strategy uses no score, so that --per-module, --scores and --spread "
            "mean nothing."
        )
    if targets and not per_module and chosen.params is None:
        raise HtsrError(
            "--target says which linears --per-module or a parameter budget is about.",
            "A count for each layer holds for whatever is adapted: leave it out.",
        )
    if pool != "role" and not per_module:
        raise HtsrError(f"--pool {pool} is about --per-module.", "Give both, or neither.")
    if groups and strategy != "mola":
        raise HtsrError("--groups are the mola strategy's.", "Give --strategy mola with them.")
    if experts and strategy != "explicit":
        raise HtsrError(
            "--experts are the explicit strategy's.", "Give --strategy explicit with them."
        )
    limits = bounds or Bounds()
    prefixes = _prefixes(metrics, layers, experts, scores)
    units = _units(metrics, prefixes, per_module, targets, chosen)
    if strategy == "alphalora":
        values = _scores(metrics, units, per_module, metric, scores)
        units = [replace(unit, score=v) for unit, v in zip(units, values, strict=True)]
        plan = plans.alphalora(
            units, len(prefixes), chosen, beta, spread, repair, limits, _pool(pool)
        )
        plan = replace(plan, strategy=_by(plan.strategy, metrics, metric, scores))
    elif strategy == "uniform":
        plan = plans.uniform(units, chosen, limits)
    elif strategy == "mola":
        plan = plans.mola(groups, units, chosen, limits)
    elif strategy == "explicit":
        plan = plans.explicit(experts, len(units), chosen)
    else:
        raise HtsrError(
            f"There is no strategy {strategy!r}.", f"Choose from {', '.join(STRATEGIES)}."
        )
    evidence = (_means if per_module else _rows)(units, plan, prefixes)
    return Allocation(
        format=Allocation.FORMAT,
        version=Allocation.VERSION,
        budget=sum(row.experts for row in evidence),
        experts=tuple(row.experts for row in evidence),
        top_k=tuple(min(top_k, row.experts) for row in evidence),
        tool=tool,
        model=metrics.model if metrics else None,
        metrics=source,
        strategy=replace(plan.strategy, targets=tuple(targets) or None),
        evidence=tuple(evidence),
        modules=_modules(units, plan, top_k) if per_module else (),
        parameters=_spent(units, plan, chosen),
    )


def _one_budget(T: int | None, budget: int | None) -> int | None:
    if T is not None and budget is not None:
        raise HtsrError("budget is another name of T.", "Give one of them.")
    return budget if T is None else T


def _params(metrics: Metrics | None, params: int | None, share: float | None) -> int | None:
    if share is None:
        return params
    if params is not None:
        raise HtsrError("--params and --target-share are both budgets.", "Give one of them.")
    if not 0 < share <= 1:
        raise HtsrError(f"A share of the base's parameters is above 0 and at most 1, not {share}.")
    base = metrics.model.parameters if metrics else None
    if base is None:
        raise HtsrError(
            "How many parameters the base has is not known.",
            "Analyze it again, which writes it down, or give --params.",
        )
    return math.floor(share * base)


def _check_budget(budget: Budget) -> None:
    if budget.params is not None and budget.experts is not None:
        raise HtsrError("--T and a parameter budget are both given.", "Give one of them.")
    if budget.r < 1:
        raise HtsrError(f"--r must be at least 1, not {budget.r}.")


def _pool(pool: str) -> str:
    if pool not in POOLS:
        raise HtsrError(f"There is no pool {pool!r}.", f"Choose from {', '.join(POOLS)}.")
    return pool


def _prefixes(metrics, layers, experts, scores) -> list[str | None]:
    """The blocks' names, None where they are unknown."""
    if metrics is not None:
        if layers not in (None, len(metrics.layers)):
            raise HtsrError(
                f"--layers {layers} contradicts the {len(metrics.layers)} layers of the metrics."
            )
        return [layer.prefix for layer in metrics.layers]
    if scores is not None and scores.key == "prefix":
        return list(scores.values)
    count = layers or len(experts) or (len(scores.values) if scores is not None else 0)
    if count < 1:
        raise HtsrError("The number of layers is unknown.", "Give a metrics file or --layers.")
    return [None] * count


def _units(metrics, prefixes, per_module, targets, budget) -> list[Unit]:
    if metrics is None:
        if per_module or budget.params is not None:
            raise HtsrError(
                "Single linears and their parameters are known from metrics only.",
                "Run htsr analyze first, and name its file.",
            )
        return layer_units(prefixes)
    if per_module:
        return linear_units(metrics, targets, None if budget.params is None else budget.r)
    if budget.params is not None:
        return costed_layers(metrics, targets, budget.r)
    return layer_units(prefixes)


def _scores(metrics, units, per_module, metric, scores) -> list[float]:
    if scores is not None:
        if metric != "pl_alpha_hill":
            raise HtsrError(f"--scores come in place of --metric {metric}.", "Give one of them.")
        if (scores.key == "module") != per_module:
            wrong = "by linears" if scores.key == "module" else "by layers"
            hint = "Add --per-module." if scores.key == "module" else "Leave --per-module out."
            raise HtsrError(f"{scores.source.file} has scores {wrong}.", hint)
        by_number = scores.key == "layer"
        return scores.ordered([str(u.layer) if by_number else u.name for u in units])
    if metrics is None:
        raise HtsrError("The alphalora strategy needs metrics.", "Run htsr analyze first.")
    return linear_scores(units, metric) if per_module else layer_scores(metrics, metric)


def _by(strategy: Strategy, metrics, metric: str, scores: Scores | None) -> Strategy:
    """The strategy, with what its scores were."""
    if scores is not None:
        return replace(strategy, metric=scores.column, scores=scores.source)
    if set(parse_metric(metric)) == {"stable_rank"}:  # no estimator, no windows
        return replace(strategy, metric=metric)
    settings = metrics.settings
    return replace(strategy, metric=metric, estimator=settings.estimator, farms=settings.farms)


def _rows(units, plan, prefixes) -> list[Evidence]:
    return [
        Evidence(unit.layer, prefix, unit.score, quota, count, plan.reason)
        for unit, prefix, quota, count in zip(
            units, prefixes, plan.quotas, plan.counts, strict=True
        )
    ]


def _modules(units, plan, top_k: int) -> tuple[Module, ...]:
    return tuple(
        Module(unit.layer, unit.name, unit.matrix.role, unit.score, quota, n, min(top_k, n))
        for unit, quota, n in zip(units, plan.quotas, plan.counts, strict=True)
    )


def _means(units, plan, prefixes) -> list[Evidence]:
    """Each layer's mean count, rounded as eq. 7 rounds, so that the sum is kept."""
    rows = []
    for layer, prefix in enumerate(prefixes):
        own = [i for i, unit in enumerate(units) if unit.layer == layer]
        columns = ([u.score for u in units], plan.quotas, plan.counts)
        means = [math.fsum(c[i] for i in own) / len(own) if own else None for c in columns]
        rows.append((layer, prefix, *means))
    counts = [mean or 0.0 for *_, mean in rows]
    total = round(math.fsum(counts))
    whole = repair_remainder(counts, total, Bounds(0)) if total else [0] * len(counts)
    nothing = "no linear of this layer is adapted"
    return [
        Evidence(layer, prefix, score, quota, n, None if score is not None else nothing)
        for (layer, prefix, score, quota, _), n in zip(rows, whole, strict=True)
    ]


def _spent(units, plan, budget: Budget) -> Parameters | None:
    if budget.params is None:
        return None
    spent = sum(unit.cost.of(n) for unit, n in zip(units, plan.counts, strict=True))
    return Parameters(budget.params, spent, budget.r, budget.share)
