"""Records as the rows of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np

from htsr_alloc.records import METRICS, Allocation, Matrix, Metrics
from htsr_alloc.records.results import Result
from htsr_alloc.records.tables import role_values

Row = tuple[str, str]  # what, its value


def facts(source: Result, metrics: Metrics) -> list[Row]:
    """Where the numbers come from."""
    model, settings = metrics.model, metrics.settings
    farms = settings.farms
    rows = [
        ("model", model.name),
        ("revision", model.revision or "local files"),
        ("SHA-256 of the analysed weights", model.weights_sha256 or "not recorded"),
        ("architecture", model.architecture or "not stated"),
        ("layers", f"{len(metrics.layers)}"),
        (
            "matrices",
            f"{len(metrics.matrices)}, stored as {_counts(m.dtype for m in metrics.matrices)}",
        ),
        ("estimator", f"{settings.estimator}, {settings.bins} bins"),
        (
            "FARMS",
            f"{farms.windows} x {farms.windows} windows of {farms.rows} rows, ratio {farms.ratio:g}"
            if farms
            else "no",
        ),
        ("engine", f"{settings.engine} on {settings.device}"),
        ("decomposed by", _counts(m.engine for m in metrics.matrices)),
        ("analysed with", f"{metrics.tool.name} {metrics.tool.version}, {metrics.tool.created}"),
        (source.file.file, f"SHA-256 {source.file.sha256}"),
    ]
    if metrics.spectra:
        rows.append((metrics.spectra.file, f"SHA-256 {metrics.spectra.sha256}"))
    return rows


_BUDGET = {"experts": "T", "ranks": "sum of ranks"}  # what is counted -> its sum


def allocation_facts(result: Result) -> list[Row]:
    """How an allocation was decided."""
    record = result.record
    assert isinstance(record, Allocation)
    rows = [
        ("file", result.file.file),
        ("SHA-256", result.file.sha256),
        (_BUDGET[record.counted], str(record.budget)),
    ]
    if record.strategy:
        given = asdict(record.strategy)
        signal = given.pop("signal")
        rows.append(("strategy", str(given.pop("name"))))
        rows += [(name, str(value)) for name, value in given.items() if value is not None]
        if signal is not None:
            said = [f"{x['role']} {x['i2']:.2f}" for x in signal["roles"]]
            rows.append(("I² of each role", ", ".join(said)))
            rows.append(("signal", signal["uniform"] or f"p = {signal['p']:.2g}"))
    if record.metrics:
        rows.append(("made from", f"{record.metrics.file}, SHA-256 {record.metrics.sha256}"))
    if record.tool:
        rows.append(
            ("made with", f"{record.tool.name} {record.tool.version}, {record.tool.created}")
        )
    return rows


def role_rows(metrics: Metrics) -> list[tuple[str, int, list[tuple[float, float, float] | None]]]:
    """(role, matrices, (mean, least, largest) of each metric over the layers)."""
    count = Counter(matrix.role for matrix in metrics.matrices)
    spans: dict[str, list] = {role: [] for role in count}
    for metric in METRICS:
        for role, values in zip(*role_values(metrics, metric), strict=True):
            known = values[np.isfinite(values)]
            one = (
                (float(known.mean()), float(known.min()), float(known.max()))
                if len(known)
                else None
            )
            spans[role].append(one)
    return [(role, count[role], spans[role]) for role in count]


def skipped_groups(metrics: Metrics) -> list[tuple[str, list[str]]]:
    """(reason, tensors) of what was left out."""
    groups: dict[str, list[str]] = {}
    for item in metrics.skipped:
        groups.setdefault(item.reason, []).append(item.tensor)
    return list(groups.items())


def outstanding(metrics: Metrics) -> list[Matrix]:
    """Matrices to look at first: two each of the least and largest alpha and of the worst fit."""
    fitted = [m for m in metrics.matrices if m.pl_alpha_hill is not None]
    by_alpha = sorted(fitted, key=lambda m: m.pl_alpha_hill or 0.0)
    by_distance = sorted(fitted, key=lambda m: -(m.ks_distance or 0.0))
    chosen = {m.tensor: m for m in [*by_alpha[:2], *by_alpha[-2:], *by_distance[:2]]}
    return list(chosen.values())


def _counts(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in Counter(names).most_common())
