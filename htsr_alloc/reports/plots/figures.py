"""Whole figures from records: which panels, how large, under which title."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Matrix, Metrics
from htsr_alloc.reports.plots.allocation import draw_allocation
from htsr_alloc.reports.plots.layers import draw_heatmap, draw_layers, draw_models
from htsr_alloc.reports.plots.spectra import draw_esd, no_spectrum, spectra_of
from htsr_alloc.reports.plots.style import look, new_figure, plain

MOST_PANELS = 120
MOST_BINS = 10_000
PANEL_COLUMNS = 8


def model_figure(
    metrics: Metrics | None,
    allocations: Sequence[tuple[str, Allocation]] = (),
    metric: str = "pl_alpha_hill",
    panels: Collection[str] = ("layers", "heatmap", "allocation"),
) -> Figure:
    """A model's panels below each other, over the same layers.

    Args:
        metrics: for ``layers`` and ``heatmap``.
        allocations: (label, allocation) for one panel of bars each.
        panels: which to draw.
    """
    layers = max(
        [len(metrics.layers)] if metrics else [len(a.experts) for _, a in allocations], default=0
    )
    roles = len({matrix.role for matrix in metrics.matrices}) if metrics else 0
    drawn: list[tuple[float, object]] = []  # (inches, what)
    if metrics is not None and "layers" in panels:
        drawn.append((max(3.0, 0.19 * min(roles, 16) + 0.8), "layers"))
    if metrics is not None and "heatmap" in panels:
        drawn.append((max(1.4, 0.22 * roles + 0.7), "heatmap"))
    if "allocation" in panels:
        drawn += [(2.3, item) for item in allocations]
    with look():
        heights = [inches for inches, _ in drawn]
        figure = new_figure(min(11.0, 8.0 + 0.04 * layers), sum(heights) + 0.4)
        rows = figure.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (_, what) in zip(rows, drawn, strict=True):
            if isinstance(what, tuple):
                draw_allocation(axes, what[1])
                axes.set_title(allocation_title(*what), loc="left")
            elif metrics is not None and what == "layers":
                draw_layers(axes, metrics, metric)
            elif metrics is not None:
                draw_heatmap(axes, metrics, metric)
        if metrics is not None:
            figure.suptitle(metrics_title(metrics))
    return figure


def models_figure(models: Sequence[tuple[str, Metrics]], metric: str = "pl_alpha_hill") -> Figure:
    """The layers' means of several metrics files, one line each."""
    with look():
        layers = max(len(metrics.layers) for _, metrics in models)
        figure = new_figure(min(11.0, 8.0 + 0.04 * layers), 3.6)
        draw_models(figure.subplots(), models, metric)
    return figure


def esd_figure(
    metrics: Metrics, matrices: Sequence[Matrix], spectra: Mapping[str, np.ndarray]
) -> Figure:
    """One ESD in full, or a grid of small ones.

    Raises:
        HtsrError: too many for one picture, or a spectrum is absent.
    """
    if len(matrices) > MOST_PANELS:
        raise HtsrError(
            f"{len(matrices)} spectra do not fit one picture (at most {MOST_PANELS}).",
            "Choose fewer with --matrix, --layer or --role.",
        )
    values, bins = spectra_of(matrices, spectra), metrics.settings.bins
    if not 1 <= bins <= MOST_BINS:
        raise HtsrError(f"A histogram of {bins} bins cannot be drawn (1 to {MOST_BINS}).")
    with look():
        if len(matrices) == 1:
            if values[0] is None:
                reason = matrices[0].reason
                raise HtsrError(f"{matrices[0].tensor} has no spectrum: {reason}.")
            figure = new_figure(6.4, 4.6)
            draw_esd(figure.subplots(), matrices[0], values[0], bins)
            shape = " x ".join(str(n) for n in matrices[0].shape)
            figure.suptitle(f"{metrics_title(metrics)}, {shape}", fontsize=9)
            return figure
        columns = min(PANEL_COLUMNS, max(3, round(len(matrices) ** 0.5)), len(matrices))
        rows = -(-len(matrices) // columns)
        figure = new_figure(max(6.0, 1.7 * columns + 0.4), 1.55 * rows + 0.7)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, matrix, own in zip(grid, matrices, values, strict=False):
            if own is None:
                no_spectrum(axes, matrix)
            else:
                draw_esd(axes, matrix, own, bins, small=True)
        for axes in grid[len(matrices) :]:
            axes.set_axis_off()
        figure.suptitle(f"{metrics_title(metrics)}: density of λ, fitted tail, xmin")
    return figure


def metrics_title(metrics: Metrics) -> str:
    """The model and how it was measured."""
    farms = ", FARMS windows" if metrics.settings.farms else ""
    estimator = plain(metrics.settings.estimator, 20)
    return f"{plain(metrics.model.name, 50)}, estimator {estimator}{farms}"


def allocation_title(label: str, allocation: Allocation) -> str:
    """The file and what it decided."""
    strategy = allocation.strategy
    beta = f", β = {strategy.beta:g}" if strategy and strategy.beta is not None else ""
    return f"{plain(label, 40)}: T = {allocation.budget}{beta}"
