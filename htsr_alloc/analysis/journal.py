"""The spectra finished so far, so that a killed run goes on at the next matrix.

One JSON line a matrix, appended and synced; the first line says what the spectra depend on. A
line that a kill cut short is dropped. The estimator is not part of it: fits are made from the
spectra, so that a resumed run may use another.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import cannot, read_bytes
from htsr_alloc.spectra.spectrum import Spectrum

START = b'{"format": "htsr.journal"'


@dataclass(frozen=True)
class Entry:
    """A finished matrix: its spectrum and the SHA-256 of its stored bytes."""

    spectrum: Spectrum
    sha256: str


class Journal:
    """An append-only file beside the output, locked while it is open.

    Args:
        path: the journal's file; made when absent.
        identity: what the spectra depend on (checkpoint, engine, ...). A journal with another
            one is refused, naming the first difference.
        restart: throw an existing journal away.

    Raises:
        HtsrError: another run holds the journal, it belongs to other settings or another
            checkpoint, or it cannot be written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        try:
            self._file = open(path, "a+b")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise cannot("write", path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise HtsrError(
                f"Another run is writing {path}.", "Wait for it, or choose another output with -o."
            ) from None
        try:
            if restart:
                self._file.truncate(0)
            self._load(dict(identity))
        except BaseException:
            self.__exit__()
            raise

    def add(self, name: str, entry: Entry) -> None:
        """Append one matrix; on return it survives a crash."""
        self.entries[name] = entry
        spectrum = entry.spectrum
        self._append(
            {
                "name": name,
                "sha256": entry.sha256,
                "eigenvalues": _encode(spectrum.eigenvalues),
                "n_zero": spectrum.n_zero,
                "engine": spectrum.engine,
                "windows": None if spectrum.windows is None else _encode(spectrum.windows),
                "reason": spectrum.reason,
            }
        )

    def remove(self) -> None:
        """Delete the file: the results are safely written elsewhere."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written was told by _append
            self._file.close()  # and with it the lock

    def _load(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text.rfind(b"\n") + 1  # what follows the last newline is torn
        if whole or not START.startswith(text[: len(START)]):
            self.entries = _parse(text[:whole], identity, self.path)
        self._file.truncate(whole)
        if not whole:
            self._append({"format": "htsr.journal", "identity": identity})

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot("write", self.path, error) from error


def read_journal(path: Path, identity: Mapping[str, Any]) -> dict[str, Entry]:
    """The whole lines of a journal that this process does not own; nothing is changed.

    Raises:
        HtsrError: as ``Journal``.
    """
    text = read_bytes(path)
    text = text[: text.rfind(b"\n") + 1]
    return _parse(text, dict(identity), path) if text else {}


def _parse(text: bytes, identity: dict[str, Any], path: Path) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    try:
        header, *lines = text.splitlines()
        found = json.loads(header)["identity"]
        for line in lines:
            record = json.loads(line)
            windows = record["windows"]
            spectrum = Spectrum(
                _decode(record["eigenvalues"]),
                record["n_zero"],
                record["engine"],
                None if windows is None else _decode(windows),
                record["reason"],
            )
            bytes.fromhex(record["sha256"])
            entries[record["name"]] = Entry(spectrum, record["sha256"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HtsrError(
            f"{path} is damaged ({type(error).__name__}).", "Start over with --restart."
        ) from error
    if not isinstance(found, dict):
        found = {}
    for key in sorted(set(identity) | set(found)):
        if identity.get(key) != found.get(key):
            raise HtsrError(
                f"{path} is of a run with another {key} "
                f"({_brief(found.get(key))}; now {_brief(identity.get(key))}).",
                "Run it as before, start over with --restart, or choose another output with -o.",
            )
    return entries


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f8").astype(np.float64)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
