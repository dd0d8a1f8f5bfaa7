"""The adapters that a server holds at once, on one linear: torch alone, nothing of vLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from htsr_alloc.lora_moe.gated import GatedLora
from htsr_alloc.lora_moe.gates import is_wide


@dataclass(frozen=True)
class Held:
    """One adapter on one linear: its first products, of all slices and routers, as one.

    Small products cost a CPU more to start than to compute.

    Attributes:
        a: (ΣR, d_in), every slice's A; then the routers, (ΣN, d_in), where they have its dtype.
        routers: the same routers, where they have not.
        ranks: R of each slice; 0 where the adapter leaves it alone.
        records: the gate of each slice; None of plain LoRA.
    """

    a: Tensor
    routers: Tensor | None
    ranks: tuple[int, ...]
    records: tuple[GatedLora | None, ...]

    @classmethod
    def of(
        cls, a: Sequence[Tensor], ranks: Sequence[int], records: Sequence[GatedLora | None]
    ) -> Held:
        """From each slice's A, (R_max, d_in), of which the first R rows count, and its record."""
        gated = tuple(
            own if own is not None and own.router is not None else None for own in records
        )
        every = [own[:rank] for own, rank in zip(a, ranks, strict=True)]
        routers = [
            r if is_wide(r.dtype) else r.float() for r in map(router_of, gated) if r is not None
        ]
        same = all(router.dtype == a[0].dtype for router in routers)
        apart = torch.cat(routers) if routers and not same else None
        joined = torch.cat([*every, *routers] if same else every)
        return cls(joined, apart, tuple(ranks), gated)

    def hidden(self, x: Tensor) -> list[Tensor]:
        """Of each slice the gated A x, (rows, R) in A's dtype. x: (rows, d_in)."""
        made = F.linear(x.to(self.a.dtype), self.a)
        total = sum(self.ranks)
        logits = made[:, total:]
        if self.routers is not None:
            logits = F.linear(x.to(self.routers.dtype), self.routers)
        parts = list(made[:, :total].split(self.ranks, 1))
        start = 0
        for i, record in enumerate(self.records):
            if record is not None:
                own = logits[:, start : start + record.experts]
                start += record.experts
                parts[i] = (parts[i] * record.by_rank(x, own)).to(made.dtype)
        return parts


def router_of(record: GatedLora | None) -> Tensor | None:
    """(N, d_in), if the record has one."""
    return None if record is None else record.router


def add_by_slot(
    y: Tensor,
    x: Tensor,
    slot_of_token: Tensor,
    held: Sequence[Held | None],
    b: Sequence[Tensor],
) -> None:
    """y += Δ(x) of each token's own adapter, one adapter after another. For CPUs.

    A token whose slot is −1 stays as it is. What depends on the batch is decided on the host.

    Args:
        y: (tokens, d_out), in place. x: (tokens, d_in).
        slot_of_token: (tokens,) int64.
        held: of each slot. b: of each slice (slots, 1, d_out of the slice, R_max).
    """
    slots = slot_of_token.unique().tolist()
    for slot in slots:
        adapter = None if slot < 0 else held[slot]
        if adapter is None or not any(adapter.ranks):
            continue
        rows = None if len(slots) == 1 else (slot_of_token == slot).nonzero().squeeze(1)
        start = 0
        for own, hidden in zip(b, adapter.hidden(x if rows is None else x[rows]), strict=True):
            stop, rank = start + own.shape[2], hidden.shape[1]
            if rank:
                made = F.linear(hidden, own[slot, 0, :, :rank]).to(y.dtype)
                out = y[:, start:stop]
                out.add_(made) if rows is None else out.index_add_(0, rows, made)
            start = stop


@dataclass(frozen=True)
class SlotGates:
    """Every slot's gate on one slice of a linear, as tensors of fixed shapes. For GPUs.

    Attributes:
        router: (slots, N_max + 1, d_in) float32; the last row is AdaMoLE's W_τ.
        bias: (slots,), AdaMoLE's b.
        n: (slots,) int64, N. k: (slots,) int64. by_threshold: (slots,) bool, AdaMoLE's gate.
        expert: (slots, R_max) int64, the expert of each rank; N_max for a weight of 1.
    """

    router: Tensor
    bias: Tensor
    n: Tensor
    k: Tensor
    by_threshold: Tensor
    expert: Tensor

    @classmethod
    def empty(cls, slots: int, n: int, d_in: int, ranks: int, device: torch.device) -> SlotGates:
        """Slots of plain LoRA: every rank has the weight 1."""
        most = torch.full((slots,), n, device=device)
        return cls(
            router=torch.zeros(slots, n + 1, d_in, device=device),
            bias=torch.zeros(slots, device=device),
            n=most,
            k=most.clone(),
            by_threshold=torch.zeros(slots, dtype=torch.bool, device=device),
            expert=torch.full((slots, ranks), n, device=device),
        )

    def put(self, slot: int, record: GatedLora | None) -> None:
        """Fill a slot, in place; None makes it one of plain LoRA."""
        most = self.router.shape[1] - 1
        self.router[slot] = 0
        self.bias[slot] = 0
        self.n[slot] = self.k[slot] = most
        self.by_threshold[slot] = False
        self.expert[slot] = most
        if record is None or record.router is None:
            return
        expert = record.ranks
        self.router[slot, : record.experts] = record.router.to(self.router)
        self.n[slot], self.k[slot] = record.experts, record.k
        self.expert[slot, : len(expert)] = expert.where(expert >= 0, most).to(self.expert)
        if record.threshold is not None:
            weight, bias = record.threshold
            self.router[slot, most] = weight[0].to(self.router)
            self.bias[slot] = bias[0].to(self.bias)
            self.by_threshold[slot] = True

    def weights(self, x: Tensor, slot_of_token: Tensor) -> Tensor:
        """The weight of each rank of each token's adapter, (tokens, R_max) float32.

        Nothing in it depends on the values on the host, so that it can be compiled and captured.

        Args:
            x: (tokens, d_in). slot_of_token: (tokens,) int64; what −1 gets is not used.
        """
        slots, rows, _ = self.router.shape
        slot = slot_of_token.clamp(min=0)
        every = F.linear(x.float(), self.router.flatten(0, 1)).unflatten(-1, (slots, rows))
        own = every.gather(1, slot.view(-1, 1, 1).expand(-1, 1, rows)).squeeze(1)
        number = torch.arange(rows - 1, device=x.device)
        n, k = self.n[slot].unsqueeze(1), self.k[slot].unsqueeze(1)  # (tokens, 1)
        logits = own[:, :-1].masked_fill(number >= n, -math.inf)  # (tokens, N_max)
        place = logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = logits.masked_fill(place >= k, -math.inf).softmax(-1)
        tau = (own[:, -1:] + self.bias[slot].unsqueeze(1)).sigmoid() / n
        above = (logits.softmax(-1) - tau).relu()
        total = above.sum(-1, keepdim=True)
        above = above / total.where(total > 0, 1.0)
        gate = torch.where(self.by_threshold[slot].unsqueeze(1), above, chosen)
        gate = torch.cat([gate, torch.ones_like(gate[:, :1])], 1)
        return gate.gather(1, self.expert[slot])
