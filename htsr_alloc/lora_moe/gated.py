"""GatedLora: what one adapter does on one linear, as plain tensors that any server can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from htsr_alloc.lora_moe import gates

UNGATED = -1  # in ``expert_of_rank``: a rank whose weight is 1 for every token


@dataclass(frozen=True)
class GatedLora:
    """A LoRA of R ranks with one multiplication between its two products.

    Δ(x) = s B (g(x)[expert of each rank] ⊙ A x) − B_res A_res x.

    Attributes:
        a: (R, d_in), every expert's A, repeated where experts share one. b: (d_out, R).
        expert_of_rank: (R,) int64, the expert that each rank belongs to; UNGATED for none.
        router: (N, d_in); None where no gate depends on the token.
        gate: a name in GATES. k: experts that a token uses; N where the gate has no such number.
        scale: s.
        residual: A_res (R', d_in) and B_res (d_out, R'); or None.
        threshold: AdaMoLE's W_τ (1, d_in) and b (1,); or None.
    """

    a: Tensor
    b: Tensor
    expert_of_rank: Tensor
    router: Tensor | None
    gate: str
    k: int
    scale: float
    residual: tuple[Tensor, Tensor] | None = None
    threshold: tuple[Tensor, Tensor] | None = None

    @property
    def experts(self) -> int:
        """N, the gates that a router gives; 0 without one."""
        return 0 if self.router is None else len(self.router)

    def weights(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """g(x), (..., N), in the router's dtype, float32 or better.

        x: (..., d_in). logits: the router's, (..., N), where they are there already.
        """
        assert self.router is not None
        if logits is None:
            logits = gates.router_logits(x, self.router)
        return GATES[self.gate](self, logits, x).weights

    def delta(self, x: Tensor) -> Tensor:
        """Δ(x), (..., d_out), in the dtype of A. x: (..., d_in)."""
        a, b = self.flat()
        hidden = F.linear(x.to(a.dtype), a)  # (..., R + R')
        return F.linear((hidden * self.by_rank(x)).to(a.dtype), b)

    def by_rank(self, x: Tensor, logits: Tensor | None = None) -> Tensor | float:
        """The weight of each rank, (..., R + R'), residual included; 1 where there is no router."""
        if self.router is None:
            return 1.0
        gate = self.weights(x, logits)
        place, ungated = self._places
        if ungated:
            gate = torch.cat([gate, torch.ones_like(gate[..., :1])], -1)
        return gate.index_select(-1, place)

    @cached_property
    def _places(self) -> tuple[Tensor, bool]:
        """Each rank's place among the gates, N where its weight is 1; whether there are such."""
        alone = self.ranks == UNGATED
        return self.ranks.masked_fill(alone, self.experts), bool(alone.any())

    @cached_property
    def ranks(self) -> Tensor:
        """The expert of each rank, (R + R',), residual included; UNGATED without a router."""
        own = self.expert_of_rank
        if self.router is None:
            own = torch.full_like(own, UNGATED)
        if self.residual is None:
            return own
        return torch.cat([own, own.new_full((len(self.residual[0]),), UNGATED)])

    def flat(self) -> tuple[Tensor, Tensor]:
        """A (R + R', d_in) and s B (d_out, R + R'), residual included."""
        a, b = self.a, self.b * self.scale
        if self.residual is None:
            return a, b
        return torch.cat([a, self.residual[0]]), torch.cat([b, -self.residual[1]], 1)


def _top_k(own: GatedLora, logits: Tensor, x: Tensor) -> gates.Routing:
    return gates.top_k_softmax(logits, own.k)


def _threshold(own: GatedLora, logits: Tensor, x: Tensor) -> gates.Routing:
    assert own.threshold is not None
    return gates.threshold(logits, gates.router_logits(x, *own.threshold))


GATES: dict[str, Callable[[GatedLora, Tensor, Tensor], gates.Routing]] = {
    "top_k": _top_k,
    "threshold": _threshold,
}
