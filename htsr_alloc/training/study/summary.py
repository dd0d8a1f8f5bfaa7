"""Results to one table and one figure: mean, deviation, and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.training.study.plan import Study, cells
from htsr_alloc.training.study.store import Key
from htsr_alloc.training.wilson import Z95

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ALL = "all tasks"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"


@dataclass(frozen=True)
class Difference:
    """A row less the baseline in accuracy, over the seeds that both have.

    ``over_rows`` and ``over_seeds`` are halves of 95 % intervals. The first says whether these
    trained models differ on other rows of the task (each row's difference is averaged over seeds
    first); the second, what other seeds would do on these rows (Student's t; None for one seed).
    """

    mean: float
    over_rows: float
    over_seeds: float | None
    by_seed: tuple[float, ...]


@dataclass(frozen=True)
class Line:
    """One row of the table; the means are over seeds, ``deviation`` is theirs (None for one).

    ``diverged`` runs have no accuracy and count in no mean; where all did, the means are None.
    """

    task: str
    row: str
    seeds: int
    rows: int
    trainable: int
    accuracy: float | None
    deviation: float | None
    loss: float | None
    difference: Difference | None
    diverged: int = 0


def summarise(study: Study, done: Mapping[Key, Mapping[str, Any]]) -> list[Line]:
    """A line for each task and row that has a result, in the study's order; then ``ALL``.

    The lines of ``ALL`` are means over tasks, for the rows that every task has with the same seeds.
    """
    lines = []
    lost = {key for key, cell in done.items() if cell.get("diverged")}
    everything, done = done, {key: cell for key, cell in done.items() if key not in lost}
    for task in study.tasks:
        base = {s: done[k] for s in study.seeds if (k := (task, study.baseline, s)) in done}
        for row in study.rows:
            own = {s: done[k] for s in study.seeds if (k := (task, row.name, s)) in done}
            gone = [everything[k] for s in study.seeds if (k := (task, row.name, s)) in lost]
            if not own and gone:
                size = gone[0]["trainable"]
                lines.append(Line(task, row.name, 0, 0, size, None, None, None, None, len(gone)))
            if not own:
                continue
            found = list(own.values())
            accuracies = [cell["accuracy"] for cell in found]
            common = sorted(own.keys() & base.keys())
            compared = bool(common) and row.name != study.baseline
            lines.append(
                Line(
                    task,
                    row.name,
                    len(own),
                    found[0]["n"],
                    found[0]["trainable"],
                    statistics.mean(accuracies),
                    statistics.stdev(accuracies) if len(own) > 1 else None,
                    statistics.mean(cell["loss"] for cell in found),
                    difference([own[s]["hits"] for s in common], [base[s]["hits"] for s in common])
                    if compared
                    else None,
                    len(gone),
                )
            )
    if len(study.tasks) > 1:
        for row in study.rows:
            seeds = {
                tuple(s for s in study.seeds if (task, row.name, s) in done) for task in study.tasks
            }
            if len(seeds) == 1 and seeds != {()}:
                lines.append(over_tasks([line for line in lines if line.row == row.name]))
    return lines


def difference(own: Sequence[str], base: Sequence[str]) -> Difference:
    """The paired difference of accuracies; ``own[s][i]`` is "1" where row i is right."""
    by_seed = tuple(
        sum(int(a) - int(b) for a, b in zip(x, y, strict=True)) / len(x)
        for x, y in zip(own, base, strict=True)
    )
    n, seeds = len(own[0]), len(own)
    by_row = [sum(int(x[i]) - int(y[i]) for x, y in zip(own, base, strict=True)) for i in range(n)]
    error = statistics.stdev([d / seeds for d in by_row]) / math.sqrt(n) if n > 1 else math.nan
    over_seeds = None
    if seeds > 1:
        over_seeds = t95(seeds - 1) * statistics.stdev(by_seed) / math.sqrt(seeds)
    return Difference(statistics.mean(by_seed), Z95 * error, over_seeds, by_seed)


def over_tasks(lines: Sequence[Line]) -> Line:
    """One row's mean over its tasks; tasks, their rows and their seeds are independent.

    The seeds' interval pools the tasks' degrees of freedom, so that three seeds of four tasks
    count as eight and not as two.
    """
    first, k = lines[0], len(lines)
    parts = [line.difference for line in lines if line.difference is not None]
    together = None
    if len(parts) == k and len({len(d.by_seed) for d in parts}) == 1:
        seeds = [d.over_seeds / t95(len(d.by_seed) - 1) for d in parts if d.over_seeds is not None]
        over_seeds = None
        if len(seeds) == k:
            over_seeds = t95(sum(len(d.by_seed) - 1 for d in parts)) * math.hypot(*seeds) / k
        together = Difference(
            statistics.mean(d.mean for d in parts),
            math.hypot(*(d.over_rows for d in parts)) / k,
            over_seeds,
            tuple(map(statistics.mean, zip(*(d.by_seed for d in parts), strict=True))),
        )
    deviations = [line.deviation for line in lines if line.deviation is not None]
    return Line(
        ALL,
        first.row,
        first.seeds,
        sum(line.rows for line in lines),
        first.trainable,
        statistics.mean(line.accuracy for line in lines if line.accuracy is not None),
        math.hypot(*deviations) / k if len(deviations) == k else None,
        statistics.mean(line.loss for line in lines if line.loss is not None),
        together,
    )


def t95(freedom: int) -> float:
    """The half-width of a 95 % interval of Student's t, in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def markdown(study: Study, lines: Sequence[Line], done: Mapping[Key, Any]) -> str:
    """The table, and how much of the study it holds."""
    head = "| task | row | seeds | trainable | accuracy | sd | Δ vs {} | rows | seeds | loss |"
    text = [head.format(study.baseline), "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    before = None
    for line in lines:
        d = line.difference
        text.append(
            "| "
            + " | ".join(
                [
                    line.task if line.task != before else "",
                    line.row,
                    f"{line.seeds}" + (f" ({line.diverged} diverged)" if line.diverged else ""),
                    f"{line.trainable:,}",
                    f"{line.accuracy:.1%}" if line.accuracy is not None else "-",
                    f"{line.deviation:.1%}" if line.deviation is not None else "-",
                    f"{d.mean:+.1%}" if d else "-",
                    f"±{d.over_rows:.1%}" if d else "-",
                    f"±{d.over_seeds:.1%}" if d and d.over_seeds is not None else "-",
                    f"{line.loss:.3f}" if line.loss is not None else "-",
                ]
            )
            + " |"
        )
        before = line.task
    sizes = sorted({line.rows for line in lines if line.task != ALL and line.rows})
    planned = cells(study)
    finished = sum(cell.key in done for cell in planned)
    text += [
        "",
        f"{finished} of {len(planned)} cells; n = {', '.join(map(str, sizes))} test rows a task. "
        "*accuracy* and *loss* (of the right answer, per token) are means over seeds and *sd* is "
        f"the seeds' standard deviation. *Δ vs {study.baseline}* is the mean paired difference "
        "over the seeds that both have, with two 95 % intervals: *rows* is over test rows, given "
        "these seeds, and *seeds* over seeds, given these rows (Student's t).",
    ]
    return "\n".join(text) + "\n"


def write_into(path: Path, table: str) -> None:
    """Put the table between the two marks of a document.

    Raises:
        HtsrError: the marks are not there.
    """
    text = files.read_bytes(path).decode("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise HtsrError(f"{path.name} has no place for the table.", f"Write {BEGIN} and {END}.")
    files.write_text(path, f"{before}{begin}\n{table}{end}{after}")


def plot(study: Study, lines: Sequence[Line], path: Path | None = None) -> Figure:
    """Each row's difference from the baseline with its interval and its seeds, task by task.

    Args:
        path: a file to write as well.

    Raises:
        HtsrError: there is nothing to compare yet, or the file cannot be written.
    """
    from htsr_alloc import style

    compared = [line for line in lines if line.difference is not None]
    tasks = list(dict.fromkeys(line.task for line in compared))
    if not tasks:
        raise HtsrError("There is no pair to compare yet.", "Run more of the study.")
    names = [row.name for row in study.rows if any(line.row == row.name for line in compared)]
    with style.look():
        figure = _drawn(study, compared, tasks, names)
        if path is not None:
            try:
                figure.savefig(path)
            except OSError as error:
                raise files.cannot("write", path, error) from None
    return figure


def _drawn(
    study: Study, compared: Sequence[Line], tasks: Sequence[str], names: Sequence[str]
) -> Figure:
    """One panel a task, one row of it a row of the study."""
    from htsr_alloc.style import COLOURS, new_figure

    figure = new_figure(2.2 + 2.6 * len(tasks), 1.2 + 0.24 * len(names))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        axes.axvline(0, color="0.6", linewidth=0.8)
        for line in compared:
            if line.task != task:
                continue
            d, y = line.difference, names.index(line.row)
            assert d is not None
            axes.errorbar(
                100 * d.mean, y, xerr=100 * d.over_rows, fmt="o", color=COLOURS[0], ms=4, lw=1
            )
            axes.plot(
                [100 * x for x in d.by_seed], [y] * len(d.by_seed), "|", color=COLOURS[1], ms=8
            )
        axes.set_title(task)
        axes.set_xlabel(
            f"points over {study.baseline}\n(bars: 95 % over rows, ticks: seeds)", fontsize=8
        )
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure
