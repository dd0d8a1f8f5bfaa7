"""Paired differences with a bootstrap over test rows and seeds together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
ORIGIN = 20261129  # of the random numbers
TAILS = (0.025, 0.975)
POWER = 2.80  # standard errors: z(0.975) + z(0.8), two-sided 5 % and 80 % power


@dataclass(frozen=True)
class Difference:
    """A row less the baseline, over the seeds that both have.

    ``low`` to ``high`` is the 95 % interval for other rows and other seeds, and ``error`` the
    bootstrap's standard deviation. One seed says nothing of other seeds: its interval is for other
    rows alone.
    """

    mean: float
    low: float
    high: float
    error: float
    by_seed: tuple[float, ...]

    @property
    def visible(self) -> float:
        """The smallest true difference that is told from 0 four times in five."""
        return POWER * self.error


@dataclass(frozen=True)
class Paired:
    """A difference and the draws that it is made of, one mean a draw."""

    by_seed: tuple[float, ...]
    draws: np.ndarray

    @property
    def difference(self) -> Difference:
        """The mean and its interval, by percentiles of the draws."""
        low, high = np.quantile(self.draws, TAILS)
        mean, error = float(np.mean(self.by_seed)), float(self.draws.std(ddof=1))
        return Difference(mean, float(low), float(high), error, self.by_seed)


def paired(
    own: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]],
    row_stream: int = 0,
    seed_stream: int = 0,
) -> Paired:
    """Draw seeds and rows, both with replacement, and take each draw's mean difference.

    A draw has the same rows for every seed, as the study has (the pigeonhole bootstrap, Owen 2007,
    https://doi.org/10.1214/07-AOAS122, which errs towards wide intervals).

    Args:
        own, base: (S, n), of the same seeds and rows in the same order.
        row_stream, seed_stream: of random numbers. Tasks that are averaged have rows of their
            own, and seeds of their own unless one model has learnt them.
    """
    matrix = np.asarray(own, float) - np.asarray(base, float)
    seeds, rows = matrix.shape
    by_seed = _shares(seeds, 0, seed_stream)
    by_row = _shares(rows, 1, row_stream)
    draws = ((by_seed @ matrix) * by_row).sum(1)
    return Paired(tuple(matrix.mean(1).tolist()), draws)


def _shares(count: int, kind: int, stream: int) -> np.ndarray:
    """How often each draw has each of ``count`` things, as shares: (DRAWS, count)."""
    generator = np.random.default_rng([ORIGIN, kind, stream])
    return generator.multinomial(count, np.full(count, 1 / count), DRAWS) / count


def averaged(parts: Sequence[Paired]) -> Paired:
    """The mean over tasks, whose streams say what they share."""
    seeds = np.mean([part.by_seed for part in parts], axis=0)
    return Paired(tuple(seeds.tolist()), np.mean([part.draws for part in parts], axis=0))
