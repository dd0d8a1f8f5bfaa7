"""What studies have found about a way of allocating. The file is written by ``htsr study``."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from htsr_alloc import files
from htsr_alloc.allocation.strategies import Explicit
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, StrategyRecord
from htsr_alloc.records.convert import convert

FILE = Path(__file__).with_name("findings.json")


REGIMES = {"each": "", "together": ", learnt together", "sequence": ", one after the other"}


@dataclass(frozen=True)
class Gap:
    """The loss less that of the uniform allocation, in nats, with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def clause(self) -> str:
        """For people."""
        return (
            f"loss {self.mean:+.3f} nats from uniform, 95 % interval {self.low:+.3f} to "
            f"{self.high:+.3f} ({_seeds(self.seeds)})"
        )


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


@dataclass(frozen=True)
class Finding:
    """One way of allocating against uniform and against random allocations of the same spread.

    Attributes:
        study: the plan's name. model: what was trained.
        regime: what one model learnt, as the plan has it.
        tasks: all that were compared. rows: test rows of each.
        unit: what was allocated, experts or ranks. targets: roles that were adapted, all there are.
        strategy, metric, estimator, beta, groups: as an allocation file has them.
        uniform: the mean difference over the tasks; None for uniform itself.
        draws: random allocations, 0 where there were none. draw_seeds: seeds that all have.
        better, worse: the tasks on which the loss was below, or above, every random one's.
    """

    study: str
    model: str
    regime: Literal["each", "together", "sequence"]
    tasks: tuple[str, ...]
    rows: int
    unit: str
    targets: tuple[str, ...]
    strategy: str
    metric: str | None
    estimator: str | None
    beta: float | None
    uniform: Gap | None
    draws: int
    draw_seeds: int
    better: tuple[str, ...]
    worse: tuple[str, ...]
    groups: tuple[int, ...] = ()

    def sentence(self, model: str | None = None) -> str:
        """What it says, with what chance alone would do.

        Args:
            model: the one in front of the user, where it may be another.
        """
        places = f"{', '.join(self.tasks)}{REGIMES[self.regime]}; {self.rows} test rows each"
        clauses = [self.uniform.clause] if self.uniform else []
        if self.draws:
            count, chance = len(self.tasks), len(self.tasks) / (self.draws + 1)
            clauses.append(
                f"among {self.draws} random allocations it is the best on {len(self.better)} of "
                f"{count} tasks and the worst on {len(self.worse)}, where chance gives "
                f"{chance:.1f} of each ({_seeds(self.draw_seeds)})"
            )
        choices = _list(self.metric, self.estimator, self.beta, *map(str, self.groups))
        where = self.model if model in (None, self.model) else f"another model, {self.model}"
        what = f"{self.strategy}'s {self.unit}{choices} on {where} ({places})"
        return f"known of {what}: {'; '.join(clauses)}"

    def is_about(self, allocation: Allocation) -> bool:
        """Whether an allocation was made in this way, layer by layer."""
        record = allocation.strategy
        if record is None or allocation.modules:
            return False
        if any((record.scores, record.farms, record.signal, record.stack)):
            return False  # a part of the model, or other numbers
        if record.targets is not None and set(record.targets) != set(self.targets):
            return False
        own = (self.unit, self.strategy, self.metric, self.estimator, self.beta)
        return own == (allocation.counted, *_choices(record)) and self.groups == _groups(record)


def _choices(record: StrategyRecord) -> tuple[str, str | None, str | None, float | None]:
    return record.name, record.metric, record.estimator, record.beta


def _groups(record: StrategyRecord) -> tuple[int, ...]:
    return tuple(record.groups or ())


def read_findings(path: Path) -> tuple[Finding, ...]:
    """Every finding of a file.

    Raises:
        HtsrError: it cannot be read, or does not hold findings.
    """
    try:
        data = files.parse_json(files.read_bytes(path).decode("utf-8"))
        return convert(tuple[Finding, ...], data)
    except (ValueError, RecursionError) as error:
        raise HtsrError(f"{path.name} does not hold a study's findings: {error}.") from None


def write_findings(path: Path, study: str, found: Iterable[Finding]) -> None:
    """Put a study's findings into a file, in place of those that it had there."""
    kept = read_findings(path) if path.is_file() else ()
    whole = [*(own for own in kept if own.study != study), *found]
    text = json.dumps([asdict(own) for own in whole], indent=1, ensure_ascii=False)
    files.write_text(path, text + "\n")


@functools.cache
def _shipped() -> tuple[Finding, ...]:
    return read_findings(FILE)


def known(allocation: Allocation) -> list[str]:
    """One line of each study that has tried this way of allocating, or one that none has.

    Nothing of counts that were given as they are.
    """
    record = allocation.strategy
    if record is None or record.name == Explicit.name:
        return []
    model = allocation.model.name if allocation.model else None
    said = [own.sentence(model) for own in _shipped() if own.is_about(allocation)]
    nothing = "nothing, no tuned study has compared it"
    return said or [f"known of {_described(allocation, record)}: {nothing}"]


def _described(allocation: Allocation, record: StrategyRecord) -> str:
    """The choice in hand, as a sentence about it names it."""
    name, metric, estimator, beta = _choices(record)
    metric = record.scores.file if record.scores else metric
    linears = " by linears" if allocation.modules else ""
    choices = _list(metric, estimator, beta, *map(str, _groups(record)), *(record.targets or ()))
    return f"{name}'s {allocation.counted}{linears}{choices}"


def _list(metric: str | None, estimator: str | None, beta: float | None, *more: str) -> str:
    power = None if beta is None else f"beta {beta:g}"
    given = [x for x in (metric, estimator, power, *more) if x is not None]
    return f" ({', '.join(given)})" if given else ""
