"""AlphaLoRA's counts on layers drawn at random: what a choice by scores has to beat."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import ClassVar

from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.allocation.strategies.alphalora import AlphaLora
from htsr_alloc.allocation.strategies.base import Plan


@dataclass(frozen=True)
class Random(AlphaLora):
    """Eq. 6 and 7 after the scores of each group have been shuffled.

    Units that cost the same get AlphaLoRA's counts in another order: as wide a spread, in places
    that mean nothing. The evidence has each unit's own score, and the quota of the one it drew.

    Attributes:
        seed: of the shuffle; each is one draw.
    """

    seed: int = 0

    name: ClassVar[str] = "random"

    def plan(self, sharing: Sharing) -> Plan:
        """AlphaLoRA's plan of the shuffled units."""
        units, draw = list(sharing.units), random.Random(self.seed)
        for group in sharing.groups:
            scores = [units[i].score for i in group]
            draw.shuffle(scores)
            for i, score in zip(group, scores, strict=True):
                units[i] = replace(units[i], score=score)
        made = super().plan(replace(sharing, units=units))
        return replace(made, record=replace(made.record, seed=self.seed))


STRATEGY = Random
