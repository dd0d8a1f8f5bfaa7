"""A fine-tuned model against its base: both means by layer, and the change role by role."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from htsr_alloc.errors import HtsrError
from htsr_alloc.records.tables import role_values
from htsr_alloc.reports.plots.heatmap import draw_cells, height
from htsr_alloc.reports.plots.inputs import Inputs
from htsr_alloc.reports.plots.layers import draw_models
from htsr_alloc.reports.plots.panels import LABELS, stack
from htsr_alloc.style import plain

SIGNED = "PuOr_r"  # white is no change; safe for colour-blind readers


def figure(inputs: Inputs) -> Figure:
    """Two metrics files, the base first.

    Raises:
        HtsrError: their numbers of layers differ.
    """
    (base_name, base), (other_name, other) = inputs.metrics
    counts = len(base.layers), len(other.layers)
    if counts[0] != counts[1]:
        raise HtsrError(
            f"The two models have {counts[0]} and {counts[1]} layers, so there is no difference "
            "by layer.",
            "Draw both by relative depth with `view` layers.",
        )
    names, tables = zip(*(role_values(one, inputs.metric) for one in (base, other)), strict=True)
    roles = tuple(dict.fromkeys((*names[0], *names[1])))
    first, second = (_aligned(roles, *found) for found in zip(names, tables, strict=True))
    change = second - first  # (R, L)
    known = np.abs(change[np.isfinite(change)])
    most = float(np.percentile(known, 98)) if known.size else 0.0
    limits = (-(most or 1.0), most or 1.0)
    label = f"Δ {LABELS[inputs.metric]}"
    panels = [
        (3.0, lambda axes: draw_models(axes, inputs.metrics, inputs.metric)),
        (
            height(len(roles)) + 0.3,
            lambda axes: draw_cells(axes, roles, change, limits, label, SIGNED, "+.2f"),
        ),
    ]
    title = f"{plain(other_name, 40)} minus {plain(base_name, 40)}"
    return stack(panels, counts[0], title, inputs.size)


def _aligned(roles: tuple[str, ...], own: tuple[str, ...], table: np.ndarray) -> np.ndarray:
    """The (R, L) table with a row for every role; NaN where the file lacks the role."""
    rows = dict(zip(own, table, strict=True))
    return np.array([rows.get(role, np.full(table.shape[1], np.nan)) for role in roles])
