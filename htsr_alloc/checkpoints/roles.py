"""The role of each matrix: the shortest unambiguous word that its checkpoint has for it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from htsr_alloc.checkpoints.halves import Half
from htsr_alloc.checkpoints.listing import TensorRef
from htsr_alloc.checkpoints.rules import expert_position


def roles_of(
    kept: Sequence[TensorRef],
    blocks: Mapping[str, tuple[str, int]],
    halves: Mapping[str, tuple[Half, Half]],
) -> dict[tuple[str, Half | None], str]:
    """(Tensor name, half) -> role: its path inside the block, cut to the shortest unambiguous
    ending. A half has the path that it has apart."""
    inner: dict[tuple[str, Half | None], tuple[str, ...]] = {}
    for ref in kept:
        path = re.sub(r"[._]?weight$", "", ref.name).split(".")
        expert = expert_position(ref.name)
        if expert:
            del path[expert]
        path = path[blocks[ref.name][0].count(".") + 2 :]
        for half in halves.get(ref.name, (None,)):
            inner[ref.name, half] = (*path[:-1], half.word) if half else tuple(path)
    # Numbers inside a block (T5's layer.0) say nothing, unless two weights differ by them alone.
    per_block = Counter(
        (blocks[name], _wordy(path))
        for (name, _), path in inner.items()
        if expert_position(name) is None
    )
    ambiguous = {path for (_, path), count in per_block.items() if count > 1}
    paths = {
        name: path if _wordy(path) in ambiguous else _wordy(path) for name, path in inner.items()
    }
    owners: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for path in set(paths.values()):
        for start in range(len(path)):
            owners[path[start:]].add(path)

    def shortest(path: tuple[str, ...]) -> str:
        for start in range(len(path) - 1, 0, -1):
            if len(owners[path[start:]]) == 1 and not path[start].isdecimal():
                return ".".join(path[start:])
        return ".".join(path)

    return {name: shortest(path) for name, path in paths.items()}


def _wordy(path: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in path if not part.isdecimal())
