"""What a trainer must know besides the allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation

Modules = Mapping[str, Sequence[str]]  # block prefix -> full names of the linears in it


@dataclass(frozen=True)
class Lora:
    """What a LoRA trainer needs besides the allocation.

    ``r`` is the rank of one expert. ``lora_alpha`` / ``r`` is the scale of every linear, also
    where the allocation holds ranks and no experts.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        allocation: Allocation | None,
        r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = lora_dropout,
        target_modules: Sequence[str] = (),
    ) -> Lora:
        """With the defaults that fit the allocation.

        These are 8 and 16. An allocation of ranks has its uniform rank, twice that for
        ``lora_alpha``, and the linears that its parameters were counted for.

        Raises:
            HtsrError: a rank besides those of the allocation.
        """
        targets = tuple(target_modules)
        if allocation is None or not allocation.holds_ranks or allocation.parameters is None:
            alpha = cls.lora_alpha if lora_alpha is None else lora_alpha
            return cls(cls.r if r is None else r, alpha, lora_dropout, targets)
        if r is not None:
            raise HtsrError(
                "`r` is the rank of one expert, and this allocation holds the linears' ranks.",
                "Remove it.",
            )
        uniform = allocation.parameters.r
        alpha = 2 * uniform if lora_alpha is None else lora_alpha
        known = allocation.strategy.targets if allocation.strategy is not None else None
        return cls(uniform, alpha, lora_dropout, targets or known or ())

    def rank(self, allocation: Allocation, count: int) -> int:
        """The rank of a linear with this count."""
        return count if allocation.holds_ranks else self.r * count

    def alpha(self, allocation: Allocation, count: int) -> float:
        """Its alpha, at which the scale alpha / rank is ``lora_alpha`` / ``r``."""
        alpha = self.lora_alpha * count / (self.r if allocation.holds_ranks else 1)
        return int(alpha) if alpha == int(alpha) else alpha


def refuse_ranks(what: str, allocation: Allocation) -> None:
    """Raise HtsrError where an allocation holds ranks, and ``what`` needs experts."""
    if allocation.holds_ranks:
        raise HtsrError(
            f"{what} needs experts, and this allocation holds ranks of plain LoRA.",
            "Export it to peft-rank or axolotl, or train it with the system lora.",
        )


def refuse_modules(export: str, modules: Modules | None) -> None:
    """Raise HtsrError where a model is given to an export that does not name modules."""
    if modules is not None:
        raise HtsrError(
            f"The {export} export does not name modules, so that `model` means nothing.",
            "Leave it out.",
        )
