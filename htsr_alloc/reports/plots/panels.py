"""Panels below each other over the same layers, and what they share: titles, axes, legends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from htsr_alloc.records import Metrics
from htsr_alloc.reports.plots.inputs import Size
from htsr_alloc.style import look, new_figure, plain

Panel = tuple[float, Callable[[Axes], None]]  # its height in inches, and what draws it

LABELS = {
    "pl_alpha_hill": "PL_Alpha_Hill",
    "alpha_hat": "Alpha_Hat",
    "stable_rank": "Stable_Rank",
}


def stack(
    panels: Sequence[Panel], layers: int, title: str | None = None, size: Size | None = None
) -> Figure:
    """One figure of the panels, from the top down; a given size is shared out by their heights."""
    heights = [inches for inches, _ in panels]
    width, total = size or (min(11.0, 8.0 + 0.04 * layers), sum(heights) + 0.4)
    with look():
        figure = new_figure(width, total)
        rows = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (_, draw) in zip(rows, panels, strict=True):
            draw(axes)
        if title is not None:
            figure.suptitle(title)
    return figure


def metrics_title(metrics: Metrics) -> str:
    """The model and how it was measured."""
    farms = ", FARMS windows" if metrics.settings.farms else ""
    estimator = plain(metrics.settings.estimator, 20)
    return f"{plain(metrics.model.name, 50)}, estimator {estimator}{farms}"


def number_layers(axes: Axes, count: int, part: float = 1.0) -> None:
    """The x axis: whole layers, as many numbers as there is room for on that part of the width."""
    width = part * axes.figure.bbox.width / axes.figure.dpi  # pyright: ignore[reportAttributeAccessIssue]
    axes.set_xlim(-0.5, count - 0.5)
    nbins = round(min(20, 2.5 * width))
    axes.xaxis.set_major_locator(
        MaxNLocator(nbins=nbins, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)
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
