"""An allocation as bars by layer, against uniform and, of experts, MoLA at the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from htsr_alloc.allocation import Mola, Uniform, mola_counts
from htsr_alloc.records import Allocation
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.panels import (
    Panel,
    legend_beside,
    mark_stacks,
    number_layers,
    stack,
)
from htsr_alloc.style import COLOURS, plain

MOLA = (2, 4, 6, 8)  # MoLA-2468, the paper's "inverted triangle"
BARS = "#B5DCF4"  # pale enough that the steps stand out in a grey print
MANY, DIGITS = 40, 80  # layers and digits for which 8 inches have room above the bars


def figure(inputs: Inputs) -> Figure:
    """One panel of bars for each allocation."""
    layers = max(len(record.experts) for _, record in inputs.allocations)
    return stack(panels(inputs.allocations), layers, size=inputs.size)


def panels(allocations: Sequence[tuple[str, Allocation]]) -> list[Panel]:
    """A titled panel for each (label, allocation)."""

    def panel(label: str, record: Allocation) -> Panel:
        def draw(axes: Axes) -> None:
            draw_allocation(axes, record)
            axes.set_title(title(label, record), loc="left")

        return 2.3, draw

    return [panel(*item) for item in allocations]


def title(label: str, allocation: Allocation) -> str:
    """The file and what it decided."""
    strategy = allocation.strategy
    beta = f", β = {strategy.beta:g}" if strategy and strategy.beta is not None else ""
    if allocation.holds_ranks and allocation.parameters is not None:
        return f"{plain(label, 40)}: the parameters of rank {allocation.parameters.r}{beta}"
    return f"{plain(label, 40)}: T = {allocation.budget}{beta}"


def baselines(allocation: Allocation) -> dict[str, list[float]]:
    """Name -> each layer's share of the allocation's budget, not yet rounded to whole experts; the
    allocation's own strategy is left out. Ranks have one baseline: the uniform rank."""
    layers, budget = len(allocation.experts), allocation.budget
    own = allocation.strategy.name if allocation.strategy else None
    if allocation.holds_ranks and allocation.parameters is not None:
        return {"uniform": [float(allocation.parameters.r)] * layers} if own != "uniform" else {}
    shares: dict[str, list[int]] = {}
    if own != Uniform.name:
        shares[Uniform.name] = [1] * layers
    if own != Mola.name and layers >= len(MOLA):
        shares["MoLA-2468"] = mola_counts(MOLA, layers)
    return {name: [share / sum(each) * budget for share in each] for name, each in shares.items()}


def draw_allocation(axes: Axes, allocation: Allocation) -> None:
    """Bars of the experts or ranks of each layer; steps of the baselines."""
    count = len(allocation.experts)
    name = plain(allocation.strategy.name, 28) if allocation.strategy else "allocation"
    bars = axes.bar(
        range(count),
        allocation.experts,
        width=0.8,
        color=BARS,
        edgecolor="black",
        linewidth=0.5,
        label=name,
    )
    edges = np.arange(count + 1) - 0.5
    looks: dict[str, dict[str, Any]] = {
        Uniform.name: {"color": "black", "linestyle": "--"},
        "MoLA-2468": {"color": COLOURS[1], "linestyle": "-"},
    }
    for label, shares in baselines(allocation).items():
        axes.stairs(shares, edges, baseline=None, label=label, linewidth=1.5, **looks[label])
    digits = sum(len(str(experts)) for experts in allocation.experts)
    room = min(1, axes.figure.bbox.width / axes.figure.dpi / 8)  # pyright: ignore[reportAttributeAccessIssue]
    if count <= MANY * room and digits <= DIGITS * room:
        for text in axes.bar_label(bars, fontsize=7, padding=1):  # legible on a baseline
            text.set(zorder=5, path_effects=[withStroke(linewidth=2, foreground="white")])
    mean = "mean of the linears' " if allocation.modules else ""
    axes.set_ylabel(mean + allocation.counted)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.1)
    number_layers(axes, count)
    mark_stacks(axes, [row.prefix for row in allocation.evidence])
    legend_beside(axes)
