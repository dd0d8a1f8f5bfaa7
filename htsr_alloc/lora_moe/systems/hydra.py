"""HydraLoRA: one A that all experts share, and every expert always."""

from __future__ import annotations

from typing import Any

from htsr_alloc.lora_moe.systems.base import Shape, System


class Hydra(System):
    """Δ(x) = s Σ_i g_i B_i (A x), g the softmax over all experts."""

    name = "hydra"
    title = "HydraLoRA"
    reference = "arXiv 2404.19245, eq. 5"
    has_top_k = False
    settings = ("init_lora_weights",)
    balance_coef = 0.0
    budget_knob = "experts"

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """A is (r, d_in)."""
        return {**super().shapes(config, n, d_in, d_out), "A": (config.r, d_in)}


SYSTEM = Hydra()
