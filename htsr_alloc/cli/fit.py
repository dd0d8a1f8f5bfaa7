"""``htsr fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.choices import ESTIMATOR
from htsr_alloc.cli.opening import warn_unfitted
from htsr_alloc.cli.options import OutFile, Strict
from htsr_alloc.cli.screen import Screen
from htsr_alloc.records import Settings


def fit(
    metrics: Annotated[Path, typer.Argument(help="A metrics file with its spectra beside it.")],
    estimator: Annotated[str, "Rule that chooses the tail to fit.", ESTIMATOR],
    bins: Annotated[int, "Bins of the histogram that finds the peak."] = Settings.bins,
    output: OutFile = None,
    force: Annotated[bool, "Replace a result of other settings."] = False,
    strict: Strict = False,
    *,
    screen: Screen,
) -> None:
    """Fit the kept spectra again with another estimator, without the checkpoint.

    Examples:
        htsr fit smollm2.metrics.json --estimator median
        htsr fit smollm2.metrics.json --estimator official --bins 50 -o bins50.metrics.json
    """
    from htsr_alloc.analysis import refit
    from htsr_alloc.analysis.outputs import RunFiles

    old = RunFiles(metrics)
    path = output or metrics.with_name(f"{old.stem}.{estimator}.metrics.json")
    fitted = refit.refit(metrics, RunFiles(path), estimator, bins, force=force)
    screen.show(views.metrics(fitted))
    screen.note(f"wrote {path}")
    warn_unfitted(screen, fitted, strict)
