"""Two metrics files, or two allocations, set against each other. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics
from htsr_alloc.records.tables import layer_values, role_values
from htsr_alloc.reports.pairing import identified, in_like_words, unmatched


@dataclass(frozen=True)
class Pair:
    """One layer, role or matrix in both files.

    ``difference`` is other - reference; where a value is null so is it, and ``reason`` says why.
    """

    name: str
    reference: float | None
    other: float | None
    difference: float | None
    reason: str | None = None


@dataclass(frozen=True)
class Correlation:
    """Rank correlations over the ``n`` layers that have both values; ``reason`` where null."""

    n: int
    spearman: float | None
    kendall: float | None
    reason: str | None


@dataclass(frozen=True)
class MetricsComparison:
    """Two metrics files.

    Attributes:
        by: ``layer``, or ``relative depth`` where the numbers of layers differ: the file of more
            layers is interpolated at the depths of the other's (first layer 0, last layer 1), and
            matrices are not paired.
        roles: means over the layers.
        matrices: the same layer, role and expert in both: first those with a value in one file
            only, then the most changed.
        unmatched: matrices of one file only; with the reason where the other has them joined with
            others, or apart.
        settings: what the two were measured differently by, as ``estimator: official, ks``.
        mean_change, largest_change: of the layers' absolute differences.
    """

    metric: str
    by: str
    layers: tuple[Pair, ...]
    roles: tuple[Pair, ...]
    matrices: tuple[Pair, ...]
    unmatched: tuple[str, ...]
    settings: tuple[str, ...]
    correlation: Correlation
    mean_change: float | None
    largest_change: float | None

    def same(self, tolerance: float = 0.0) -> bool:
        """Whether layers and matrices pair up and none differs by more than the tolerance."""
        if self.unmatched or self.by != "layer":
            return False
        return all(_close(pair, tolerance) for pair in (*self.layers, *self.matrices))


@dataclass(frozen=True)
class AllocationComparison:
    """Two allocations over the same number of layers.

    Attributes:
        counted: experts or ranks.
        layers: those of each.
        modules: counts of linears, where one of the two has them; 0 of one that is not adapted.
        top_k: layers whose top_k differs.
        budgets: T of both.
        moved: how many change their layer: half the L1 distance, of which a difference of the
            budgets is first taken off.
    """

    counted: str
    layers: tuple[Pair, ...]
    modules: tuple[Pair, ...]
    top_k: tuple[int, ...]
    budgets: tuple[int, int]
    moved: int
    correlation: Correlation

    def same(self, tolerance: float = 0.0) -> bool:
        """Whether no count differs by more than the tolerance, nor a layer's top_k at all."""
        pairs = (*self.layers, *self.modules)
        return not self.top_k and all(_close(pair, tolerance) for pair in pairs)


def compare(
    reference: Metrics | Allocation, other: Metrics | Allocation, metric: str = "pl_alpha_hill"
) -> MetricsComparison | AllocationComparison:
    """Set two records of one kind against each other.

    Args:
        metric: of metrics, the one to compare.

    Raises:
        HtsrError: different kinds, an unknown metric, or allocations over different numbers of
            layers or of different things.
    """
    if isinstance(reference, Metrics) and isinstance(other, Metrics):
        return compare_metrics(reference, other, metric)
    if isinstance(reference, Allocation) and isinstance(other, Allocation):
        return compare_allocations(reference, other)
    raise HtsrError(
        "Metrics and allocations cannot be compared with each other.",
        "Name files of one kind.",
    )


def compare_metrics(reference: Metrics, other: Metrics, metric: str) -> MetricsComparison:
    """See ``compare``."""
    reference, other = in_like_words(reference, other)
    a, b = layer_values(reference, metric), layer_values(other, metric)
    if len(a) == len(b):
        sides = [
            (x.prefix, x.reason, y.reason)
            for x, y in zip(reference.layers, other.layers, strict=True)
        ]
        by, pairs, alone = "layer", *_matrices(reference, other, metric)
    else:
        few = min(len(a), len(b))
        depths = np.arange(few) / max(1, few - 1)
        a, b = _at_depths(a, depths), _at_depths(b, depths)
        sides = [(f"depth {depth:.2f}", None, None) for depth in depths]
        by, pairs, alone = "relative depth", (), ()
    layers = tuple(
        _pair(name, x, y, why_x, why_y)
        for (name, why_x, why_y), x, y in zip(sides, a, b, strict=True)
    )
    changes = [abs(pair.difference) for pair in layers if pair.difference is not None]
    return MetricsComparison(
        metric=metric,
        by=by,
        layers=layers,
        roles=_roles(reference, other, metric),
        matrices=pairs,
        unmatched=alone,
        settings=tuple(_settings(reference, other)),
        correlation=_correlation(a, b),
        mean_change=float(np.mean(changes)) if changes else None,
        largest_change=max(changes, default=None),
    )


