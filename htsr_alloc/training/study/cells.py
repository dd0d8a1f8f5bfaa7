"""A study's cells: which rows on which tasks with which seeds and rates, in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from htsr_alloc import files
from htsr_alloc.allocation import read_scores
from htsr_alloc.records import METRICS, Metrics, loads
from htsr_alloc.training.identity import content_of
from htsr_alloc.training.settings import LEARNING_RATE, Recipe
from htsr_alloc.training.study.plan import RowSpec, Study, Task

Key = tuple[str, str, int, float | None]
Done = Mapping[Key, Mapping[str, Any]]
NOTHING: Done = MappingProxyType({})


@dataclass(frozen=True)
class Cell:
    """One trained model and its tests; ``rate`` is None where the row is not tuned."""

    tasks: tuple[str, ...]
    row: RowSpec
    seed: int
    rate: float | None = None

    @property
    def keys(self) -> list[Key]:
        """What its results are found by, one a task."""
        return [(task, self.row.name, self.seed, self.rate) for task in self.tasks]

    @property
    def title(self) -> str:
        """For people."""
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{', '.join(self.tasks)}: {self.row.name}, seed {self.seed}{rate}"

    def is_in(self, done: Done) -> bool:
        """Whether it has run."""
        return all(key in done for key in self.keys)

    def recipe(self, study: Study, tasks: Sequence[str] = ()) -> Recipe:
        """The study's recipe with this seed, the tasks' steps and the row's rate, if any.

        Args:
            tasks: those of one stage; default all of the cell's.
        """
        rate = self.rate or self.row.learning_rate or study.recipe.learning_rate
        steps = [study.tasks[task].steps or study.recipe.steps for task in tasks or self.tasks]
        known = [n for n in steps if n is not None]
        return dataclasses.replace(
            study.recipe,
            save_every=0,  # a cell that is interrupted begins again
            seed=self.seed,
            steps=sum(known) if len(known) == len(steps) else None,
            learning_rate=rate or LEARNING_RATE,
        )

    def stages(self, study: Study) -> list[tuple[str, ...]]:
        """The tasks of each training, one after the other."""
        return [(task,) for task in self.tasks] if study.regime == "sequence" else [self.tasks]

    def tunes(self, study: Study) -> bool:
        """Whether its loss on validation rows has a part in the choice of the rate."""
        return self.rate is not None and self.seed in study.tuning(self.row)


def cells(study: Study, done: Done = NOTHING) -> list[Cell]:
    """What is to run, as far as ``done`` tells which rates are the best.

    The main rows of every task, seed by seed; then the others with the first seed. Where rates are
    chosen, the tuning seeds run at each of them, and the other seeds at the best.
    """
    main = [row for row in study.rows if row.main]
    others = [row for row in study.rows if not row.main]

    def tried(tasks: tuple[str, ...], rows: Sequence[RowSpec]) -> list[Cell]:
        depth = max((len(study.tuning(row)) for row in rows), default=0)
        return [
            Cell(tasks, row, seed, rate)
            for seed in study.seeds[:depth]
            for row in rows
            if seed in study.tuning(row)
            for rate in study.rates(row)
        ]

    found = []
    for tasks in study.groups:
        best = {row.name: chosen(study, done, tasks, row) for row in main}
        found += tried(tasks, main)
        found += [
            Cell(tasks, row, seed, rate)
            for seed in study.seeds
            for row in main
            if seed not in study.tuning(row)
            for rate in best[row.name]
        ]
    return found + [cell for tasks in study.groups for cell in tried(tasks, others)]


def planned(study: Study) -> int:
    """How many cells there are when all is known."""

    def each(row: RowSpec) -> int:
        tuning = len(study.tuning(row))
        return tuning * len(study.rates(row)) + len(study.seeds_of(row)) - tuning

    return len(study.groups) * sum(map(each, study.rows))


def chosen(
    study: Study, done: Done, tasks: Sequence[str], row: RowSpec
) -> tuple[float | None, ...]:
    """The one rate to test with, as a tuple; empty before it is known.

    It is that of the least validation loss, a mean over the tuning seeds and over the tasks of one
    model; a rate at which one of them diverged loses to every other.
    """
    rates, losses = study.rates(row), []
    if not study.tuned(row):
        return rates
    for rate in rates:
        keys = [(task, row.name, seed, rate) for task in tasks for seed in study.tuning(row)]
        lines = [done.get(key) for key in keys]
        if None in lines:
            return ()
        values = [line["valid_loss"] for line in lines if line and not line["diverged"]]
        if None in values:  # of a seed that had no part in the choice; a run refuses it
            return ()
        mean = statistics.mean(values) if len(values) == len(lines) else math.inf
        losses.append(mean if math.isfinite(mean) else math.inf)
    return (rates[losses.index(min(losses))],)


def outcomes(study: Study, done: Done) -> dict[tuple[str, str, int], Mapping[str, Any]]:
    """The lines that the table is made of, by task, row and seed: those of the chosen rates."""
    found = {}
    for tasks in study.groups:
        for row in study.rows:
            for rate in chosen(study, done, tasks, row):
                seeds = study.seeds_of(row)
                for key in (k for s in seeds for k in Cell(tasks, row, s, rate).keys):
                    if key in done:
                        found[key[:3]] = done[key]
    return found


def lines_at(
    study: Study, done: Done, task: str, row: RowSpec, rate: float | None
) -> dict[int, Mapping[str, Any]]:
    """A row's lines by seed, without those that diverged.

    Args:
        rate: None for the row's own, the best of its grid. At another one, a row has the lines of
            its grid; one that is not tuned has none.
    """
    if rate is None or rate == study.rate(row):
        lines = outcomes(study, done)
        found = {seed: lines.get((task, row.name, seed)) for seed in study.seeds_of(row)}
    else:
        seeds = study.seeds_of(row) if rate in study.rates(row) else ()
        found = {seed: done.get((task, row.name, seed, rate)) for seed in seeds}
    return {seed: own for seed, own in found.items() if own and not own.get("diverged")}


def fingerprint(study: Study, cell: Cell) -> str:
    """A hash of everything that a cell's result depends on, but the machine and the versions."""
    row = cell.row
    parts: dict[str, Any] = {
        "model": study.model.name,
        "config": content_of(study.model / "config.json"),
        "row": _row(row),
        "scores": _scores(row.metrics or study.metrics, row.scores_of(cell.tasks[0])),
        "recipe": dataclasses.asdict(cell.recipe(study)),
    }
    tasks = [_task(study.tasks[task]) for task in cell.tasks]
    if study.regime == "each":
        parts |= tasks[0]
    else:
        steps = [cell.recipe(study, stage).steps for stage in cell.stages(study)]
        parts |= {"regime": study.regime, "tasks": tasks, "stages": steps}
    if study.valid_rows is not None:
        parts["valid_rows"] = study.valid_rows
    for name in ("experts", "r", "lora_alpha", "lora_dropout", "max_length", "dtype"):
        parts[name] = getattr(study, name)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _task(task: Task) -> dict[str, Any]:
    return {
        "train": content_of(task.train),
        "test": content_of(task.test),
        "valid": content_of(task.valid) if task.valid else None,
        "test_rows": task.test_rows,
    }


# Fields that the first study's rows did not have, and what they were then.
LATER: Mapping[str, Any] = {
    "settings": {},
    "match": "total",
    "times": 1,
    "draw": None,
    "spread": None,
}


def _row(row: RowSpec) -> dict[str, Any]:
    """A row's fields that a result depends on; those of ``LATER`` where they are given.

    The grid is not among them: each cell's recipe has its own rate.
    """
    told_elsewhere = ("name", "main", "metrics", "learning_rates", "scores")
    found = {k: v for k, v in dataclasses.asdict(row).items() if k not in told_elsewhere}
    return {k: v for k, v in found.items() if k not in LATER or v != LATER[k]}


def _scores(path: Path, scores: Path | None) -> Any:
    """What an allocation takes from a metrics or a score file; the rest of it may change."""
    if scores is not None:
        return read_scores(scores).values
    metrics = loads(Metrics, files.read_bytes(path), path.name)
    return [tuple(getattr(layer, name) for name in METRICS) for layer in metrics.layers]
