"""A study's findings about allocations, for ``htsr_alloc.allocation.findings``."""

from __future__ import annotations

from pathlib import Path

from htsr_alloc import files
from htsr_alloc.allocation.findings import Finding
from htsr_alloc.lora_moe.systems import DEFAULT
from htsr_alloc.records import Metrics, loads
from htsr_alloc.training.study.cells import Done, outcomes
from htsr_alloc.training.study.chance import Rank, ranks
from htsr_alloc.training.study.plan import Study

UNITS = {DEFAULT: "experts", "lora": "ranks"}  # what is allocated, by the row's system


def findings(study: Study, done: Done, plan: Path) -> list[Finding]:
    """One of each allocation of AlphaLoRA's experts, or LoRA's ranks, ranked among random ones.

    Rows by score files are left out: an allocation file does not say what they hold.
    """
    path = study.metrics
    model = loads(Metrics, files.read_bytes(path), path.name).model.name
    lines, by_row = outcomes(study, done), dict[str, list[Rank]]()
    for own in ranks(study, done):
        by_row.setdefault(own.row, []).append(own)
    found = []
    for row in study.rows:
        ranked = by_row.get(row.name)
        unit = UNITS.get(row.system)
        if not ranked or row.scores is not None or unit is None or row.settings:
            continue
        tasks = tuple(own.task for own in ranked)
        record = study.allocation(row, study.experts, tasks[0]).strategy
        assert record is not None
        sizes = [line["n"] for (task, name, _), line in lines.items() if name == row.name]
        found.append(
            Finding(
                study=plan.name,
                model=model,
                tasks=tasks,
                rows=min(sizes),
                draws=ranked[0].draws,
                unit=unit,
                strategy=record.name,
                metric=record.metric,
                estimator=record.estimator,
                beta=record.beta,
                better=tuple(own.task for own in ranked if own.outside == "better"),
                worse=tuple(own.task for own in ranked if own.outside == "worse"),
            )
        )
    return found
