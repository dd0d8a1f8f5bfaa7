"""``htsr train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.adapters import Push, base_of, hand_on
from htsr_alloc.cli.choices import TASK, TRAINED_SYSTEM
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Chat, Device, Dtype, Target, pairs
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError
from htsr_alloc.training import check_installed
from htsr_alloc.training.settings import Recipe


def train(
    model: Annotated[str, "Folder or hub id of the model."],
    data: Annotated[
        str,
        "Rows to train on: JSON lines, a hub data set as org/name or org/name:split, or a folder "
        "of images, one folder for each class.",
    ],
    allocation: Annotated[
        Path | None, typer.Argument(help="An allocation file; em_lora and full take none.")
    ] = None,
    output: Annotated[Path, "Folder of the trained adapter."] = Path("adapter"),
    validation: Annotated[str | None, "Rows whose loss is logged after each epoch."] = None,
    task: Annotated[str, "What to train for.", TASK] = "causal-lm",
    system: Annotated[
        str, "LoRA-MoE system to train, or a baseline of the same ranks.", TRAINED_SYSTEM
    ] = "alphalora",
    settings: Annotated[
        list[str] | None,
        "Setting of the system as NAME=VALUE; repeatable. Names: {lora_moe.config:LoraMoeConfig}.",
    ] = None,
    r: Annotated[
        int | None,
        "Rank r of one expert; default the system's, or 8, and of ranks the uniform rank. Under "
        "torchrun write --lora-r.",
    ] = None,
    lora_alpha: Annotated[
        float | None,
        "LoRA's alpha: the scale of an expert is alpha / r; default the system's, or 16, and of "
        "ranks twice the uniform rank.",
    ] = None,
    lora_dropout: Annotated[
        float | None,
        "Dropout probability on the experts' input; default the system's, or 0.05.",
    ] = None,
    target: Target = None,
    max_length: Annotated[int, "Most tokens of a row; longer prompts are cut."] = 512,
    chat: Chat = False,
    dtype: Dtype = "auto",
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
    {"prompt", "choices", "answer"}. Only the answers are learnt. With --task classification it is
    {"text", "label"}, {"text", "text_pair", "label"} or {"image", "label"}. It runs under torchrun
    and accelerate launch as it is.

    Examples:
        htsr train model.allocation.json --model model --data train.jsonl -o adapter
        htsr train model.allocation.json --model model --data train.jsonl --system mor --set mor_router=mean --steps 2
        torchrun --nproc-per-node 2 -m htsr_alloc train model.allocation.json --model model --data train.jsonl
    """  # noqa: E501
    check_installed()
    from htsr_alloc.lora_moe.build import load
    from htsr_alloc.training import models
    from htsr_alloc.training.identity import classes_of
    from htsr_alloc.training.methods import adapter_for, recipe_for
    from htsr_alloc.training.run import PICTURE, Run, is_first, leave
    from htsr_alloc.training.run import train as fine_tune

    models.silence()
    loaded = None if allocation is None else load(allocation)
    adapter = adapter_for(
        system,
        loaded,
        target=target or (),
        settings=pairs(settings or ()),
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
    )
    if adapter.whole and push is not None:
        raise HtsrError("--push uploads an adapter, and this trains a whole model.", "Remove it.")
    recipe = recipe_for(system, recipe)
    base = base_of(model, hub)
    asked = Run(
        base.folder,
        hub.rows(data),
        output,
        allocation,
        None if validation is None else hub.rows(validation),
        adapter,
        recipe,
        max_length,
        chat,
        dtype,
        device,
        task,
    )
    done = fine_tune(asked, resume=resume, progress=screen.watched, note=screen.note)
    leave()
    if not is_first():
        return
    steps = f"step {done.steps}"
    if done.loss_from < done.steps:
        steps = f"steps {done.loss_from} to {done.steps}"
    facts = [
        f"Trained on {done.rows} rows of {Path(data).name}, {done.steps} steps, learning rate "
        f"{recipe.learning_rate:g}, seed {recipe.seed}",
        f"Loss: {done.loss:.4g}, mean of {steps}; trainable parameters: {done.trainable:,}",
    ]
    if validation is not None:
        loss = "" if done.validation_loss is None else f", last loss {done.validation_loss:.4g}"
        facts.append(f"Validation: {done.validation_rows} rows of {Path(validation).name}{loss}")
    if not adapter.whole:
        labels = classes_of(output) or ()
        hand_on(screen, output, base, facts, loaded, push, hub.token, labels)
    screen.show(views.trained(done))
    screen.note(f"loss: the mean of {steps}")
    what = "model" if adapter.whole else "adapter"
    screen.note(f"wrote {output}: the {what}, {PICTURE} and log.jsonl")
