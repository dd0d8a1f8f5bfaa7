"""``htsr train``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli.options import AsJson, Device, Dtype, Quiet
from htsr_alloc.cli.screen import Screen


def train(
    model: Annotated[Path, typer.Option(help="The model's folder.")],
    data: Annotated[Path, typer.Option(help="Rows to train on, JSON lines.")],
    allocation: Annotated[
        Optional[Path], typer.Argument(help="An allocation file; EM-LoRA takes none.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The adapter's folder.")] = Path(
        "adapter"
    ),
    validation: Annotated[
        Optional[Path], typer.Option(help="Rows whose loss is logged after each epoch.")
    ] = None,
    system: Annotated[
        str,
        typer.Option(
            help="alphalora, goat, goat_plus, mor, hydra, adamole, em_lora; or lora: the control."
        ),
    ] = "alphalora",
    r: Annotated[
        int,
        typer.Option("--r", "--lora-r", help="Rank of one expert; torchrun takes --r for its own."),
    ] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Numerator of the LoRA scale.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout on the experts' input.")] = 0.05,
    target: Annotated[
        Optional[list[str]], typer.Option(help="Adapt linears of this name; repeatable.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 1.0,
    steps: Annotated[Optional[int], typer.Option(help="Optimiser steps, instead.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a micro-batch, each process.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, decaying to 0.")] = 3e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_length: Annotated[int, typer.Option(help="Tokens of a row; prompts are cut.")] = 512,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template for prompts.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of the experts, the dropout and the order.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps.")] = 10,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 is never.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on at the last checkpoint in the folder.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train an allocation's experts on JSON lines, with transformers' Trainer.

    A row is {"prompt", "completion"}, {"instruction", "input", "response"}, {"messages"}, or
    {"prompt", "choices", "answer"}. Only the answers are learnt. torchrun and accelerate launch
    run it as it is: torchrun --nproc-per-node 2 -m htsr_alloc train ...
    """
    from htsr_alloc.training import models
    from htsr_alloc.training import run as running
    from htsr_alloc.training.recipe import Recipe

    screen = Screen(as_json, quiet or not running.is_first())
    models.silence()
    asked = running.Run(
        model,
        data,
        output,
        allocation,
        validation,
        models.Adapter(system, r, lora_alpha, lora_dropout, tuple(target or ())),
        Recipe(
            epochs=epochs,
            steps=steps,
            batch_size=batch_size,
            accumulate=accumulate,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
            log_every=log_every,
            save_every=save_every,
        ),
        max_length,
        chat,
        dtype,
        device,
    )
    done = running.train(asked, resume=resume, progress=screen.watched, note=screen.note)
    if not running.is_first():
        return
    if as_json:
        screen.result(asdict(done))
    else:
        screen.table(
            ["rows", "steps", "loss", "seconds", "trainable"],
            [[done.rows, done.steps, done.loss, f"{done.seconds:.0f}", f"{done.trainable:,}"]],
        )
    screen.note(f"wrote {output}: the adapter, {running.PICTURE} and log.jsonl")
