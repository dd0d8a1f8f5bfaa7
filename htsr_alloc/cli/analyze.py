"""``htsr analyze``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.inspect import show
from htsr_alloc.cli.opening import layer_map_of, opened, say_transfer, warn_unfitted
from htsr_alloc.cli.options import (
    ESTIMATOR_HELP,
    AsJson,
    CacheDir,
    Exclude,
    Include,
    KeepShards,
    Offline,
    OutFile,
    Quiet,
    Revision,
    Source,
    Stream,
    Token,
)
from htsr_alloc.cli.screen import Screen, parse_size


def analyze(
    source: Source,
    output: OutFile = None,
    estimator: Annotated[Optional[str], typer.Option(help=ESTIMATOR_HELP)] = None,
    bins: Annotated[int, typer.Option(help="Bins of the histogram that finds the peak.")] = 100,
    engine: Annotated[str, typer.Option(help="auto, exact, fast, portable or cuda.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    farms: Annotated[
        bool, typer.Option("--farms", help="Pool windows of one shape (default estimator: median).")
    ] = False,
    farms_rows: Annotated[int, typer.Option(help="Rows of a FARMS window.")] = 100,
    farms_ratio: Annotated[float, typer.Option(help="Columns of a window for each row.")] = 2.0,
    farms_windows: Annotated[int, typer.Option(help="Windows along each axis.")] = 10,
    include: Include = None,
    exclude: Exclude = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    stream: Stream = False,
    keep_shards: KeepShards = True,
    workers: Annotated[
        Optional[int], typer.Option(help="Threads, a matrix each; default one a core.")
    ] = None,
    max_memory: Annotated[
        Optional[str], typer.Option(help="Bound on the whole process, as 8GB or 500MB.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted run finished.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a matrix could not be fitted.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As inspect.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fit every weight matrix's spectrum and write MODEL.metrics.json, one value a layer."""
    # Of torchrun's processes the first speaks.
    screen = Screen(as_json, quiet or os.environ.get("RANK", "0") != "0")
    checkpoint = opened(source, revision, token, cache_dir, offline, stream, keep_shards)
    if dry_run:
        show(screen, checkpoint, include, exclude)
        return
    say_transfer(screen, checkpoint, layer_map_of(checkpoint, include, exclude))
    from htsr_alloc import files, records
    from htsr_alloc.analysis import analyze as analysis
    from htsr_alloc.analysis import decompose
    from htsr_alloc.spectra.spectrum import choose_device

    limits = decompose.Limits(workers, parse_size(max_memory) if max_memory else None)

    chosen = choose_device(device)
    if device == "auto":
        screen.note(f"device: {chosen}")
    settings = records.Settings(
        estimator=estimator or ("median" if farms else "official"),
        bins=bins,
        engine=engine,
        device=chosen,
        farms=records.Farms(farms_rows, farms_ratio, farms_windows) if farms else None,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
    )
    to_stdout = output is not None and str(output) == "-"
    to_device = output is not None and is_device(output)
    run_files = None
    if not to_stdout and not to_device:
        name = checkpoint.name.rpartition("/")[2]
        run_files = analysis.RunFiles(output or Path(f"{name}.metrics.json"))
    metrics = analysis.analyze(
        checkpoint, settings, run_files, limits=limits, restart=restart, progress=screen.progress
    )
    if metrics is None:  # not the first rank
        return
    if to_stdout:
        screen.text(records.dumps(metrics))
    elif to_device and output is not None:  # no place for a journal or spectra beside it
        files.write_text(output, records.dumps(metrics))
    else:
        views.show_metrics(screen, metrics)
        screen.note(f"wrote {run_files.metrics} and {run_files.spectra.name}" if run_files else "")
    warn_unfitted(screen, metrics, strict)


def is_device(path: Path) -> bool:
    """A pipe or device, such as /dev/null; a missing path, file or folder is none."""
    return path.exists() and not path.is_file() and not path.is_dir()
