"""allocation.json: the decisions, as frozen dataclasses."""

# pyright: reportMissingTypeStubs=false
# (of pandas)
from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from htsr_alloc.errors import check_choice
from htsr_alloc.records.facts import (
    ADDED,
    Count,
    Farms,
    File,
    Model,
    Tool,
    check_bare_name,
)
from htsr_alloc.records.frames import frame

if typing.TYPE_CHECKING:
    from pandas import DataFrame


EXPERTS: Literal["experts_per_layer"] = "experts_per_layer"
RANKS: Literal["rank_per_layer"] = "rank_per_layer"


@dataclass(frozen=True)
class RoleSignal:
    """One role's z = ln(alpha - 1) over its ``n`` matrices: mean, variance and I^2.

    ``i2`` is the share of the spread that the standard errors do not explain, with its 95 %
    interval.
    """

    role: str
    n: Count
    mean: float
    tau2: float
    i2: float
    i2_low: float
    i2_high: float


@dataclass(frozen=True)
class Signal:
    """How much of the spread between layers is signal, by the strategy that shrinks the rest.

    ``common`` is the variance that a layer's roles share, ``p`` how often chance alone spreads
    as widely. ``uniform`` says why all layers have one score; null where they differ.
    """

    roles: tuple[RoleSignal, ...]
    common: float
    p: float
    uniform: str | None


@dataclass(frozen=True)
class StrategyRecord:
    """How an allocation was chosen; a field that the strategy does not use is null.

    ``spread`` is the ratio of quotas that beta was solved for. ``farms`` are the windows that the
    score was measured on. ``scores`` is the file that the score came from, ``metric`` then its
    column. ``pool`` says among which linears a budget was shared, of those in ``targets`` (roles;
    null is all; ``experts`` are the base's own): ``role``, each role by itself, or ``all``.
    ``stack`` is the part of the model that was allocated (null is all of it), and ``score_over``
    the matrices that a layer's score is the mean over: null is all, ``adapted`` those that get
    experts. ``seed`` is that of random places.
    """

    name: str
    metric: str | None = None
    estimator: str | None = None
    beta: float | None = None
    repair: str | None = None
    min: int | None = None
    max: int | None = None
    groups: tuple[int, ...] | None = None
    spread: float | None = field(default=None, metadata=ADDED)
    farms: Farms | None = field(default=None, metadata=ADDED)
    scores: File | None = field(default=None, metadata=ADDED)
    pool: str | None = field(default=None, metadata=ADDED)
    targets: tuple[str, ...] | None = field(default=None, metadata=ADDED)
    signal: Signal | None = field(default=None, metadata=ADDED)
    stack: str | None = field(default=None, metadata=ADDED)
    score_over: str | None = field(default=None, metadata=ADDED)
    seed: int | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class Evidence:
    """One layer: its score v, its quota q = v^beta / sum(v^beta) * T, its experts.

    Under a parameter budget the quota is within the bounds already. In an allocation by modules
    score, quota and experts are the means of the layer's. ``reason`` says why score or quota is
    null (a strategy that uses none).
    """

    layer: Count
    prefix: str | None
    score: float | None
    quota: float | None
    experts: Count
    reason: str | None = None


@dataclass(frozen=True)
class Module:
    """One linear with a count of its own. ``name`` is the checkpoint's, without ``.weight``."""

    layer: Count
    name: str
    role: str
    score: float
    quota: float
    experts: Count
    top_k: Count


@dataclass(frozen=True)
class Parameters:
    """A budget in trainable parameters: what was asked for, what the counts spend of it.

    ``r`` is the rank of one expert; of ranks it is the uniform rank that costs ``asked``.
    ``share`` is the part of the base's ``Model.parameters`` that ``asked`` was computed from, or
    null. ``counted_on`` is the metrics' matrices, or the model's linears.
    """

    asked: int
    spent: int
    r: int
    share: float | None = None
    counted_on: Literal["metrics", "model"] = field(default="metrics", metadata=ADDED)


