"""The training recipe: transformers' Trainer over encoded rows, and what it leaves behind."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import write_text
from htsr_alloc.lora_moe import BilevelMixin, RouterLossCallback, activation_parameters
from htsr_alloc.training import saves
from htsr_alloc.training.models import refuse_data_parallel, takes_kept_logits
from htsr_alloc.training.settings import LEARNING_RATE, Recipe
from htsr_alloc.training.tokens import IGNORED, BucketSampler

LOG = "log.jsonl"


class Diverged(HtsrError):
    """The loss or a weight is no longer a finite number."""


class FromFirstLabel:
    """A collator whose batches have logits from the token before the first that is learnt.

    The loss is the same. Where every row begins with a prompt, most tokens then have no logits,
    which are a step's largest tensors and a fifth of the work on a small language model.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """input_ids and what goes with it, (B, S); labels, (B, K), of the last K tokens."""
        batch = self.collate(examples)
        learnt = (batch["labels"] != IGNORED).any(0)  # (S,)
        start = max(0, int(learnt.int().argmax()) - 1)
        # As a tensor: a slice would not be contiguous, and the head's weight copied for each row.
        kept = torch.arange(start, len(learnt))
        return {**batch, "labels": batch["labels"][:, start:], "logits_to_keep": kept}


class RecipeTrainer(Trainer):
    """The stock Trainer; its batches hold rows of like length, and it stops where it diverges.

    Losses and trained weights are looked at whenever something is logged or saved, so that no
    step waits for the device and no checkpoint holds NaN.
    """

    _finite: torch.Tensor | None = None  # whether every loss so far was, a 0-d bool

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        now = torch.isfinite(loss.detach())
        self._finite = now if self._finite is None else self._finite & now
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.refuse_divergence()
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.refuse_divergence()
        super()._save_checkpoint(model, trial)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if self.is_world_process_zero():
            saves.mark(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}")

    def refuse_divergence(self) -> None:
        """Raise Diverged where a loss or a trained weight is NaN or infinite."""
        trained = (p for p in self.model.parameters() if p.requires_grad)  # type: ignore[union-attr]
        lost = self._finite is not None and not bool(self._finite)
        if lost or not all(bool(torch.isfinite(p).all()) for p in trained):
            what = "the loss is not finite" if lost else "a weight is not finite"
            kept, _ = saves.newest_whole(Path(str(self.args.output_dir)))
            last = f"; {kept.name} is the last good checkpoint" if kept is not None else ""
            raise Diverged(
                f"The training diverged by step {self.state.global_step + 1}: {what}{last}.",
                "Lower the learning rate.",
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> BucketSampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        lengths = [example.length for example in data]  # type: ignore[union-attr]
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return BucketSampler(lengths, together * self.args.world_size, self.args.seed)


class BilevelTrainer(BilevelMixin, RecipeTrainer):
    """EM-LoRA's: its activations learn from validation rows."""


class LastStep(TrainerCallback):
    """Logs the last step too, wherever the steps between two lines of the log end."""

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """Ask for a line."""
        if state.global_step >= state.max_steps:
            control.should_log = True


class LogFile(TrainerCallback):
    """The trainer's log as JSON lines, of a resumed run from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args, state, control, **kwargs: Any) -> None:
        """Write the whole log again: it is short, and never torn."""
        if state.is_world_process_zero:
            lines = [json.dumps(row) + "\n" for row in state.log_history]
            write_text(self.path, "".join(lines))


def make_trainer(
    model: Any,
    train: Sequence[Any],
    folder: Path,
    recipe: Recipe,
    *,
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    items: bool = True,
    validation: Sequence[Any] = (),
    activations: Sequence[Any] = (),
    callbacks: Sequence[TrainerCallback] = (),
    device: torch.device | None = None,
    bf16: bool = False,
    progress: bool = False,
) -> RecipeTrainer:
    """A Trainer that is ready to run.

    Args:
        train: examples, each with a ``length``.
        collate: examples to a batch.
        items: whether the model's loss is a mean over all tokens of an accumulated batch, whose
            number it is told; otherwise it is a mean over a micro-batch's rows.
        validation: rows whose loss is logged after each epoch.
        activations: rows that EM-LoRA's activations learn from; they stay as they are without.
        bf16: bfloat16 autocast.

    Raises:
        HtsrError: one process with several GPUs.
    """
    device = device or torch.device("cpu")
    refuse_data_parallel(device, processes())
    folder.mkdir(parents=True, exist_ok=True)
    steps = total_steps(len(train), recipe, processes())
    arguments = TrainingArguments(
        output_dir=str(folder / saves.CHECKPOINTS),
        num_train_epochs=recipe.epochs,
        max_steps=-1 if recipe.steps is None else recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate or LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        optim="adamw_torch",
        seed=recipe.seed,
        bf16=bf16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="epoch" if len(validation) else "no",
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        save_total_limit=2,
        report_to=[],
        use_cpu=device.type == "cpu",
        disable_tqdm=not progress,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    theta = activation_parameters(model)
    kind: Any = RecipeTrainer
    extra: dict[str, Any] = {}
    if theta and len(activations):
        kind, extra = BilevelTrainer, {"activation_dataset": list(activations)}
    else:
        for parameter in theta:
            parameter.requires_grad_(False)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=list(train),
        eval_dataset=list(validation) or None,
        data_collator=FromFirstLabel(collate) if takes_kept_logits(model) else collate,
        callbacks=[RouterLossCallback(), LastStep(), LogFile(folder / LOG), *callbacks],
        **extra,
    )
    if not items:  # the heads take the number, as the signature says, and do not use it
        trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


def total_steps(rows: int, recipe: Recipe, ranks: int = 1) -> int:
    """Optimiser steps of the whole run."""
    if recipe.steps is not None:
        return recipe.steps
    batches = math.ceil(rows / (recipe.batch_size * ranks))
    return math.ceil(max(1, math.ceil(batches / recipe.accumulate)) * recipe.epochs)


def processes() -> int:
    """How many take part, before torch.distributed is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))
