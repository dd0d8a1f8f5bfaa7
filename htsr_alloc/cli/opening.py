"""What several commands do first and last."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsr_alloc.cli.screen import Screen, size
from htsr_alloc.errors import HtsrError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.layers import LayerMap
    from htsr_alloc.checkpoints.reading import Checkpoint
    from htsr_alloc.records import Metrics


@dataclass(frozen=True)
class Hub:
    """How a hub id is opened."""

    revision: Annotated[str | None, "Branch, tag or commit of a hub id."] = None
    token: Annotated[
        str | None,
        "Access token of the hub. Better set HF_TOKEN: other users of the machine can read a "
        "command line.",
    ] = None
    cache_dir: Annotated[Path | None, "Folder where files of the hub are cached."] = None
    offline: Annotated[bool, "Use only what is in the hub's local cache."] = False

    def open(self, source: str, shards: str = "keep") -> Checkpoint:
        """The checkpoint, whose headers have been read."""
        from htsr_alloc.checkpoints.open import open_checkpoint

        # Its warnings show the signed addresses of files.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        return open_checkpoint(
            source,
            revision=self.revision,
            token=self.token,
            cache_dir=self.cache_dir,
            offline=self.offline,
            shards=shards,
        )

    def folder(self, source: str, weights: bool = True) -> Path:
        """A model's folder on this machine; of a hub id ``org/name`` the snapshot in the cache,
        with or without its weights."""
        path = Path(source).expanduser()
        if path.exists() or not REPOSITORY.fullmatch(source):
            return path  # whoever reads it says what is missing
        from htsr_alloc.checkpoints.hub import snapshot

        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        where = self.revision, self.token, self.cache_dir, self.offline
        return snapshot(source, *where, weights)

    def rows(self, source: str) -> Path:
        """A JSON lines file; of a data set of the hub, ``org/name`` or ``org/name:split``, a copy.

        The split is ``train`` if none is given.
        """
        path = Path(source).expanduser()
        repo, _, split = source.partition(":")
        if path.exists() or path.suffix in (".jsonl", ".json") or not REPOSITORY.fullmatch(repo):
            return path
        from htsr_alloc.checkpoints.rows import rows_of

        return rows_of(repo, split or "train", self.token, self.cache_dir, self.offline)


@dataclass(frozen=True)
class Shards:
    """How a hub id's files are read and kept."""

    stream: Annotated[bool, "Read a hub id by byte ranges; nothing is kept on disk."] = False
    keep_shards: Annotated[bool, "Keep a hub id's files, or delete each when it is done."] = True

    def __post_init__(self) -> None:
        if self.stream and not self.keep_shards:
            raise HtsrError("--stream has no shards to drop.", "Remove one of the two.")

    @property
    def way(self) -> str:
        return "stream" if self.stream else "keep" if self.keep_shards else "drop"


@dataclass(frozen=True)
class Selection:
    """Which tensors are taken."""

    include: Annotated[
        tuple[str, ...], "Take only tensors whose name matches, as '*self_attn*'; repeatable."
    ] = ()
    exclude: Annotated[
        tuple[str, ...], "Leave out tensors whose name matches, as '*k_proj*'; repeatable."
    ] = ()
    stack: Annotated[
        str | None,
        "Take only one stack of layers, as language_model or visual; htsr inspect shows them.",
    ] = None

    def patterns(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """``include`` and ``exclude``; the latter has every other stack than ``stack``.

        Raises:
            HtsrError: there is no such stack.
        """
        exclude = self.exclude
        if self.stack is not None:
            from htsr_alloc.checkpoints.layers import map_layers
            from htsr_alloc.checkpoints.stacks import other_stacks

            whole = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
            exclude += other_stacks(whole.prefixes, self.stack)
        return {"include": self.include, "exclude": exclude}


def layer_map_of(checkpoint: Checkpoint, selection: Selection | None = None) -> LayerMap:
    from htsr_alloc.checkpoints.layers import map_layers

    selection = selection or Selection()
    return map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        architecture=checkpoint.architecture,
        **selection.patterns(checkpoint),
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
