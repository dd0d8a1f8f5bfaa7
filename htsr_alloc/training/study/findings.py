"""A study's findings about allocations, for ``htsr_alloc.allocation.findings``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.allocation import Uniform
from htsr_alloc.allocation.findings import Finding, Gap
from htsr_alloc.lora_moe.systems import DEFAULT
from htsr_alloc.records import Metrics, loads
from htsr_alloc.training.study.bootstrap import averaged
from htsr_alloc.training.study.cells import Done, lines_at, outcomes
from htsr_alloc.training.study.chance import Rank, ranks
from htsr_alloc.training.study.plan import RowSpec, Study
from htsr_alloc.training.study.summary import paired_losses, streams_of

UNITS = {DEFAULT: "experts", "lora": "ranks"}  # what is allocated, by the row's system


def findings(study: Study, done: Done, plan: Path) -> list[Finding]:
    """One of each allocation of AlphaLoRA's experts, or LoRA's ranks, against uniform and random.

    Rows by score files are left out: an allocation file does not say what they hold.
    """
    path = study.metrics
    metrics = loads(Metrics, files.read_bytes(path), path.name)
    lines, by_row = outcomes(study, done), dict[str, list[Rank]]()
    for own in ranks(study, done):
        by_row.setdefault(own.row, []).append(own)
    found = []
    for row in study.rows:
        unit = UNITS.get(row.system)
        known_by_name = row.scores is None and not row.settings and row.times == 1
        if unit is None or not known_by_name or row.match != "total" or row.draw is not None:
            continue
        ranked = by_row.get(row.name, [])
        tasks = tuple(own.task for own in ranked) or tuple(study.tasks)
        gap = _gap(study, done, row, tasks)
        if not ranked and gap is None:
            continue
        record = study.allocation(row, study.experts, tasks[0]).strategy
        assert record is not None
        sizes = [line["n"] for key, line in lines.items() if key[1] == row.name and line["n"]]
        found.append(
            Finding(
                study=plan.name,
                model=metrics.model.name,
                regime=study.regime,
                tasks=tasks,
                rows=min(sizes),
                unit=unit,
                targets=tuple(sorted({matrix.role for matrix in metrics.matrices})),
                strategy=record.name,
                metric=record.metric,
                estimator=record.estimator,
                beta=record.beta,
                uniform=gap,
                draws=ranked[0].draws if ranked else 0,
                draw_seeds=min((own.seeds for own in ranked), default=0),
                better=tuple(own.task for own in ranked if own.outside == "better"),
                worse=tuple(own.task for own in ranked if own.outside == "worse"),
                groups=tuple(record.groups or ()),
            )
        )
    return found


def _gap(study: Study, done: Done, row: RowSpec, tasks: Sequence[str]) -> Gap | None:
    """How far a row is from the uniform one of its kind, over tasks: each at its best rate, or
    where the row has one rate at that. None where a task has no pair."""
    alike = [x for x in study.rows if x.but_for_places == row.but_for_places]
    base = next((x for x in alike if x.strategy == Uniform.name), None)
    if base is None or base is row:
        return None
    parts = []
    rate = study.rate(row)
    if rate is None and not study.tuned(base):
        return None
    for task in tasks:
        own, other = (lines_at(study, done, task, x, rate) for x in (row, base))
        part = paired_losses(own, other, streams_of(study, task))
        if part is None or (parts and len(parts[0].by_seed) != len(part.by_seed)):
            return None
        parts.append(part)
    found = averaged(parts).difference
    mean, low, high = (round(x, 4) for x in (found.mean, found.low, found.high))
    return Gap(mean, low, high, len(found.by_seed))
