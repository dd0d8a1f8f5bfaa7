"""GatedLora: what one adapter does on one linear, as plain tensors that any server can take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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

    def weights(self, x: Tensor) -> Tensor:
        """g(x), (..., N), in the router's dtype, float32 or better. x: (..., d_in)."""
        assert self.router is not None
        return GATES[self.gate](self, gates.router_logits(x, self.router), x).weights

    def delta(self, x: Tensor) -> Tensor:
        """Δ(x), (..., d_out), in the dtype of A. x: (..., d_in)."""
        own = x.to(self.a.dtype)
        a, b, expert = self.flat()
        hidden = F.linear(own, a)  # (..., R + R')
        if self.router is not None:
            gate = self.weights(x).to(hidden.dtype)
            one = torch.ones_like(gate[..., :1])
            hidden = hidden * torch.cat([gate, one], -1)[..., expert]  # UNGATED is the last
        return F.linear(hidden, b)

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (R + R', d_in), s B (d_out, R + R') and the expert of each rank, residual included.

        Without a router every rank is UNGATED.
        """
        a, b, expert = self.a, self.b * self.scale, self.expert_of_rank
        if self.router is None:
            expert = torch.full_like(expert, UNGATED)
        if self.residual is not None:
            res_a, res_b = self.residual
            a, b = torch.cat([a, res_a]), torch.cat([b, -res_b], 1)
            expert = torch.cat([expert, expert.new_full((len(res_a),), UNGATED)])
        return a, b, expert


def _top_k(own: GatedLora, logits: Tensor, x: Tensor) -> gates.Routing:
    return gates.top_k_softmax(logits, own.k)


def _threshold(own: GatedLora, logits: Tensor, x: Tensor) -> gates.Routing:
    assert own.threshold is not None
    return gates.threshold(logits, gates.router_logits(x, *own.threshold))


GATES: dict[str, Callable[[GatedLora, Tensor, Tensor], gates.Routing]] = {
    "top_k": _top_k,
    "threshold": _threshold,
}
