"""A study file (YAML): models, tasks and rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from htsr_alloc import files
from htsr_alloc.allocation import Bounds, allocate, keywords_of, parse_groups, read_scores
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.systems import DEFAULT
from htsr_alloc.records import Allocation, Metrics, loads
from htsr_alloc.records.convert import convert
from htsr_alloc.records.lora import Lora
from htsr_alloc.records.text import printable
from htsr_alloc.training.baselines import Baseline
from htsr_alloc.training.methods import METHODS, read_settings
from htsr_alloc.training.settings import LEARNING_RATE, Recipe

UNTRAINED = "none"  # the system of a row that only evaluates the model
Positive = Annotated[int, Meta(ge=1)]
TASK = "{task}"  # in the name of a score file
Number = int | float  # as the file has it: a fingerprint tells 2 from 2.0
Rate = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Task:
    """JSON lines to train on and to test on.

    ``valid`` is for tuning, and for systems that also learn from validation rows. Only the first
    ``test_rows`` are tested. ``steps`` is None where the study's recipe gives them.
    """

    train: Path
    test: Path
    valid: Path | None = None
    test_rows: Positive | None = None
    steps: Positive | None = None


@dataclass(frozen=True)
class RowSpec:
    """One row of the table: a system and an allocation.

    ``strategy``, ``metric``, ``metrics``, ``scores``, ``beta``, ``spread``, ``groups`` and
    ``repair`` are those of ``htsr allocate``, whose budget is the study's; in the name of
    ``scores`` the task stands for ``{task}``. ``main`` rows run with every seed, the others
    with the first. What is None is the study's. ``settings`` are the system's, as those of
    ``htsr train --set``. ``match`` says which parameters are the baseline's, all of them or
    those that act on a token, and ``times`` how many times as many the row trains. ``draw`` is the
    seed of a random strategy: the other allocations of the same system have to beat the rows that
    have one. ``learning_rates`` are a grid of the row's own, as long as the study's; a row with a
    ``learning_rate`` is not tuned.
    """

    name: str
    system: str = DEFAULT
    main: bool = False
    strategy: str = "uniform"
    metrics: Path | None = None
    metric: str = "pl_alpha_hill"
    beta: Number = 2.5
    repair: str = "remainder"
    groups: str | None = None
    experts: Positive | None = None
    learning_rate: Rate | None = None
    settings: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    match: Literal["total", "active"] = "total"
    times: Positive = 1
    draw: Annotated[int, Meta(ge=0)] | None = None
    learning_rates: tuple[Rate, ...] = ()
    scores: Path | None = None
    spread: Annotated[float, Meta(gt=1)] | None = None

    @property
    def but_for_places(self) -> tuple[Any, ...]:
        """What two rows have in common that differ only in where their experts are."""
        return self.system, self.settings, self.match, self.times, self.experts

    def scores_of(self, task: str) -> Path | None:
        """The score file of a task."""
        return None if self.scores is None else Path(str(self.scores).replace(TASK, task))


@dataclass(frozen=True)
class Study:
    """A whole study. ``experts`` (T) and ``r`` set the budget that every row has to meet.

    With ``learning_rates`` each row is trained at every one of them with the first
    ``tuning_seeds`` seeds (a row that is not main with the first), and with the others at the one
    with the least loss on the tasks' first ``valid_rows`` validation rows.

    ``regime``: ``each`` task by itself, all ``together`` (the rows of every task in one training,
    of as many steps as theirs together), or in ``sequence``, one after the other with the same
    adapter. A model of several tasks is tested on each, and tuned on the mean of their losses.
    """

    model: Path
    metrics: Path
    results: Path
    tasks: Annotated[Mapping[str, Task], Meta(min_length=1)]
    rows: Annotated[tuple[RowSpec, ...], Meta(min_length=1)]
    seeds: Annotated[tuple[int, ...], Meta(min_length=1)] = (1, 2, 3)
    baseline: str = "uniform"
    experts: Positive = 160
    r: Positive = Lora.r
    lora_alpha: Number = Lora.lora_alpha
    lora_dropout: Number = Lora.lora_dropout
    max_length: Positive = 512
    dtype: str = "auto"
    eval_batch_size: Positive = 32
    recipe: Recipe = field(default_factory=Recipe)
    learning_rates: tuple[Rate, ...] = ()
    tuning_seeds: Positive = 1
    valid_rows: Positive | None = None
    regime: Literal["each", "together", "sequence"] = "each"

    @property
    def away(self) -> Path | None:
        """The first of the files that its cells are made of that is not there."""
        tasks = [path for x in self.tasks.values() for path in (x.train, x.test, x.valid) if path]
        return next((path for path in (self.model, *tasks) if not path.exists()), None)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The tasks that one model is trained on."""
        return [(task,) for task in self.tasks] if self.regime == "each" else [tuple(self.tasks)]

    def tuned(self, row: RowSpec) -> bool:
        """Whether the row's learning rate is chosen from a grid."""
        fixed = row.system == UNTRAINED or row.learning_rate is not None
        return bool(self.learning_rates) and not fixed

    def rates(self, row: RowSpec) -> tuple[float | None, ...]:
        """The grid of a row; one None for a row that is not tuned."""
        return (row.learning_rates or self.learning_rates) if self.tuned(row) else (None,)

    def rate(self, row: RowSpec) -> float | None:
        """The one learning rate of a row that is not tuned; None of one that is."""
        if self.tuned(row):
            return None
        return row.learning_rate or self.recipe.learning_rate or LEARNING_RATE

    def seeds_of(self, row: RowSpec) -> tuple[int, ...]:
        """The seeds that a row runs with."""
        return self.seeds if row.main else self.seeds[:1]

    def tuning(self, row: RowSpec) -> tuple[int, ...]:
        """The seeds that run at every rate of a row."""
        return self.seeds[: self.tuning_seeds if row.main and self.tuned(row) else 1]

    def allocation(self, row: RowSpec, budget: int, task: str) -> Allocation:
        """A row's experts per layer for a budget T, on a task."""
        path, scores = row.metrics or self.metrics, row.scores_of(task)
        keywords = {
            "beta": row.beta if row.spread is None else None,
            "spread": row.spread,
            "metric": row.metric if scores is None else None,
            "scores": None if scores is None else read_scores(scores),
            "groups": parse_groups(row.groups) if row.groups else None,
            "seed": row.draw,
        }
        return allocate(
            loads(Metrics, files.read_bytes(path), path.name),
            strategy=row.strategy,
            T=budget,
            repair=row.repair,
            bounds=Bounds(low=1),
            **{k: v for k, v in keywords.items() if k in keywords_of(row.strategy)},
        )


