"""What several commands do first and last."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import typer

from htsr_alloc.cli.screen import Screen, size
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.layers import LayerMap
    from htsr_alloc.checkpoints.reading import Checkpoint
    from htsr_alloc.records import Metrics


def opened(
    source, revision, token, cache_dir, offline, stream=False, keep_shards=True
) -> Checkpoint:
    from htsr_alloc.checkpoints.open import open_checkpoint

    # Its warnings show the signed addresses of files.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if stream and not keep_shards:
        raise HtsrError("--stream has no shards to drop.", "Leave one of the two away.")
    return open_checkpoint(
        source,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        offline=offline,
        shards="stream" if stream else "keep" if keep_shards else "drop",
    )


def layer_map_of(checkpoint: Checkpoint, include=None, exclude=None) -> LayerMap:
    from htsr_alloc.checkpoints.layers import map_layers

    return map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        include=include or (),
        exclude=exclude or (),
    )


def say_transfer(screen: Screen, checkpoint: Checkpoint, layer_map: LayerMap) -> None:
    """What comes over the network and what disk it takes, before it does."""
    import shutil

    from htsr_alloc.analysis.cost import transfer

    moved = transfer(checkpoint, layer_map.matrices)
    if not moved.download:
        return
    screen.note(f"to download: {size(moved.download)}; on disk at a time: {size(moved.disk)}")
    if moved.folder is None:
        return
    there = next(folder for folder in (moved.folder, *moved.folder.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < moved.disk:
        screen.warn(f"{there} has {size(free)} free; --drop-shards takes less and --stream none.")


def warn_unfitted(screen: Screen, metrics: Metrics, strict: bool) -> None:
    from htsr_alloc.records import FAILED

    failed = [matrix for matrix in metrics.matrices if matrix.status == FAILED]
    for matrix in failed[:10]:
        screen.warn(f"{matrix.tensor} has no fit: {matrix.reason}")
    if len(failed) > 10:
        screen.warn(f"... and {len(failed) - 10} more; see the metrics file.")
    if failed and strict:
        raise typer.Exit(3)
