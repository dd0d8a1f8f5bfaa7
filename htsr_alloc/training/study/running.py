"""Run a study's cells that have no result yet, one after the other."""

from __future__ import annotations

import functools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from htsr_alloc.errors import HtsrError
from htsr_alloc.training import models, tokens
from htsr_alloc.training.evaluate import NotNumbers, Score, evaluate
from htsr_alloc.training.identity import weights_of
from htsr_alloc.training.methods import method_of
from htsr_alloc.training.positions import refuse_longer
from htsr_alloc.training.recipe import Diverged, make_trainer, total_steps
from htsr_alloc.training.rows import read_rows, share_of
from htsr_alloc.training.study.budget import Fitted, Size, fitted, size_of
from htsr_alloc.training.study.cells import Cell, cells, fingerprint, planned
from htsr_alloc.training.study.plan import UNTRAINED, Study, check_rows
from htsr_alloc.training.study.store import Store
from htsr_alloc.version import __version__

Said = Callable[[str], None]
DIGITS = 4  # of a test row's loss


def run(study: Study, device: torch.device, say: Said, limit: int | None = None) -> int:
    """Run what is left; several processes may do so at once.

    Args:
        limit: stop after so many cells.

    Returns:
        How many cells this process has run.

    Raises:
        HtsrError: a file that is not there, a result made with other settings than the study's, or
            a row that cannot run.
    """
    if study.away is not None:
        raise HtsrError(
            f"{study.away} is not there.", "The plan says what fetches it, or correct it."
        )
    store, total = Store(study.results), planned(study)
    check(study, store)
    check_rows(study)
    count = 0
    while limit is None or count < limit:
        done = store.read()
        known = cells(study, done)
        waiting = [cell for cell in known if not cell.is_in(done)]
        for cell in waiting:  # the first that no other process has
            with store.claim(cell.keys[0]) as mine:
                if not mine or cell.is_in(store.read()):
                    continue
                say(f"{cell.title} ({total - len(known) + len(waiting)} of {total} left)")
                results = run_cell(study, cell, device)
                store.add(*results)
            count += 1
            for line in results:
                outcome = line["diverged"] or (
                    f"accuracy {line['accuracy']:.3f}, loss {line['loss']:.3f}"
                )
                say(f"  {line['task']}: {outcome} in {line['wall_s']:.0f} s")
            break
        else:
            break
    return count


def check(study: Study, store: Store) -> None:
    """Refuse to add to results of other settings.

    Raises:
        HtsrError: with the first cell that differs.
    """
    done = store.read()
    for cell in cells(study, done):
        held = [done[key] for key in cell.keys if key in done]
        if not held:
            continue
        old, tasks = held[0], " and ".join(cell.tasks)
        if "weights" in old and old["weights"] != weights_of(study.model):
            raise HtsrError(
                f"{store.path.name} has {cell.row.name} on {tasks} with other weights than "
                f"those in {study.model.name}.",
                "Name another results file, or give the model that the results are of.",
            )
        if any(line["fingerprint"] != fingerprint(study, cell) for line in held):
            raise HtsrError(
                f"{store.path.name} has {cell.row.name} on {tasks} with other settings or data "
                "than the study's.",
                "Name another results file, or take the old line out.",
            )
        if cell.tunes(study) and any(not x["diverged"] and x["valid_loss"] is None for x in held):
            raise HtsrError(
                f"{store.path.name} has {cell.title} without a loss on validation rows, because "
                "its seed had no part in the choice of the rate.",
                "Take that line out, or lower `tuning_seeds`.",
            )


