"""A study file (YAML) to cells: which rows on which tasks with which seeds, in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from htsr_alloc import files
from htsr_alloc.allocation import Bounds, allocate, parse_groups
from htsr_alloc.allocation.exports import Lora
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.systems import DEFAULT
from htsr_alloc.records import METRICS, Allocation, Metrics, loads
from htsr_alloc.training.identity import content_of
from htsr_alloc.training.recipe import Recipe

T = TypeVar("T")
UNTRAINED = "none"  # the system of a row that only evaluates the model


@dataclass(frozen=True)
class Task:
    """JSON lines to train on and to test on; ``valid`` is for EM-LoRA's activations.

    ``steps`` is None where the study's recipe says how many.
    """

    train: Path
    test: Path
    valid: Path | None = None
    test_rows: int | None = None  # the first so many
    steps: int | None = None


@dataclass(frozen=True)
class RowSpec:
    """One row of the table: a system and an allocation.

    ``strategy``, ``metric``, ``metrics``, ``beta``, ``groups`` and ``repair`` are those of
    ``htsr allocate``, whose budget is the study's. ``main`` rows run with every seed, the others
    with the first. Settings that are None are the study's.
    """

    name: str
    system: str = DEFAULT
    main: bool = False
    strategy: str = "uniform"
    metrics: Path | None = None
    metric: str = "pl_alpha_hill"
    beta: float = 2.5
    repair: str = "remainder"
    groups: str | None = None
    experts: int | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class Study:
    """A whole study. ``experts`` (T) and ``r`` set the budget that every row has to meet."""

    model: Path
    metrics: Path
    results: Path
    tasks: Mapping[str, Task]
    rows: tuple[RowSpec, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    baseline: str = "uniform"
    experts: int = 160
    r: int = Lora.r
    lora_alpha: float = Lora.lora_alpha
    lora_dropout: float = Lora.lora_dropout
    max_length: int = 512
    dtype: str = "auto"
    eval_batch_size: int = 32
    recipe: Recipe = field(default_factory=Recipe)

    def allocation(self, row: RowSpec, budget: int) -> Allocation:
        """A row's experts per layer for a budget T."""
        path = row.metrics or self.metrics
        return allocate(
            loads(Metrics, files.read_bytes(path), path.name),
            strategy=row.strategy,
            budget=budget,
            beta=row.beta,
            metric=row.metric,
            repair=row.repair,
            bounds=Bounds(low=1),
            groups=parse_groups(row.groups) if row.groups else (),
        )

    def recipe_of(self, cell: Cell) -> Recipe:
        """The study's recipe with the cell's seed, its task's steps and its row's rate, if any."""
        return dataclasses.replace(
            self.recipe,
            seed=cell.seed,
            steps=self.tasks[cell.task].steps or self.recipe.steps,
            learning_rate=cell.row.learning_rate or self.recipe.learning_rate,
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
        HtsrError: no YAML, an unknown or missing key, two rows of one name, no baseline row.
    """
    import yaml

    try:
        data = yaml.safe_load(files.read_bytes(path).decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise HtsrError(f"{path.name} is not YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(data, dict):
        raise HtsrError(f"{path.name} holds no study.", "See data/study/smollm2.yaml.")
    here = path.parent
    tasks = _mapping(data.pop("tasks", {}), "tasks", path)
    rows = data.pop("rows", [])
    recipe = _mapping(data.pop("recipe", {}), "recipe", path)
    study = _made(
        Study,
        {
            **data,
            "tasks": {n: _made(Task, _mapping(v, n, path), path, here) for n, v in tasks.items()},
            "rows": tuple(_made(RowSpec, _mapping(row, "rows", path), path, here) for row in rows),
            "recipe": _made(Recipe, recipe, path, here),
        },
        path,
        here,
    )
    study = dataclasses.replace(
        study, seeds=tuple(study.seeds), baseline=baseline or study.baseline
    )
    names = [row.name for row in study.rows]
    if not study.tasks or not names or not study.seeds:
        raise HtsrError(f"{path.name} has no tasks, no rows or no seeds.")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise HtsrError(f"{path.name} has two rows called {twice!r}.")
    if study.baseline not in names:
        raise HtsrError(f"{path.name} has no row {study.baseline!r}, its baseline.")
    return study


def _mapping(value: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise HtsrError(f"{path.name}: {name} is no mapping.")
    return dict(value)


def _made(kind: type[T], data: Mapping[str, Any], path: Path, here: Path) -> T:
    """A dataclass of a mapping; text where a Path belongs is taken from the file's folder."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in fields:
            raise HtsrError(
                f"{path.name} has an unknown key {name!r} in {kind.__name__.lower()}.",
                f"Known are {', '.join(fields)}.",
            )
    for name, f in fields.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise HtsrError(f"{path.name} has a {kind.__name__.lower()} without {name!r}.")
    values = {
        name: here / value if "Path" in str(fields[name].type) and value is not None else value
        for name, value in data.items()
    }
    return kind(**values)
