"""AlphaLoRA, MoLA and MoLoRA: the mixture of ``base``; they differ in the experts per layer."""

from __future__ import annotations

from htsr_alloc.lora_moe.systems.base import System


class AlphaLora(System):
    """Top-k mixtures of LoRA experts, as many on each layer as an allocation says."""

    name = "alphalora"
    title = "AlphaLoRA"
    reference = "arXiv 2410.10054; MoLA, arXiv 2402.08562, eq. 3"


SYSTEM = AlphaLora()
