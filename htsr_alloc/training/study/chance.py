"""Is an allocation better than experts in random places? Each against the plan's random draws."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.training.study.cells import Done, lines_at
from htsr_alloc.training.study.plan import RowSpec, Study


@dataclass(frozen=True)
class Rank:
    """One allocation on one task among ``draws`` random ones, by the loss on the same ``seeds``.

    ``rank`` 1 is the lowest loss of all; ``low`` and ``high`` are the random ones'.
    """

    task: str
    row: str
    loss: float
    rank: int
    low: float
    high: float
    draws: int
    seeds: int

    @property
    def outside(self) -> str:
        """``better`` or ``worse`` than every random one, or nothing."""
        return {1: "better", self.draws + 1: "worse"}.get(self.rank, "")

    @property
    def chance(self) -> float:
        """How often one more random allocation would be better than all of them."""
        return 1 / (self.draws + 1)


def ranks(study: Study, done: Done) -> list[Rank]:
    """Every allocation among the random ones of its system, task by task; none where a draw is
    missing.

    They are compared at one rate: each at its best, or where the draws have one rate at that.
    """
    found = []

    def losses(task: str, row: RowSpec, rate: float | None) -> dict[int, float]:
        lines = lines_at(study, done, task, row, rate)
        return {seed: line["loss"] for seed, line in lines.items()}

    for task in study.tasks:
        for row in study.rows:
            draws = [other for other in study.rows if _rivals(study, row, other)]
            if not draws or row.draw is not None:
                continue
            rate = study.rate(draws[0])
            own, *random = (losses(task, x, rate) for x in (row, *draws))
            shared = set(own).intersection(*random)
            if shared:
                means = [statistics.mean(x[seed] for seed in shared) for x in (own, *random)]
                found.append(_rank(task, row.name, means[0], means[1:], len(shared)))
    return found


def _rivals(study: Study, row: RowSpec, draw: RowSpec) -> bool:
    """Whether a random row has all that the other has, but the places."""
    if draw.draw is None:
        return False
    alike = row.but_for_places == draw.but_for_places
    if study.tuned(draw):
        return alike and study.rates(row) == study.rates(draw)
    return alike and study.rate(draw) in (study.rate(row), *study.rates(row))


def _rank(task: str, name: str, loss: float, random: Sequence[float], seeds: int) -> Rank:
    place = 1 + sum(other < loss for other in random)
    return Rank(task, name, loss, place, min(random), max(random), len(random), seeds)


def table(found: Sequence[Rank]) -> str:
    """Markdown, and what chance does."""
    if not found:
        return ""
    text = [
        "| task | allocation | loss | random draws | rank | outside |",
        "|---|---|--:|--:|--:|---|",
    ]
    for own in found:
        text.append(
            f"| {own.task} | {own.row} | {own.loss:.3f} | {own.low:.3f} to {own.high:.3f} | "
            f"{own.rank} of {own.draws + 1} | {own.outside or '-'} |"
        )
    draws = sorted({own.draws for own in found})
    odds = " or ".join(str(n + 1) for n in draws)
    expected = sum(own.chance for own in found)
    outside = [own.outside for own in found]
    text += [
        "",
        f"Each allocation among {' or '.join(map(str, draws))} random ones, which have "
        "AlphaLoRA's counts in other places, by the loss on "
        "the seeds that all have; *outside* is beyond all of them. One more random allocation "
        f"would be the best one time in {odds}, and the worst as often: over {len(found)} "
        f"comparisons {expected:.1f} better and as many worse by chance. Here "
        f"{outside.count('better')} are better and {outside.count('worse')} worse; those of one "
        "task share its random allocations, so that they are not so many separate trials.",
    ]
    return "\n".join(text) + "\n"
