"""``htsr plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli.choices import METRIC, VIEW
from htsr_alloc.cli.options import Quiet
from htsr_alloc.cli.screen import Screen


def plot(
    files: Annotated[list[Path], typer.Argument(help="Metrics files and allocation files.")],
    output: Annotated[
        Path | None, "Figure to write, a .png, .svg or .pdf; default FILE.png in this folder."
    ] = None,
    view: Annotated[
        str | None, "What to draw; default overview, and esd with --matrix, --layer, --role.", VIEW
    ] = None,
    metric: Annotated[str, "Metric to draw.", METRIC] = "pl_alpha_hill",
    matrix: Annotated[
        list[str] | None,
        "Draw the spectrum of this tensor, or of all that match, as '*q_proj*'; repeatable.",
    ] = None,
    layer: Annotated[list[int] | None, "Draw the spectra of this layer; repeatable."] = None,
    role: Annotated[list[str] | None, "Draw the spectra of this role; repeatable."] = None,
    size: Annotated[str | None, "Width x height in inches, as 8x5."] = None,
    dpi: Annotated[float | None, "Dots per inch of a .png; default 150."] = None,
    quiet: Quiet = False,
) -> None:
    """Draw metrics by layer, a heat map, allocations or spectra, from the files alone.

    Examples:
        htsr plot smollm2.metrics.json smollm2.allocation.json
        htsr plot smollm2.metrics.json --view heatmap --metric stable_rank -o heatmap.pdf
        htsr plot smollm2.metrics.json --layer 0 --role q_proj -o spectrum.svg
    """
    from htsr_alloc.files import refuse_overwriting
    from htsr_alloc.reports import plots

    path = output or Path(files[0].name.removesuffix(".json") + ".png")
    refuse_overwriting(path, files)
    plots.plot(
        *files,
        view=view,
        metric=metric,
        matrix=matrix or (),
        layer=layer or (),
        role=role or (),
        output=path,
        size=None if size is None else _inches(size),
        dpi=dpi,
    )
    Screen(quiet=quiet).note(f"wrote {path}")


def _inches(size: str) -> tuple[float, float]:
    """8x5 as (8.0, 5.0)."""
    width, _, height = size.partition("x")
    try:
        return float(width), float(height)
    except ValueError:
        raise typer.BadParameter(
            "Give width x height in inches, as 8x5.", param_hint="--size"
        ) from None
