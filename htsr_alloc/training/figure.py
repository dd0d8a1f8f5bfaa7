"""The picture of a run: its losses, and the load of every router at its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr_alloc import files
from htsr_alloc.lora_moe import RouterReport, routing_report
from htsr_alloc.lora_moe.routing import draw_load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS, BATCH = 64, 8  # examples that the load is taken from
MOST_TICKS = 16


def plot_run(
    model: Any,
    log: Sequence[Mapping[str, Any]],
    examples: Sequence[Any],
    path: Path,
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
) -> None:
    """Write the figure of a trained model.

    Raises:
        HtsrError: the file cannot be written.
    """
    from htsr_alloc import style

    loads = _loads(model, examples, collate)
    with style.look():
        figure = _drawn(log, loads)
        try:
            figure.savefig(path)
        except OSError as error:
            raise files.cannot("write", path, error) from None


def _drawn(log: Sequence[Mapping[str, Any]], loads: list[RouterReport]) -> Figure:
    """The losses by step, and the load of every router if there are any."""
    from htsr_alloc.style import COLOURS, new_figure

    figure = new_figure(10 if loads else 5, 4)
    panels = figure.subplots(1, 2 if loads else 1, squeeze=False)[0]
    kinds = (("loss", "training"), ("eval_loss", "validation"))
    for (name, label), colour in zip(kinds, COLOURS, strict=False):
        points = [(row["step"], row[name]) for row in log if name in row]
        if points:
            panels[0].plot(*zip(*points, strict=True), marker=".", color=colour, label=label)
    panels[0].set_xlabel("step")
    panels[0].set_ylabel("loss")
    lines = list(panels[0].lines)
    balance = [(row["step"], row["router_aux_loss"]) for row in log if "router_aux_loss" in row]
    if balance:
        twin = panels[0].twinx()
        steps, values = zip(*balance, strict=True)
        lines += twin.plot(
            steps, values, color="0.6", linewidth=0.8, label="router_aux_loss (right)"
        )
    panels[0].legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    if loads:
        draw_load(panels[1], loads)
        _mark_layers(panels[1], [report.name for report in loads])
    return figure


def _mark_layers(axes: Axes, names: Sequence[str]) -> None:
    """Tick the first router of each layer, or of every second or third: as many as there is room
    for."""
    numbers = [
        found[0] if (found := re.findall(r"(?<=\.)\d+(?=\.|$)", name)) else "" for name in names
    ]
    first = [i for i, own in enumerate(numbers) if own and own not in numbers[:i]]
    chosen = first[:: 1 + len(first) // MOST_TICKS]
    axes.set_yticks(chosen, [numbers[i] for i in chosen])
    axes.set_ylabel(f"layer ({len(names)} routers)")


def _loads(
    model: Any, examples: Sequence[Any], collate: Callable[[Sequence[Any]], Mapping[str, Any]]
) -> list[RouterReport]:
    """Every router's load on the first examples; none where there is no router."""
    if not _has_router(model):
        return []
    device = next(model.parameters()).device
    parts = [examples[i : i + BATCH] for i in range(0, min(ROWS, len(examples)), BATCH)]
    batches = ({n: v.to(device) for n, v in collate(part).items()} for part in parts)
    return routing_report(model, batches)


def _has_router(model: Any) -> bool:
    return any("lora_moe_router" in name for name, _ in model.named_parameters())
