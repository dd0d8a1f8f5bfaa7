"""The number of eigenvalues in each fitted tail, by layer: a line per role."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from htsr_alloc.records import Metrics
from htsr_alloc.records.facts import SHORT
from htsr_alloc.records.tables import role_values
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.layers import draw_roles
from htsr_alloc.reports.plots.panels import (
    Panel,
    legend_beside,
    mark_stacks,
    metrics_title,
    number_layers,
    stack,
)


def figure(inputs: Inputs) -> Figure:
    """One model's tails."""
    metrics = inputs.metrics[0][1]
    return stack([panel(metrics)], len(metrics.layers), metrics_title(metrics), inputs.size)


def panel(metrics: Metrics) -> Panel:
    """The lines, with the height that their legend needs."""
    roles = len({matrix.role for matrix in metrics.matrices})
    return max(2.4, 0.19 * min(roles, 16) + 0.6), lambda axes: draw_tails(axes, metrics)


def draw_tails(axes: Axes, metrics: Metrics) -> None:
    """k of each role on a logarithmic axis (of a mixture's experts the mean); a dashed line below
    which a tail is short."""
    roles, table = role_values(metrics, "k")
    draw_roles(axes, roles, table)
    axes.axhline(SHORT, color="black", linestyle="--", linewidth=1, label=f"short: k < {SHORT}")
    count_axis(axes, table)
    axes.set_ylabel("eigenvalues in the tail, k")
    axes.grid(True, axis="y")
    number_layers(axes, table.shape[1])
    mark_stacks(axes, [layer.prefix for layer in metrics.layers])
    legend_beside(axes)


def count_axis(axes: Axes, counts: np.ndarray) -> None:
    """A logarithmic y axis with whole numbers, which holds the counts and ``SHORT``."""
    known = counts[np.isfinite(counts)]
    low, high = (float(f([*known, SHORT])) for f in (min, max))
    axes.set_yscale("log")
    axes.set_ylim(low / 1.2, high * 1.2)
    spread = high / low
    subs = (1, 2, 5) if spread < 30 else (1, 5) if spread < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))
