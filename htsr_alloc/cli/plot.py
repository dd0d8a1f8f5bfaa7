"""``htsr plot``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli.options import Quiet
from htsr_alloc.cli.screen import Screen


def plot(
    files: Annotated[list[Path], typer.Argument(help="Metrics and allocation files.")],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="A .png, .svg or .pdf; default FILE.png here."),
    ] = None,
    view: Annotated[
        Optional[str],
        typer.Option(help="overview, layers, heatmap, allocation, difference or esd."),
    ] = None,
    metric: Annotated[str, typer.Option(help="pl_alpha_hill, alpha_hat or stable_rank.")] = (
        "pl_alpha_hill"
    ),
    matrix: Annotated[
        Optional[list[str]],
        typer.Option(help="The spectrum of this tensor, or of all like '*q_proj*'; repeatable."),
    ] = None,
    layer: Annotated[
        Optional[list[int]], typer.Option(help="The spectra of this layer; repeatable.")
    ] = None,
    role: Annotated[
        Optional[list[str]], typer.Option(help="The spectra of this role; repeatable.")
    ] = None,
    size: Annotated[
        Optional[str], typer.Option(help="Width x height in inches, as 8x5.", metavar="WxH")
    ] = None,
    dpi: Annotated[Optional[float], typer.Option(help="Dots per inch of a .png; default 150.")] = (
        None
    ),
    quiet: Quiet = False,
) -> None:
    """Draw metrics by layer, a heat map, allocations or spectra, from the files alone."""
    from htsr_alloc.reports import plots

    path = output or Path(files[0].name.removesuffix(".json") + ".png")
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
