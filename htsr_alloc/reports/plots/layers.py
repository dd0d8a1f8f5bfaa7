"""A metric over the layers: lines by role, a heat map, several models in one picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.ticker import MaxNLocator

from htsr_alloc.records import Metrics
from htsr_alloc.records.tables import layer_values, role_values
from htsr_alloc.reports.plots.style import COLOUR_MAP, LABELS, line_styles, plain

MARKS = 16  # markers along a line, about; more would touch at 80 layers
FEW_LAYERS = 12  # up to which a heat map's cells carry their numbers


def draw_layers(axes: Axes, metrics: Metrics, metric: str) -> None:
    """One thin line a role, the layers' mean in bold; a gap where there is no value.

    A mean that stands for a part of its layer's matrices only is a hollow circle.
    """
    means = layer_values(metrics, metric)
    roles, table = role_values(metrics, metric)
    x = np.arange(len(means))
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
    bold = {"color": "black", "linewidth": 2.6, "marker": "o", "markersize": 3}
    axes.plot(x, means, label="mean", zorder=3, **bold)
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


def draw_heatmap(axes: Axes, metrics: Metrics, metric: str) -> None:
    """Role by layer; hatched where there is no value.

    The colours span the values from the 2nd to the 98th percentile, so that one outlier does not
    make all others alike; the colour bar has a tip where values lie beyond.
    """
    layer_values(metrics, metric)  # refuses what cannot be drawn
    roles, table = role_values(metrics, metric)
    axes.patch.set(facecolor="white", hatch="xxx", edgecolor="0.7")
    known = table[np.isfinite(table)]
    low, high = np.percentile(known, [2, 98]) if known.size else (0.0, 1.0)
    below, above = bool((known < low).any()), bool((known > high).any())
    mesh = axes.pcolormesh(
        np.arange(table.shape[1] + 1) - 0.5,
        np.arange(len(roles) + 1) - 0.5,
        np.ma.masked_invalid(table),
        cmap=COLOUR_MAP,
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
    beside = axes.inset_axes((1.01, 0, 0.015, 1))
    Colorbar(
        beside,
        mesh,
        extend="both" if below and above else "min" if below else "max" if above else "neither",
        label=LABELS[metric],
    )
    if table.shape[1] <= FEW_LAYERS:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                light = value > (low + high) / 2
                colour = "black" if light else "white"
                axes.text(
                    column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7
                )


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


def number_layers(axes: Axes, count: int) -> None:
    """The x axis: whole layers, as many numbers as there is room for."""
    axes.set_xlim(-0.5, count - 0.5)
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=20, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
    )
    axes.set_xlabel("layer")


def mark_stacks(axes: Axes, prefixes: Sequence[str | None]) -> None:
    """A dotted line where an encoder ends and a decoder starts."""
    stacks = [(prefix or "").rpartition(".")[0] for prefix in prefixes]
    for i in range(1, len(stacks)):
        if stacks[i] != stacks[i - 1]:
            axes.axvline(i - 0.5, color="0.4", linestyle=":", linewidth=1)


def legend_beside(axes: Axes) -> None:
    """A legend right of the axes, where it hides no line."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, ncols=1 + len(handles) // 16
    )
