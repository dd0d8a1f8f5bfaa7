"""Checkpoints on this machine: a safetensors file, or a folder of them.

Files are read, never mapped: a mapped file that is cut short while it is read ends the process
(SIGBUS), and reading costs no more. Links are followed, because caches and data disks are built
of them, but only to regular files: a pipe or device would never end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from htsr_alloc.checkpoints.header import Header, read_header
from htsr_alloc.checkpoints.listing import (
    CONFIG_NAMES,
    INDEX_NAMES,
    MAX_JSON,
    Shard,
    Transfer,
    choose_files,
    list_tensors,
    parse_config,
    refuse_format,
)
from htsr_alloc.checkpoints.reading import Checkpoint, readable
from htsr_alloc.errors import HtsrError
from htsr_alloc.files import cannot, read_bytes

Reader = Callable[[int, int], bytes]  # (begin, length) -> exactly that many bytes


class LocalFiles:
    """The bytes of shards that lie in one folder."""

    by_shard = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, shard: Shard, begin: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes from ``begin`` on.

        Raises:
            HtsrError: the file is not the one that was listed, before or after the reading.
        """
        path = self.folder / shard.name
        try:
            with open_regular(path) as file:
                _same(file, shard, path)
                read_exactly(file, begin, into, path)
                _same(file, shard, path)
        except OSError as error:
            raise cannot("read", path, error) from error

    def release(self, shard: Shard) -> None:
        """Local files stay."""

    def transfer(self, shards: Sequence[Shard], tensors: int) -> Transfer:
        return Transfer(0, 0)


def open_file(path: Path) -> Checkpoint:
    """One ``.safetensors`` file of any name."""
    if path.suffix != ".safetensors":
        refuse_format([path.name], path)
    listing = list_tensors([path.name], None, lambda name: local_header(path.parent / name))
    config, store = _config(path.parent), LocalFiles(path.parent)
    paths = (path, *(path.parent / name for name in CONFIG_NAMES))
    return Checkpoint(readable(path.stem), None, config, listing, store, paths)


def open_folder(folder: Path) -> Checkpoint:
    """A folder with an index, a ``model.safetensors``, or any safetensors files."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise cannot("list", folder, error) from error
    files, index = choose_files(names, lambda name: read_small(folder / name), folder)
    listing = list_tensors(files, index, lambda name: local_header(folder / name))
    config, store = _config(folder), LocalFiles(folder)
    paths = tuple(folder / name for name in (*files, *INDEX_NAMES, *CONFIG_NAMES))
    return Checkpoint(readable(folder.resolve().name), None, config, listing, store, paths)


def local_header(path: Path) -> tuple[Shard, Header]:
    """A local file's checked header; its identity is its size, its time and the header's hash."""
    header, status = parsed(path, lambda read, size: read_header(read, size, str(path)))
    return shard_of(path, status, header.sha256), header


def parsed(path: Path, parse: Callable[[Reader, int], Any]) -> tuple[Any, os.stat_result]:
    """What ``parse(read, size)`` makes of a file, read as far as it asks; and the file's status."""
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())

            def read(begin: int, length: int) -> bytes:
                data = bytearray(length)
                read_exactly(file, begin, memoryview(data), path)
                return bytes(data)

            return parse(read, status.st_size), status
    except OSError as error:
        raise cannot("read", path, error) from error


def shard_of(path: Path, status: os.stat_result, sha256: str) -> Shard:
    """A local file, whose header has this hash."""
    identity = f"{_version(status)}:{sha256}"
    stamp = f"{_place(status)}:{status.st_ctime_ns}"
    return Shard(path.name, status.st_size, identity, stamp)


def read_small(path: Path) -> bytes:
    """A configuration or an index."""
    try:
        with open_regular(path):
            return read_bytes(path, MAX_JSON)
    except OSError as error:
        raise cannot("read", path, error) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, unbuffered; a pipe, socket or device is refused unopened."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise HtsrError(f"{path} is not a regular file.")
    return open(path, "rb", buffering=0)


def read_exactly(file: BinaryIO, begin: int, into: memoryview, path: Path) -> None:
    """Fill ``into`` from byte ``begin`` on, or say that the file ends earlier."""
    file.seek(begin)
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise HtsrError(f"{path} changed while it was read.", "Run the command again.")
        done += count


def _same(file: BinaryIO, shard: Shard, path: Path) -> None:
    status = os.fstat(file.fileno())
    same = shard.identity.startswith(f"{_version(status)}:")
    if not (same and shard.stamp.startswith(f"{_place(status)}:")):
        raise HtsrError(f"{path} changed while it was read.", "Run the command again.")


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def _place(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}"


def _config(folder: Path) -> dict[str, Any]:
    names = [name for name in CONFIG_NAMES if (folder / name).is_file()]
    return parse_config(names, lambda name: read_small(folder / name))
