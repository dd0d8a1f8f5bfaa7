"""Run a study's cells that have no result yet, one after the other."""

from __future__ import annotations

import functools
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.training import models, tokens
from htsr_alloc.training.evaluate import Score, evaluate
from htsr_alloc.training.identity import weights_of
from htsr_alloc.training.methods import method_of
from htsr_alloc.training.recipe import Diverged, make_trainer, total_steps
from htsr_alloc.training.rows import read_rows, share_of
from htsr_alloc.training.study.budget import fitted
from htsr_alloc.training.study.plan import UNTRAINED, Cell, Study, cells, check_rows, fingerprint
from htsr_alloc.training.study.store import Store
from htsr_alloc.version import __version__

Said = Callable[[str], None]


def run(study: Study, device: torch.device, say: Said, limit: int | None = None) -> int:
    """Run what is left; several processes may do so at once.

    Args:
        limit: stop after so many cells.

    Returns:
        How many cells this process has run.

    Raises:
        HtsrError: a result made with other settings than the study's, or a row that cannot run.
    """
    store, planned = Store(study.results), cells(study)
    check(study, store)
    check_rows(study)
    count = 0
    for cell in planned:
        if limit is not None and count >= limit:
            break
        if cell.key in store.read():
            continue
        with store.claim(cell.key) as mine:
            if not mine or cell.key in store.read():
                continue
            left = len(planned) - len(store.read())
            say(f"{cell.task}: {cell.row.name}, seed {cell.seed} ({left} of {len(planned)} left)")
            result = run_cell(study, cell, device)
            store.add(result)
            count += 1
            outcome = result["diverged"] or f"accuracy {result['accuracy']:.3f}"
            say(f"  {outcome} in {result['wall_s']:.0f} s")
    return count


def check(study: Study, store: Store) -> None:
    """Refuse to add to results of other settings.

    Raises:
        HtsrError: with the first cell that differs.
    """
    done = store.read()
    for cell in cells(study):
        old = done.get(cell.key)
        if old is None:
            continue
        if "weights" in old and old["weights"] != weights_of(study.model):
            raise HtsrError(
                f"{store.path.name} has {cell.row.name} on {cell.task} with other weights than "
                f"those in {study.model.name}.",
                "Name another results file, or give the model that the results are of.",
            )
        if old["fingerprint"] != fingerprint(study, cell):
            raise HtsrError(
                f"{store.path.name} has {cell.row.name} on {cell.task} with other settings or data "
                "than the study's.",
                "Name another results file, or take the old line out.",
            )


def run_cell(study: Study, cell: Cell, device: torch.device) -> dict[str, Any]:
    """Train and test one cell; what goes into the results."""
    started, cpu = time.time(), time.process_time()
    task, dtype = study.tasks[cell.task], models.dtype_of(study.dtype, device)
    tokenizer = _tokenizer(study.model)
    collate = tokens.Collator(tokens.pad_id(tokenizer))
    made = None if cell.row.system == UNTRAINED else fitted(study, cell.row)
    weights = dtype if made is None else made.adapter.weights_in(dtype)
    model: Any = models.open_causal_lm(study.model, weights).to(device)
    train_loss, trainable, diverged = None, 0, None
    if made is not None:
        recipe = study.recipe_of(cell)
        examples = _examples(study.model, task.train, study.max_length)
        torch.manual_seed(cell.seed)
        steps = total_steps(len(examples), recipe)
        model = made.adapter.put_on(model, made.allocation, steps=steps)
        made.adapter.start(model, examples, collate, recipe.batch_size)
        trainable = models.trainable(model)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(
                model,
                examples,
                Path(folder),
                recipe,
                collate=collate,
                callbacks=made.adapter.callbacks(),
                activations=_validation(study, cell),
                device=device,
                bf16=dtype == torch.bfloat16,
            )
            try:
                trainer.train()
                trainer.refuse_divergence()
            except Diverged as error:
                diverged = error.message
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        train_loss = None if diverged else losses[-1]
    trained = time.time()
    rows = share_of(read_rows(task.test), task.test_rows)
    score = None
    if not diverged:
        score = evaluate(model, tokenizer, rows, batch_size=study.eval_batch_size)
    scored = dict.fromkeys(f.name for f in fields(Score)) if score is None else asdict(score)
    return {
        "task": cell.task,
        "row": cell.row.name,
        "seed": cell.seed,
        "system": cell.row.system,
        **scored,
        "diverged": diverged,
        "train_loss": train_loss,
        "trainable": trainable,
        "r": made.adapter.r if made else None,
        "experts": list(made.allocation.experts) if made and made.allocation else None,
        "wall_s": round(time.time() - started, 1),
        "test_s": round(time.time() - trained, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "versions": {"htsr_alloc": __version__, "torch": torch.__version__},
        "fingerprint": fingerprint(study, cell),
        "weights": weights_of(study.model),
    }


def _validation(study: Study, cell: Cell) -> list[tokens.Example]:
    path = study.tasks[cell.task].valid
    if path is None or not method_of(cell.row.system).bilevel:
        return []
    return _examples(study.model, path, study.max_length)


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
