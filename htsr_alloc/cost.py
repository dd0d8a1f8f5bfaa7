"""What an analysis will take, told before it starts: time and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.layers import MatrixRef
from htsr_alloc.listing import FLOAT_DTYPES

BASE_BYTES = 350 << 20  # Python, torch and their buffers, resident
ROW_CHUNK = 512  # rows of a matrix upcast at a time: 16 MiB of float64 at 4096 columns


@dataclass(frozen=True)
class Cost:
    """``peak_bytes`` of memory, a bound; ``seconds``, rough."""

    peak_bytes: int
    seconds: float


def flops(matrix: MatrixRef) -> float:
    """Gram matrix (m n^2, by symmetry) and tridiagonalisation (4/3 n^3), m >= n."""
    m, n = max(matrix.shape), min(matrix.shape)
    return float(m) * n * n + 4.0 / 3.0 * n**3


def matrix_bytes(matrix: MatrixRef) -> int:
    """What one matrix holds while it is decomposed: itself as stored (twice with a scale, as
    float32), its Gram matrix, LAPACK's copy and workspace of it, and one chunk of rows."""
    m, n = max(matrix.shape), min(matrix.shape)
    size = FLOAT_DTYPES[matrix.ref.dtype][0]
    stored = m * n * (size if size > 1 else 5)
    return stored + 8 * n * (3 * n + 2 * ROW_CHUNK)


def peak_bytes(matrices: Sequence[MatrixRef], workers: int) -> int:
    """Memory of an analysis: the program, every eigenvalue, the largest matrices at once."""
    largest = sorted((matrix_bytes(matrix) for matrix in matrices), reverse=True)[:workers]
    return BASE_BYTES + spectra_bytes(matrices) + sum(largest)


def spectra_bytes(matrices: Sequence[MatrixRef]) -> int:
    """Eigenvalues, which stay to the end: as kept, as journaled and as written."""
    return sum(3 * 8 * min(matrix.shape) for matrix in matrices)


def predict(matrices: Sequence[MatrixRef], workers: int) -> Cost:
    """Memory from the shapes; seconds from one trial on this machine (0.2 s, imports torch)."""
    import torch

    from htsr_alloc.spectrum import spectrum

    trial = 768
    weight = torch.randn(trial, trial, generator=torch.Generator().manual_seed(0))
    times = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(3):
        start = time.perf_counter()
        spectrum(weight)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    total = sum(flops(matrix) for matrix in matrices)
    each = min(times) / (7.0 / 3.0 * trial**3)
    longest = max((flops(matrix) for matrix in matrices), default=0.0)
    return Cost(peak_bytes(matrices, workers), each * max(total / workers, longest))
