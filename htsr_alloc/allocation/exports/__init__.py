"""An allocation in the formats of other trainers: one file and one row each."""

from __future__ import annotations

from collections.abc import Callable

from htsr_alloc.allocation.exports.axolotl import to_axolotl
from htsr_alloc.allocation.exports.lora import Lora, Modules, refuse_ranks
from htsr_alloc.allocation.exports.mola import to_mola
from htsr_alloc.allocation.exports.peft_rank import to_peft_rank
from htsr_alloc.allocation.exports.table import to_csv
from htsr_alloc.records import Allocation

# The text of a file, from an allocation, a Lora and, where they are known, a model's Modules.
EXPORTS: dict[str, Callable[[Allocation, Lora, Modules | None], str]] = {
    "mola": to_mola,
    "peft-rank": to_peft_rank,
    "axolotl": to_axolotl,
    "csv": to_csv,
}

__all__ = [
    "EXPORTS",
    "Lora",
    "Modules",
    "refuse_ranks",
    "to_axolotl",
    "to_csv",
    "to_mola",
    "to_peft_rank",
]
