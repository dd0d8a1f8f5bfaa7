"""What is allocated by: one metric or several as one, of layers or of single linears."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from htsr_alloc.allocation.units import Unit
from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.records import METRICS, Metrics


@dataclass(frozen=True)
class Metric:
    """A metric of the metrics file, or several with weights as ``parse_metric`` reads them."""

    text: str = "pl_alpha_hill"

    @property
    def fitted(self) -> bool:
        """Whether an estimator has a part in it: Stable_Rank alone has none, nor windows."""
        return set(parse_metric(self.text)) != {"stable_rank"}

    def of(self, units: Sequence[Unit], metrics: Metrics | None) -> list[float]:
        """The score of each layer or linear.

        Raises:
            HtsrError: no metrics, an unknown metric, or one without a value.
        """
        if metrics is None:
            raise HtsrError("Scores by a metric need metrics.", "Run htsr analyze first.")
        if units[0].matrix is not None:
            return linear_scores(units, self.text)
        return layer_scores(metrics, self.text)

    def record(self, metrics: Metrics | None) -> dict[str, Any]:
        """What the allocation file says of the scores."""
        facts: dict[str, Any] = {"metric": self.text}
        if self.fitted and metrics is not None:
            facts |= {"estimator": metrics.settings.estimator, "farms": metrics.settings.farms}
        return facts


def parse_metric(text: str) -> dict[str, float]:
    """``pl_alpha_hill`` or ``pl_alpha_hill:0.5,stable_rank:0.5`` as weights by metric.

    Weights are scaled so that their absolute values sum to 1; one left out is 1. A negative
    weight turns a metric's direction round.

    Raises:
        HtsrError: an unknown metric, one named twice, or a weight that is zero or not a number.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, colon, number = (word.strip() for word in part.partition(":"))
        check_choice("metric", name, METRICS)
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = 0.0
        if name in weights or weight == 0 or not math.isfinite(weight):
            raise HtsrError(f"`metric` {text!r} is not like pl_alpha_hill:0.5,stable_rank:0.5.")
        weights[name] = weight
    total = sum(map(abs, weights.values()))
    return {name: weight / total for name, weight in weights.items()}


def combined(columns: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Several metrics as one positive score: weighted z-scores of the logarithms.

    With z_ji = (ln m_ji - mu_j) / sigma_j over the units i of metric j, and sum |w_j| = 1,

        v_i = exp( sum_j |w_j| mu_j + (sum_j |w_j| sigma_j) * sum_j w_j z_ji )

    Logs, because eq. 6 asks for ratios; z-scores, so that a metric's weight does not depend on
    how widely it happens to vary; and back on the metrics' mean scale, so that one metric alone
    gives itself and beta keeps its meaning.

    Args:
        columns: each metric's values, all positive.
        weights: one a metric.
    """
    if len(columns) == 1 and weights[0] == 1:
        return list(columns[0])
    logs = [[math.log(value) for value in column] for column in columns]
    means = [statistics.fmean(column) for column in logs]
    deviations = [statistics.pstdev(column, mean) for column, mean in zip(logs, means, strict=True)]
    centre = math.fsum(abs(w) * mean for w, mean in zip(weights, means, strict=True))
    width = math.fsum(abs(w) * sd for w, sd in zip(weights, deviations, strict=True))
    return [
        math.exp(
            centre
            + width
            * math.fsum(
                w * (column[i] - mean) / sd
                for w, column, mean, sd in zip(weights, logs, means, deviations, strict=True)
                if sd > 0
            )
        )
        for i in range(len(logs[0]))
    ]


def layer_scores(metrics: Metrics, metric: str) -> list[float]:
    """One score a layer.

    Args:
        metric: a metric, or several with weights as ``parse_metric`` reads them.

    Raises:
        HtsrError: unknown metric, or layers without a value.
    """
    weights = parse_metric(metric)
    columns: list[list[Any]] = []
    for name in weights:
        values = [getattr(layer, name) for layer in metrics.layers]
        missing = [x for x, v in zip(metrics.layers, values, strict=True) if v is None]
        if missing:
            raise HtsrError(
                f"{len(missing)} of {len(values)} layers have no {name}; the first is "
                f"{missing[0].prefix}: {missing[0].reason}.",
                "Analyze the whole checkpoint; do not leave out all matrices of a layer.",
            )
        columns.append(values)
    if not metrics.layers:
        raise HtsrError("The metrics hold no layers.")
    return _positive(columns, weights, [layer.prefix for layer in metrics.layers])


def linear_scores(units: Sequence[Unit], metric: str) -> list[float]:
    """One score a linear.

    Raises:
        HtsrError: unknown metric, or linears without a value.
    """
    weights = parse_metric(metric)
    columns: list[list[Any]] = []
    for name in weights:
        values = [getattr(unit.matrix, name) for unit in units]
        for unit, value in zip(units, values, strict=True):
            if value is None:
                raise HtsrError(
                    f"{unit.name} has no {name}: {unit.matrix and unit.matrix.reason}.",
                    "Allocate by layers, or name the other linears as `targets`.",
                )
        columns.append(values)
    return _positive(columns, weights, [unit.name for unit in units])


def _positive(
    columns: Sequence[Sequence[float]], weights: dict[str, float], names: Sequence[str]
) -> list[float]:
    if len(weights) > 1 or -1 in weights.values():
        for metric, column in zip(weights, columns, strict=True):
            for name, value in zip(names, column, strict=True):
                if value <= 0:
                    raise HtsrError(
                        f"{name} has {metric} {value:.6g}, and a combination needs values above "
                        "zero.",
                        "Combine others; pl_alpha_hill and stable_rank are always positive.",
                    )
    return combined(columns, list(weights.values()))
