"""Rank correlations. numpy only; ties share their mean rank."""

from __future__ import annotations

import numpy as np


def ranks(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,) ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rho of two (n,) series; None where one is constant or n < 2."""
    if not _varies(a) or not _varies(b):
        return None
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def kendall(a: np.ndarray, b: np.ndarray) -> float | None:
    """Kendall's tau-b of two (n,) series; None where one is constant or n < 2."""
    if not _varies(a) or not _varies(b):
        return None
    x, y = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def _varies(values: np.ndarray) -> bool:
    return len(values) > 1 and bool((values != values[0]).any())
