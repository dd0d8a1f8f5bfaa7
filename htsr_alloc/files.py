"""Reading and writing files so that a crash, a full disk or a second run loses nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from htsr_alloc.errors import HtsrError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes ``path``'s place only when the block ends without error.

    Raises:
        HtsrError: the file cannot be written (no such folder, read-only, disk full); what
            stood at ``path`` before still stands there.
    """
    temporary = _temporary(path)
    try:
        if is_special(path):  # written to, not replaced
            with open(path, "wb") as file:
                yield file
            return
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise cannot("write", path, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Raise now what ``atomic_write`` would raise after the work.

    Raises:
        HtsrError: no such folder, a read-only one, a folder at ``path``, a name that is too long
            or that the file system does not take.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not is_special(path):
            temporary = _temporary(path)
            with open(temporary, "wb"):
                temporary.unlink()
    except OSError as error:
        raise cannot("write", path, error) from error
    except ValueError as error:  # a zero byte or a surrogate in the name
        raise HtsrError(f"Cannot write {str(path)!r}: {error}.") from None


def refuse_overwriting(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is one of the files that are read.

    Raises:
        HtsrError: it is one of them, by this name or another.
    """
    for source in inputs:
        with contextlib.suppress(OSError, ValueError):
            if path.samefile(source):
                raise HtsrError(
                    f"{path} is read by this command and would be overwritten.",
                    "Choose another output with -o.",
                )


def is_special(path: Path) -> bool:
    """A pipe or device, such as /dev/null; a missing path, file or folder is none."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def read_bytes(path: Path, limit: int = 1 << 30) -> bytes:
    """The file's bytes.

    Raises:
        HtsrError: it does not exist, cannot be read, is a pipe, or has more than ``limit`` bytes.
    """
    try:
        if path.is_fifo():  # it may never be written to
            raise HtsrError(f"{path} is a pipe.", "Give a file.")
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise cannot("read", path, error) from error
    if len(data) > limit:
        raise HtsrError(f"{path} is larger than the {limit >> 20} MiB that are read of it.")
    return data


def sha256(path: Path) -> str:
    """The hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise cannot("read", path, error) from error
    return digest.hexdigest()


def cannot(verb: str, path: Path, error: OSError) -> HtsrError:
    """An operating-system error as a sentence."""
    absent = verb == "read" and isinstance(error, FileNotFoundError)
    hint = "Check the name, and the folder that the command runs in." if absent else None
    return HtsrError(f"Cannot {verb} {path}: {error.strerror or error}.", hint)


def parse_json(text: str) -> Any:
    """JSON without NaN, Infinity and duplicate keys.

    Raises:
        ValueError: it is not JSON, or has one of these. RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=unique_keys)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs as a dict; ValueError on a duplicate key."""
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {twice!r}")
    return record