def run_cell(study: Study, cell: Cell, device: torch.device) -> list[dict[str, Any]]:
    """Train and test one cell; what goes into the results, a line a task."""
    started, cpu = time.time(), time.process_time()
    dtype = models.dtype_of(study.dtype, device)
    made = None if cell.row.system == UNTRAINED else fitted(study, cell.row, cell.tasks[0])
    weights = dtype if made is None else made.adapter.weights_in(dtype)
    model: Any = models.open_causal_lm(study.model, weights).to(device)
    trained = Trained(model)
    if made is not None:
        trained = _train(study, cell, made, model, device)
    before = time.time()
    try:
        tests = {name: _tested(study, cell, trained, name) for name in cell.tasks}
    except NotNumbers as error:
        trained = replace(trained, diverged=error.message)
        tests = {name: _tested(study, cell, trained, name) for name in cell.tasks}
    shared = {
        "diverged": trained.diverged,
        "train_loss": trained.loss,
        "trainable": trained.size.total,
        "active": trained.size.active,
        "r": made.adapter.r if made else None,
        "experts": list(made.allocation.experts) if made and made.allocation else None,
        "learning_rate": cell.recipe(study).learning_rate if made else None,
        "step_s": trained.step_s,
        "wall_s": round(time.time() - started, 1),
        "test_s": round(time.time() - before, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "versions": {"htsr_alloc": __version__, "torch": torch.__version__},
        "fingerprint": fingerprint(study, cell),
        "weights": weights_of(study.model),
    }
    own = {"row": cell.row.name, "seed": cell.seed, "rate": cell.rate, "system": cell.row.system}
    return [{"task": name, **own, **found, **shared} for name, found in tests.items()]


def _tested(study: Study, cell: Cell, trained: Trained, name: str) -> dict[str, Any]:
    """What one task says of a trained model; None where that diverged."""
    task, before = study.tasks[name], trained.before.get(name)
    score = valid = None
    if not trained.diverged:
        if cell.tunes(study) and task.valid is not None:
            valid = _score(study, trained.model, task.valid, study.valid_rows)
        score = _score(study, trained.model, task.test, task.test_rows)
    scored = dict.fromkeys(f.name for f in fields(Score)) if score is None else asdict(score)
    if score is not None:
        scored["losses"] = [round(loss, DIGITS) for loss in score.losses]
    scored |= {
        "valid_loss": valid.loss if valid else None,
        "valid_accuracy": valid.accuracy if valid else None,
    }
    if before is not None:  # directly after its own training
        scored |= {"before_loss": before.loss, "before_accuracy": before.accuracy}
    return scored


@dataclass(frozen=True)
class Trained:
    """A model after its training, if any.

    ``step_s`` is the median step's seconds. ``before`` has the score of each task that
    others came after, directly after its own training.
    """

    model: Any
    size: Size = field(default_factory=lambda: Size(0, 0))
    loss: float | None = None
    diverged: str | None = None
    step_s: float | None = None
    before: Mapping[str, Score] = field(default_factory=dict)


class StepTimes(TrainerCallback):
    """The time of each optimiser step: on a CPU the process's own, which others do not lengthen."""

    def __init__(self, device: torch.device) -> None:
        self.began, self.seconds = 0.0, list[float]()
        self.clock = time.process_time if device.type == "cpu" else time.perf_counter

    def on_step_begin(self, args, state, control, **kwargs: Any) -> None:
        """The clock starts."""
        self.began = self.clock()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """It stops."""
        self.seconds.append(self.clock() - self.began)


def _train(study: Study, cell: Cell, made: Fitted, model: Any, device: torch.device) -> Trained:
    """A row's adapter on the model, trained on the cell's tasks, stage by stage."""
    adapter, stages, before = made.adapter, cell.stages(study), dict[str, Score]()
    collate = tokens.Collator(tokens.pad_id(_tokenizer(study.model)))
    rows = [_rows(study, [study.tasks[task].train for task in stage]) for stage in stages]
    validation = [_validation(study, stage, cell.row.system) for stage in stages]
    refuse_longer(model, [row for own in (*rows, *validation) for row in own])
    recipes = [cell.recipe(study, stage) for stage in stages]
    torch.manual_seed(cell.seed)
    steps = sum(total_steps(len(own), recipe) for own, recipe in zip(rows, recipes, strict=True))
    model = adapter.put_on(model, made.allocation, steps=steps)
    adapter.start(model, rows[0], collate, recipes[0].batch_size)
    size, times, loss, diverged = size_of(model), StepTimes(device), None, None
    for stage, examples, valid, recipe in zip(stages, rows, validation, recipes, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                model,
                examples,
                Path(folder),
                recipe,
                collate=collate,
                callbacks=[times, *adapter.callbacks()],
                activations=valid,
                device=device,
                bf16=models.dtype_of(study.dtype, device) == torch.bfloat16,
            )
            try:
                trainer.train()
                trainer.refuse_divergence()
                loss = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
                if stage != stages[-1]:
                    task = study.tasks[stage[0]]
                    before[stage[0]] = _score(study, model, task.test, task.test_rows)
            except (Diverged, NotNumbers) as error:
                diverged = error.message
                break
    step = round(statistics.median(times.seconds), 3) if times.seconds else None
    return Trained(model, size, None if diverged else loss, diverged, step, before)


def _score(study: Study, model: Any, path: Path, limit: int | None) -> Score:
    rows = share_of(read_rows(path), limit)
    return evaluate(model, _tokenizer(study.model), rows, batch_size=study.eval_batch_size)


def _validation(study: Study, stage: Sequence[str], system: str) -> list[tokens.Example]:
    paths = [study.tasks[task].valid for task in stage] if method_of(system).bilevel else []
    return _rows(study, [path for path in paths if path is not None])


def _rows(study: Study, paths: Sequence[Path]) -> list[tokens.Example]:
    return [row for path in paths for row in _examples(study.model, path, study.max_length)]


@functools.cache
def _tokenizer(folder: Path) -> Any:
    return tokens.open_tokenizer(folder)


@functools.cache
def _examples(model: Path, path: Path, max_length: int) -> list[tokens.Example]:
    """A file's tokens, made once a process."""
    tokenizer = _tokenizer(model)
    return [tokens.encode(row, tokenizer, max_length) for row in read_rows(path)]


@functools.cache
def _cpu() -> str:
    """The processor's name and the threads used."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name") and line.partition(":")[2].strip():
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {torch.get_num_threads()} thread(s)"
