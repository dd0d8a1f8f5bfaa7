"""Lines to a Markdown table, to a document and to a figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.training.study.bootstrap import Difference
from htsr_alloc.training.study.cells import Done, cells, planned
from htsr_alloc.training.study.chance import ranks
from htsr_alloc.training.study.chance import table as chances
from htsr_alloc.training.study.plan import UNTRAINED, Study
from htsr_alloc.training.study.summary import ALL, Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = "<!-- {0}: begin -->", "<!-- {0}: end -->"  # around the table of data/study/{0}.yaml
NONE = "-"


def _interval(found: Difference | None, unit: str) -> str:
    if found is None:
        return NONE
    return f"{found.mean:+{unit}} [{found.low:+{unit}}, {found.high:+{unit}}]"


def _given(value: float | None, unit: str) -> str:
    return NONE if value is None else f"{value:{unit}}"


# Name, alignment and text of each column; one that no line has anything in is left out.
COLUMNS: tuple[tuple[str, str, Callable[[Line], str]], ...] = (
    ("row", "---", lambda line: line.row),
    ("equal", "---", lambda line: line.match or NONE),
    ("rate", "--:", lambda line: _given(line.rate, "g") + "*" * line.edge),
    (
        "seeds",
        "--:",
        lambda line: f"{line.seeds}" + (f" ({line.diverged} diverged)" if line.diverged else ""),
    ),
    ("trainable", "--:", lambda line: f"{line.trainable:,}"),
    ("active", "--:", lambda line: _given(line.active, ",")),
    ("s a step", "--:", lambda line: _given(line.step_s, ".2f")),
    ("accuracy", "--:", lambda line: _given(line.accuracy, ".1%")),
    ("sd", "--:", lambda line: _given(line.deviation, ".1%")),
    ("Δ accuracy", "--:", lambda line: _interval(line.accuracy_difference, ".1%")),
    ("loss", "--:", lambda line: _given(line.loss, ".3f")),
    ("Δ loss", "--:", lambda line: _interval(line.loss_difference, ".3f")),
    ("lost accuracy", "--:", lambda line: _given(line.forgot_accuracy, ".1%")),
    ("lost loss", "--:", lambda line: _given(line.forgot_loss, ".3f")),
)


REGIMES = {
    "each": "Each task has a model of its own.",
    "together": "One model has learnt the rows of all tasks together.",
    "sequence": "One model has learnt {} and is tested after the last; *lost* is how much worse it "
    "then is than directly after the task.",
}


def markdown(study: Study, lines: Sequence[Line], done: Done) -> str:
    """The table, how much of the study it holds, and what it could have seen."""
    filled = [(name, align, [text(line) for line in lines]) for name, align, text in COLUMNS]
    columns = [column for column in filled if set(column[2]) - {NONE}]
    text = [
        "| " + " | ".join(["task", *(name for name, _, _ in columns)]) + " |",
        "|" + "|".join(["---", *(align for _, align, _ in columns)]) + "|",
    ]
    before = None
    for i, line in enumerate(lines):
        task = line.task if line.task != before else ""
        text.append("| " + " | ".join([task, *(texts[i] for _, _, texts in columns)]) + " |")
        before = line.task
    sizes = sorted({line.rows for line in lines if line.task != ALL and line.rows})
    finished = sum(cell.is_in(done) for cell in cells(study, done))
    said = [
        f"{finished} of {planned(study)} cells; n = {', '.join(map(str, sizes))} test rows a task. "
        "*accuracy* and *loss* (of the right answer, in nats a token) are means over seeds and "
        f"*sd* is the seeds' standard deviation. *Δ* is the mean paired difference from "
        f"{study.baseline} over the seeds that both have, with its 95 % interval: a bootstrap over "
        "rows and seeds together, of one seed over rows alone. *s a step* is the median of a "
        "training's steps, on a CPU in CPU seconds.",
        REGIMES[study.regime].format(", then ".join(study.tasks)),
        *_tuning(study, lines),
        *_power(study, lines),
    ]
    found = "\n".join([*text, "", " ".join(said)]) + "\n"
    compared = chances(ranks(study, done))
    return f"{found}\n{compared}" if compared else found


def _tuning(study: Study, lines: Sequence[Line]) -> list[str]:
    if not study.learning_rates:
        return []
    edges = [f"{line.row} on {line.task}" for line in lines if line.edge]
    said = (
        f"*rate* is the best of {len(study.learning_rates)} by the loss on validation rows with "
        f"seed {', '.join(map(str, study.seeds[: study.tuning_seeds]))}"
    )
    if study.tuning_seeds > 1:
        said += f" (a row that has one seed: with {study.seeds[0]})"
    if edges:
        said += "; * is at an end of its grid, so that a better one may lie beyond it"
    groups = (
        "Rows are equal to the baseline in *total* trainable parameters, or in those *active* on "
        "a token: of a mixture the A and B of the experts that it takes, without the router."
    )
    return [f"{said}.", groups]


def _power(study: Study, lines: Sequence[Line]) -> list[str]:
    """The smallest differences that rows with all seeds, or else all rows, could have shown."""
    most = max((line.seeds for line in lines if line.hits), default=0)
    said = []
    tasks = dict.fromkeys(line.task for line in lines)
    for task in tasks:
        own = [line for line in lines if line.task == task and line.seeds == most]
        hits = [d.visible for line in own if (d := line.accuracy_difference)]
        losses = [d.visible for line in own if (d := line.loss_difference)]
        if hits:
            nats = f" and {min(losses):.3f} to {max(losses):.3f} nats" if losses else ""
            said.append(f"{task} {min(hits):.1%} to {max(hits):.1%}{nats}")
    if not said:
        return []
    return [
        f"With {most} seed{'s' * (most > 1)} the smallest difference seen four times in five (80 % "
        f"power at 5 %, 2.80 standard errors; least and most over the rows): {'; '.join(said)}."
    ]


def write_into(path: Path, table: str, name: str) -> None:
    """Put the table between its study's two marks in a document.

    Args:
        name: the study's, which is its file's without the suffix.

    Raises:
        HtsrError: the marks are not there.
    """
    first, last = (mark.format(name) for mark in MARKS)
    text = files.read_bytes(path).decode("utf-8")
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise HtsrError(f"{path.name} has no place for the table.", f"Write {first} and {last}.")
    files.write_text(path, f"{before}{begin}\n{table}{end}{after}")


def plot(study: Study, lines: Sequence[Line], path: Path | None = None) -> Figure:
    """Each row's difference from the baseline with its interval and its seeds, task by task.

    The difference is the losses', or the accuracies' where no losses are kept. Untrained rows are
    left out: they are so far off that the others' differences could not be seen.

    Args:
        path: a file to write as well.

    Raises:
        HtsrError: there is nothing to compare yet, or the file cannot be written.
    """
    from htsr_alloc import style

    untrained = {row.name for row in study.rows if row.system == UNTRAINED}
    compared = [x for x in lines if x.hits is not None and x.row not in untrained]
    if not compared:
        raise HtsrError("There is no pair to compare yet.", "Run more of the study.")
    with style.look():
        figure = _drawn(study, compared)
        if path is not None:
            try:
                figure.savefig(path)
            except OSError as error:
                raise files.cannot("write", path, error) from None
    return figure


def _drawn(study: Study, compared: Sequence[Line]) -> Figure:
    """One panel a task, one row of it a row of the study."""
    from htsr_alloc.style import COLOURS, new_figure

    tasks = list(dict.fromkeys(line.task for line in compared))
    names = [row.name for row in study.rows if any(line.row == row.name for line in compared)]
    by_loss = all(line.losses is not None for line in compared)
    unit, scale = ("nats of loss", 1) if by_loss else ("points", 100)
    figure = new_figure(2.2 + 2.6 * len(tasks), 1.2 + 0.24 * len(names))
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        axes.axvline(0, color="0.6", linewidth=0.8)
        for line in compared:
            found = line.loss_difference if by_loss else line.accuracy_difference
            if line.task != task or found is None:
                continue
            y = names.index(line.row)
            ends = [[scale * (found.mean - found.low)], [scale * (found.high - found.mean)]]
            centre = scale * found.mean
            axes.errorbar(centre, y, xerr=ends, fmt="o", color=COLOURS[0], ms=4, lw=1)
            seeds = [scale * x for x in found.by_seed]
            axes.plot(seeds, [y] * len(seeds), "|", color=COLOURS[1], ms=8)
        axes.set_title(task)
        axes.set_xlabel(f"{unit} over {study.baseline}\n(bars: 95 %, ticks: seeds)", fontsize=8)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure
