"""``htsr explain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htsr_alloc.cli.allocate import newest_metrics
from htsr_alloc.cli.explaining import explanation
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from htsr_alloc.records import Allocation, Metrics


def explain(
    file: Annotated[
        Path | None,
        typer.Argument(help="A metrics or an allocation file; default the newest metrics here."),
    ] = None,
    layer: Annotated[
        str | None,
        "Layer whose matrices are shown, as 10 or model.layers.10; default the largest of each "
        "layer.",
    ] = None,
    metrics: Annotated[
        Path | None,
        "Metrics that an allocation was made from; default the file that it names, beside it.",
    ] = None,
    *,
    screen: Screen,
) -> None:
    """Show why a layer has its number: what each matrix adds to it, and how sure that is.

    Of an allocation file also why it has its count: its quota, and the count without each matrix.

    Examples:
        htsr explain smollm2.metrics.json
        htsr explain smollm2.metrics.json --layer 10
        htsr explain smollm2.allocation.json --layer 10 --json
    """
    from htsr_alloc.records import Allocation
    from htsr_alloc.records.results import read_result
    from htsr_alloc.reports.counts import explain_counts
    from htsr_alloc.reports.explain import explain as explained
    from htsr_alloc.reports.explain import layer_number

    if file is None:
        file = newest_metrics()
        screen.note(f"metrics: {file.name}")
    if str(file).isdecimal() and not file.exists():
        raise HtsrError(f"There is no file {file}.", f"For a layer write --layer {file}.")
    record = read_result(file).record
    if not isinstance(record, Allocation):
        if metrics is not None:
            raise HtsrError("`metrics` are those of an allocation file.", f"{file} has its own.")
        number = None if layer is None else layer_number(record, layer)
        found = explained(record, number)
        screen.show(explanation(found, record.settings.estimator, number))
        return
    source = _metrics_of(record, file, metrics)
    number = None if layer is None else layer_number(source, layer)
    found, counts = explain_counts(record, source, number)
    screen.show(explanation(found, source.settings.estimator, number, counts, record))


def _metrics_of(allocation: Allocation, file: Path, given: Path | None) -> Metrics:
    """The metrics that the allocation was made from, as far as names tell."""
    from htsr_alloc import files, records

    named = None if allocation.metrics is None else file.with_name(allocation.metrics.file)
    path = given or named
    if path is None or not path.exists():
        what = f"There is no {path}" if path else f"{file} names no metrics file"
        raise HtsrError(f"{what}, from which the counts follow.", "Give the file as `metrics`.")
    return records.loads(records.Metrics, files.read_bytes(path), path.name)
