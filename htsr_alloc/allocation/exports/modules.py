"""The linear modules of a model that an export may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.units import BASE_EXPERTS
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation
from htsr_alloc.records.lora import Lora

# What PEFT takes for parts of a mixture's experts where a model is one, wherever they are.
TAKEN = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class Modules:
    """What of a model may be adapted.

    Attributes:
        names: block prefix -> full names of the linears in it.
        parameters: those of the names that are a parameter's, and no module's: a tensor of
            experts, or the weight of a linear that PEFT would take for an expert's.
    """

    names: Mapping[str, Sequence[str]]
    parameters: frozenset[str] = frozenset()


def check_named(lora: Lora, modules: Modules | None) -> None:
    """Raise HtsrError for a target whose names only a model has."""
    for target in lora.target_modules if modules is None else ():
        last = target.rpartition(".")[2]
        if target == BASE_EXPERTS:
            raise HtsrError(
                "The names of a model's own experts are transformers', not the checkpoint's.",
                "Give `model`.",
            )
        if last != target and last in TAKEN:
            raise HtsrError(
                f"In a mixture PEFT takes every {last} for its experts', {target} too.",
                "Give `model`, by which each linear is named so that PEFT does not.",
            )


def refuse_ranks(what: str, allocation: Allocation) -> None:
    """Raise HtsrError where an allocation holds ranks, and ``what`` needs experts."""
    if allocation.holds_ranks:
        raise HtsrError(
            f"{what} needs experts, and this allocation holds ranks of plain LoRA.",
            "Export it to peft-rank or axolotl, or train it with the system lora.",
        )


def named_layers(allocation: Allocation) -> dict[str, int]:
    """Prefix -> experts.

    Raises:
        HtsrError: the allocation does not say the prefixes.
    """
    layers = {row.prefix: row.experts for row in allocation.evidence}
    if not layers or None in layers:
        raise HtsrError(
            "The allocation does not say which modules its layers are.",
            "Allocate from a metrics file, which knows the prefixes.",
        )
    return {str(prefix): experts for prefix, experts in layers.items()}


def refuse_modules(export: str, modules: Modules | None) -> None:
    """Raise HtsrError where a model is given to an export that does not name modules."""
    if modules is not None:
        raise HtsrError(
            f"The {export} export does not name modules, so that `model` means nothing.",
            "Leave it out.",
        )
