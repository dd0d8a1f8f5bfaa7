"""``htsr analyze``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from htsr_alloc.cli import views
from htsr_alloc.cli.choices import ENGINE, ESTIMATOR
from htsr_alloc.cli.inspect import show
from htsr_alloc.cli.opening import Hub, Selection, Shards, say_transfer, warn_unfitted
from htsr_alloc.cli.options import OutFile, Source, Strict
from htsr_alloc.cli.screen import Screen, parse_size
from htsr_alloc.records import Farms, Settings

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.layers import LayerMap


def analyze(
    source: Source,
    output: OutFile = None,
    estimator: Annotated[
        str | None,
        "Rule that chooses the tail to fit; default official, and median with --farms.",
        ESTIMATOR,
    ] = None,
    bins: Annotated[int, "Bins of the histogram that finds the peak."] = Settings.bins,
    engine: Annotated[str, "How eigenvalues are computed.", ENGINE] = Settings.engine,
    device: Annotated[str, "Where to compute: auto, cpu, cuda or cuda:N."] = "auto",
    farms: Annotated[bool, "Pool the eigenvalues of windows of one shape (FARMS)."] = False,
    farms_rows: Annotated[int, "Rows of a FARMS window."] = Farms.rows,
    farms_ratio: Annotated[float, "Columns of a FARMS window divided by its rows."] = Farms.ratio,
    farms_windows: Annotated[int, "FARMS windows along each axis."] = Farms.windows,
    workers: Annotated[
        int | None, "Matrices decomposed at the same time, a thread each; default one a core."
    ] = None,
    max_memory: Annotated[
        str | None, "Upper bound on the memory of the whole process, as 8GB or 500MB."
    ] = None,
    restart: Annotated[bool, "Discard what an interrupted run has finished."] = False,
    force: Annotated[bool, "Replace a result of other settings or of another model."] = False,
    strict: Strict = False,
    dry_run: Annotated[bool, "Only list what would be analysed, as htsr inspect does."] = False,
    *,
    hub: Hub,
    shards: Shards,
    selection: Selection,
    screen: Screen,
) -> None:
    """Fit every weight matrix's spectrum and write MODEL.metrics.json, one value a layer.

    Examples:
        htsr analyze Qwen/Qwen3-0.6B
        htsr analyze model --estimator median --exclude '*k_proj*' -o median.metrics.json
        htsr analyze Qwen/Qwen3-0.6B --workers 4 --max-memory 8GB
    """
    checkpoint = hub.open(source, shards.way)
    if dry_run:
        show(screen, checkpoint, selection)
        return
    from htsr_alloc import files, records
    from htsr_alloc.analysis import analyze as analysis
    from htsr_alloc.analysis.decompose import Limits
    from htsr_alloc.analysis.outputs import RunFiles
    from htsr_alloc.spectra.devices import choose_device

    limits = Limits(workers, parse_size(max_memory) if max_memory else None)
    chosen = choose_device(device)
    if device == "auto":
        screen.note(f"device: {chosen}")
    settings = Settings(
        estimator=estimator or ("median" if farms else "official"),
        bins=bins,
        engine=engine,
        device=chosen,
        farms=Farms(farms_rows, farms_ratio, farms_windows) if farms else None,
        **selection.patterns(checkpoint),
    )
    to_stdout = str(output) == "-"
    to_device = output is not None and files.is_special(output)
    run_files = None
    if not to_stdout and not to_device:
        name = checkpoint.name.rpartition("/")[2]
        run_files = RunFiles(output or Path(f"{name}.metrics.json"))

    def progress(stream: Iterable, layer_map: LayerMap) -> Iterator:
        say_transfer(screen, checkpoint, layer_map)  # now that the weights are not refused
        return screen.progress(stream, layer_map)

    metrics = analysis.analyze(
        checkpoint,
        settings,
        run_files,
        limits=limits,
        restart=restart,
        force=force,
        progress=progress,
    )
    if metrics is None:  # not the first rank
        return
    if to_stdout:
        screen.text(records.dumps(metrics))
    elif to_device and output is not None:  # no place for a journal or spectra beside it
        files.write_text(output, records.dumps(metrics))
    else:
        screen.show(views.metrics(metrics))
        screen.note(f"wrote {run_files.metrics} and {run_files.spectra.name}" if run_files else "")
    warn_unfitted(screen, metrics, strict)
