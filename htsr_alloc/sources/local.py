"""Checkpoints on this machine: a safetensors file, or a folder of them."""

from __future__ import annotations

import functools
from pathlib import Path

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import cannot, read_bytes
from htsr_alloc.sources.listing import (
    Shard,
    choose_files,
    list_tensors,
    local_header,
    read_config,
    refuse_format,
)
from htsr_alloc.sources.reading import Checkpoint


def open_file(path: Path) -> Checkpoint:
    """One ``.safetensors`` file of any name."""
    if path.suffix != ".safetensors":
        refuse_format([path.name], path)
    listing = list_tensors([path.name], None, lambda name: local_header(path.parent / name))
    fetch = functools.partial(_in_folder, path.parent)
    return Checkpoint(path.stem, None, read_config(path.parent), listing, fetch)


def open_folder(folder: Path) -> Checkpoint:
    """A folder with an index, a ``model.safetensors``, or any safetensors files."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise cannot("list", folder, error) from error
    files, index = choose_files(names, lambda name: read_bytes(folder / name), folder)
    listing = list_tensors(files, index, lambda name: local_header(folder / name))
    fetch = functools.partial(_in_folder, folder)
    return Checkpoint(folder.resolve().name, None, read_config(folder), listing, fetch)


def _in_folder(folder: Path, shard: Shard) -> Path:
    path = folder / shard.name
    try:
        stat = path.stat()
    except OSError as error:
        raise cannot("read", path, error) from error
    if not shard.identity.startswith(f"{stat.st_size}:{stat.st_mtime_ns}:"):
        raise HtsrError(f"{path} changed while it was read.", "Run the command again.")
    return path
