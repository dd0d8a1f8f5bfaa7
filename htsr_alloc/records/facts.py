"""metrics.json: the facts of an analysis, as frozen dataclasses."""

# pyright: reportMissingTypeStubs=false
# (of pandas)
from __future__ import annotations

import math
import typing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Annotated, Literal

from msgspec import Meta

from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.records.frames import frame
from htsr_alloc.version import __version__

if typing.TYPE_CHECKING:
    from pandas import DataFrame

METRICS = ("pl_alpha_hill", "alpha_hat", "stable_rank")

# What a matrix's status can be: a number that stands, one to read with care, none at all.
OK, MARKED, FAILED = "ok", "marked", "failed"

Count = Annotated[int, Meta(ge=0)]
MAX_BINS = 1_000_000  # of a histogram; there are never as many eigenvalues

SHORT = 50  # eigenvalues in a tail; below, Hill's error alone is 14 % of alpha - 1
UNCERTIFIED = "no peak certified"  # ends an engine's name: float32 for smooth estimators

# Estimators whose start is the histogram's peak, which noise of 1 % on the weights moves, and the
# one that docs/ESTIMATORS.md recommends for a decision in their place.
NOISY = ("official", "paper", "band")
FOR_DECISIONS = "kde-mean"

# Metadata of a field that was added within a version: it is written only where it is not at its
# default, so that a file that does without it reads as before.
ADDED = {"added": True}


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
class Dequantised:
    """``matrices`` quantised matrices of one kind that were analysed as the floats they stand for.

    ``format`` is the way they are stored (``gguf``, ``gptq``), ``dtype`` that of the matrices;
    ``library`` decoded them, or null where htsr did. Their smallest singular values are rounding
    noise.
    """

    format: str
    dtype: str
    matrices: Count
    library: str | None = None


@dataclass(frozen=True)
class Model:
    """What was analysed.

    ``revision`` is the hub's commit, or null for local files; ``weights_sha256`` is the hash
    over the stored bytes of every analysed tensor, in the order of ``matrices``. ``parameters``
    counts the numbers in all of the checkpoint's float tensors, embeddings included.
    ``dequantised`` says which matrices were stored quantised.
    """

    name: str
    revision: str | None = None
    weights_sha256: str | None = None
    architecture: str | None = None
    num_layers: int | None = None
    parameters: int | None = field(default=None, metadata=ADDED)
    dequantised: tuple[Dequantised, ...] = field(default=(), metadata=ADDED)


@dataclass(frozen=True)
class Farms:
    """FARMS sub-sampling (arXiv 2506.06280): ``windows`` x ``windows`` evenly spaced
    sub-matrices of ``rows`` x ``rows * ratio``."""

    rows: Annotated[int, Meta(ge=1)] = 100
    ratio: Annotated[float, Meta(gt=0)] = 2.0
    windows: Annotated[int, Meta(ge=1)] = 10

    def __post_init__(self) -> None:
        if self.rows < 1 or self.windows < 1 or not 0 < self.ratio < math.inf:
            raise HtsrError("FARMS needs rows >= 1, windows >= 1 and a positive ratio.")


@dataclass(frozen=True)
class Settings:
    """How the numbers were made.

    ``noise`` is the size of the noise behind the standard errors, relative to the root mean square
    of a matrix's entries; null where there are none (FARMS, and files of before).
    """

    estimator: str
    bins: int = 100
    engine: str = "auto"
    device: str = "cpu"
    farms: Farms | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    noise: Annotated[float, Meta(gt=0)] | None = field(default=None, metadata=ADDED)

    def __post_init__(self) -> None:
        if self.bins > MAX_BINS:
            raise HtsrError(f"bins must be at most {MAX_BINS}, not {self.bins}.")
        if self.farms is not None and self.noise is not None:
            raise HtsrError("With FARMS there are no standard errors, so that `noise` is null.")


@dataclass(frozen=True)
class File:
    """A neighbouring file: a bare name (never a path) and the SHA-256 of its bytes."""

    file: Annotated[str, Meta(extra_json_schema={"pattern": r"^[^/\\:\u0000]+$"})]
    sha256: str


