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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import cannot
from htsr_alloc.spectrum import Spectrum


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
            self._file.close()
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

    def close(self, *, remove: bool = False) -> None:
        """Release the lock; ``remove`` when the results are safely written elsewhere."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _load(self, identity: dict[str, Any]) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        whole = sum(len(line) + 1 for line in lines[:-1])  # what follows the last newline is torn
        self._file.truncate(whole)
        if not lines[:-1]:
            self._append({"format": "htsr.journal", "identity": identity})
            return
        try:
            found = json.loads(lines[0])["identity"]
            for line in lines[1:-1]:
                record = json.loads(line)
                windows = record["windows"]
                self.entries[record["name"]] = Entry(
                    Spectrum(
                        _decode(record["eigenvalues"]),
                        record["n_zero"],
                        record["engine"],
                        None if windows is None else _decode(windows),
                        record["reason"],
                    ),
                    record["sha256"],
                )
        except (ValueError, KeyError, TypeError) as error:
            raise HtsrError(
                f"{self.path} is damaged ({type(error).__name__}).", "Start over with --restart."
            ) from error
        if not isinstance(found, dict):
            found = {}
        for key in sorted(set(identity) | set(found)):
            if identity.get(key) != found.get(key):
                raise HtsrError(
                    f"{self.path} is of a run with another {key} "
                    f"({_brief(found.get(key))}; now {_brief(identity.get(key))}).",
                    "Run it as before, start over with --restart, or choose another output "
                    "with -o.",
                )

    def _append(self, record: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot("write", self.path, error) from error


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(values.astype("<f8").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f8").astype(np.float64)


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
