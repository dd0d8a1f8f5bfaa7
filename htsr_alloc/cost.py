"""What an analysis will take, told before it starts: time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.layers import MatrixRef

BASE_BYTES = 350 << 20  # Python, torch and their buffers, resident


@dataclass(frozen=True)
class Cost:
    """``flops`` of all matrices together; ``peak_bytes`` of memory; ``seconds`` is rough."""

    flops: float
    peak_bytes: int
    seconds: float | None = None


def flops(shape: tuple[int, int]) -> float:
    """Gram matrix (2 m n^2) and tridiagonalisation (4/3 n^3) of an m x n matrix, m >= n."""
    m, n = max(shape), min(shape)
    return 2.0 * m * n * n + 4.0 / 3.0 * n**3


def predict(matrices: Sequence[MatrixRef], trial_size: int = 768) -> Cost:
    """Memory from the largest matrix; seconds from one trial of ``trial_size`` on this machine.

    The trial costs about 0.1 s, and the import of torch.
    """
    import time

    import torch

    from htsr_alloc.spectrum import spectrum

    total = sum(flops(matrix.shape) for matrix in matrices)
    weight = torch.randn(trial_size, trial_size, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        spectrum(weight)
        times.append(time.perf_counter() - start)
    seconds = total * min(times) / flops((trial_size, trial_size))
    return Cost(total, peak_bytes(matrices), seconds)


def peak_bytes(matrices: Sequence[MatrixRef]) -> int:
    """Memory: two matrices as stored, one Gram matrix with its copy and workspace, one chunk."""
    from htsr_alloc.listing import FLOAT_DTYPES
    from htsr_alloc.spectrum import ROW_CHUNK

    largest = 0
    for matrix in matrices:
        m, n = matrix.shape
        stored = m * n * FLOAT_DTYPES[matrix.ref.dtype][0]
        small = min(m, n)
        largest = max(largest, 2 * stored + 8 * small * (3 * small + 2 * ROW_CHUNK))
    return BASE_BYTES + largest