@dataclass(frozen=True)
class Matrix:
    """One weight matrix. Numbers are null only where ``reason`` says why.

    ``tensor`` names it: the checkpoint's tensor, with ``[i]`` for slice i of a 3-d one, and
    ``[i,gate_proj]`` for the gate in a slice that joins an expert's gate and up. Such a half has
    the shape (d_out, d_in), any other the stored one.
    ``n_eigs`` eigenvalues were kept and ``n_zero`` found to be zero (together min(shape));
    ``k`` is the number of eigenvalues in the fitted tail; ``peak_gap`` is the count of the
    fullest histogram bin less that of the second (0: a tie, the first bin won).

    ``alpha_se`` is the standard error of ``pl_alpha_hill``, sqrt(``alpha_hill_se``^2 +
    ``alpha_start_se``^2): of the tail's finite size, (alpha - 1) / sqrt(k), and of the choice of
    its start, under ``Settings.noise``, which moves the tail's length from ``k_low`` to
    ``k_high``. They are null where the settings name no noise or the fit failed.
    """

    tensor: str
    layer: Count
    role: str
    expert: Count | None
    shape: tuple[Count, Count]
    dtype: str
    n_eigs: Count
    n_zero: Count
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
    status: Annotated[str, Meta(extra_json_schema={"enum": [OK, MARKED, FAILED]})]
    reason: str | None
    alpha_se: float | None = field(default=None, metadata=ADDED)
    alpha_hill_se: float | None = field(default=None, metadata=ADDED)
    alpha_start_se: float | None = field(default=None, metadata=ADDED)
    k_low: int | None = field(default=None, metadata=ADDED)
    k_high: int | None = field(default=None, metadata=ADDED)

    @property
    def start_jumps(self) -> bool:
        """Whether the choice of the start adds more to the error than the tail's size does."""
        return (self.alpha_start_se or 0.0) > (self.alpha_hill_se or 0.0)

    @property
    def short_tail(self) -> bool:
        """Whether alpha was fitted to fewer than ``SHORT`` eigenvalues."""
        return self.k is not None and self.k < SHORT


# The rules of Metrics.check on one matrix, as JSON Schema says them.
RULES = [
    {
        "if": {"properties": {"status": {"enum": [MARKED, FAILED]}}},
        "then": {"properties": {"reason": {"type": "string", "minLength": 1}}},
    },
    {
        "if": {"properties": {"status": {"enum": [OK, MARKED]}}},
        "then": {"properties": {"pl_alpha_hill": {"type": "number"}}},
    },
]


@dataclass(frozen=True)
class Layer:
    """Plain means over the layer's fitted matrices (``matrices`` in all, ``unfitted`` not)."""

    layer: Count
    prefix: str
    matrices: Count
    unfitted: Count
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
    """Facts: what htsr analyze found, matrix by matrix and layer by layer.

    ``spectra`` is null when they were not kept.
    """

    format: Literal["htsr.metrics"]
    version: Literal[1]
    tool: Tool
    model: Model
    settings: Settings
    spectra: File | None
    matrices: tuple[Annotated[Matrix, Meta(extra_json_schema={"allOf": RULES})], ...]
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]

    FORMAT: typing.ClassVar[Literal["htsr.metrics"]] = "htsr.metrics"
    HINT: typing.ClassVar[str] = "htsr analyze writes such files."
    VERSION: typing.ClassVar[Literal[1]] = 1

    def to_pandas(self, table: str = "layers") -> DataFrame:
        """The layers, the ``matrices`` or the ``skipped`` tensors as a pandas table.

        Raises:
            HtsrError: pandas is not installed, or there is no such table.
        """
        kinds = {"layers": Layer, "matrices": Matrix, "skipped": Skipped}
        check_choice("table", table, kinds)
        return frame(getattr(self, table), kinds[table])

    def check(self) -> None:
        """Raise ValueError on what types alone cannot say."""
        if [layer.layer for layer in self.layers] != list(range(len(self.layers))):
            raise ValueError("layers: must be numbered 0, 1, 2, ... in order")
        if len({matrix.tensor for matrix in self.matrices}) != len(self.matrices):
            raise ValueError("matrices: a tensor is listed twice")
        for i, matrix in enumerate(self.matrices):
            if matrix.layer >= len(self.layers):
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
            check_bare_name(self.spectra.file, "spectra.file")


def check_bare_name(name: str, where: str) -> None:
    """Raise ValueError on a path: files name each other by their bare names."""
    if name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
        raise ValueError(f"{where}: must be a bare file name, not {name!r}")
