"""Metrics as tables: one row a role, one column a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.records import METRICS, Matrix, Metrics


def layer_values(metrics: Metrics, metric: str) -> np.ndarray:
    """(L,) values of the layers; NaN where the file has none.

    Raises:
        HtsrError: unknown metric, no layers.
    """
    check_choice("metric", metric, METRICS)
    if not metrics.layers:
        raise HtsrError("The metrics hold no layers.")
    return _numbers([getattr(layer, metric) for layer in metrics.layers])


def by_role(metrics: Metrics) -> dict[str, dict[int, list[Matrix]]]:
    """Role -> layer -> its matrices (several where a mixture has experts), in the file's order."""
    found: dict[str, dict[int, list[Matrix]]] = {}
    for matrix in metrics.matrices:
        found.setdefault(matrix.role, {}).setdefault(matrix.layer, []).append(matrix)
    return found


def role_values(metrics: Metrics, name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The roles in the file's order, and (R, L) values of a metric or of ``k``.

    A mixture's experts of one role are averaged; NaN where no matrix of the role has a value.
    """
    found = by_role(metrics)
    table = np.full((len(found), len(metrics.layers)), np.nan)
    for row, layers in enumerate(found.values()):
        for layer, matrices in layers.items():
            values = [v for m in matrices if (v := getattr(m, name)) is not None]
            if values:
                table[row, layer] = np.mean(values)
    return tuple(found), table


def mean_error(matrices: Sequence[Matrix], error: str) -> float:
    """The standard error of the matrices' mean alpha; NaN where a fitted one has none."""
    found = [getattr(m, error) for m in matrices if m.pl_alpha_hill is not None]
    return float(np.linalg.norm(found)) / len(found) if found and None not in found else np.nan


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
