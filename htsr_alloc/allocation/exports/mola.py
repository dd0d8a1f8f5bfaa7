"""The training scripts of MoLA and AlphaLoRA."""

from __future__ import annotations

from collections.abc import Sequence

from htsr_alloc.allocation.exports.lora import Lora, Modules, refuse_modules, refuse_ranks
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation


def to_mola(allocation: Allocation, lora: Lora, modules: Modules | None = None) -> str:
    """Arguments of the MoLA and AlphaLoRA training scripts.

    Raises:
        HtsrError: a layer without experts, or linears with counts of their own, which those
            scripts cannot build.
    """
    refuse_modules("mola", modules)
    refuse_ranks("MoLA's trainer", allocation)
    if allocation.modules:
        raise HtsrError(
            "MoLA's trainer has one count a layer, and this allocation one a linear.",
            "Allocate without `per_module`, or export to peft-rank.",
        )
    if 0 in allocation.experts:
        layer = allocation.experts.index(0)
        raise HtsrError(
            f"Layer {layer} has no expert, which MoLA's trainer cannot build.",
            "Allocate at least one expert a layer, or export to peft-rank.",
        )
    lines = [
        f'--lora_r "{_commas([lora.r] * len(allocation.experts))}"',
        f"--lora_alpha {lora.lora_alpha}",
        f"--lora_dropout {lora.lora_dropout:g}",
        f'--number_experts "{_commas(allocation.experts)}"',
        f'--top_k "{_commas(allocation.top_k)}"',
    ]
    if lora.target_modules:
        lines.insert(3, f'--lora_target_modules "{",".join(lora.target_modules)}"')
    return " \\\n".join(lines) + "\n"


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(str(n) for n in numbers)
