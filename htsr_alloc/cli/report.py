"""``htsr report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli.options import OutFile, Quiet
from htsr_alloc.cli.screen import Screen


def report(
    files: Annotated[list[Path], typer.Argument(help="A metrics file, and its allocations.")],
    output: OutFile = None,
    note: Annotated[
        Optional[list[str]],
        typer.Option(help="A sentence for the cautions, as what the source was; repeatable."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page with tables, figures, provenance and cautions; it opens offline."""
    from htsr_alloc import files as writing
    from htsr_alloc.reports import report as make

    page = make(*files, notes=note or ())
    screen = Screen(quiet=quiet)
    if output is not None and str(output) == "-":
        screen.text(page)
        return
    stem = files[0].name.removesuffix(".json").removesuffix(".metrics")
    path = output or Path(f"{stem}.report.html")
    writing.write_text(path, page)
    screen.note(f"wrote {path}")
