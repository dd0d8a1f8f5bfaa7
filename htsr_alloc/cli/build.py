"""``htsr build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.options import AsJson, Quiet
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError


def build(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    model: Annotated[Path, typer.Option(help="The model's folder; --dry-run reads its config.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what each layer would get.")
    ] = False,
    system: Annotated[
        str, typer.Option(help="alphalora, goat, goat_plus, mor, hydra or adamole.")
    ] = "alphalora",
    target: Annotated[
        Optional[list[str]], typer.Option(help="Adapt linears of this name; repeatable.")
    ] = None,
    r: Annotated[int, typer.Option("--r", "--lora-r", help="Rank of one expert.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Numerator of the LoRA scale.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout on the experts' input.")] = 0.05,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="The adapter's folder.")
    ] = None,
    control: Annotated[
        Optional[Path], typer.Option(help="Also write plain LoRA of the same ranks, as JSON.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Put an allocation's experts on a model, and show what each layer got."""
    from htsr_alloc import files
    from htsr_alloc.lora_moe.build import build as put_on
    from htsr_alloc.lora_moe.build import control as plain_lora
    from htsr_alloc.lora_moe.build import describe, empty_model, load, open_model, resolve_layers
    from htsr_alloc.training.models import silence

    screen = Screen(as_json, quiet)
    silence()
    loaded = load(allocation)
    if not dry_run and output is None:
        raise HtsrError("An adapter needs a folder.", "Give -o FOLDER, or --dry-run.")
    base = empty_model(model) if dry_run else open_model(model)
    prefixes = resolve_layers(base, loaded)
    settings = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    text = None
    if control is not None:
        text = plain_lora(base, loaded, target_modules=target, **settings)  # type: ignore[arg-type]
    made = put_on(base, loaded, system=system, target_modules=target, **settings)
    views.show_build(screen, made, describe(made, prefixes))
    if control is not None and text is not None:
        files.write_text(control, text)
        screen.note(f"wrote {control}")
    if not dry_run:
        made.save_pretrained(str(output))
        screen.note(f"wrote {output}")
