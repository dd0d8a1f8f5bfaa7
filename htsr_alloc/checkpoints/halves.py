"""Experts whose gate and up are one tensor, taken apart: the same matrices however stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from htsr_alloc.checkpoints.listing import TensorRef
from htsr_alloc.checkpoints.rules import INTERLEAVED, STACKS, inputs_first, of_experts

if TYPE_CHECKING:
    import torch

GATE, UP = "gate_proj", "up_proj"


@dataclass(frozen=True)
class Half:
    """The gate or the up of an expert in whose matrix both are: its first rows or its last, or
    every other one.

    ``word`` is the name that it has apart. With ``inputs_first`` the matrix is (d_in, d_out).
    """

    word: str
    inputs_first: bool
    interleaved: bool

    @property
    def together(self) -> bool:
        """Whether its rows lie one after the other in the file."""
        return not self.inputs_first and not self.interleaved

    def rows(self, count: int) -> tuple[int, int]:
        """Where they begin and end among the ``count`` of both, if they lie together."""
        return (count // 2, count) if self.word == UP else (0, count // 2)

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """(d_out, d_in) of the joined matrix."""
        both = weight.T if self.inputs_first else weight
        second, rows = self.word == UP, len(both) // 2
        own = both[second::2] if self.interleaved else both[rows:] if second else both[:rows]
        return own.contiguous()


def halves_of(
    tensors: Sequence[TensorRef], architecture: str | None
) -> dict[str, tuple[Half, Half]]:
    """Stack of experts -> the gate and the up that it joins, of those that do.

    gpt-oss alone takes them by turns, and has biases; of a stack with biases in a checkpoint that
    does not say its architecture nothing is known.
    """
    shapes = {ref.name: ref.shape for ref in tensors if len(ref.shape) == 3}
    biased = {ref.name.removesuffix("_bias") for ref in tensors if ref.name.endswith("_bias")}
    by_turns = (architecture or "").startswith(INTERLEAVED)
    found: dict[str, tuple[Half, Half]] = {}
    for name, shape in shapes.items():
        for first, second in STACKS:
            down = shapes.get(name.removesuffix(first) + second)
            if not name.endswith(f".{first}") or down is None or not of_experts(name):
                continue
            how = inputs_first(shape, down)
            if how is not None and (name not in biased or architecture is not None):
                found[name] = Half(GATE, how, by_turns), Half(UP, how, by_turns)
    return found
