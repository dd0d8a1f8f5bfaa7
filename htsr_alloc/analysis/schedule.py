"""Matrices over single-thread workers, under a bound on memory.

One matrix a thread beats all threads on one matrix: the linear algebra's own threads wait for each
other, the more so on a busy machine. Torch and LAPACK release the GIL, so that threads suffice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from htsr_alloc.errors import HtsrError

Task = TypeVar("Task")
Result = TypeVar("Result")


def available_cores() -> int:
    """Processors for this process; torchrun's processes on one machine share them."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, cores // whole_number("LOCAL_WORLD_SIZE", 1))


def whole_number(variable: str, least: int) -> int:
    """A variable that torchrun sets; ``least`` where it is not set.

    Raises:
        HtsrError: it is not a whole number, or less than ``least``.
    """
    text = os.environ.get(variable, str(least))
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
        raise HtsrError(
            f"The environment's {variable} is {text!r}, not a whole number from {least} on.",
            f"Start it with torchrun, or unset {variable}.",
        )
    return int(text)


def run(
    tasks: Sequence[Task],
    work: Callable[[Task], Result],
    *,
    workers: int,
    cost: Callable[[Task], int],
    budget: int,
    start_thread: Callable[[], None] | None = None,
) -> Iterator[tuple[Task, Result]]:
    """Run ``work`` on every task and yield (task, result) as they finish.

    Tasks start in the order given; one that does not fit into what is left of ``budget`` is
    passed over for the first later one that does.

    Args:
        workers: threads.
        cost: bytes a task holds while it runs.
        budget: bytes that all running tasks together may hold.
        start_thread: called once in each thread.

    Raises:
        HtsrError: a single task costs more than the budget, before any work is done.
        Exception: whatever ``work`` raised first; what runs is left to end, the rest dropped.
    """
    costs = [cost(task) for task in tasks]
    if costs and max(costs) > budget:
        raise HtsrError(
            f"One matrix takes {max(costs) / 1e6:.0f} MB, and the bound on memory leaves "
            f"{max(budget, 0) / 1e6:.0f} MB for matrices.",
            f"Raise `max_memory` by {(max(costs) - budget) / 1e6 + 1:.0f}MB.",
        )
    waiting = list(range(len(tasks)))
    running: dict[Future[Result], int] = {}
    pool = ThreadPoolExecutor(workers, "htsr", start_thread)

    def fill() -> None:
        used = sum(costs[i] for i in running.values())
        position = 0
        while len(running) < workers and position < len(waiting):
            i = waiting[position]
            if used + costs[i] <= budget:
                running[pool.submit(work, tasks[i])] = waiting.pop(position)
                used += costs[i]
            else:
                position += 1

    try:
        fill()
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            finished = [(running.pop(future), future) for future in done]
            if all(future.exception() is None for future in done):
                fill()  # before the caller, who may write to disk, has the results
            for i, future in finished:
                yield tasks[i], future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