@dataclass(frozen=True)
class Allocation:
    """Decisions: how many experts each layer gets. A trainer needs only ``experts`` and ``top_k``.

    Both have one entry a layer. ``experts`` sum to ``budget``; ``top_k`` is at most the layer's
    experts, and 0 only where there are none. Where ``modules`` is not empty it says more: each
    linear's own count, and that no other linear is adapted. ``experts`` are then the layers'
    means, rounded.

    Where ``unit`` is ``rank_per_layer``, counts are ranks of plain LoRA: N ranks are N experts of
    rank 1 that all work on every token, without a router.
    """

    format: Literal["htsr.allocation"]
    version: Literal[1]
    budget: int
    experts: Annotated[tuple[Count, ...], Meta(min_length=1)]
    top_k: tuple[Count, ...]
    unit: Literal["experts_per_layer", "rank_per_layer"] = EXPERTS
    tool: Tool | None = None
    model: Model | None = None
    metrics: File | None = None
    strategy: StrategyRecord | None = None
    evidence: tuple[Evidence, ...] = ()
    modules: tuple[Module, ...] = field(default=(), metadata=ADDED)
    parameters: Parameters | None = field(default=None, metadata=ADDED)

    FORMAT: typing.ClassVar[Literal["htsr.allocation"]] = "htsr.allocation"
    HINT: typing.ClassVar[str] = "htsr allocate writes such files."
    VERSION: typing.ClassVar[Literal[1]] = 1

    def to_pandas(self, table: str = "layers") -> DataFrame:
        """The layers, or the ``modules`` that have counts of their own, as a pandas table.

        Raises:
            HtsrError: pandas is not installed, or there is no such table.
        """
        check_choice("table", table, ("layers", "modules"))
        if table == "modules":
            return frame(self.modules, Module)
        rows = self.evidence or tuple(
            Evidence(i, None, None, None, n) for i, n in enumerate(self.experts)
        )
        found: Any = frame(rows, Evidence)  # pandas has no types
        return found.assign(top_k=self.top_k)

    @property
    def holds_ranks(self) -> bool:
        """Whether counts are ranks of plain LoRA, not experts."""
        return self.unit == RANKS

    @property
    def counted(self) -> Literal["experts", "ranks"]:
        """What the counts are, in a word."""
        return "ranks" if self.holds_ranks else "experts"

    def check(self) -> None:
        """Raise ValueError on what types alone cannot say."""
        if sum(self.experts) != self.budget:
            raise ValueError(f"experts: sum to {sum(self.experts)}, not to budget {self.budget}")
        if len(self.top_k) != len(self.experts):
            raise ValueError(f"top_k: {len(self.top_k)} entries for {len(self.experts)} layers")
        for i, (k, n) in enumerate(zip(self.top_k, self.experts, strict=True)):
            _check_top_k(k, n, f"top_k[{i}]")
        if self.holds_ranks and self.parameters is None:
            raise ValueError("parameters: ranks need them, for the uniform rank r")
        if self.evidence:
            if tuple(row.experts for row in self.evidence) != self.experts:
                raise ValueError("evidence: its experts differ from experts")
            for i, row in enumerate(self.evidence):
                if row.layer != i:
                    raise ValueError(f"evidence[{i}].layer: must be {i}")
                if row.reason is None and (row.score is None or row.quota is None):
                    raise ValueError(f"evidence[{i}].reason: a null number needs a reason")
        if self.metrics is not None:
            check_bare_name(self.metrics.file, "metrics.file")
        if self.strategy is not None and self.strategy.scores is not None:
            check_bare_name(self.strategy.scores.file, "strategy.scores.file")
        if self.modules:
            self._check_modules()

    def _check_modules(self) -> None:
        counts: list[list[int]] = [[] for _ in self.experts]
        for i, module in enumerate(self.modules):
            if module.layer >= len(counts):
                raise ValueError(f"modules[{i}].layer: {module.layer} is not among the layers")
            _check_top_k(module.top_k, module.experts, f"modules[{i}].top_k")
            counts[module.layer].append(module.experts)
        if len({module.name for module in self.modules}) != len(self.modules):
            raise ValueError("modules: a linear is listed twice")
        for layer, (own, experts) in enumerate(zip(counts, self.experts, strict=True)):
            mean = sum(own) / len(own) if own else 0
            if abs(mean - experts) >= 2:
                raise ValueError(
                    f"modules: layer {layer} has {mean:.3g} experts a linear, and experts says "
                    f"{experts}"
                )


def _check_top_k(top_k: int, experts: int, where: str) -> None:
    if not min(experts, 1) <= top_k <= experts:
        raise ValueError(f"{where}: {top_k} does not fit {experts} experts")
