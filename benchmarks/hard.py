"""Matrices whose eigenvalues float32 finds hard: near ties, clusters, outliers, few values.

``benchmarks/engines.py --guard`` and ``tests/spectra/test_certificate.py`` hold the float32 route's
error bound to them.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.random import Generator

ASPECTS = (1.5, 3.0)
CONDITIONS = (1.0, 10.0, 1e2, 1e4, 1e6, 1e12)


def from_singular(m: int, n: int, singular: np.ndarray, rng: Generator) -> np.ndarray:
    """(m, n) with these singular values and random singular vectors."""
    left = np.linalg.qr(rng.standard_normal((m, n)))[0]
    return (left * singular) @ np.linalg.qr(rng.standard_normal((n, n)))[0].T


def clusters(n: int, condition: float, rng: Generator) -> np.ndarray:
    centres = graded(n, condition)[rng.integers(0, n, 5)]
    return centres[rng.integers(0, 5, n)] * (1 + 1e-3 * rng.standard_normal(n))


def graded(n: int, condition: float) -> np.ndarray:
    return np.logspace(-np.log10(condition), 0, n)


def groups(n: int, condition: float, size: int) -> np.ndarray:
    return np.repeat(graded(-(-n // size), condition), size)[:n]


# singular values: (n, condition, rng) -> (n,)
SPECTRA: dict[str, Callable[[int, float, Generator], np.ndarray]] = {
    "graded": lambda n, c, rng: graded(n, c),
    "ties of 8": lambda n, c, rng: groups(n, c, 8),
    "near ties": lambda n, c, rng: groups(n, c, 8) * (1 + 1e-6 * rng.standard_normal(n)),
    "n / 8 ties": lambda n, c, rng: groups(n, c, n // 8),
    "clusters": clusters,
    "low rank": lambda n, c, rng: np.where(np.arange(n) < n // 3, 0, graded(n, c)),
}

# entries: (m, n, rng) -> (m, n)
ENTRIES: dict[str, Callable[[int, int, Generator], np.ndarray]] = {
    "gaussian": lambda m, n, rng: rng.standard_normal((m, n)),
    "positive": lambda m, n, rng: rng.uniform(0, 1, (m, n)),
    "one direction": lambda m, n, rng: (
        rng.standard_normal((m, n)) + 30 * rng.standard_normal((m, 1))
    ),
    "signs": lambda m, n, rng: rng.uniform(0.01, 1) * (2.0 * rng.integers(0, 2, (m, n)) - 1),
    "ternary": lambda m, n, rng: rng.uniform(0.01, 1) * rng.integers(-1, 2, (m, n)),
    "4 bits": lambda m, n, rng: rng.uniform(0.01, 1) * np.round(3 * rng.standard_normal((m, n))),
    "8 bits": lambda m, n, rng: rng.uniform(0.01, 1) * np.round(40 * rng.standard_normal((m, n))),
    "outlier columns": lambda m, n, rng: outliers(m, n, 0.3, rng),
    "uneven columns": lambda m, n, rng: outliers(m, n, 1.5, rng),
    "huge columns": lambda m, n, rng: huge(m, n, rng),
    "huge rows": lambda m, n, rng: huge(n, m, rng).T,
}


def outliers(m: int, n: int, spread: float, rng: Generator) -> np.ndarray:
    sizes = np.exp(spread * rng.standard_normal(n))
    sizes[:6] *= 8
    return rng.standard_normal((m, n)) * sizes


def huge(m: int, n: int, rng: Generator) -> np.ndarray:
    """A few columns 10 to 500 times as large as the others, which are uneven too."""
    made = rng.standard_normal((m, n)) * np.exp(rng.uniform(0, 1) * rng.standard_normal(n))
    made[:, rng.integers(0, n, rng.integers(1, 12))] *= 10 ** rng.uniform(1, 2.7)
    return made


def hard(sizes: tuple[int, ...], seeds: int = 1) -> Iterator[tuple[str, torch.Tensor]]:
    """(kind, W), W (m, n) float32, of every kind and every n in ``sizes``."""
    rng = np.random.default_rng(0)
    for n in sizes:
        for m in (int(n * aspect) for aspect in ASPECTS):
            for kind, singular in SPECTRA.items():
                for condition in CONDITIONS:
                    made = from_singular(m, n, singular(n, condition, rng), rng)
                    yield f"{kind}, {condition:g}", torch.from_numpy(made).float()
    for seed in range(seeds):
        yield from hard_entries(sizes, seed)


def hard_entries(sizes: tuple[int, ...], seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of ``ENTRIES`` alone, which cost no decomposition to make."""
    for n in sizes:
        for m in (int(n * aspect) for aspect in ASPECTS):
            rng = np.random.default_rng([n, seed])
            for kind, entries in ENTRIES.items():
                yield kind, torch.from_numpy(entries(m, n, rng)).float()
