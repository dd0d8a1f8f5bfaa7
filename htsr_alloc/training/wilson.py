"""The interval of a share. Standard library only."""

from __future__ import annotations

import math

Z95 = 1.959963984540054  # of the normal distribution


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share.

    Args:
        correct, n: how many of how many; n is at least 1.
        z: quantile of the normal distribution.
    """
    share, room = correct / n, z * z / n
    middle = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / n + room / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
