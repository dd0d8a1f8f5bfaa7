"""What a trainer must know besides the allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError

Modules = Mapping[str, Sequence[str]]  # block prefix -> full names of the linears in it


@dataclass(frozen=True)
class Lora:
    """What a LoRA trainer needs besides the allocation; ``r`` is of one expert."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ()


def refuse_modules(export: str, modules: Modules | None) -> None:
    """Raise HtsrError where a model is given to an export that does not name modules."""
    if modules is not None:
        raise HtsrError(
            f"The {export} export does not name modules, so that `model` means nothing.",
            "Leave it out.",
        )
