"""A plain LoRA in place of a mixture, by the mean gate: approximate, with its measured error."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.layer import LoraMoeLinear
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.routing import active_adapter, evaluating, routing_report


@dataclass(frozen=True)
class Collapsed:
    """A plain LoRA.

    Attributes:
        factors: module -> (A (rank, d_in), B (d_out, rank)); the scale is in B.
        error: ‖logits − logits'‖ / ‖logits‖ over the calibration batches, padding included.
        exact: whether no router was averaged (one expert everywhere), so that the error is
            rounding only.
        task_type: PEFT's, of the mixture.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    error: float
    exact: bool
    task_type: str | None = None

    def save(self, folder: str | Path) -> None:
        """An adapter folder that PEFT loads as LoRA, and ``collapse.json`` with the error."""
        folder = Path(folder)
        ranks = {name: a.shape[0] for name, (a, _) in self.factors.items()}
        config = LoraConfig(
            r=max(ranks.values()),
            lora_alpha=max(ranks.values()),
            target_modules=list(ranks),
            rank_pattern={"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()},
            alpha_pattern={"^" + name.replace(".", r"\."): rank for name, rank in ranks.items()},
            inference_mode=True,
            task_type=self.task_type,
        )
        config.save_pretrained(str(folder))
        tensors = {}
        for name, (a, b) in self.factors.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        label = {"approximate": not self.exact, "relative_logits_error": self.error}
        (folder / "collapse.json").write_text(json.dumps(label) + "\n")


def collapse(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter: str | None = None
) -> Collapsed:
    """Fix every gate at its mean over calibration batches, which makes the experts one LoRA.

    Token-routed experts cannot be merged exactly: the gate is a function of the token. Read the
    error before using the result.

    Args:
        batches: of the model's own arguments.

    Raises:
        HtsrError: no batch, EM-DoRA, whose experts are not low-rank sums, an adapter that is not
            the active one, or one with trained modules or tokens besides.
    """
    batches = list(batches)
    adapted = list(layers_of(model))
    adapter = active_adapter(model, adapter)
    layers = [layer for layer in adapted if adapter in layer.mixture]
    if not all(p.sums for layer in layers for p in layer.products(adapter)):
        raise HtsrError("EM-DoRA's experts are not low-rank sums and cannot become a LoRA.")
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter)
    for held in (config.modules_to_save, config.trainable_token_indices) if config else ():
        if held:
            raise HtsrError(
                f"The adapter also holds trained modules or tokens ({', '.join(map(str, held))}), "
                "which are not part of a LoRA.",
                "Keep the mixture.",
            )
    task = config.task_type if config else None
    if not batches:
        raise HtsrError("collapse needs calibration batches.")
    routed = any(adapter in layer.lora_moe_router or adapter in layer.place for layer in layers)
    gates = {}
    if routed:
        gates = {row.name: row.gate for row in routing_report(model, batches, adapter)}
    factors = {layer.name: _factors(layer, adapter, gates) for layer in layers}
    return Collapsed(factors, _error(model, batches, layers, factors), not routed, task)


@torch.no_grad()
def _factors(
    layer: LoraMoeLinear, adapter: str, gates: Mapping[str, tuple[float, ...]]
) -> tuple[Tensor, Tensor]:
    how = layer.mixture[adapter]
    share = how.system.share(how.config, how.experts)
    gate = gates.get(layer.name, (share,) * how.experts)
    if adapter in layer.place:
        block, index = layer.place[adapter]
        gate = (gates[block][index],)
    rows, columns = [], []  # (r, d_in) and (d_out, r)
    residual = None
    for product in layer.products(adapter):
        b = product.b * (product.scale * gate[product.expert])
        residual = product.residual
        if rows and product.a is rows[-1]:  # one A: the experts' B add up
            columns[-1] = columns[-1] + b
        else:
            rows.append(product.a)
            columns.append(b)
    if residual is not None:
        rows.append(residual[0])
        columns.append(-residual[1])
    return torch.cat(rows), torch.cat(columns, 1)


@torch.no_grad()
def _error(
    model: nn.Module,
    batches: list[Mapping[str, Any]],
    layers: list[LoraMoeLinear],
    factors: Mapping[str, tuple[Tensor, Tensor]],
) -> float:
    def replace(layer: LoraMoeLinear, args: tuple, out: Tensor) -> Tensor:
        a, b = factors[layer.name]
        low_rank = F.linear(F.linear(args[0].to(a.dtype), a), b)
        return (layer.base_layer(args[0]) + low_rank).to(out.dtype)

    difference = total = 0.0
    with evaluating(model):
        for batch in batches:
            want = model(**batch).logits.double()
            hooks = [layer.register_forward_hook(replace) for layer in layers]
            try:
                got = model(**batch).logits.double()
            finally:
                for hook in hooks:
                    hook.remove()
            difference += float((got - want).square().sum())
            total += float(want.square().sum())
    return (difference / total) ** 0.5
