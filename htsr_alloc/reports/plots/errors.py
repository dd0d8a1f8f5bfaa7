"""How sure each α is: a row of panels for each role, with standard errors and lengths of tails."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix
from htsr_alloc.records.facts import SHORT
from htsr_alloc.records.tables import by_role, mean_error
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.panels import mark_stacks, metrics_title, number_layers
from htsr_alloc.reports.plots.tails import count_axis
from htsr_alloc.style import COLOURS, look, new_figure, plain

PALE = "#9CC9E8"  # Hill's part, under the black line of the whole error


def figure(inputs: Inputs) -> Figure:
    """Two panels a role: α with its errors, and k with its range.

    Raises:
        HtsrError: the metrics have no errors, or another metric is asked for.
    """
    metrics = inputs.metrics[0][1]
    if inputs.metric != "pl_alpha_hill":
        raise HtsrError("The errors view is about pl_alpha_hill.", "Remove `metric`.")
    if all(matrix.alpha_se is None for matrix in metrics.matrices):
        raise HtsrError(
            "The metrics have no standard errors.",
            "htsr fit computes them from the kept spectra; with FARMS there are none.",
        )
    roles = by_role(metrics)
    layers = len(metrics.layers)
    size = inputs.size or (min(13.0, 9.0 + 0.05 * layers), 1.15 * len(roles) + 1.0)
    with look():
        made = new_figure(*size)
        grid = made.subplots(len(roles), 2, sharex=True, squeeze=False)
        for (left, right), (role, own) in zip(grid, roles.items(), strict=True):
            draw_alphas(left, own)
            draw_counts(right, own)
            left.set_ylabel(plain(role, 20), fontsize=8)
            for axes in (left, right):
                axes.grid(True, axis="y")
                number_layers(axes, layers, 0.45)
                axes.set_xlabel("")
                mark_stacks(axes, [layer.prefix for layer in metrics.layers])
        for axes in grid[-1]:
            axes.set_xlabel("layer")
        grid[0, 0].set_title("α ± its error (blue: Hill's part; hollow: the start decides)", size=8)
        grid[0, 1].set_title(f"k and its range (dashed: {SHORT})", size=8)
        made.align_ylabels(grid[:, 0])
        made.suptitle(metrics_title(metrics))
    return made


def draw_alphas(axes: Axes, own: dict[int, list[Matrix]]) -> None:
    """One role's alphas; of a mixture's experts the mean with its error."""
    fitted = {
        layer: [(m, m.pl_alpha_hill) for m in matrices if m.pl_alpha_hill is not None]
        for layer, matrices in own.items()
    }
    fitted = {layer: found for layer, found in fitted.items() if found}
    means = [float(np.mean([alpha for _, alpha in found])) for found in fitted.values()]
    x = list(fitted)
    for error, line in (
        ("alpha_hill_se", {"ecolor": PALE, "elinewidth": 4}),
        ("alpha_se", {"ecolor": "black", "elinewidth": 0.9}),
    ):
        bars = [mean_error([m for m, _ in found], error) for found in fitted.values()]
        axes.errorbar(x, means, bars, fmt="none", **line)
    jumps = [any(m.start_jumps for m, _ in found) for found in fitted.values()]
    colours = ["white" if jump else "black" for jump in jumps]
    axes.scatter(x, means, 13, c=colours, edgecolors="black", linewidths=0.8, zorder=3)
    axes.yaxis.set_major_locator(MaxNLocator(4))


def draw_counts(axes: Axes, own: dict[int, list[Matrix]]) -> None:
    """One role's numbers of eigenvalues in the tail, with their ranges under the noise."""
    for layer, matrices in own.items():
        ks = [m.k for m in matrices if m.k is not None]
        ends = [k for m in matrices for k in (m.k_low, m.k_high) if k is not None]
        if ks and ends:
            axes.vlines(layer, min(ends), max(ends), color="black", linewidth=0.9)
        if ks:
            axes.plot(layer, np.mean(ks), color=COLOURS[0], marker="o", markersize=3)
    axes.axhline(SHORT, color="black", linestyle="--", linewidth=0.8)
    found = [k for ms in own.values() for m in ms for k in (m.k, m.k_low, m.k_high) if k]
    count_axis(axes, np.array(found, dtype=float))
