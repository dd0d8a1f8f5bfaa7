"""All that the files have: lines, tails, heat map and allocations below each other."""

from __future__ import annotations

from matplotlib.figure import Figure

from htsr_alloc.errors import HtsrError
from htsr_alloc.reports.plots import allocation, heatmap, layers, tails
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.panels import Panel, metrics_title, stack


def figure(inputs: Inputs) -> Figure:
    """One model with its allocations, allocations alone, or several models.

    Raises:
        HtsrError: several models with allocations.
    """
    count = len(inputs.metrics)
    if count == 0:
        return allocation.figure(inputs)
    if count > 1:
        if inputs.allocations:
            raise HtsrError(
                "This view takes one metrics file with allocations.", "Draw the others separately."
            )
        return layers.figure(inputs)
    _, metrics = inputs.metrics[0]
    panels: list[Panel] = [
        layers.panel(metrics, inputs.metric),
        tails.panel(metrics),
        heatmap.panel(metrics, inputs.metric),
        *allocation.panels(inputs.allocations),
    ]
    return stack(panels, len(metrics.layers), metrics_title(metrics), inputs.size)
