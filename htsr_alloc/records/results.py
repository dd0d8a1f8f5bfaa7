"""Result files: a record of either kind, and the spectra kept beside metrics. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, File, Metrics, loads

FARMS_SUFFIX = "#farms"  # the pooled spectrum of a matrix, beside the whole one


@dataclass(frozen=True)
class Result:
    """A metrics or allocation file: what it holds, and the hash of its bytes."""

    path: Path
    file: File
    record: Metrics | Allocation

    @property
    def stem(self) -> str:
        """The name without ``.metrics.json`` or ``.allocation.json``."""
        name = self.path.name.removesuffix(".json")
        return name.removesuffix(".metrics").removesuffix(".allocation")


def read_result(path: str | Path) -> Result:
    """A metrics or an allocation file, told apart by its ``format``.

    Raises:
        HtsrError: it cannot be read, is neither, or breaks its format's rules.
    """
    path = Path(path)
    content = files.read_bytes(path)
    try:
        data = files.parse_json(content.decode("utf-8"))
    except (ValueError, RecursionError):
        data = None
    named = cast(dict[str, Any], data).get("format") if isinstance(data, dict) else None
    kind = {Metrics.FORMAT: Metrics, Allocation.FORMAT: Allocation}.get(str(named))
    if kind is None:
        raise HtsrError(
            f"{path.name} is neither a metrics nor an allocation file.",
            "Make one with htsr analyze or htsr allocate.",
        )
    source = File(path.name, hashlib.sha256(content).hexdigest())
    return Result(path, source, loads(kind, content, path.name))


class Spectra(Mapping[str, np.ndarray]):
    """Tensor -> the ascending float64 eigenvalues its tail was fitted to (FARMS: the pooled
    ones), each read when asked for."""

    def __init__(self, reader: Any, suffix: str) -> None:
        self._reader, self._suffix = reader, suffix
        names: list[str] = reader.keys()
        kept = (name for name in names if name.endswith(suffix))
        self._names = dict.fromkeys(name.removesuffix(suffix) for name in kept)

    def __getitem__(self, tensor: str) -> np.ndarray:
        if tensor not in self._names:
            raise KeyError(tensor)
        name = tensor + self._suffix
        if self._reader.get_slice(name).get_dtype() == "F64":
            values = self._reader.get_tensor(name)
            if values.ndim == 1:
                return values
        raise HtsrError(f"{name} is not a spectrum: it must be one row of float64.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def open_spectra(metrics: Metrics, path: Path) -> Generator[Spectra]:
    """The spectra that lie beside the metrics file at ``path``.

    Raises:
        HtsrError: there are none, they cannot be read, or they are not the ones the metrics were
            written with.
    """
    import safetensors

    safe_open: Any = safetensors.safe_open  # has no types

    if metrics.spectra is None:
        raise HtsrError(f"{path.name} was written without spectra.", "Analyze it to a file.")
    spectra_path = path.with_name(metrics.spectra.file)
    if not spectra_path.exists():
        raise HtsrError(
            f"There is no {spectra_path.name} beside {path.name}.",
            "Keep the two in one folder, or analyze again.",
        )
    if files.sha256(spectra_path) != metrics.spectra.sha256:
        raise HtsrError(
            f"{spectra_path.name} is not the file that {path.name} was written with.",
            "Analyze again.",
        )
    try:
        with safe_open(spectra_path, framework="numpy") as reader:
            yield Spectra(reader, FARMS_SUFFIX if metrics.settings.farms else "")
    except safetensors.SafetensorError as error:
        raise HtsrError(f"{spectra_path} cannot be read: {error}.") from error
