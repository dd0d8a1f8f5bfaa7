"""The two JSON files, metrics (facts) and allocation (decisions), as frozen dataclasses.

Standard library only, so that a trainer can read an allocation without torch or numpy.
The same rules stand as JSON Schema in ``schemas/``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, TypeVar

from htsr_alloc import __version__, decoding
from htsr_alloc.errors import HtsrError

METRICS = ("pl_alpha_hill", "alpha_hat", "stable_rank")

# What a matrix's status can be: a number that stands, one to read with care, none at all.
OK, MARKED, FAILED = "ok", "marked", "failed"


@dataclass(frozen=True)
class Tool:
    """Who wrote the file; ``created`` is UTC, ISO 8601."""

    name: str
    version: str
    created: str


def this_tool() -> Tool:
    """This program, now."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Tool("htsr_alloc", __version__, now)


@dataclass(frozen=True)
class Model:
    """What was analysed.

    ``revision`` is the hub's commit, or null for local files; ``weights_sha256`` is the hash
    over the stored bytes of every analysed tensor, in the order of ``matrices``.
    """

    name: str
    revision: str | None = None
    weights_sha256: str | None = None
    architecture: str | None = None
    num_layers: int | None = None


@dataclass(frozen=True)
class Farms:
    """FARMS sub-sampling (arXiv 2506.06280): ``windows`` x ``windows`` evenly spaced
    sub-matrices of ``rows`` x ``rows * ratio``."""

    rows: int = 100
    ratio: float = 2.0
    windows: int = 10

    def __post_init__(self) -> None:
        if self.rows < 1 or self.windows < 1 or not 0 < self.ratio < math.inf:
            raise HtsrError("FARMS needs rows >= 1, windows >= 1 and a positive ratio.")


@dataclass(frozen=True)
class Settings:
    """How the numbers were made."""

    estimator: str
    bins: int = 100
    engine: str = "auto"
    device: str = "cpu"
    farms: Farms | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """A neighbouring file: a bare name (never a path) and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Matrix:
    """One weight matrix. Numbers are null only where ``reason`` says why.

    ``tensor`` names it: the checkpoint's tensor, with ``[i]`` for slice i of a 3-d one.
    ``n_eigs`` eigenvalues were kept and ``n_zero`` found to be zero (together min(shape));
    ``k`` is the number of eigenvalues in the fitted tail; ``peak_gap`` is the count of the
    fullest histogram bin less that of the second (0: a tie, the first bin won).
    """

    tensor: str
    layer: int
    role: str
    expert: int | None
    shape: tuple[int, int]
    dtype: str
    n_eigs: int
    n_zero: int
    lambda_min: float | None
    lambda_max: float | None
    pl_alpha_hill: float | None
    alpha_hat: float | None
    stable_rank: float | None
    xmin: float | None
    k: int | None
    ks_distance: float | None
    peak_gap: int | None
    engine: str
    status: str
    reason: str | None


@dataclass(frozen=True)
class Layer:
    """Plain means over the layer's fitted matrices (``matrices`` in all, ``unfitted`` not)."""

    layer: int
    prefix: str
    matrices: int
    unfitted: int
    pl_alpha_hill: float | None
    alpha_hat: float | None
    stable_rank: float | None
    reason: str | None


