"""Matrices to spectra: in which order, on which devices, under which bound on memory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from htsr_alloc.analysis import schedule
from htsr_alloc.analysis.cost import fixed_bytes, flops, matrix_bytes, workers_bytes
from htsr_alloc.analysis.journal import Entry
from htsr_alloc.checkpoints.layers import MatrixRef
from htsr_alloc.checkpoints.reading import Checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Settings
from htsr_alloc.spectra.engines import check_engine
from htsr_alloc.spectra.estimators import ESTIMATORS
from htsr_alloc.spectra.spectrum import spectrum

THREADS_PER_GPU = 2  # one reads and copies while the other's matrix is decomposed


@dataclass(frozen=True)
class Limits:
    """``workers`` threads (default: one a core, two a GPU) and ``max_memory`` bytes of the whole
    process (default: what the workers need)."""

    workers: int | None = None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise HtsrError(f"`workers` must be at least 1, not {self.workers}.")


def peak_bins(settings: Settings) -> int | None:
    """Bins of the histogram whose peak a spectrum must keep; None where no fit looks for one."""
    smooth = settings.farms is None and ESTIMATORS[settings.estimator].smooth
    return None if smooth and settings.engine == "auto" else settings.bins


def decompose_all(
    checkpoint: Checkpoint, matrices: Sequence[MatrixRef], settings: Settings, limits: Limits
) -> Iterator[tuple[MatrixRef, Entry]]:
    """Each matrix with its spectrum and hash, as they finish.

    The largest come first, so that no worker is left alone with one at the end; where shards are
    downloaded, those of a shard come together.
    """
    devices = _devices(settings.device)
    check_engine(settings.engine, devices[0])
    threads = THREADS_PER_GPU * len(devices) if devices[0].type == "cuda" else None
    workers = limits.workers or threads or schedule.available_cores()
    by_shard = checkpoint.store.by_shard
    tasks = sorted(matrices, key=lambda m: (m.ref.shard if by_shard else 0, -flops(m), m.name))
    if limits.max_memory is not None:
        budget = limits.max_memory - fixed_bytes(matrices)
    else:
        budget = workers_bytes(matrices, workers, settings.engine)
        _check_fits(matrices, settings.engine)
    here = threading.local()
    free = devices * workers  # each thread takes the next: devices in turn
    lock = threading.Lock()

    def start_thread() -> None:
        torch.set_num_threads(1)  # torch keeps this number for each thread
        with lock:
            here.device = free.pop(0)
        if here.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(here.device))

    def work(matrix: MatrixRef) -> Entry:
        try:
            return decompose(matrix)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise HtsrError(
                f"There was not enough memory for {matrix.name} ({_size(matrix)}).",
                "Run the same command again with fewer `workers`; what is finished is kept.",
            ) from error

    def decompose(matrix: MatrixRef) -> Entry:
        digest = hashlib.sha256()
        weight = matrix.read(checkpoint, digest)
        if here.device.type == "cuda":
            weight = weight.pin_memory()
        found = spectrum(
            weight,
            engine=settings.engine,
            device=here.device,
            farms=settings.farms,
            bins=peak_bins(settings),
        )
        return Entry(found, digest.hexdigest(), checkpoint.stamp(matrix.ref))

    users = Counter(shard for matrix in tasks for shard in checkpoint.shards_of(matrix.ref))
    for matrix, entry in schedule.run(
        tasks,
        work,
        workers=min(workers, max(1, len(tasks))),
        cost=lambda matrix: matrix_bytes(matrix, settings.engine),
        budget=budget,
        start_thread=start_thread,
    ):
        yield matrix, entry  # and journaled, when we go on
        for shard in checkpoint.shards_of(matrix.ref):
            users[shard] -= 1
            if users[shard] == 0:
                checkpoint.store.release(shard)


def _check_fits(matrices: Sequence[MatrixRef], engine: str) -> None:
    """Refuse a matrix that this machine's memory cannot hold, which Linux would let us begin."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for matrix in matrices:
        needed = matrix_bytes(matrix, engine)
        if needed > machine:
            raise HtsrError(
                f"{matrix.name} ({_size(matrix)}) takes {needed / 1e9:.0f} GB of memory, and "
                f"this machine has {machine / 1e9:.0f} GB.",
                "Leave it out with `exclude`.",
            )


def _size(matrix: MatrixRef) -> str:
    return f"{matrix.shape[0]} x {matrix.shape[1]}"


def _devices(name: str) -> list[torch.device]:
    """``cuda`` is every GPU (under torchrun, this process's), ``cuda:N`` that one."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        own = schedule.whole_number("LOCAL_RANK", 0) % torch.cuda.device_count()
        return [torch.device("cuda", own)]
    if name == "cuda":
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device(name)]
