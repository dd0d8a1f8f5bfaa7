"""Equal budgets: the experts or the rank with which a row has the baseline's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.build import empty_model
from htsr_alloc.lora_moe.layer import LoraMoeLinear
from htsr_alloc.lora_moe.systems import DEFAULT, System
from htsr_alloc.records import Allocation
from htsr_alloc.training.baselines import Baseline
from htsr_alloc.training.methods import Adapter, method_of, read_settings
from htsr_alloc.training.models import trainable
from htsr_alloc.training.study.plan import RowSpec, Study

TOLERANCE = 0.01  # a budget further from the baseline's is refused
MOST = 1 << 16  # the search ends here


@dataclass(frozen=True)
class Size:
    """Trainable parameters: ``total``, and ``active``, those that work on one token.

    A token uses the A and B of the K experts that its router takes, so that a mixture of rank r
    has the active parameters of plain LoRA of rank K r. Routers only choose, and count in
    ``total`` alone.
    """

    total: int
    active: int


@dataclass(frozen=True)
class Fitted:
    """What a row puts on the model, and how many parameters it trains."""

    adapter: Adapter
    allocation: Allocation | None
    size: Size

    def of(self, match: str) -> int:
        """The parameters that a row is matched by."""
        return getattr(self.size, match)


def fitted(study: Study, row: RowSpec, task: str = "") -> Fitted:
    """A row of the study with the parameters of uniform AlphaLoRA at the study's T and r.

    They are all that are trained, or those active on a token, as the row's ``match`` says, and
    ``times`` as many. What moves is the system's ``budget_knob``: T, or r; for a baseline the ranks
    in proportion; nothing where a row has those parameters already. Experts do not change what is
    active with top-k, and stay as they are in that group. alpha / r stays the same. Full
    fine-tuning trains every parameter, whatever the budget.

    Raises:
        HtsrError: no setting is within 1 % of it.
    """
    scale, method = study.lora_alpha / study.r, method_of(row.system)
    settings = read_settings(row.system, row.settings)

    def adapter(r: float) -> Adapter:
        return Adapter(row.system, r, scale * r, study.lora_dropout, settings=settings)

    def counted(r: float, experts: int) -> Fitted:
        allocation = study.allocation(row, experts, task) if method.takes_allocation else None
        size = parameters(study.model, adapter(r), _frozen(allocation))
        return Fitted(adapter(r), allocation, size)

    base = Adapter(DEFAULT, study.r, study.lora_alpha, study.lora_dropout)
    uniform = study.allocation(RowSpec("uniform"), study.experts, task)
    whole = parameters(study.model, base, _frozen(uniform))
    experts = row.experts or study.experts
    layers = len(uniform.experts)
    if isinstance(method, Baseline) and method.whole:
        return counted(study.r, experts)
    target = row.times * Fitted(base, uniform, whole).of(row.match)

    def near(make: Callable[[int], Fitted], low: int) -> Fitted:
        return nearest(make, target, low, row.match)

    each = (method.budget_experts or 0) * layers or experts
    knobs: dict[str | None, Callable[[], Fitted]] = {
        "ranks": lambda: near(lambda i: counted(i / 64, experts), 1),  # 64ths
        "experts": lambda: near(lambda i: counted(study.r, i), layers),
        "rank": lambda: near(lambda i: counted(i, each), 1),
        None: lambda: counted(study.r, experts),
    }
    fixed = row.match == "active" and isinstance(method, System) and method.has_top_k
    fixed = fixed and method.budget_knob == "experts"
    made = knobs[None if fixed else method.budget_knob]()
    off = made.of(row.match) / target - 1
    if abs(off) > TOLERANCE:
        kind = "parameters" if row.match == "total" else "parameters a token"
        raise HtsrError(
            f"{row.name} trains {made.of(row.match):,} {kind}, {off:+.1%} of the budget's "
            f"{target:,}.",
            "Change experts or r of the study.",
        )
    return made


def nearest(make: Callable[[int], Fitted], target: int, low: int, match: str) -> Fitted:
    """The setting whose parameters, which grow with it, are nearest to the target."""
    high = low
    while make(high).of(match) < target and high < MOST * low:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if make(middle).of(match) < target else (low, middle)
    return min(make(low), make(high), key=lambda found: abs(found.of(match) - target))


@dataclass(frozen=True)
class _Counts:
    """An allocation as a key: all that parameters depend on."""

    experts: tuple[int, ...]
    allocation: Allocation

    def __hash__(self) -> int:
        return hash(self.experts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Counts) and self.experts == other.experts


def _frozen(allocation: Allocation | None) -> _Counts | None:
    return None if allocation is None else _Counts(allocation.experts, allocation)


@functools.lru_cache(maxsize=1024)
def parameters(model: Path, adapter: Adapter, counts: _Counts | None) -> Size:
    """Trainable parameters, counted on the model without weights."""
    bare: Any = empty_model(model)
    return size_of(adapter.put_on(bare, None if counts is None else counts.allocation))


def size_of(model: Any) -> Size:
    """Trainable parameters of an adapted model.

    Where the data say how many experts a token uses (AdaMoLE), or which linears (EM-LoRA), all are
    active.
    """
    total, idle = trainable(model), 0
    for layer in model.modules():
        if not isinstance(layer, LoraMoeLinear):
            continue
        for name, how in layer.mixture.items():
            own = {kind: getattr(layer, f"lora_moe_{kind}") for kind in how.system.trained}
            sizes = {k: held[name].numel() for k, held in own.items() if name in held}
            used = min(how.top_k, how.experts) if how.system.has_top_k else how.experts
            unused = (sizes["A"] + sizes["B"]) * (how.experts - used) // how.experts
            idle += sizes.get("router", 0) + unused
    return Size(total, total - idle)
