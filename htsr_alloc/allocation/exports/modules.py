"""The linear modules of a model that an export may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation

Modules = Mapping[str, Sequence[str]]  # block prefix -> full names of the linears in it


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
