"""Paired differences with a bootstrap over test rows and seeds together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
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


def paired(own: Sequence[Sequence[float]], base: Sequence[Sequence[float]], stream: int) -> Paired:
    """Draw seeds and rows, both with replacement, and take each draw's mean difference.

    A draw has the same rows for every seed, as the study has (the pigeonhole bootstrap, Owen 2007,
    https://doi.org/10.1214/07-AOAS122, which errs towards wide intervals).

    Args:
        own, base: (S, n), of the same seeds and rows in the same order.
        stream: of random numbers; tasks that are averaged need different ones.
    """
    matrix = np.asarray(own, float) - np.asarray(base, float)
    seeds, rows = matrix.shape
    generator = np.random.default_rng([20261129, stream])
    # How often a draw has each seed and each row, as shares.
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    by_row = generator.multinomial(rows, np.full(rows, 1 / rows), DRAWS) / rows
    draws = ((by_seed @ matrix) * by_row).sum(1)
    return Paired(tuple(matrix.mean(1).tolist()), draws)


def averaged(parts: Sequence[Paired]) -> Paired:
    """The mean over tasks, which are drawn independently of each other."""
    seeds = np.mean([part.by_seed for part in parts], axis=0)
    return Paired(tuple(seeds.tolist()), np.mean([part.draws for part in parts], axis=0))