@dataclass(frozen=True)
class Skipped:
    """A tensor that was left out, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class Metrics:
    """metrics.json. ``spectra`` is null when they were not kept."""

    format: str
    version: int
    tool: Tool
    model: Model
    settings: Settings
    spectra: File | None
    matrices: tuple[Matrix, ...]
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]

    FORMAT: typing.ClassVar[str] = "htsr.metrics"
    VERSION: typing.ClassVar[int] = 1

    def check(self) -> None:
        """Raise ValueError on what types alone cannot say."""
        if [layer.layer for layer in self.layers] != list(range(len(self.layers))):
            raise ValueError("layers: must be numbered 0, 1, 2, ... in order")
        if len({matrix.tensor for matrix in self.matrices}) != len(self.matrices):
            raise ValueError("matrices: a tensor is listed twice")
        for i, matrix in enumerate(self.matrices):
            if not 0 <= matrix.layer < len(self.layers):
                raise ValueError(f"matrices[{i}].layer: {matrix.layer} is not among the layers")
            if matrix.status not in (OK, MARKED, FAILED):
                raise ValueError(f"matrices[{i}].status: unknown status {matrix.status!r}")
            if matrix.status != OK and not matrix.reason:
                raise ValueError(f"matrices[{i}].reason: status {matrix.status} needs a reason")
            if matrix.status != FAILED and matrix.pl_alpha_hill is None:
                raise ValueError(f"matrices[{i}].pl_alpha_hill: null without status failed")
        for layer in self.layers:
            if layer.reason is None and any(getattr(layer, m) is None for m in METRICS):
                raise ValueError(f"layers[{layer.layer}].reason: a null number needs a reason")
        if self.spectra is not None:
            _check_bare_name(self.spectra.file, "spectra.file")


@dataclass(frozen=True)
class Strategy:
    """How an allocation was chosen; a field that the strategy does not use is null."""

    name: str
    metric: str | None = None
    estimator: str | None = None
    beta: float | None = None
    repair: str | None = None
    min: int | None = None
    max: int | None = None
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Evidence:
    """One layer: its score v, its quota q = v^beta / sum(v^beta) * T, its experts.

    ``reason`` says why score or quota is null (a strategy that uses none).
    """

    layer: int
    prefix: str | None
    score: float | None
    quota: float | None
    experts: int
    reason: str | None = None


@dataclass(frozen=True)
class Allocation:
    """allocation.json. A trainer needs only ``experts`` and ``top_k``, one entry a layer."""

    format: str
    version: int
    budget: int
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    unit: str = "experts_per_layer"
    tool: Tool | None = None
    model: Model | None = None
    metrics: File | None = None
    strategy: Strategy | None = None
    evidence: tuple[Evidence, ...] = ()

    FORMAT: typing.ClassVar[str] = "htsr.allocation"
    VERSION: typing.ClassVar[int] = 1

    def check(self) -> None:
        """Raise ValueError on what types alone cannot say."""
        if not self.experts:
            raise ValueError("experts: must list at least one layer")
        if sum(self.experts) != self.budget:
            raise ValueError(f"experts: sum to {sum(self.experts)}, not to budget {self.budget}")
        if min(self.experts) < 0:
            raise ValueError("experts: a negative count")
        if len(self.top_k) != len(self.experts):
            raise ValueError(f"top_k: {len(self.top_k)} entries for {len(self.experts)} layers")
        for i, (k, n) in enumerate(zip(self.top_k, self.experts, strict=True)):
            if not min(n, 1) <= k <= n:
                raise ValueError(f"top_k[{i}]: {k} does not fit {n} experts")
        if self.unit != "experts_per_layer":
            raise ValueError(f"unit: unknown unit {self.unit!r}")
        if self.evidence:
            if tuple(row.experts for row in self.evidence) != self.experts:
                raise ValueError("evidence: its experts differ from experts")
            for i, row in enumerate(self.evidence):
                if row.layer != i:
                    raise ValueError(f"evidence[{i}].layer: must be {i}")
                if row.reason is None and (row.score is None or row.quota is None):
                    raise ValueError(f"evidence[{i}].reason: a null number needs a reason")
        if self.metrics is not None:
            _check_bare_name(self.metrics.file, "metrics.file")


Record = TypeVar("Record", Metrics, Allocation)


def dumps(record: Metrics | Allocation) -> str:
    """The JSON text, indented, ending in a newline.

    Raises:
        ValueError: a number is NaN or infinite, or the record breaks its own rules.
    """
    record.check()
    return json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False) + "\n"


def loads(kind: type[Record], text: str | bytes, source: str) -> Record:
    """Parse and validate a metrics or allocation file.

    Args:
        kind: ``Metrics`` or ``Allocation``.
        text: the file's contents, UTF-8 when bytes.
        source: what to call the file in an error.

    Raises:
        HtsrError: not JSON, another format, a newer version, an unknown or missing key, a
            wrong type, NaN, or numbers that contradict each other; the sentence names where.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        data = decoding.parse(text)
        _check_header(kind, data)
        record = decoding.decode(kind, data)
        record.check()
    except RecursionError:
        raise HtsrError(f"{source} is nested too deeply to be {kind.FORMAT}.") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise HtsrError(f"{source} is not a valid {kind.FORMAT} file: {error}.") from None
    return record


def _check_header(kind: type[Metrics] | type[Allocation], data: Any) -> None:
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError('no "format" key')
    if data["format"] != kind.FORMAT:
        raise ValueError(f"its format is {data['format']!r}")
    version = data.get("version")
    if isinstance(version, int) and version > kind.VERSION:
        raise ValueError(
            f"version {version} is newer than this htsr reads ({kind.VERSION}); upgrade htsr"
        )
    if version != kind.VERSION or isinstance(version, bool):
        raise ValueError(f"version: expected {kind.VERSION}, found {version!r}")


def _check_bare_name(name: str, where: str) -> None:
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise ValueError(f"{where}: must be a bare file name, not {name!r}")
