"""``htsr compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htsr_alloc.cli.comparing import show_allocations, show_metrics, to_json
from htsr_alloc.cli.options import AsJson, Quiet
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from htsr_alloc.records.results import Result

DIFFERENT = 4  # exit code under --check


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="Metrics files, or allocations; the first is the reference."),
    ],
    metric: Annotated[str, typer.Option(help="pl_alpha_hill, alpha_hat or stable_rank.")] = (
        "pl_alpha_hill"
    ),
    top: Annotated[int, typer.Option(help="How many of the most changed matrices to list.")] = 10,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference that still counts as none.")
    ] = 0.0,
    check: Annotated[bool, typer.Option("--check", help="Exit 4 when the files differ.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Set files against the first: layers, ranks, roles, matrices; or the experts moved."""
    from htsr_alloc.records import Metrics
    from htsr_alloc.records.results import read_result
    from htsr_alloc.reports.compare import AllocationComparison, MetricsComparison
    from htsr_alloc.reports.compare import compare as set_against

    if len(files) < 2:
        raise HtsrError("A comparison takes two files or more.")
    if not tolerance >= 0 or top < 0:
        raise HtsrError("--tolerance and --top must not be negative.")
    screen = Screen(as_json, quiet)
    results = [read_result(path) for path in files]
    names = labels(results)
    reference = results[0].record
    found = [set_against(reference, result.record, metric) for result in results[1:]]
    same = [comparison.same(tolerance) for comparison in found]
    if as_json:
        screen.result(to_json(results, names, found, same, tolerance, top))
    elif isinstance(reference, Metrics):
        show_metrics(screen, names, [x for x in found if isinstance(x, MetricsComparison)], top)
    else:
        show_allocations(screen, names, [x for x in found if isinstance(x, AllocationComparison)])
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
