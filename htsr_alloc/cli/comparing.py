"""Comparisons as JSON, tables and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from htsr_alloc.cli.screen import Table

if TYPE_CHECKING:
    from htsr_alloc.records.results import Result
    from htsr_alloc.reports.compare import AllocationComparison, MetricsComparison, Pair


def to_json(
    results: Sequence[Result],
    names: Sequence[str],
    found: Sequence[MetricsComparison | AllocationComparison],
    same: Sequence[bool],
    tolerance: float,
    top: int,
) -> dict[str, Any]:
    """Everything that the tables say; ``matrices`` are the ``top`` most changed."""
    comparisons = []
    for name, comparison, alike in zip(names[1:], found, same, strict=True):
        data = asdict(comparison)
        if "matrices" in data:
            data["matrices"] = data["matrices"][:top]
        comparisons.append({"file": name, "same": alike, **data})
    return {
        "reference": names[0],
        "tolerance": tolerance,
        "files": [
            {"label": name, "file": result.file.file, "sha256": result.file.sha256}
            for name, result in zip(names, results, strict=True)
        ],
        "comparisons": comparisons,
    }


def warnings_of(names: Sequence[str], found: Sequence[MetricsComparison]) -> list[str]:
    """What makes the values hard to compare."""
    warnings = []
    for name, comparison in zip(names[1:], found, strict=True):
        warnings += [
            f"{names[0]} and {name} differ in {setting}; values may not be comparable."
            for setting in comparison.settings
        ]
        if comparison.by != "layer":
            warnings.append(
                f"{names[0]} and {name} have different numbers of layers: compared by relative "
                "depth, the deeper one interpolated; matrices are not paired."
            )
    return warnings


def metrics_tables(
    names: Sequence[str], found: Sequence[MetricsComparison], top: int
) -> list[Table]:
    """Layers, then a row a file, roles, and the matrices that changed most."""
    rows = [
        [name, c.by, c.correlation.n, c.correlation.spearman, c.correlation.kendall, c.mean_change,
         c.largest_change, c.correlation.reason or ""]
        for name, c in zip(names[1:], found, strict=True)
    ]  # fmt: skip
    columns = ["file", "by", "n", "spearman", "kendall", "mean |diff|", "largest |diff|", "note"]
    tables = [
        *_side_by_side("layer", names, [comparison.layers for comparison in found]),
        Table(columns, rows, left=["file", "by", "note"]),
        *_side_by_side("role", names, [comparison.roles for comparison in found]),
    ]
    changed = [
        [name, pair.name, pair.reference, pair.other, pair.difference, pair.reason or ""]
        for name, comparison in zip(names[1:], found, strict=True)
        for pair in comparison.matrices[:top]
        if pair.difference or pair.reason
    ]
    if changed:
        columns = ["file", "most changed matrices", names[0], "here", "diff", "note"]
        tables.append(Table(columns, changed, left=["file", "most changed matrices", "note"]))
    return tables


def unpaired(names: Sequence[str], found: Sequence[MetricsComparison]) -> list[str]:
    """The first matrix of each file that has no partner, and how many more."""
    notes = []
    for name, comparison in zip(names[1:], found, strict=True):
        if comparison.unmatched:
            first, more = comparison.unmatched[0], len(comparison.unmatched) - 1
            notes.append(f"{name}: unpaired: {first}" + (f" and {more} more" if more else ""))
    return notes


def allocation_tables(names: Sequence[str], found: Sequence[AllocationComparison]) -> list[Table]:
    """Layers, then a row a file."""
    rows = [
        [name, c.moved, *c.budgets, len(c.top_k), *_linears(c, found), c.correlation.spearman,
         c.correlation.kendall, c.correlation.reason or ""]
        for name, c in zip(names[1:], found, strict=True)
    ]  # fmt: skip
    what = found[0].counted
    total = "T" if what == "experts" else "sum"
    linears = ["linears differ"] if any(comparison.modules for comparison in found) else []
    columns = ["file", f"{what} moved", f"{total} of {names[0]}", total, "top_k differs", *linears,
               "spearman", "kendall", "note"]  # fmt: skip
    return [
        *_side_by_side("layer", names, [comparison.layers for comparison in found]),
        Table(columns, rows, left=["file", "note"]),
    ]


def _linears(comparison: AllocationComparison, found: Sequence[AllocationComparison]) -> list[int]:
    """How many linears' counts differ, in a table of which some file has counts of linears."""
    if not any(other.modules for other in found):
        return []
    return [sum(pair.difference != 0 for pair in comparison.modules)]


def _side_by_side(
    what: str, names: Sequence[str], found: Sequence[Sequence[Pair]]
) -> Iterator[Table]:
    """A row a thing: the reference, then each file's value and difference.

    Files that were compared at other places (relative depths) get a table of their own.
    """
    tables: dict[tuple, list[int]] = {}
    for i, pairs in enumerate(found):
        tables.setdefault(tuple((pair.name, pair.reference) for pair in pairs), []).append(i)
    for references, members in tables.items():
        columns = [what, names[0]]
        rows: list[list] = [list(reference) for reference in references]
        notes = [""] * len(rows)
        for i in members:
            columns += [names[i + 1], "diff"]
            for place, pair in enumerate(found[i]):
                rows[place] += [pair.other, pair.difference]
                notes[place] = notes[place] or pair.reason or ""
        if any(notes):
            columns.append("note")
            rows = [[*row, note] for row, note in zip(rows, notes, strict=True)]
        yield Table(columns, rows, left=[what, "note"])
