"""``htsr report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli.options import OutFile, Quiet
from htsr_alloc.cli.screen import Screen


def report(
    files: Annotated[
        list[Path], typer.Argument(help="A metrics file, then its allocation files if any.")
    ],
    output: OutFile = None,
    note: Annotated[
        list[str] | None,
        "Sentence to add to the cautions, such as where the model came from; repeatable.",
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page with tables, figures, provenance and cautions; it opens offline.

    Examples:
        htsr report smollm2.metrics.json
        htsr report smollm2.metrics.json smollm2.allocation.json -o smollm2.html
    """
    from htsr_alloc.files import refuse_overwriting
    from htsr_alloc.reports import report as make

    stem = files[0].name.removesuffix(".json").removesuffix(".metrics")
    path = output or Path(f"{stem}.report.html")
    refuse_overwriting(path, files)
    page = make(*files, notes=note or ())
    Screen(quiet=quiet).save(page, path)
