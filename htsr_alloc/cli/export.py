"""``htsr export``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from htsr_alloc.cli.choices import EXPORT
from htsr_alloc.cli.opening import Hub, layer_map_of
from htsr_alloc.cli.options import LoraAlphaOrRanks, LoraDropout, LoraR, OutFile, Quiet, Target
from htsr_alloc.cli.screen import Screen
from htsr_alloc.records.lora import Lora

if TYPE_CHECKING:
    from htsr_alloc.allocation.exports import Modules
    from htsr_alloc.checkpoints.layers import LayerMap
    from htsr_alloc.records import Allocation


def export(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    to: Annotated[str, "Format to write.", EXPORT],
    model: Annotated[
        str | None, "Checkpoint against whose module names the patterns are checked."
    ] = None,
    target_modules: Target = None,
    r: LoraR = None,
    lora_alpha: LoraAlphaOrRanks = None,
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
    from htsr_alloc.allocation.exports import EXPORTS

    if output is not None:
        files.refuse_overwriting(output, [allocation])
    loaded = records.loads(records.Allocation, files.read_bytes(allocation), allocation.name)
    lora = Lora.of(loaded, r, lora_alpha, lora_dropout, target_modules or ())
    modules = None
    if model is not None:
        found = layer_map_of(hub.open(model))
        modules = modules_of(found)
        if any(matrix.expert is not None for matrix in found.matrices):
            loaded, modules = in_transformers(hub, model, loaded, lora)
            lora = replace(lora, target_modules=())
    Screen(quiet=quiet).save(EXPORTS[to](loaded, lora, modules), output)


def in_transformers(
    hub: Hub, model: str, allocation: Allocation, lora: Lora
) -> tuple[Allocation, Modules]:
    """The names that transformers gives a mixture, which its checkpoint does not have."""
    from htsr_alloc.lora_moe.build import empty_model
    from htsr_alloc.lora_moe.plain import plain_modules

    base = empty_model(hub.folder(model, weights=False))
    return plain_modules(base, allocation, lora.target_modules or None)


def modules_of(layer_map: LayerMap) -> Modules:
    """Block prefix -> the names of its linear modules."""
    from htsr_alloc.allocation.exports import Modules

    modules: dict[str, list[str]] = {prefix: [] for prefix in layer_map.prefixes}
    for matrix in layer_map.matrices:
        names = modules[layer_map.prefixes[matrix.layer]]
        if matrix.module not in names:
            names.append(matrix.module)
    return Modules(modules)
