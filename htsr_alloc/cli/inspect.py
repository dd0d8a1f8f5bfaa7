"""``htsr inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from htsr_alloc.cli.inspecting import inspection
from htsr_alloc.cli.opening import Hub, Selection, Shards, layer_map_of, say_transfer
from htsr_alloc.cli.options import Source
from htsr_alloc.cli.screen import Screen

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.reading import Checkpoint


def inspect(
    source: Source, *, hub: Hub, shards: Shards, selection: Selection, screen: Screen
) -> None:
    """List a checkpoint's layers and matrices from its headers, and what analyze would take.

    Examples:
        htsr inspect Qwen/Qwen3-0.6B
        htsr inspect model --exclude '*k_proj*'
        htsr inspect model/model.safetensors --json
    """
    show(screen, hub.open(source, shards.way), selection)


def show(screen: Screen, checkpoint: Checkpoint, selection: Selection) -> None:
    """What analyze would take, without its work."""
    from htsr_alloc.analysis.cost import predict, transfer
    from htsr_alloc.analysis.schedule import available_cores

    layer_map = layer_map_of(checkpoint, selection)
    cost = predict(layer_map.matrices, available_cores())
    screen.show(inspection(checkpoint, layer_map, cost, transfer(checkpoint, layer_map.matrices)))
    say_transfer(screen, checkpoint, layer_map)
