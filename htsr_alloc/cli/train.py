"""``htsr train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.choices import DTYPE, TASK, TRAINED_SYSTEM
from htsr_alloc.cli.options import Chat, Device, Target
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError
from htsr_alloc.training import check_installed
from htsr_alloc.training.settings import Recipe


def train(
    model: Annotated[Path, "Folder of the model."],
    data: Annotated[
        Path, "Rows to train on, JSON lines; or a folder of images, one folder for each class."
    ],
    allocation: Annotated[
        Path | None, typer.Argument(help="An allocation file; em_lora and full take none.")
    ] = None,
    output: Annotated[Path, "Folder of the trained adapter."] = Path("adapter"),
    validation: Annotated[Path | None, "Rows whose loss is logged after each epoch."] = None,
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
        "Rank r of one expert; default the system's, or 8. Under torchrun write --lora-r.",
    ] = None,
    lora_alpha: Annotated[
        float | None,
        "LoRA's alpha: the scale of an expert is alpha / r; default the system's, or 16.",
    ] = None,
    lora_dropout: Annotated[
        float | None,
        "Dropout probability on the experts' input; default the system's, or 0.05.",
    ] = None,
    target: Target = None,
    max_length: Annotated[int, "Most tokens of a row; longer prompts are cut."] = 512,
    chat: Chat = False,
    dtype: Annotated[
        str, "Number format; auto is bfloat16 where the device computes in it.", DTYPE
    ] = "auto",
    device: Device = "auto",
    resume: Annotated[bool, "Continue at the last checkpoint in the output folder."] = False,
    *,
    recipe: Recipe,
    screen: Screen,
) -> None:
    """Train an allocation's experts on JSON lines, with transformers' Trainer.

    A row is {"prompt", "completion"}, {"instruction", "input", "response"}, {"messages"}, or
    {"prompt", "choices", "answer"}. Only the answers are learnt. With --task classification it is
    {"text", "label"}, {"text", "text_pair", "label"} or {"image", "label"}. It runs under torchrun
    and accelerate launch as it is.

    Examples:
        htsr train model.allocation.json --model model --data train.jsonl -o adapter
        htsr train model.allocation.json --model model --data train.jsonl --system hydra --steps 2
        htsr train model.allocation.json --model model --data train.jsonl --system goat --set goat_segment=P --set top_k=1 --steps 2 -o goat
        torchrun --nproc-per-node 2 -m htsr_alloc train model.allocation.json --model model --data train.jsonl
    """  # noqa: E501
    check_installed()
    from htsr_alloc.lora_moe.build import load
    from htsr_alloc.training import models
    from htsr_alloc.training import run as running
    from htsr_alloc.training.methods import adapter_for, recipe_for

    models.silence()
    adapter = adapter_for(
        system,
        None if allocation is None else load(allocation),
        target=target or (),
        settings=_pairs(settings or ()),
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
    )
    asked = running.Run(
        model,
        data,
        output,
        allocation,
        validation,
        adapter,
        recipe_for(system, recipe),
        max_length,
        chat,
        dtype,
        device,
        task,
    )
    done = running.train(asked, resume=resume, progress=screen.watched, note=screen.note)
    if not running.is_first():
        return
    screen.show(views.trained(done))
    screen.note(f"wrote {output}: the adapter, {running.PICTURE} and log.jsonl")


def _pairs(given: Sequence[str]) -> dict[str, str]:
    """The settings by name."""
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise HtsrError(f"--set {text} has no value.", "Write --set NAME=VALUE.")
        if name in pairs:
            raise HtsrError(f"--set {name} is given twice.")
        pairs[name] = value
    return pairs
