"""What ``htsr explain`` shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from htsr_alloc.cli.screen import Table, View
from htsr_alloc.cli.views import plus
from htsr_alloc.records.facts import SHORT

if TYPE_CHECKING:
    from htsr_alloc.records import Allocation
    from htsr_alloc.reports.counts import Counted
    from htsr_alloc.reports.explain import LayerParts


def explanation(
    found: Sequence[LayerParts],
    estimator: str,
    layer: int | None,
    counts: Sequence[Counted] = (),
    allocation: Allocation | None = None,
) -> View:
    """One layer's matrices, or each layer with the one that adds most; with an allocation also
    the counts."""
    what = "experts" if allocation is None else allocation.counted
    every, counted = layer is None, bool(counts)
    columns = [
        "layer",
        *(["mean"] if every else []),
        *(["quota", what] if every and counted else []),
    ]
    columns += ["role", "alpha ± se", "k", "share", "without"]
    columns += [f"{what} then"] if counted and not every else []
    columns += ["note"]
    if every and counted:  # 80 columns
        columns = [name for name in columns if name not in ("k", "note")]
    rows, notes = [], [f"estimator: {estimator}"]
    for row, own in zip(found, counts or [None] * len(found), strict=True):
        for part in row.parts[: 1 if every else None]:
            cells = {
                "layer": row.layer,
                "mean": plus(row.score, row.se),
                "role": part.role[:20],
                "alpha ± se": plus(part.alpha, part.se),
                "k": part.k,
                "share": f"{part.share:.0%}",
                "without": part.without,
                "note": ", ".join(part.reasons),
            }
            if own is not None:
                then = own.without.get(part.tensor)
                cells |= {"quota": own.quota, what: own.count, f"{what} then": then}
            rows.append([cells[name] for name in columns])
        if not every:
            gets = "" if own is None else f", the quota {own.quota:.3f}: {own.count} {what}"
            notes.append(f"{row.prefix}: the mean is {plus(row.score, row.se)}{gets}")
    notes.append(
        "without: the layer's mean without that matrix; start: the choice of the tail's start "
        f"decides its alpha; short: k < {SHORT}"
    )
    if counted and not every:
        notes.append(f"{what} then: what the layer would get with that mean, of the same budget")
    data = {"estimator": estimator, "layers": [asdict(x) for x in found]}
    if counted:
        data["counts"] = [asdict(x) for x in counts]
    return View(data, [Table(columns, rows, left=["role", "note"])], notes)
