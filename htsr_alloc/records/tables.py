"""Metrics as tables: one row a role, one column a layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.records import METRICS, Metrics


def layer_values(metrics: Metrics, metric: str) -> np.ndarray:
    """(L,) values of the layers; NaN where the file has none.

    Raises:
        HtsrError: unknown metric, no layers.
    """
    check_choice("metric", metric, METRICS)
    if not metrics.layers:
        raise HtsrError("The metrics hold no layers.")
    return _numbers([getattr(layer, metric) for layer in metrics.layers])


def role_values(metrics: Metrics, metric: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The roles in the file's order, and (R, L) values.

    A mixture's experts of one role are averaged; NaN where no matrix of the role has a value.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for matrix in metrics.matrices:
        own = found.setdefault(matrix.role, {}).setdefault(matrix.layer, [])
        if (value := getattr(matrix, metric)) is not None:
            own.append(value)
    table = np.full((len(found), len(metrics.layers)), np.nan)
    for row, layers in enumerate(found.values()):
        for layer, values in layers.items():
            if values:
                table[row, layer] = np.mean(values)
    return tuple(found), table


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
