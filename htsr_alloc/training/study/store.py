"""Results as JSON lines, safe against kill -9 and against a second worker.

Every change is a whole new file in the old one's place, made while one byte of the lock file is
held, so that no line is torn or lost. A cell in work is another byte of it. The system lets both go
when a process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.training.study.cells import Key

FILE_BYTE = 0  # held to change the file; cells hold later ones


class Store:
    """The finished cells of a study, by task, row, seed and tuned rate."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_path = path.with_name(f".{path.name}.lock")

    @functools.cached_property
    def _lock(self) -> BinaryIO:
        """Open from the first claim to the end of the process; who only reads needs none."""
        try:
            return open(self.lock_path, "ab")
        except OSError as error:
            raise files.cannot("write", self.lock_path, error) from None

    def read(self) -> dict[Key, dict[str, Any]]:
        """Every finished cell.

        Raises:
            HtsrError: a line that is not a cell.
        """
        if not self.path.exists():
            return {}
        found = {}
        for number, line in enumerate(files.read_bytes(self.path).splitlines(), 1):
            try:
                cell = json.loads(line)
                found[cell["task"], cell["row"], cell["seed"], cell.get("rate")] = cell
            except (ValueError, KeyError, TypeError, RecursionError):
                raise HtsrError(f"{self.path.name}, line {number}: this is not a cell.") from None
        return found

    def add(self, *found: dict[str, Any]) -> None:
        """Append one finished cell's lines, all or none."""
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, FILE_BYTE)
        except OSError as error:
            raise files.cannot("lock", self.lock_path, error) from None
        try:
            lines = [*self.read().values(), *found]
            files.write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, FILE_BYTE)

    @contextlib.contextmanager
    def claim(self, key: Key) -> Iterator[bool]:
        """Whether this process alone has the cell, as long as the block lasts."""
        byte = 1 + zlib.crc32("\0".join(map(str, key)).encode())
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # no lock at all, as on some NFS
                raise files.cannot("lock", self.lock_path, error) from None
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN, 1, byte)
