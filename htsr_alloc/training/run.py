"""One training run: what ``htsr train`` does, from files to an adapter's folder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.build import load
from htsr_alloc.training import figure, models, saves
from htsr_alloc.training.handing import whole_files
from htsr_alloc.training.identity import RUN, content_of, weights_of
from htsr_alloc.training.methods import Adapter
from htsr_alloc.training.positions import refuse_longer
from htsr_alloc.training.recipe import (
    Recipe,
    make_trainer,
    processes,
    total_steps,
)
from htsr_alloc.training.tasks import readers_of

PICTURE = "training.png"


@dataclass(frozen=True)
class Run:
    """What is asked for.

    ``validation`` rows have their loss logged after each epoch, and EM-LoRA's activations learn
    from them. ``chat`` writes prompts and completions in the tokenizer's chat template. ``task``
    is one of ``tasks.TASKS``.
    """

    model: Path
    data: Path
    output: Path
    allocation: Path | None = None
    validation: Path | None = None
    adapter: Adapter = field(default_factory=Adapter)
    recipe: Recipe = field(default_factory=Recipe)
    max_length: int = 512
    chat: bool = False
    dtype: str = "auto"
    device: str = "auto"
    task: str = "causal-lm"

    def settings(self) -> dict[str, Any]:
        """Everything a checkpoint depends on, but where files lie."""
        given = {n: getattr(self, n) for n in ("allocation", "data", "validation")}
        return {
            **{n: None if path is None else content_of(path) for n, path in given.items()},
            "model": content_of(self.model / "config.json"),
            "weights": weights_of(self.model),
            **asdict(self.adapter),
            "target": list(self.adapter.target),
            "settings": dict(self.adapter.settings),
            "task": self.task,
            **{k: v for k, v in asdict(self.recipe).items() if not k.endswith("_every")},
            "max_length": self.max_length,
            "chat": self.chat,
        }


@dataclass(frozen=True)
class Trained:
    """What came of it; ``loss`` and ``validation_loss`` are the last ones logged.

    The log's losses are means over the steps since the line before; ``loss`` is of the steps from
    ``loss_from`` to the last.
    """

    rows: int
    steps: int
    loss: float
    seconds: float
    trainable: int
    dtype: str
    device: str
    resumed_at: int
    validation_rows: int = 0
    validation_loss: float | None = None
    loss_from: int = 1


def train(
    run: Run, *, resume: bool = False, progress: bool = False, note: Callable[[str], None]
) -> Trained:
    """Train and save the adapter; under torchrun or accelerate, this process's part of it.

    The output folder gets the adapter, the log as JSON lines, the settings, a figure and, while
    the run lasts, checkpoints.

    Args:
        resume: go on at the last checkpoint.

    Raises:
        HtsrError: bad rows, rows longer than the model's positions, an allocation that does not
            fit, a folder that holds another run.
    """
    started = time.time()
    checkpoint = _earlier(run, resume, note)
    device = models.device_of(run.device)
    dtype = models.dtype_of(run.dtype, device)
    read, made = readers_of(run.task)
    rows = {"data": read(run.data)}
    rows["validation"] = [] if run.validation is None else read(run.validation)
    task = made(run.model, rows["data"], None, run.max_length, run.chat)
    encoded = {name: task.encode(given) for name, given in rows.items()}
    allocation = None if run.allocation is None else load(run.allocation)
    torch.manual_seed(run.recipe.seed)
    model: Any = task.open_model(run.adapter.weights_in(dtype))
    model = run.adapter.put_on(
        model,
        allocation,
        task_type=task.task_type,
        heads=task.heads,
        steps=total_steps(len(encoded["data"]), run.recipe, processes()),
    )
    task.refuse_unread(model)
    refuse_longer(model, [*encoded["data"], *encoded["validation"]])
    run.adapter.start(model.to(device), encoded["data"], task.collate, run.recipe.batch_size)
    trainer = make_trainer(
        model,
        encoded["data"],
        run.output,
        run.recipe,
        collate=task.collate,
        items=task.items,
        callbacks=run.adapter.callbacks(),
        validation=encoded["validation"],
        activations=encoded["validation"],
        device=device,
        bf16=dtype == torch.bfloat16,
        progress=progress and is_first(),
    )
    count = models.trainable(model)  # without the activations that no validation rows teach
    if is_first():
        note(
            f"{len(encoded['data'])} rows; {count:,} trainable parameters; "
            f"{str(dtype).removeprefix('torch.')} on {device.type}"
        )
        if checkpoint is not None:
            note(f"resumed at {checkpoint.name}")
        # The processes have met by now, so that each has seen the folder as it was.
        said = {**run.settings(), "labels": list(task.labels)}
        files.write_text(run.output / RUN, json.dumps(said, indent=1) + "\n")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.refuse_divergence()
    history = trainer.state.log_history
    if trainer.is_world_process_zero():
        with whole_files(run.output) as folder:
            model.save_pretrained(str(folder))
            # A classifier and a model of its own have all that opens them.
            if task.labels or not isinstance(model, PeftModel):
                task.processor.save_pretrained(str(folder))
        examples = encoded["validation"] or encoded["data"]
        try:
            figure.plot_run(model, history, examples, run.output / PICTURE, task.collate)
        except HtsrError as error:  # the adapter is saved; a figure is no reason to fail
            note(f"no figure: {error.message}")
    losses = {key: [r[key] for r in history if key in r] for key in ("loss", "eval_loss")}
    return Trained(
        rows=len(encoded["data"]),
        steps=trainer.state.global_step,
        loss=losses["loss"][-1],
        seconds=time.time() - started,
        trainable=count,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        resumed_at=0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]),
        validation_rows=len(encoded["validation"]),
        validation_loss=next(reversed(losses["eval_loss"]), None),
        loss_from=1 + ([0] + [int(row["step"]) for row in history if "loss" in row])[-2],
    )


def is_first() -> bool:
    """Whether this is the one process, or the first of several, which alone writes."""
    return os.environ.get("RANK", "0") == "0"


def leave() -> None:
    """End this process's part in torch.distributed, whose threads can abort Python's exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _earlier(run: Run, resume: bool, note: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, if that is asked for.

    Raises:
        HtsrError: the folder holds a run that this one would overwrite, or another one.
    """
    path = run.output / RUN
    if not path.is_file():
        return None
    checkpoint, broken = saves.newest_whole(run.output / saves.CHECKPOINTS)
    if not resume:
        saved = (run.output / name for name in ("adapter_config.json", "config.json"))
        if checkpoint is None and not any(path.is_file() for path in saved):
            return None  # it was stopped before it had saved anything
        raise HtsrError(
            f"{run.output} holds a run already.", "Give `resume`, or another folder as `output`."
        )
    before, now = json.loads(files.read_bytes(path)), run.settings()
    # What an older version did not write down cannot be compared.
    changed = [name for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise HtsrError(
            f"{run.output} was started with another {changed[0]}: {before.get(changed[0])}, not "
            f"{now[changed[0]]}.",
            "Give the same settings, or another folder as `output`.",
        )
    run.adapter.refuse_resume()
    if broken and is_first():
        note(f"{', '.join(path.name for path in broken)}: not whole, so not used")
    return checkpoint
