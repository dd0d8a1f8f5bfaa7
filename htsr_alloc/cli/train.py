"""``htsr train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.adapters import Push, base_of, hand_on
from htsr_alloc.cli.choices import DTYPE, TRAINED_SYSTEM
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Chat, Device, LoraAlpha, LoraDropout, LoraR, Target
from htsr_alloc.cli.screen import Screen
from htsr_alloc.records.lora import Lora
from htsr_alloc.training import check_installed
from htsr_alloc.training.settings import Recipe


def train(
    model: Annotated[str, "Folder or hub id of the model."],
    data: Annotated[
        str, "Rows to train on: JSON lines, or a hub data set as org/name or org/name:split."
    ],
    allocation: Annotated[
        Path | None, typer.Argument(help="An allocation file; EM-LoRA takes none.")
    ] = None,
    output: Annotated[Path, "Folder of the trained adapter."] = Path("adapter"),
    validation: Annotated[str | None, "Rows whose loss is logged after each epoch."] = None,
    system: Annotated[
        str, "LoRA-MoE system to train; lora is plain LoRA of the same ranks.", TRAINED_SYSTEM
    ] = "alphalora",
    r: LoraR = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = Lora.lora_dropout,
    target: Target = None,
    max_length: Annotated[int, "Most tokens of a row; longer prompts are cut."] = 512,
    chat: Chat = False,
    dtype: Annotated[
        str, "Number format; auto is bfloat16 where the device computes in it.", DTYPE
    ] = "auto",
    device: Device = "auto",
    resume: Annotated[bool, "Continue at the last checkpoint in the output folder."] = False,
    push: Push = None,
    *,
    recipe: Recipe,
    hub: Hub,
    screen: Screen,
) -> None:
    """Train an allocation's experts on JSON lines, with transformers' Trainer.

    A row is {"prompt", "completion"}, {"instruction", "input", "response"}, {"messages"}, or
    {"prompt", "choices", "answer"}. Only the answers are learnt. It runs under torchrun and
    accelerate launch as it is.

    Examples:
        htsr train model.allocation.json --model model --data train.jsonl -o adapter
        htsr train model.allocation.json --model model --data train.jsonl --system hydra --steps 2
        torchrun --nproc-per-node 2 -m htsr_alloc train model.allocation.json --model model --data train.jsonl
    """  # noqa: E501
    check_installed()
    from htsr_alloc.lora_moe.build import load
    from htsr_alloc.training import models
    from htsr_alloc.training.run import PICTURE, Run, is_first
    from htsr_alloc.training.run import train as fine_tune

    models.silence()
    loaded = None if allocation is None else load(allocation)
    lora = Lora.of(loaded, r, lora_alpha, lora_dropout, target or ())
    base = base_of(model, hub)
    asked = Run(
        base.folder,
        hub.rows(data),
        output,
        allocation,
        None if validation is None else hub.rows(validation),
        models.Adapter(system, lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules),
        recipe,
        max_length,
        chat,
        dtype,
        device,
    )
    done = fine_tune(asked, resume=resume, progress=screen.watched, note=screen.note)
    if not is_first():
        return
    facts = [
        f"Trained on {done.rows} rows of {Path(data).name}, {done.steps} steps, learning rate "
        f"{recipe.learning_rate:g}, seed {recipe.seed}",
        *([f"Validation rows: {Path(validation).name}"] if validation else []),
        f"Last loss: {done.loss:.4g}; trainable parameters: {done.trainable:,}",
    ]
    hand_on(screen, output, base, facts, loaded, push, hub.token)
    screen.show(views.trained(done))
    screen.note(f"wrote {output}: the adapter, {PICTURE} and log.jsonl")
