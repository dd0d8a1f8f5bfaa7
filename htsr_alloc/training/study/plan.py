"""A study file (YAML) to cells: which rows on which tasks with which seeds, in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from htsr_alloc import files
from htsr_alloc.allocation import Bounds, allocate, keywords_of, parse_groups
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.systems import DEFAULT
from htsr_alloc.records import METRICS, Allocation, Metrics, loads
from htsr_alloc.records.convert import convert
from htsr_alloc.records.lora import Lora
from htsr_alloc.records.text import printable
from htsr_alloc.training.identity import content_of
from htsr_alloc.training.methods import METHODS, read_settings
from htsr_alloc.training.settings import LEARNING_RATE, Recipe

UNTRAINED = "none"  # the system of a row that only evaluates the model
Positive = Annotated[int, Meta(ge=1)]
Number = int | float  # as the file has it: a fingerprint tells 2 from 2.0


@dataclass(frozen=True)
class Task:
    """JSON lines to train on and to test on.

    ``valid`` is for systems that also learn from validation rows. Only the first ``test_rows``
    are tested. ``steps`` is None where the study's recipe gives them.
    """

    train: Path
    test: Path
    valid: Path | None = None
    test_rows: Positive | None = None
    steps: Positive | None = None


@dataclass(frozen=True)
class RowSpec:
    """One row of the table: a system and an allocation.

    ``strategy``, ``metric``, ``metrics``, ``beta``, ``groups`` and ``repair`` are those of
    ``htsr allocate``, whose budget is the study's. ``main`` rows run with every seed, the others
    with the first. What is None is the study's. ``settings`` are the system's, as those of
    ``htsr train --set``.
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
    learning_rate: Annotated[float, Meta(gt=0)] | None = None
    settings: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A whole study. ``experts`` (T) and ``r`` set the budget that every row has to meet."""

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

    def allocation(self, row: RowSpec, budget: int) -> Allocation:
        """A row's experts per layer for a budget T."""
        path = row.metrics or self.metrics
        groups = parse_groups(row.groups) if row.groups else None
        keywords = {"beta": row.beta, "metric": row.metric, "groups": groups}
        return allocate(
            loads(Metrics, files.read_bytes(path), path.name),
            strategy=row.strategy,
            T=budget,
            repair=row.repair,
            bounds=Bounds(low=1),
            **{k: v for k, v in keywords.items() if k in keywords_of(row.strategy)},
        )

    def recipe_of(self, cell: Cell) -> Recipe:
        """The study's recipe with the cell's seed, its task's steps and its row's rate, if any."""
        return dataclasses.replace(
            self.recipe,
            save_every=0,  # a cell that is interrupted begins again
            seed=cell.seed,
            steps=self.tasks[cell.task].steps or self.recipe.steps,
            learning_rate=cell.row.learning_rate or self.recipe.learning_rate or LEARNING_RATE,
        )


@dataclass(frozen=True)
class Cell:
    """One training run and its test."""

    task: str
    row: RowSpec
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What a result is found by."""
        return self.task, self.row.name, self.seed


def cells(study: Study) -> list[Cell]:
    """The main rows of every task, seed by seed; then the others with the first seed."""
    main = [row for row in study.rows if row.main]
    others = [row for row in study.rows if not row.main]
    return [
        *(Cell(task, row, s) for task in study.tasks for s in study.seeds for row in main),
        *(Cell(task, row, study.seeds[0]) for task in study.tasks for row in others),
    ]


def fingerprint(study: Study, cell: Cell) -> str:
    """A hash of everything that a cell's result depends on, but the machine and the versions."""
    task, row = study.tasks[cell.task], cell.row
    parts: dict[str, Any] = {
        "model": study.model.name,
        "config": content_of(study.model / "config.json"),
        "train": content_of(task.train),
        "test": content_of(task.test),
        "valid": content_of(task.valid) if task.valid else None,
        "test_rows": task.test_rows,
        "row": {k: v for k, v in dataclasses.asdict(row).items() if k not in ("name", "main")},
        "scores": _scores(row.metrics or study.metrics),
        "recipe": dataclasses.asdict(study.recipe_of(cell)),
    }
    parts["row"].pop("metrics")
    if not row.settings:  # as it was before rows had settings
        parts["row"].pop("settings")
    for name in ("experts", "r", "lora_alpha", "lora_dropout", "max_length", "dtype"):
        parts[name] = getattr(study, name)
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _scores(path: Path) -> list[tuple[float | None, ...]]:
    """What an allocation takes from a metrics file; the rest of it may change."""
    metrics = loads(Metrics, files.read_bytes(path), path.name)
    return [tuple(getattr(layer, name) for name in METRICS) for layer in metrics.layers]


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
        HtsrError: an unknown system, or an allocation that cannot be made; it names the row.
    """
    systems = (UNTRAINED, *METHODS)
    for row in study.rows:
        try:
            if row.system not in systems:
                raise HtsrError(
                    f"there is no system {row.system!r}.", f"Choose from {', '.join(systems)}."
                )
            if row.system != UNTRAINED:
                read_settings(row.system, row.settings)
            study.allocation(row, row.experts or study.experts)
        except HtsrError as error:
            raise HtsrError(f"The row {row.name}: {error.message}", error.hint) from None
