"""MoLA: groups of consecutive layers, each with one count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from htsr_alloc.allocation.budget import Experts
from htsr_alloc.allocation.sharing import Sharing
from htsr_alloc.allocation.strategies.base import Plan, Strategy
from htsr_alloc.errors import HtsrError


@dataclass(frozen=True)
class Mola(Strategy):
    """MoLA (https://arxiv.org/abs/2402.08562): its counts as they are, or scaled to a budget.

    Attributes:
        groups: experts a layer of each group, as 2, 4, 6, 8.
    """

    groups: tuple[int, ...] = ()

    name: ClassVar[str] = "mola"

    def plan(self, sharing: Sharing) -> Plan:
        """The groups' counts where no other budget is given, else in proportion to them."""
        own = mola_counts(self.groups, sharing.layers)
        counts = [own[unit.layer] for unit in sharing.units]
        quotas = [float(count) for count in counts]
        record = sharing.record(self.name, groups=self.groups)
        if sharing.budget not in (None, Experts(sum(counts))):
            quotas, counts = sharing.by(self.name, quotas)
            return Plan(record, quotas, counts, "mola uses no score")
        for layer, count in enumerate(counts):
            if not sharing.bounds.allow(count):
                raise HtsrError(
                    f"MoLA gives layer {layer} {count} experts, outside {sharing.bounds.words}."
                )
        return Plan(replace(record, repair=None), quotas, counts, "mola uses no score")


STRATEGY = Mola


def mola_counts(groups: Sequence[int], layers: int) -> list[int]:
    """MoLA: each group of consecutive layers has one count of experts.

    Layer i of L belongs to group floor(i * G / L), so that group sizes differ by at most one
    when L is not divisible by G.

    Raises:
        HtsrError: no group, a negative count, or more groups than layers.
    """
    if not groups or min(groups) < 0:
        raise HtsrError("`groups` needs counts such as 2468 or 4-6-8-10.")
    if len(groups) > layers:
        raise HtsrError(f"{len(groups)} groups do not fit {layers} layers.")
    return [groups[i * len(groups) // layers] for i in range(layers)]


def parse_groups(text: str) -> tuple[int, ...]:
    """``2468`` as 2, 4, 6, 8; ``4-6-8-10`` (or commas) as 4, 6, 8, 10.

    Without separators every digit is a group, except for the published ``46810``.

    Raises:
        HtsrError: anything else.
    """
    if text == "46810":  # MoLA's own name for 4, 6, 8, 10
        return 4, 6, 8, 10
    words = text.replace(",", "-").split("-") if "-" in text or "," in text else list(text)
    if not words or not all(word.isdecimal() for word in words):
        raise HtsrError(f"`groups` {text!r} is not like 2468 or 4-6-8-10.")
    return tuple(int(word) for word in words)