def read_study(path: Path, baseline: str | None = None) -> Study:
    """A study file; its paths are relative to its own folder.

    Args:
        baseline: the row to compare with, where it is not to be the file's.

    Raises:
        HtsrError: not YAML, an unknown or missing key, a wrong type (the sentence names the
            place, e.g. ``rows[3].beta``), two rows of one name, no baseline row.
    """
    from htsr_alloc.training.study.strict_yaml import read_yaml

    def beside(kind: type, value: Any) -> Path:
        if not isinstance(value, str):
            raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
        return path.parent / value

    data = read_yaml(path)
    try:
        if isinstance(data, dict) and isinstance(data.get("tasks"), dict):
            for name, task in data["tasks"].items():  # here each has a name, and below none
                convert(Task, task, f"tasks.{name}", beside)
        study = convert(Study, data, hook=beside)
    except ValueError as error:
        raise HtsrError(f"{path.name}: {printable(error)}.") from None
    except HtsrError as error:
        raise HtsrError(f"{path.name}: recipe: {error.message}", error.hint) from None
    study = dataclasses.replace(
        study,
        baseline=baseline or study.baseline,
        recipe=dataclasses.replace(study.recipe, **data.get("recipe", {})),  # 2 stays 2, not 2.0
    )
    names = [row.name for row in study.rows]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise HtsrError(f"{path.name} has two rows called {twice!r}.")
    if study.baseline not in names:
        raise HtsrError(f"{path.name} has no row {study.baseline!r}, its baseline.")
    return study


def check_rows(study: Study) -> None:
    """Refuse a row that cannot run, before any other has run for hours.

    Raises:
        HtsrError: an unknown system or one that the regime does not suit, an allocation that
            cannot be made, a grid of another length, or a random row at another rate than the
            others, with the row's name; a task without validation rows to tune on; fewer seeds
            than tune; tasks learnt together of which only some have steps.
    """
    steps = {(task.steps or study.recipe.steps) is None for task in study.tasks.values()}
    if study.regime == "together" and len(steps) > 1:
        raise HtsrError(
            "Some of the tasks that are learnt together have steps, and some epochs.",
            "Give each its `steps`.",
        )
    if study.tuning_seeds > len(study.seeds):
        raise HtsrError(
            f"The study tunes with {study.tuning_seeds} seeds and has {len(study.seeds)}.",
            "Give it as many `seeds`.",
        )
    for name, task in study.tasks.items():
        if study.learning_rates and task.valid is None:
            raise HtsrError(f"The task {name} has no validation rows.", "Tuning needs `valid`.")
    systems = (UNTRAINED, *METHODS)
    for row in study.rows:
        try:
            if row.system not in systems:
                raise HtsrError(
                    f"there is no system {row.system!r}.", f"Choose from {', '.join(systems)}."
                )
            if row.system != UNTRAINED:
                read_settings(row.system, row.settings)
            given = {"seed": row.draw, "scores": row.scores, "spread": row.spread}
            for name in given.keys() - keywords_of(row.strategy):
                if given[name] is not None:
                    raise HtsrError(f"the {row.strategy} strategy has no {name}.", "Remove it.")
            method = METHODS.get(row.system)
            if study.regime == "sequence" and isinstance(method, Baseline) and method.callbacks:
                raise HtsrError(
                    f"{method.title} plans one training, and not several in sequence.",
                    "Leave it out of this study.",
                )
            if row.learning_rates and len(row.learning_rates) != len(study.learning_rates):
                raise HtsrError(
                    f"its grid has {len(row.learning_rates)} learning rates, and the study's "
                    f"{len(study.learning_rates)}.",
                    "Tune every row with as many runs.",
                )
            if row.times > 1 and isinstance(method, Baseline) and method.whole:
                raise HtsrError(
                    f"{method.title} trains every parameter, and not {row.times} times a budget.",
                    "Leave `times` out.",
                )
            alike = [x for x in study.rows if x.but_for_places == row.but_for_places]
            draws = {(study.rate(x), study.rates(x)) for x in alike if x.draw is not None}
            if row.draw is not None and len(draws) > 1:
                raise HtsrError(
                    "the random rows of its system have several learning rates.",
                    "Give them one, or one grid.",
                )
            for first, *others in study.groups:
                if others and row.scores is not None and TASK in str(row.scores):
                    raise HtsrError(
                        "its scores are those of one task, and one model learns several.",
                        "Name one score file.",
                    )
                study.allocation(row, row.experts or study.experts, first)
        except HtsrError as error:
            raise HtsrError(f"The row {row.name}: {error.message}", error.hint) from None
