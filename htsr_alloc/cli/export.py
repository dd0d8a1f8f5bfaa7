"""``htsr export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htsr_alloc.allocation.exports import EXPORTS, Lora
from htsr_alloc.cli.choices import EXPORT
from htsr_alloc.cli.opening import Hub, layer_map_of
from htsr_alloc.cli.options import LoraAlpha, LoraDropout, LoraR, OutFile, Quiet, Target
from htsr_alloc.cli.screen import Screen

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.reading import Checkpoint


def export(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    to: Annotated[str, "Format to write.", EXPORT],
    model: Annotated[
        str | None, "Checkpoint against whose module names the patterns are checked."
    ] = None,
    target_modules: Target = None,
    r: LoraR = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = Lora.lora_dropout,
    output: OutFile = None,
    quiet: Quiet = False,
    *,
    hub: Hub,
) -> None:
    """Write an allocation in another trainer's format.

    Examples:
        htsr export smollm2.allocation.json --to mola
        htsr export smollm2.allocation.json --to peft-rank --target q_proj -o lora.json
        htsr export smollm2.allocation.json --to csv
    """
    from htsr_alloc import files, records

    loaded = records.loads(records.Allocation, files.read_bytes(allocation), allocation.name)
    lora = Lora.of(loaded, r, lora_alpha, lora_dropout, target_modules or ())
    modules = modules_of(hub.open(model)) if model is not None else None
    Screen(quiet=quiet).save(EXPORTS[to](loaded, lora, modules), output)


def modules_of(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Block prefix -> the names of its linear modules."""
    layer_map = layer_map_of(checkpoint)
    modules: dict[str, list[str]] = {prefix: [] for prefix in layer_map.prefixes}
    for matrix in layer_map.matrices:
        names = modules[layer_map.prefixes[matrix.layer]]
        if matrix.module not in names:
            names.append(matrix.module)
    return modules
