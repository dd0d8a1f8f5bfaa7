"""The processes of one torchrun: who takes which matrix, and how the results come together.

Only Python objects on the host are exchanged, a few kB a matrix, so that gloo serves on GPUs as
well. Outside torchrun there is one rank, and torch.distributed is not touched.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from htsr_alloc.analysis.journal import Entry, is_journal, read_journal
from htsr_alloc.analysis.schedule import whole_number
from htsr_alloc.errors import HtsrError

log = logging.getLogger(__name__)
Task = TypeVar("Task")
Found = TypeVar("Found")
TO_MEET = timedelta(minutes=10)  # for all ranks to start
TO_END = timedelta(days=1)  # ranks end hours apart on large models
SILENCE = 10.0  # seconds of waiting before it is said


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes of a torchrun; alone where there is none.

        Raises:
            HtsrError: variables of the environment that do not fit each other, or the others do
                not come within ``TO_MEET``.
        """
        size = whole_number("WORLD_SIZE", 1)
        if size == 1 or "RANK" not in os.environ:
            return cls()
        rank = whole_number("RANK", 0)
        if rank >= size:
            raise HtsrError(f"RANK is {rank} and WORLD_SIZE {size}.", "Start it with torchrun.")
        import torch.distributed as dist

        def meet() -> Any:
            dist.init_process_group("gloo", timeout=TO_MEET)
            return dist.new_group(timeout=TO_END)

        return cls(rank, size, cls(rank, size)._wait_for(meet, TO_MEET))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.size > 1 and kind is not KeyboardInterrupt:  # which leaves a call that blocks
            import torch.distributed as dist

            dist.destroy_process_group()

    def _wait_for(self, meeting: Callable[[], Found], longest: timedelta) -> Found:
        """The result of a call that blocks until all ranks make it.

        It runs on a thread of its own, because nothing but the end of the process stops it: so
        that a signal reaches this one, and a wait is said.

        Raises:
            HtsrError: it failed, or the others were not there in time.
        """
        done: Future[Found] = Future()

        def run() -> None:
            try:
                done.set_result(meeting())
            except BaseException as error:  # raised again where it is waited for
                done.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        start, said = time.monotonic(), False
        limit = longest.total_seconds()
        while not done.done():
            wait([done], 0.1)
            if not said and time.monotonic() - start > SILENCE:
                said = True
                log.warning(
                    f"Rank {self.rank} of {self.size} waits for the others, at most {limit:.0f} s."
                )
        try:
            return done.result()
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            raise HtsrError(
                f"Rank {self.rank} of {self.size} did not meet the others within {limit:.0f} s, "
                f"or lost one ({str(error).splitlines()[0]:.200}).",
                "See what the other ranks say, then run the same command again: it resumes.",
            ) from error

    @property
    def first(self) -> bool:
        """Whether this rank writes the result."""
        return self.rank == 0

    def own_file(self, path: Path) -> Path:
        """The path for a file of this rank's own: ``x.journal`` becomes ``x.journal.rank1``, which
        no run of another name has."""
        return path if self.first else path.with_name(f"{path.name}.rank{self.rank}")

    def read_journals(self, path: Path, identity: dict[str, Any]) -> dict[str, Entry]:
        """What the journals of any ranks hold, of an earlier run of any size.

        The other ranks of this run may be opening theirs, so that nothing is locked here.
        """
        found: dict[str, Entry] = {}
        for other in _of_ranks(path):
            found |= read_journal(other, identity)
        if self.size > 1 and path.exists():
            found |= read_journal(path, identity)
        return found

    def remove_journals(self, path: Path) -> None:
        """Delete the journals that ranks of this or an earlier run have left."""
        for other in _of_ranks(path):
            with suppress(OSError):
                with open(other, "rb") as file:
                    ours = is_journal(file)
                if ours:
                    other.unlink()

    def share(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """The union of every rank's entries, on every rank."""
        if self.size == 1:
            return entries
        import torch.distributed as dist

        parts: list[Any] = [None] * self.size
        self._wait_for(lambda: dist.all_gather_object(parts, entries, self.group), TO_END)
        return {name: entry for part in parts for name, entry in part.items()}

    def take(self, tasks: Sequence[Task], cost: Callable[[Task], float]) -> list[Task]:
        """This rank's share: the largest task goes to the rank with the least so far, and so on.

        All ranks compute the same shares, because they are given the same tasks.
        """
        if self.size == 1:
            return list(tasks)
        loads = [0.0] * self.size
        own = []
        for task in sorted(tasks, key=cost, reverse=True):
            least = loads.index(min(loads))
            loads[least] += cost(task)
            if least == self.rank:
                own.append(task)
        return own

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            import torch.distributed as dist

            self._wait_for(lambda: dist.barrier(self.group), TO_END)


def _of_ranks(path: Path) -> list[Path]:
    """The journals of the ranks after the first that lie beside the first's."""
    found = path.parent.glob(f"{glob.escape(path.name)}.rank*")
    return sorted(other for other in found if re.fullmatch(r"\.rank[0-9]+", other.suffix))
