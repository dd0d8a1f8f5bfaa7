"""What an analysis will take, told before it starts: time and memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from htsr_alloc.checkpoints import quantised
from htsr_alloc.checkpoints.layers import MatrixRef
from htsr_alloc.checkpoints.listing import FLOAT_DTYPES
from htsr_alloc.spectra import ROW_CHUNK

if TYPE_CHECKING:
    from htsr_alloc.checkpoints.listing import Transfer
    from htsr_alloc.checkpoints.reading import Checkpoint

BASE_BYTES = 320 << 20  # Python, torch and their buffers, resident
WORKER_BYTES = 64 << 20  # a thread's buffers in OpenBLAS and malloc


@dataclass(frozen=True)
class Estimate:
    """Bounds on memory with all workers and with one (the least ``max_memory``), rough seconds."""

    peak_bytes: int
    least_bytes: int
    seconds: float


def flops(matrix: MatrixRef) -> float:
    """Gram matrix (m n^2, by symmetry) and tridiagonalisation (4/3 n^3), m >= n."""
    m, n = max(matrix.shape), min(matrix.shape)
    return float(m) * n * n + 4.0 / 3.0 * n**3


def matrix_bytes(matrix: MatrixRef, engine: str = "auto") -> int:
    """What one matrix and its worker hold: the matrix as stored (and dequantised to float32), its
    Gram matrix, which LAPACK overwrites and torch copies, and two chunks of rows."""
    from htsr_alloc.spectra import lapack

    m, n = max(matrix.shape), min(matrix.shape)
    whole = 1 if matrix.alone else 3  # of which one half is copied
    if matrix.ref.packed is None:
        size = FLOAT_DTYPES[matrix.ref.dtype][0]
        stored = whole * m * n * (size if size > 1 else 5)
    else:
        slices = 1 if matrix.index is None else max(1, matrix.ref.shape[0])
        stored = whole * 4 * m * n + matrix.ref.nbytes // slices
    copied = engine == "portable" or lapack.load() is None
    band = 4 * m * n if engine == "fast" and m < 1.5 * n else 0
    return WORKER_BYTES + stored + band + 8 * n * ((2 if copied else 1) * n + 2 * ROW_CHUNK)


def svd_bytes(matrices: Sequence[MatrixRef]) -> int:
    """What the float64 SVD of an ill-conditioned matrix holds on top; one runs at a time."""
    return max((3 * 8 * min(matrix.shape) ** 2 for matrix in matrices), default=0)


def peak_bytes(matrices: Sequence[MatrixRef], workers: int, engine: str = "auto") -> int:
    """Memory of an analysis: the program, every eigenvalue, the largest matrices at once."""
    return fixed_bytes(matrices) + workers_bytes(matrices, workers, engine)


def workers_bytes(matrices: Sequence[MatrixRef], workers: int, engine: str) -> int:
    """The ``workers`` largest matrices together."""
    return sum(sorted((matrix_bytes(m, engine) for m in matrices), reverse=True)[:workers])


def fixed_bytes(matrices: Sequence[MatrixRef]) -> int:
    """What does not depend on the number of workers."""
    libraries = quantised.library_bytes(matrix.ref for matrix in matrices)
    return BASE_BYTES + libraries + spectra_bytes(matrices) + svd_bytes(matrices)


def spectra_bytes(matrices: Sequence[MatrixRef]) -> int:
    """Eigenvalues, which stay to the end: as kept, as journaled and as written."""
    return sum(3 * 8 * min(matrix.shape) for matrix in matrices)


def transfer(checkpoint: Checkpoint, matrices: Sequence[MatrixRef]) -> Transfer:
    """What reading the matrices moves over the network and onto the disk."""
    wanted = {shard for m in matrices for shard in checkpoint.shards_of(m.ref)}
    in_order = [shard for shard in checkpoint.listing.shards if shard in wanted]
    read = {
        (m.ref.name, m.half): m.ref.nbytes // (2 if m.half and m.alone else 1) for m in matrices
    }
    tensors = sum(read.values())
    return checkpoint.store.transfer(in_order, tensors)


def predict(matrices: Sequence[MatrixRef], workers: int) -> Estimate:
    """Memory from the shapes; seconds from one trial on this machine (0.2 s, imports torch)."""
    import torch

    from htsr_alloc.spectra.spectrum import spectrum

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
    seconds = each * max(total / workers, longest)
    return Estimate(peak_bytes(matrices, workers), peak_bytes(matrices, 1), seconds)
