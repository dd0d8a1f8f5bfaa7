"""A model's linears, where they are others than the matrices of its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError


@dataclass(frozen=True)
class Linear:
    """One linear by its full name in the model, and its widths."""

    name: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Linears:
    """The linears that ``build`` adapts, in pairs with their layer's prefix in the metrics."""

    blocks: tuple[tuple[str, tuple[Linear, ...]], ...]

    def targeted(self, targets: Sequence[str]) -> dict[str, list[Linear]]:
        """Prefix -> those whose names end in a target; all where there is none.

        Raises:
            HtsrError: a target that no linear's name ends in.
        """
        names = [linear.name for _, own in self.blocks for linear in own]
        for target in targets:
            if not any(_is(name, target) for name in names):
                ends = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise HtsrError(f"No linear of the model is a {target}.", f"There are {ends}.")
        return {
            prefix: [
                own for own in linears if not targets or any(_is(own.name, t) for t in targets)
            ]
            for prefix, linears in self.blocks
        }


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
