"""Equal budgets: the experts or the rank with which a row has the baseline's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.build import empty_model
from htsr_alloc.lora_moe.systems import DEFAULT
from htsr_alloc.records import Allocation
from htsr_alloc.training.baselines import Baseline
from htsr_alloc.training.methods import Adapter, method_of, read_settings
from htsr_alloc.training.models import trainable
from htsr_alloc.training.study.plan import RowSpec, Study

TOLERANCE = 0.02  # a budget further from the baseline's is refused
MOST = 4096  # experts a layer or rank that is ever tried


@dataclass(frozen=True)
class Fitted:
    """What a row puts on the model, and how many parameters it trains."""

    adapter: Adapter
    allocation: Allocation | None
    trainable: int


def fitted(study: Study, row: RowSpec) -> Fitted:
    """A row of the study with the parameters of uniform AlphaLoRA at the study's T and r.

    What moves is the system's ``budget_knob``: T, or r; for a baseline the ranks in proportion;
    nothing where a row has those parameters already. alpha / r stays the same. Full fine-tuning
    trains every parameter, whatever the budget.

    Raises:
        HtsrError: no setting is within 2 % of it.
    """
    scale, method = study.lora_alpha / study.r, method_of(row.system)
    settings = read_settings(row.system, row.settings)

    def adapter(r: float) -> Adapter:
        return Adapter(row.system, r, scale * r, study.lora_dropout, settings=settings)

    def counted(r: float, experts: int) -> Fitted:
        allocation = study.allocation(row, experts) if method.takes_allocation else None
        return Fitted(
            adapter(r), allocation, parameters(study.model, adapter(r), _frozen(allocation))
        )

    base = Adapter(DEFAULT, study.r, study.lora_alpha, study.lora_dropout)
    uniform = study.allocation(RowSpec("uniform"), study.experts)
    target = parameters(study.model, base, _frozen(uniform))
    experts = row.experts or study.experts
    layers = len(uniform.experts)
    if isinstance(method, Baseline) and method.whole:
        return counted(study.r, experts)
    each = (method.budget_experts or 0) * layers or experts
    knobs: dict[str | None, Callable[[], Fitted]] = {
        "ranks": lambda: nearest(lambda i: counted(i / 64, experts), target, 64),  # 64ths
        "experts": lambda: nearest(lambda i: counted(study.r, i), target, layers),
        "rank": lambda: nearest(lambda i: counted(i, each), target, 1),
        None: lambda: counted(study.r, experts),
    }
    made = knobs[method.budget_knob]()
    off = made.trainable / target - 1
    if abs(off) > TOLERANCE:
        raise HtsrError(
            f"{row.name} trains {made.trainable:,} parameters, {off:+.1%} of the budget's "
            f"{target:,}.",
            "Change experts or r of the study.",
        )
    return made


def nearest(make: Callable[[int], Fitted], target: int, low: int) -> Fitted:
    """The setting whose parameters, which grow with it, are nearest to the target."""
    high = low
    while make(high).trainable < target and high < MOST * low:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if make(middle).trainable < target else (low, middle)
    return min(make(low), make(high), key=lambda found: abs(found.trainable - target))


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
def parameters(model: Path, adapter: Adapter, counts: _Counts | None) -> int:
    """Trainable parameters, counted on the model without weights."""
    bare: Any = empty_model(model)
    return trainable(adapter.put_on(bare, None if counts is None else counts.allocation))
