"""vLLM's LoRA linears, with a gate between shrink and expand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from htsr_alloc.lora_moe.gated import GatedLora
from htsr_alloc.serving.launch import MOST
from htsr_alloc.serving.vllm.slots import Held, SlotGates, add_by_slot

DEFAULT_MOST = 16


def most_experts() -> int:
    """N_max: how many experts a linear can have on a GPU."""
    return int(os.environ.get(MOST, DEFAULT_MOST))


class GatedLinear:
    """Put before a class of vLLM's LoRA linears; ``gate`` makes a layer one of these."""

    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    output_slices: tuple[int, ...]
    punica_wrapper: Any
    held: list[Held | None]  # of each slot; empty on a GPU
    gates: list[SlotGates]  # of each slice; empty on a CPU

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        """``output`` plus Δ(x) of each token's adapter, in place. (..., d_out)."""
        shape = output.shape
        x, output = x.flatten(0, -2), output.flatten(0, -2)
        a, b = self.lora_a_stacked, self.lora_b_stacked
        if x.device.type == "cpu":
            slots = self.punica_wrapper.token_lora_indices
            add_by_slot(output, x[: len(slots)], slots, self.held, b)
            return output.view(shape)
        hidden = torch.zeros(
            (len(a), x.shape[0], a[0].shape[2]), dtype=torch.float32, device=x.device
        )
        self.punica_wrapper.add_shrink(hidden, x, a, 1.0)
        slots = self.punica_wrapper._token_lora_indices[: x.shape[0]]
        hidden = hidden * torch.stack([gates.weights(x, slots) for gates in self.gates])
        self.punica_wrapper.add_expand(output, hidden, b, self.output_slices, add_inputs=True)
        return output.view(shape)

    def put(self, slot: int, ranks: Sequence[int], records: Sequence[GatedLora | None]) -> None:
        """Say what is in a slot now: of each slice its rank and its gate."""
        if self.held:
            a = [own[slot, 0] for own in self.lora_a_stacked]
            self.held[slot] = Held.of(a, ranks, records)
        for gates, record in zip(self.gates, records, strict=False):  # none on a CPU
            gates.put(slot, record)


@cache
def _gated(kind: type) -> type:
    return type(f"Gated{kind.__name__}", (GatedLinear, kind), {})


def gate(layer: Any, slots: int) -> None:
    """Make a LoRA linear of vLLM gated; with plain LoRA in its slots it gives what it gave."""
    a = layer.lora_a_stacked
    layer.__class__ = _gated(type(layer))
    layer.held, layer.gates = [], []
    if a[0].device.type == "cpu":
        layer.held = [None] * slots
    else:
        sizes = slots, most_experts(), a[0].shape[3], a[0].shape[2]
        layer.gates = [SlotGates.empty(*sizes, a[0].device) for _ in a]
