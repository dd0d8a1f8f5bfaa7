"""The low-rank product of each expert of an adapted linear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def expert_products(
    layer: Any,
) -> Iterator[tuple[str, int, Tensor, Tensor, float, Tensor | None, bool]]:
    """Of the active adapters of a LoraMoeLinear, expert by expert.

    s B_j A_j is what the linear adds for a token whose whole gate weight is on expert j.

    Yields:
        (adapter, expert, A (r, d_in), B (d_out, r), s, residual (d_out, d_in) or None, whether
        the adapted weight is W less the residual plus s B A).
    """
    for name in layer.active_adapters:
        if name not in layer.mixture:
            continue
        how = layer.mixture[name]
        a, b = layer.lora_moe_A[name].detach(), layer.lora_moe_B[name].detach()
        residual = None
        if name in layer.lora_moe_res_A:
            residual = (layer.lora_moe_res_B[name] @ layer.lora_moe_res_A[name]).detach()
        rank = a.shape[0] if how.system in ("mor", "hydra") else a.shape[0] // how.experts
        for j in range(how.experts):
            rows = slice(j * rank, (j + 1) * rank)
            if how.system == "mor":
                own_a = layer.lora_moe_lambda_A[name][j].detach().unsqueeze(1) * a
                own_b = layer.lora_moe_lambda_B[name][j].detach().unsqueeze(1) * b
            else:
                own_a = a if how.system == "hydra" else a[rows]
                own_b = b[:, rows]
            scales = layer.lora_moe_scale
            scale = float(scales[name][j]) if name in scales else float(how.scale)
            yield name, j, own_a, own_b, scale, residual, not how.dora
