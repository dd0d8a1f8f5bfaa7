"""``htsr explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.allocate import newest_metrics
from htsr_alloc.cli.screen import Screen


def explain(
    metrics: Annotated[
        Path | None, typer.Argument(help="A metrics file; default the newest here.")
    ] = None,
    layer: Annotated[
        int | None, "Layer whose matrices are shown; default the largest of each layer."
    ] = None,
    *,
    screen: Screen,
) -> None:
    """Show why a layer has its number: what each matrix adds to it, and how sure that is.

    Examples:
        htsr explain smollm2.metrics.json
        htsr explain smollm2.metrics.json --layer 10
        htsr explain smollm2.metrics.json --layer 10 --json
    """
    from htsr_alloc import files, records
    from htsr_alloc.reports.explain import explain as explained

    if metrics is None:
        metrics = newest_metrics()
        screen.note(f"metrics: {metrics.name}")
    found = records.loads(records.Metrics, files.read_bytes(metrics), metrics.name)
    screen.show(views.explanation(explained(found, layer), found.settings.estimator, layer))
