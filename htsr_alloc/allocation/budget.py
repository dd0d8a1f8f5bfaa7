"""What is shared out: experts, or the trainable parameters that they cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.linears import Linears
from htsr_alloc.allocation.units import costed_layers
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics


@dataclass(frozen=True)
class Experts:
    """T experts of all layers together."""

    total: int


@dataclass(frozen=True)
class Params:
    """Trainable parameters, spent exactly or as closely from below as whole experts come.

    ``r`` is the rank of one expert, on which its parameters depend. ``routers`` says whether
    experts need one; plain LoRA has none.
    """

    total: int
    r: int = 8
    routers: bool = True

    def __post_init__(self) -> None:
        check_rank(self.r)


@dataclass(frozen=True)
class Share:
    """Trainable parameters as a share of the base model's: 0.01 for 1 %."""

    part: float
    r: int = 8

    def __post_init__(self) -> None:
        check_rank(self.r)
        if not 0 < self.part <= 1:
            raise HtsrError(
                f"A share of the base's parameters is above 0 and at most 1, not {self.part}."
            )

    def params(self, metrics: Metrics | None) -> Params:
        """As a number of parameters, rounded down.

        Raises:
            HtsrError: the metrics do not say how many parameters the base has.
        """
        base = metrics.model.parameters if metrics else None
        if base is None:
            raise HtsrError(
                "How many parameters the base has is not known.",
                "Analyze it again, which writes it down, or give `params`.",
            )
        return Params(math.floor(self.part * base), self.r)


@dataclass(frozen=True)
class Rank:
    """Ranks of plain LoRA, in place of experts: the parameters of rank ``r`` on every linear."""

    r: int

    def __post_init__(self) -> None:
        check_rank(self.r, "rank")

    def params(
        self, metrics: Metrics | None, targets: Sequence[str], linears: Linears | None = None
    ) -> Params:
        """As a number of parameters; what is shared out is one rank at a time.

        Raises:
            HtsrError: no metrics, or a target that no layer has.
        """
        if metrics is None:
            raise HtsrError(
                "The parameters of a rank are known from metrics only.",
                "Run htsr analyze first, and name its file.",
            )
        uniform = costed_layers(metrics, targets, self.r, routers=False, linears=linears)
        total = sum(unit.cost.of(1) for unit in uniform if unit.cost is not None)
        return Params(total, 1, routers=False)


@dataclass(frozen=True)
class Stacks:
    """T experts of each stack of layers, in this order: (``language_model``, 160), ..."""

    totals: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return ",".join(f"{name}={total}" for name, total in self.totals)


Budget = Experts | Params | Share | Rank | Stacks
# What is adapted -> its budgets, in words and as types. Another adapter is a row.
ADAPTERS: dict[str, tuple[str, tuple[type, ...]]] = {
    "lora-moe": ("`T`, `params` or `target_share`", (Experts, Params, Share, Stacks, type(None))),
    "lora": ("`rank`", (Rank,)),
}


def check_rank(r: int, name: str = "r") -> None:
    """Raise HtsrError unless ``r`` is a rank."""
    if r < 1:
        raise HtsrError(f"`{name}` must be at least 1, not {r}.")


def parse_experts(text: str) -> Experts | Stacks:
    """``160``, or ``language_model=160,vision_tower=40``.

    Raises:
        HtsrError: anything else, or a stack twice.
    """
    parts = [part.strip().rpartition("=") for part in text.split(",")]
    totals = [(name.strip(), total.strip()) for name, _, total in parts]
    names = [name for name, _ in totals]
    whole = all(total.isascii() and total.isdecimal() for _, total in totals)
    if whole and names == [""] and "=" not in text:
        return Experts(int(text))
    if not whole or not all(names) or len(set(names)) < len(names):
        raise HtsrError(f"`T` {text!r} is not like 160 or language_model=160,vision_tower=40.")
    return Stacks(tuple((name, int(total)) for name, total in totals))


def parse_params(text: str) -> int:
    """``100M``, ``1.5B``, ``660k`` or plain ``105635840``.

    Raises:
        HtsrError: anything else, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMB]?)", text.strip())
    count = float(match[1]) * 1000 ** " kmb".index(match[2].lower() or " ") if match else 0
    if count < 1:
        raise HtsrError(f"{text!r} is not a number of parameters such as 100M or 1.5B.")
    return round(count)


def parse_share(text: str) -> float:
    """``1%`` or ``0.01``.

    Raises:
        HtsrError: anything else, or outside 0 to 100 %.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)(%?)", text.strip())
    share = float(match[1]) / (100 if match[2] else 1) if match else 0
    if match and not match[2] and share >= 1:
        raise HtsrError(f"{text} is {share:.0%} of the base.", f"Write {text}% or {share / 100}.")
    if not 0 < share <= 1:
        raise HtsrError(f"{text!r} is not a share such as 1% or 0.01.")
    return share
