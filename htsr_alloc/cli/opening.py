"""What several commands do first and last."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from htsr_alloc.cli.screen import Screen

if TYPE_CHECKING:
    from htsr_alloc.layers import LayerMap
    from htsr_alloc.records import Metrics
    from htsr_alloc.sources.reading import Checkpoint


def opened(source, revision, token, cache_dir, offline) -> Checkpoint:
    from htsr_alloc.checkpoint import open_checkpoint

    return open_checkpoint(
        source, revision=revision, token=token, cache_dir=cache_dir, offline=offline
    )


def layer_map_of(checkpoint: Checkpoint, include=None, exclude=None) -> LayerMap:
    from htsr_alloc.layers import map_layers

    return map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        include=include or (),
        exclude=exclude or (),
    )


def warn_unfitted(screen: Screen, metrics: Metrics, strict: bool) -> None:
    from htsr_alloc.records import FAILED

    failed = [matrix for matrix in metrics.matrices if matrix.status == FAILED]
    for matrix in failed[:10]:
        screen.warn(f"{matrix.tensor} has no fit: {matrix.reason}")
    if len(failed) > 10:
        screen.warn(f"... and {len(failed) - 10} more; see the metrics file.")
    if failed and strict:
        raise typer.Exit(3)
