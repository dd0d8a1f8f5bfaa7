"""Results to lines: means over seeds, and paired differences from the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from htsr_alloc.training.baselines import Baseline
from htsr_alloc.training.methods import METHODS
from htsr_alloc.training.study.bootstrap import Difference, Paired, averaged, paired
from htsr_alloc.training.study.cells import Done, chosen, outcomes
from htsr_alloc.training.study.plan import UNTRAINED, RowSpec, Study

ALL = "all tasks"
Found = Mapping[int, Mapping[str, Any]]  # by seed


@dataclass(frozen=True)
class Line:
    """One row of the table; the means are over seeds, ``deviation`` is theirs (None for one).

    ``rate`` is None where the row was not tuned, or over several tasks; ``edge`` says that it is
    the grid's first or last. ``diverged`` runs have no accuracy and count in no mean; where all
    did, the means are None. The losses' difference is None where the lines hold no row's loss.
    ``forgot_accuracy`` and ``forgot_loss`` are what a task has lost since its own training, where
    others came after it. ``accuracies`` has those of each seed.
    """

    task: str
    row: str
    match: str
    seeds: int
    rows: int
    trainable: int
    accuracy: float | None = None
    deviation: float | None = None
    loss: float | None = None
    active: int | None = None
    step_s: float | None = None
    rate: float | None = None
    edge: bool = False
    hits: Paired | None = None
    losses: Paired | None = None
    diverged: int = 0
    forgot_accuracy: float | None = None
    forgot_loss: float | None = None
    accuracies: tuple[float, ...] = ()

    @property
    def accuracy_difference(self) -> Difference | None:
        """From the baseline."""
        return self.hits.difference if self.hits else None

    @property
    def loss_difference(self) -> Difference | None:
        """From the baseline, in nats."""
        return self.losses.difference if self.losses else None


def summarise(study: Study, done: Done) -> list[Line]:
    """A line for each task and row that has a result, in the study's order; then ``ALL``.

    The lines of ``ALL`` are means over tasks, for the rows that every task has with the same seeds.
    """
    lines: list[Line] = []
    everything = outcomes(study, done)
    whole = {key: line for key, line in everything.items() if not line.get("diverged")}

    def of(task: str, name: str) -> Found:
        return {s: whole[key] for s in study.seeds if (key := (task, name, s)) in whole}

    for task in study.tasks:
        for row in study.rows:
            every = [everything[k] for s in study.seeds if (k := (task, row.name, s)) in everything]
            if not every:
                continue
            own = of(task, row.name)
            base = {} if row.name == study.baseline else of(task, study.baseline)
            tasks = next(group for group in study.groups if task in group)
            rate = next(iter(chosen(study, done, tasks, row)), None)
            lines.append(_line(study, task, row, rate, every, own, base, streams_of(study, task)))
    if len(study.tasks) > 1:
        for row in study.rows:
            seeds = {tuple(of(task, row.name)) for task in study.tasks}
            if len(seeds) == 1 and seeds != {()}:
                own = [line for line in lines if line.row == row.name]
                lines.append(over_tasks(own, shared=study.regime != "each"))
    return lines


def _line(
    study: Study,
    task: str,
    row: RowSpec,
    rate: float | None,
    every: Sequence[Mapping[str, Any]],
    own: Found,
    base: Found,
    streams: tuple[int, int],
) -> Line:
    grid, found = study.rates(row), list(own.values())
    first = found[0] if found else every[0]
    accuracies = [line["accuracy"] for line in found]
    steps = [line["step_s"] for line in found if line.get("step_s")]
    return Line(
        task,
        row.name,
        _equal(row),
        len(own),
        first["n"] or 0,
        first["trainable"],
        statistics.mean(accuracies) if found else None,
        statistics.stdev(accuracies) if len(found) > 1 else None,
        statistics.mean(line["loss"] for line in found) if found else None,
        first.get("active"),
        statistics.median(steps) if steps else None,
        rate,
        rate is not None and rate in (min(grid), max(grid)),  # type: ignore[type-var]
        _paired(own, base, streams, lambda line: [int(hit) for hit in line["hits"]]),
        paired_losses(own, base, streams),
        len(every) - len(own),
        _forgot(found, "accuracy", -1),
        _forgot(found, "loss", 1),
        tuple(accuracies),
    )


def _equal(row: RowSpec) -> str:
    """What the row has as much of as the baseline, if anything."""
    method = METHODS.get(row.system)
    if row.system == UNTRAINED or (isinstance(method, Baseline) and method.whole):
        return ""
    return row.match if row.times == 1 else f"{row.times} × {row.match}"


def _forgot(found: Sequence[Mapping[str, Any]], name: str, sign: int) -> float | None:
    """How much worse the task is after the last one than after its own training."""
    key = f"before_{name}"
    pairs = [(line[name], line[key]) for line in found if key in line]
    return statistics.mean(sign * (after - before) for after, before in pairs) if pairs else None


def paired_losses(own: Found, base: Found, streams: tuple[int, int]) -> Paired | None:
    """The difference over the seeds that both have; None without one, or without rows' losses.

    Args:
        streams: random numbers of the rows and of the seeds (``bootstrap.paired``).
    """
    return _paired(own, base, streams, lambda line: line.get("losses"))


def streams_of(study: Study, task: str) -> tuple[int, int]:
    """A task has rows of its own, and seeds of its own unless one model learns several."""
    stream = list(study.tasks).index(task)
    return stream, stream if study.regime == "each" else 0


def _paired(
    own: Found, base: Found, streams: tuple[int, int], values: Callable[[Any], Any]
) -> Paired | None:
    common = sorted(own.keys() & base.keys())
    pairs = [(values(own[s]), values(base[s])) for s in common]
    if not pairs or any(value is None for pair in pairs for value in pair):
        return None
    return paired([x for x, _ in pairs], [y for _, y in pairs], *streams)


def over_tasks(lines: Sequence[Line], shared: bool) -> Line:
    """One row's mean over its tasks.

    Args:
        shared: a seed is one model, which has learnt all tasks; else each task has a model of
            its own. The differences' draws have that already.
    """
    first = lines[0]

    def mean(name: str) -> float | None:
        values = [getattr(line, name) for line in lines]
        return None if None in values else statistics.mean(values)

    def together(name: str) -> Paired | None:
        parts = [getattr(line, name) for line in lines]
        seeds = {len(part.by_seed) for part in parts if part is not None}
        return averaged(parts) if None not in parts and len(seeds) == 1 else None

    deviations = [line.deviation for line in lines if line.deviation is not None]
    deviation = None
    if len(deviations) == len(lines):
        deviation = sum(d * d for d in deviations) ** 0.5 / len(lines)
        if shared:
            each = [line.accuracies for line in lines]
            deviation = statistics.stdev(map(statistics.mean, zip(*each, strict=True)))
    return Line(
        ALL,
        first.row,
        first.match,
        first.seeds,
        sum(line.rows for line in lines),
        first.trainable,
        mean("accuracy"),
        deviation,
        mean("loss"),
        first.active,
        mean("step_s"),
        hits=together("hits"),
        losses=together("losses"),
    )
