"""The processes of one torchrun: who takes which matrix, and how the results come together.

Only Python objects on the host are exchanged, a few kB a matrix, so that gloo serves on GPUs as
well. Outside torchrun there is one rank, and torch.distributed is not touched.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from htsr_alloc.analysis.journal import Entry, is_journal, read_journal

Task = TypeVar("Task")
PATIENCE = timedelta(days=30)  # ranks end hours apart on large models


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Meet the other processes of a torchrun; alone where there is none."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ:
            return cls()
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size())

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

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
        dist.all_gather_object(parts, entries)
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

            dist.barrier()


def _of_ranks(path: Path) -> list[Path]:
    """The journals of the ranks after the first that lie beside the first's."""
    found = path.parent.glob(f"{glob.escape(path.name)}.rank*")
    return sorted(other for other in found if re.fullmatch(r"\.rank[0-9]+", other.suffix))
