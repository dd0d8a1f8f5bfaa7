"""``htsr compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htsr_alloc.cli import comparing
from htsr_alloc.cli.choices import METRIC
from htsr_alloc.cli.screen import Screen, View
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from htsr_alloc.records.results import Result

DIFFERENT = 4  # exit code under --check


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Metrics files, or allocation files; the first is the reference."),
    ],
    metric: Annotated[str, "Metric whose layer values are compared.", METRIC] = "pl_alpha_hill",
    top: Annotated[int, "Number of most changed matrices to list."] = 10,
    tolerance: Annotated[float, "Largest difference that still counts as equal."] = 0.0,
    check: Annotated[bool, "Exit with code 4 when the files differ."] = False,
    *,
    screen: Screen,
) -> None:
    """Compare files with the first: layers, ranks, roles and matrices, or the experts moved.

    Examples:
        htsr compare data/smollm2.metrics.json data/smollm2.paper.metrics.json
        htsr compare data/minilm.metrics.json data/mpnet.metrics.json --metric stable_rank
        htsr compare data/smollm2.allocation.json data/smollm2.allocation.json --check --json
    """
    from htsr_alloc.records.results import read_result
    from htsr_alloc.reports.compare import AllocationComparison, MetricsComparison
    from htsr_alloc.reports.compare import compare as set_against

    if len(files) < 2:
        raise HtsrError("A comparison takes two files or more.")
    if not tolerance >= 0 or top < 0:
        raise HtsrError("--tolerance and --top must not be negative.")
    results = [read_result(path) for path in files]
    names = labels(results)
    reference = results[0].record
    found = [set_against(reference, result.record, metric) for result in results[1:]]
    same = [comparison.same(tolerance) for comparison in found]
    # All of one kind: others are refused by the comparison.
    metrics = [x for x in found if isinstance(x, MetricsComparison)]
    allocations = [x for x in found if isinstance(x, AllocationComparison)]
    if metrics:
        tables = comparing.metrics_tables(names, metrics, top)
        notes = comparing.unpaired(names, metrics)
        for warning in comparing.warnings_of(names, metrics):
            screen.warn(warning)
    else:
        tables, notes = comparing.allocation_tables(names, allocations), []
    data = comparing.to_json(results, names, found, same, tolerance, top)
    screen.show(View(data, tables, notes))
    within = f" within {tolerance:g}" if tolerance else ""
    for name, alike in zip(names[1:], same, strict=True):
        screen.note(f"{names[0]} and {name}: {'the same' if alike else 'different'}{within}")
    if check and not all(same):
        raise typer.Exit(DIFFERENT)


def labels(results: Sequence[Result]) -> list[str]:
    """Short names that tell the files apart: with the folder, or a number, where stems agree."""
    stems = [result.stem for result in results]
    if len(set(stems)) < len(stems):
        stems = [
            f"{folder}/{result.stem}" if (folder := result.path.parent.name) else result.stem
            for result in results
        ]
    return [
        stem if stems.index(stem) == i else f"{stem}#{stems[: i + 1].count(stem)}"
        for i, stem in enumerate(stems)
    ]
