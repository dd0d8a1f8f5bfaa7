"""What studies have found about a way of allocating. The file is written by ``htsr study``."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation
from htsr_alloc.records.convert import convert

FILE = Path(__file__).with_name("findings.json")


@dataclass(frozen=True)
class Finding:
    """One way of allocating among random allocations of the same spread, by the loss of each task.

    Attributes:
        study: the plan's name. model: what was trained.
        tasks: all that were compared. rows: test rows of each.
        draws: random allocations.
        unit: what was allocated, experts or ranks.
        strategy, metric, estimator, beta: as an allocation file has them.
        better, worse: the tasks on which it was better, or worse, than every random one.
    """

    study: str
    model: str
    tasks: tuple[str, ...]
    rows: int
    draws: int
    unit: str
    strategy: str
    metric: str | None
    estimator: str | None
    beta: float | None
    better: tuple[str, ...]
    worse: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What it says, with what chance alone would do."""
        count, chance = len(self.tasks), len(self.tasks) / (self.draws + 1)
        places = f"{self.model} ({', '.join(self.tasks)}; {self.rows} test rows each)"
        return (
            f"known of {self.strategy}'s {self.unit} on {places}: better than all {self.draws} "
            f"random allocations on {len(self.better)} of {count} tasks, worse than all on "
            f"{len(self.worse)}; by chance {chance:.1f} each"
        )

    def is_about(self, allocation: Allocation) -> bool:
        """Whether an allocation was made in this way."""
        record = allocation.strategy
        if record is None or record.scores is not None:
            return False
        own = (self.unit, self.strategy, self.metric, self.estimator, self.beta)
        theirs = (allocation.counted, record.name, record.metric, record.estimator, record.beta)
        return own == theirs


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
    """One line of each study that has tried this way of allocating."""
    return [own.sentence for own in _shipped() if own.is_about(allocation)]
