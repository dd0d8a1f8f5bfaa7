"""A metric by layer: one line per role, or one line per model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from htsr_alloc.records import Matrix, Metrics
from htsr_alloc.records.tables import layer_values, mean_error, role_values
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.panels import (
    LABELS,
    Panel,
    legend_beside,
    mark_stacks,
    metrics_title,
    number_layers,
    stack,
)
from htsr_alloc.style import line_styles, plain

ERRORS = {"pl_alpha_hill": "alpha_se"}  # metric -> its standard error
MARKS = 16  # markers along a line, about; more would touch at 80 layers


def figure(inputs: Inputs) -> Figure:
    """One file: its roles and their mean. Several: the layers' means, one line each."""
    several = len(inputs.metrics) > 1
    if several:
        layers = max(len(metrics.layers) for _, metrics in inputs.metrics)
        drawn = (3.2, lambda axes: draw_models(axes, inputs.metrics, inputs.metric))
        return stack([drawn], layers, size=inputs.size)
    metrics = inputs.metrics[0][1]
    return stack(
        [panel(metrics, inputs.metric)], len(metrics.layers), metrics_title(metrics), inputs.size
    )


def panel(metrics: Metrics, metric: str) -> Panel:
    """The lines of one model, with the height that their legend needs."""
    roles = len({matrix.role for matrix in metrics.matrices})
    height = max(3.0, 0.19 * min(roles, 16) + 0.8)
    return height, lambda axes: draw_layers(axes, metrics, metric)


def draw_layers(axes: Axes, metrics: Metrics, metric: str) -> None:
    """One thin line a role, the layers' mean in bold; a gap where there is no value.

    A mean that stands for a part of its layer's matrices only is a hollow circle.
    """
    means = layer_values(metrics, metric)
    roles, table = role_values(metrics, metric)
    x = np.arange(len(means))
    draw_roles(axes, roles, table)
    bold = {"color": "black", "linewidth": 2.6, "marker": "o", "markersize": 3}
    axes.plot(x, means, label="mean", zorder=3, **bold)
    if metric in ERRORS:
        spread = mean_errors(metrics, ERRORS[metric])
        if np.isfinite(spread).any():
            axes.errorbar(x, means, spread, fmt="none", ecolor="black", label="± its error")
    partial = [layer.layer for layer in metrics.layers if layer.unfitted]
    if partial:
        axes.plot(
            partial,
            means[partial],
            color="black",
            marker="o",
            markerfacecolor="white",
            linestyle="none",
            label="mean, some unfitted",
            zorder=4,
        )
    axes.set_ylabel(LABELS[metric])
    axes.grid(True, axis="y")
    number_layers(axes, len(x))
    mark_stacks(axes, [layer.prefix for layer in metrics.layers])
    legend_beside(axes)


def draw_roles(axes: Axes, roles: Sequence[str], table: np.ndarray) -> None:
    """One thin line for each row of the (R, L) table; a gap where there is no value."""
    x = np.arange(table.shape[1])
    every = max(1, len(x) // MARKS)
    for i, (role, values, style) in enumerate(zip(roles, table, line_styles(), strict=False)):
        axes.plot(
            x,
            values,
            label=plain(role, 28),
            linewidth=0.9,
            markersize=3.2,
            markevery=marked(values, i % every, every),
            alpha=0.9,
            **style,
        )


def mean_errors(metrics: Metrics, error: str) -> np.ndarray:
    """(L,) standard errors of the layers' means; NaN where a fitted matrix has none."""
    own: list[list[Matrix]] = [[] for _ in metrics.layers]
    for matrix in metrics.matrices:
        own[matrix.layer].append(matrix)
    return np.array([mean_error(matrices, error) for matrices in own])


def draw_models(axes: Axes, models: Sequence[tuple[str, Metrics]], metric: str) -> None:
    """The layers' means of several files, one line each; by relative depth where their numbers of
    layers differ."""
    counts = {len(metrics.layers) for _, metrics in models}
    for (label, metrics), style in zip(models, line_styles(), strict=False):
        means = layer_values(metrics, metric)
        x = np.arange(len(means)) if len(counts) == 1 else relative_depth(len(means))
        axes.plot(
            x,
            means,
            label=plain(f"{label} ({metrics.settings.estimator})", 36),
            linewidth=1.6,
            markersize=4,
            markevery=max(1, len(x) // MARKS),
            **style,
        )
    axes.set_ylabel(f"{LABELS[metric]}, mean of a layer")
    axes.grid(True, axis="y")
    if len(counts) == 1:
        number_layers(axes, counts.pop())
    else:
        axes.set_xlabel("depth: first layer 0, last layer 1")
    legend_beside(axes)


def marked(values: np.ndarray, start: int, every: int) -> list[int]:
    """Where a line has markers: now and then, and at values between gaps, where it has no line."""
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    alone[start::every] = True
    return np.flatnonzero(alone).tolist()


def relative_depth(layers: int) -> np.ndarray:
    """(layers,) from 0, the first layer, to 1, the last; the only one of a model is at 0."""
    return np.arange(layers) / max(1, layers - 1)
