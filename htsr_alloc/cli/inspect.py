"""``htsr inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from htsr_alloc.cli import views
from htsr_alloc.cli.opening import layer_map_of, opened, say_transfer
from htsr_alloc.cli.options import (
    AsJson,
    CacheDir,
    Exclude,
    Include,
    KeepShards,
    Offline,
    Quiet,
    Revision,
    Source,
    Stream,
    Token,
)
from htsr_alloc.cli.screen import Screen

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.reading import Checkpoint


def inspect(
    source: Source,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    stream: Stream = False,
    keep_shards: KeepShards = True,
    include: Include = None,
    exclude: Exclude = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List a checkpoint's layers and matrices from its headers, and what analyze would take."""
    screen = Screen(as_json, quiet)
    checkpoint = opened(source, revision, token, cache_dir, offline, stream, keep_shards)
    show(screen, checkpoint, include, exclude)


def show(screen: Screen, checkpoint: Checkpoint, include, exclude) -> None:
    from htsr_alloc.analysis.cost import predict, transfer
    from htsr_alloc.analysis.schedule import available_cores

    layer_map = layer_map_of(checkpoint, include, exclude)
    cost = predict(layer_map.matrices, available_cores())
    moved = transfer(checkpoint, layer_map.matrices)
    views.show_inspection(screen, checkpoint, layer_map, cost, moved)
    if not screen.as_json:
        say_transfer(screen, checkpoint, layer_map)