def compare_allocations(reference: Allocation, other: Allocation) -> AllocationComparison:
    """See ``compare``."""
    counts = len(reference.experts), len(other.experts)
    if counts[0] != counts[1]:
        raise HtsrError(
            f"The allocations have {counts[0]} and {counts[1]} layers, so that their counts "
            "cannot be paired.",
            "Metrics files of different depths can be compared, by relative depth.",
        )
    if reference.unit != other.unit:
        raise HtsrError(
            f"One allocation is of {reference.counted}, the other of {other.counted}.",
            "Compare allocations that count the same.",
        )
    other = _in_order_of(other, [row.prefix for row in reference.evidence])
    rows = reference.evidence or other.evidence
    names = [row.prefix or f"layer {row.layer}" for row in rows]
    names = names or [f"layer {i}" for i in range(counts[0])]
    a, b = np.array(reference.experts), np.array(other.experts)
    surplus = abs(reference.budget - other.budget)
    return AllocationComparison(
        counted=reference.counted,
        layers=tuple(
            Pair(name, x, y, y - x)
            for name, x, y in zip(names, reference.experts, other.experts, strict=True)
        ),
        modules=_linears(reference, other),
        top_k=tuple(
            i for i, (x, y) in enumerate(zip(reference.top_k, other.top_k, strict=True)) if x != y
        ),
        budgets=(reference.budget, other.budget),
        moved=(int(np.abs(b - a).sum()) - surplus) // 2,
        correlation=_correlation(a, b),
    )


def _in_order_of(allocation: Allocation, prefixes: Sequence[str | None]) -> Allocation:
    """Its layers in the order of these blocks, if it has the same."""
    own = [row.prefix for row in allocation.evidence]
    if None in own or len(set(own)) < len(own) or set(own) != set(prefixes):
        return allocation
    at = [own.index(prefix) for prefix in prefixes]
    return replace(
        allocation,
        experts=tuple(allocation.experts[i] for i in at),
        top_k=tuple(allocation.top_k[i] for i in at),
        evidence=tuple(allocation.evidence[i] for i in at),
    )


def _linears(reference: Allocation, other: Allocation) -> tuple[Pair, ...]:
    a, b = ({m.name: m.experts for m in side.modules} for side in (reference, other))
    if bool(a) != bool(b):
        why = "one allocation is by linears, the other by layers"
        return tuple(Pair(name, a.get(name), b.get(name), None, why) for name in (*a, *b))
    names = dict.fromkeys((*a, *b))
    return tuple(_pair(name, a.get(name, 0), b.get(name, 0)) for name in names)


def _pair(
    name: str, a: float, b: float, why_a: str | None = None, why_b: str | None = None
) -> Pair:
    """A NaN stands for no value, for the reason ``why``."""
    first, second = (float(value) if np.isfinite(value) else None for value in (a, b))
    if first is not None and second is not None:
        return Pair(name, first, second, second - first)
    missing = [(first, why_a, "the reference"), (second, why_b, "the other file")]
    reason = "; ".join(
        f"no value in {where}" + (f": {why}" if why else "")
        for value, why, where in missing
        if value is None
    )
    return Pair(name, first, second, None, reason)


def _close(pair: Pair, tolerance: float) -> bool:
    return _change(pair) <= tolerance


def _change(pair: Pair) -> float:
    """The absolute difference; gaining or losing a value is the largest change."""
    if pair.difference is None:
        return 0.0 if pair.reference is None and pair.other is None else np.inf
    return abs(pair.difference)


def _at_depths(values: np.ndarray, depths: np.ndarray) -> np.ndarray:
    """(L,) values at relative depths in [0, 1], linearly between layers that both have one."""
    at = depths * (len(values) - 1)
    low = np.floor(at).astype(int)
    high = np.ceil(at).astype(int)
    share = at - low
    mixed = (1 - share) * values[low] + share * values[high]
    return np.where(share == 0, values[low], mixed)


def _matrices(
    reference: Metrics, other: Metrics, metric: str
) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    """The pairs, the most changed first; then what has no partner."""
    a, b = identified(reference.matrices), identified(other.matrices)
    pairs = []
    for key in a.keys() & b.keys():
        values = [getattr(side[key], metric) for side in (a, b)]
        x, y = (np.nan if value is None else value for value in values)
        pair = _pair(a[key].tensor, x, y, a[key].reason, b[key].reason)
        pairs.append((key, pair))
    pairs.sort(key=lambda item: (-_change(item[1]), item[0][0], item[1].name))
    return tuple(pair for _, pair in pairs), tuple(unmatched(a, b))


def _roles(reference: Metrics, other: Metrics, metric: str) -> tuple[Pair, ...]:
    a, b = _role_means(reference, metric), _role_means(other, metric)
    return tuple(_pair(role, a.get(role, np.nan), b.get(role, np.nan)) for role in {**a, **b})


def _role_means(metrics: Metrics, metric: str) -> dict[str, float]:
    roles, table = role_values(metrics, metric)
    known = [row[np.isfinite(row)] for row in table]
    return {
        role: float(row.mean()) if len(row) else np.nan
        for role, row in zip(roles, known, strict=True)
    }


def _settings(reference: Metrics, other: Metrics) -> Iterable[str]:
    a, b = asdict(reference.settings), asdict(other.settings)
    for name in ("estimator", "bins", "farms", "engine", "device", "include", "exclude"):
        if a[name] != b[name]:
            yield f"{name}: {_said(a[name])}, {_said(b[name])}"


def _said(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _correlation(a: np.ndarray, b: np.ndarray) -> Correlation:
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 2:
        return Correlation(len(a), None, None, "fewer than 2 layers have both values")
    if (a == a[0]).all() or (b == b[0]).all():
        return Correlation(len(a), None, None, "one side is constant")
    from scipy import stats

    rho, tau = np.asarray(stats.spearmanr(a, b))[0], np.asarray(stats.kendalltau(a, b))[0]
    return Correlation(len(a), float(rho), float(tau), None)
