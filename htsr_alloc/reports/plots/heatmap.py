"""Role by layer as colours, and the same cells as signed differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure

from htsr_alloc.records import Metrics
from htsr_alloc.records.tables import layer_values, role_values
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.panels import LABELS, Panel, metrics_title, number_layers, stack
from htsr_alloc.style import COLOUR_MAP, plain

FEW_LAYERS = 12  # up to this many, cells show their numbers


def figure(inputs: Inputs) -> Figure:
    """One model's roles by layer."""
    metrics = inputs.metrics[0][1]
    return stack(
        [panel(metrics, inputs.metric)], len(metrics.layers), metrics_title(metrics), inputs.size
    )


def panel(metrics: Metrics, metric: str) -> Panel:
    """The heat map, with a height for its roles."""
    roles = len({matrix.role for matrix in metrics.matrices})
    return height(roles), lambda axes: draw_heatmap(axes, metrics, metric)


def height(roles: int) -> float:
    """Inches for that many rows and the layer numbers."""
    return max(1.4, 0.22 * roles + 0.7)


def draw_heatmap(axes: Axes, metrics: Metrics, metric: str) -> None:
    """Role by layer; hatched where there is no value.

    The colours span the 2nd to the 98th percentile, so that one outlier does not make all others
    look alike.
    """
    layer_values(metrics, metric)  # raises if there is nothing to draw
    roles, table = role_values(metrics, metric)
    known = table[np.isfinite(table)]
    low, high = np.percentile(known, [2, 98]) if known.size else (0.0, 1.0)
    draw_cells(axes, roles, table, (float(low), float(high)), LABELS[metric])


def draw_cells(
    axes: Axes,
    roles: Sequence[str],
    table: np.ndarray,
    limits: tuple[float, float],
    label: str,
    colours: str = COLOUR_MAP,
    form: str = ".2f",
) -> None:
    """A (R, L) table as colours between the limits; the colour bar has a tip where values lie
    beyond them. NaN is hatched. Few layers show their numbers."""
    low, high = limits
    axes.patch.set(facecolor="white", hatch="xxx", edgecolor="0.7")
    known = table[np.isfinite(table)]
    below, above = bool((known < low).any()), bool((known > high).any())
    mesh = axes.pcolormesh(
        np.arange(table.shape[1] + 1) - 0.5,
        np.arange(len(roles) + 1) - 0.5,
        np.ma.masked_invalid(table),
        cmap=colours,
        vmin=low,
        vmax=high,
        edgecolor="white",
        linewidth=0.3,
    )
    axes.set_yticks(range(len(roles)), [plain(role, 28) for role in roles], fontsize=8)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    number_layers(axes, table.shape[1])
    Colorbar(
        axes.inset_axes((1.01, 0, 0.015, 1)),
        mesh,
        extend="both" if below and above else "min" if below else "max" if above else "neither",
        label=label,
    )
    if table.shape[1] <= FEW_LAYERS * min(1, axes.figure.bbox.width / axes.figure.dpi / 8):  # pyright: ignore[reportAttributeAccessIssue]
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                red, green, blue, _ = mesh.to_rgba(value)
                light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45
                colour = "black" if light else "white"
                axes.text(
                    column, row, f"{value:{form}}", ha="center", va="center", color=colour,
                    fontsize=7,
                )  # fmt: skip
