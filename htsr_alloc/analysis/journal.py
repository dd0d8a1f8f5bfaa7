"""The spectra finished so far, so that a killed run resumes at the next matrix.

One line a matrix, appended and synced: JSON, a space, a SHA-256. The first line is the header; it
says what the spectra depend on (the identity). The hash of every other line is over the header and
the line's JSON, so that a line counts only if all its bits are right and it was computed under the
same identity. A line that does not count is dropped, and its matrix computed again; the rest is
kept. The estimator is not part of the identity: fits are made from the spectra, so that a resumed
run may use another, but for one that needs a histogram's peak after one that needs none.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import cannot
from htsr_alloc.spectra.spectrum import Spectrum

FORMAT = "htsr.journal"
START = b'{"format": "htsr.journal"'
VERSION = 2  # version 1, of htsr 0.1.0, had no hashes
LONGEST = 1 << 28  # bytes of a line; a longer one does not count


@dataclass(frozen=True)
class Entry:
    """A finished matrix.

    Attributes:
        spectrum: its eigenvalues.
        sha256: of its stored bytes, as read.
        stamp: of the files that they were read from (``Checkpoint.stamp``).
    """

    spectrum: Spectrum
    sha256: str
    stamp: str = ""

    def fits(self, shape: tuple[int, int]) -> bool:
        """Whether this can be the spectrum of a matrix of this shape: min(m, n) eigenvalues, zeros
        included, or none and a reason; all positive, finite and ascending."""
        found = self.spectrum
        if found.reason is not None:
            return not len(found.eigenvalues)
        whole = len(found.eigenvalues) + found.n_zero == min(shape)
        parts = [found.eigenvalues] + ([] if found.windows is None else [found.windows])
        return whole and all(_ascending(values) for values in parts)


class Journal:
    """An append-only file beside the output, locked while it is open.

    Args:
        path: the journal's file; made when absent.
        identity: what the spectra depend on (checkpoint, engine, ...), as JSON. A journal with
            another one is refused, naming the first difference.
        restart: empty an existing journal.

    Raises:
        HtsrError: another run holds the journal, it belongs to other settings or another
            checkpoint, it is not a journal, or it cannot be written or locked.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        self.path, self.entries = path, {}
        self._header = _header(identity)
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise cannot("write", path, error) from error
        try:
            lock(self._file, path, f"Another run is writing {path}.")
            self._load(identity, restart)
        except BaseException:
            self.__exit__()
            raise

    def add(self, name: str, entry: Entry) -> None:
        """Append one matrix; on return it survives a crash."""
        self.entries[name] = entry
        found = entry.spectrum
        record = {
            "name": name,
            "sha256": entry.sha256,
            "stamp": entry.stamp,
            "eigenvalues": _encode(found.eigenvalues),
            "n_zero": found.n_zero,
            "engine": found.engine,
            "windows": None if found.windows is None else _encode(found.windows),
            "reason": found.reason,
        }
        text = json.dumps(record).encode()
        self._append(text, _digest(self._header + text))

    def remove(self) -> None:
        """Delete the file: the results are safely written elsewhere."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written was told by _append
            self._file.close()  # and with it the lock

    def _load(self, identity: Mapping[str, Any], restart: bool) -> None:
        if not restart:
            self.entries = _read(self._file, identity, self.path)
        elif not is_journal(self._file):
            raise _foreign(self.path)
        whole = 0 if restart else _whole(self._file)
        self._file.truncate(whole)  # what follows the last newline is torn
        if not whole:
            self._append(self._header, _digest(self._header))

    def _append(self, text: bytes, digest: bytes) -> None:
        try:
            self._file.write(text + b" " + digest + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot("write", self.path, error) from error


def lock(file: BinaryIO, path: Path, held: str) -> None:
    """Lock an open file until it is closed.

    Raises:
        HtsrError: another process has locked it (``held`` says so), or the file system has no
            locks, as some network file systems.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "Wait for it, or choose another `output`."
        raise HtsrError(held, hint) from None
    except OSError as error:
        hint = "Choose an `output` on a file system with locks, such as a local disk."
        raise HtsrError(cannot("lock", path, error).message, hint) from None


def read_journal(path: Path, identity: Mapping[str, Any]) -> dict[str, Entry]:
    """What a journal that this process does not own holds; nothing is changed.

    Raises:
        HtsrError: as ``Journal``.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, identity, path)
    except OSError as error:
        raise cannot("read", path, error) from error


def is_journal(file: BinaryIO) -> bool:
    """Whether an open file begins as a journal does, or is empty."""
    file.seek(0)
    text = file.read(len(START))
    return START.startswith(text) if len(text) < len(START) else text == START


def _read(file: BinaryIO, identity: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    """The entries of the lines that count, the last of a name."""
    entries: dict[str, Entry] = {}
    header = _header(identity)
    lines = _lines(file)
    first = next(lines, b"")
    for text, digest in map(_split, lines):
        if digest == _digest(header + text):
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                record = json.loads(text)
                entries[str(record["name"])] = _entry(record)
    if not entries and (first or not is_journal(file)):
        _check_header(first, identity, path)
    return entries


def _check_header(line: bytes, identity: Mapping[str, Any], path: Path) -> None:
    """Say whose journal it is, if not this run's."""
    if not line.startswith(START):
        raise _foreign(path)
    text, digest = _split(line)
    if digest != _digest(text):
        old = line.endswith(b"}")
        why = "was written by htsr 0.1.0, without checksums" if old else "has a damaged first line"
        raise HtsrError(f"{path} {why}.", "Start over with `restart`.")
    found = json.loads(text)["identity"]
    for key in sorted(set(identity) | set(found)):
        if json.dumps(identity.get(key)) != json.dumps(found.get(key)):
            raise another(path, key, f"{_brief(found.get(key))}; now {_brief(identity.get(key))}")


def another(path: Path, what: str, difference: str) -> HtsrError:
    """The refusal of a journal of another run."""
    return HtsrError(
        f"{path} is of a run with another {what} ({difference}).",
        "Run it as before, start over with `restart`, or choose another `output`.",
    )


def _foreign(path: Path) -> HtsrError:
    return HtsrError(
        f"{path} is not a journal of htsr; it is left as it is.",
        "Move it to another folder, or choose another `output`.",
    )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines that end in a newline, without it; one that is too long comes in pieces."""
    file.seek(0)
    while line := file.readline(LONGEST):
        if line.endswith(b"\n"):
            yield line[:-1]


def _whole(file: BinaryIO) -> int:
    """The bytes up to the last newline."""
    place = file.seek(0, os.SEEK_END)
    while place:
        start = max(0, place - (1 << 16))
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0


def _split(line: bytes) -> tuple[bytes, bytes]:
    text, _, digest = line.rpartition(b" ")
    return text, digest


def _header(identity: Mapping[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, "version": VERSION, "identity": dict(identity)}).encode()


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _entry(record: dict[str, Any]) -> Entry:
    windows = record["windows"]
    spectrum = Spectrum(
        _decode(record["eigenvalues"]),
        int(record["n_zero"]),
        str(record["engine"]),
        None if windows is None else _decode(windows),
        record["reason"],
    )
    bytes.fromhex(record["sha256"])
    return Entry(spectrum, record["sha256"], str(record["stamp"]))


def _ascending(values: np.ndarray) -> bool:
    """Positive, finite, and none below the one before it."""
    finite = len(values) > 0 and bool(np.isfinite(values).all())
    return finite and bool(values[0] > 0 and (np.diff(values) >= 0).all())


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
