"""``htsr export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from htsr_alloc.cli.opening import layer_map_of, opened
from htsr_alloc.cli.options import CacheDir, Offline, OutFile, Quiet, Revision, Token
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import check_choice

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.reading import Checkpoint


def export(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    to: Annotated[str, typer.Option(help="mola, peft-rank, axolotl or csv.")],
    model: Annotated[
        Optional[str], typer.Option(help="The checkpoint, whose module names are then checked.")
    ] = None,
    target_modules: Annotated[
        Optional[list[str]],
        typer.Option("--target", help="Adapt modules of this name; repeatable."),
    ] = None,
    r: Annotated[int, typer.Option("--r", "--lora-r", help="Rank of one expert.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="Numerator of the LoRA scale.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout on the adapter's input.")] = 0.05,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    output: OutFile = None,
    quiet: Quiet = False,
) -> None:
    """Write an allocation in another trainer's format."""
    from htsr_alloc import files, records
    from htsr_alloc.allocation.exports import EXPORTS, Lora

    screen = Screen(quiet=quiet)
    loaded = records.loads(records.Allocation, files.read_bytes(allocation), allocation.name)
    check_choice("export", to, EXPORTS)
    lora = Lora(r, lora_alpha, lora_dropout, tuple(target_modules or ()))
    modules = None
    if model is not None:
        modules = modules_of(opened(model, revision, token, cache_dir, offline))
    text = EXPORTS[to](loaded, lora, modules)
    if output is None or str(output) == "-":
        screen.text(text)
    else:
        files.write_text(output, text)
        screen.note(f"wrote {output}")


def modules_of(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Block prefix -> the names of its linear modules."""
    layer_map = layer_map_of(checkpoint)
    modules: dict[str, list[str]] = {prefix: [] for prefix in layer_map.prefixes}
    for matrix in layer_map.matrices:
        names = modules[layer_map.prefixes[matrix.layer]]
        if matrix.module not in names:
            names.append(matrix.module)
    return modules
