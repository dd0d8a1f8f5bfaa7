"""``htsr fit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.opening import warn_unfitted
from htsr_alloc.cli.options import (
    ESTIMATOR_HELP,
    AsJson,
    OutFile,
    Quiet,
)
from htsr_alloc.cli.screen import Screen


def fit(
    metrics: Annotated[Path, typer.Argument(help="A metrics file with its spectra beside it.")],
    estimator: Annotated[str, typer.Option(help=ESTIMATOR_HELP)],
    bins: Annotated[int, typer.Option(help="Bins of the histogram that finds the peak.")] = 100,
    output: OutFile = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a matrix could not be fitted.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate again from the kept spectra, without the checkpoint."""
    from htsr_alloc.analysis import analyze as analysis
    from htsr_alloc.analysis import refit

    screen = Screen(as_json, quiet)
    old = analysis.RunFiles(metrics)
    path = output or metrics.with_name(f"{old.stem}.{estimator}.metrics.json")
    fitted = refit.refit(metrics, analysis.RunFiles(path), estimator, bins)
    views.show_metrics(screen, fitted)
    screen.note(f"wrote {path}")
    warn_unfitted(screen, fitted, strict)
