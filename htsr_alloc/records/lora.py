"""LoRA's settings and their defaults; cheap to import, for the help of commands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lora:
    """What a LoRA trainer needs besides the allocation; ``r`` is of one expert."""

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ()
