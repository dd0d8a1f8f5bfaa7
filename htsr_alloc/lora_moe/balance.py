"""Balance losses, and their gradient through autograd.

The loss of each router is computed where the router is and attached to the gate by a node whose
backward passes the output's gradient on and hands the loss its own. So it needs no trainer that
adds anything up, and it cannot get lost inside a checkpointed block. What the node must know is
how strongly the model's loss itself is weighted in this backward (gradient accumulation, a
GradScaler, DDP's factor): ``passes`` finds that out at the model's loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

REDUCTIONS = ("layers", "sum", "mean")


def load_balance(probs: Tensor, chosen: Tensor, mask: Tensor | None, k: float) -> Tensor:
    """L = N Σ_i f_i P_i, the Switch Transformer's loss (arXiv 2101.03961, eq. 4).

    f_i is the share of choices that fell on expert i, P_i the mean of p_i, which carries the
    gradient. At balance L = 1 if every token chooses k.

    Args:
        probs: (T, N). chosen: (T, N), bool.
        mask: (T,), false for padding, or None.
        k: what f is divided by beside T: choices a token has; 1 where their number varies.
    """
    chosen = chosen.to(probs.dtype)
    if mask is None:
        f, p = chosen.mean(0), probs.mean(0)  # (N,)
    else:
        kept = mask.to(probs.dtype).unsqueeze(-1)  # (T, 1)
        tokens = kept.sum().clamp(min=1)
        f, p = (chosen * kept).sum(0) / tokens, (probs * kept).sum(0) / tokens
    return probs.shape[-1] * (f / k * p).sum()


@torch.library.custom_op("htsr_alloc::in_backward", mutates_args=())
def _in_backward(scale: Tensor, grad: Tensor) -> Tensor:
    """The scale as it is when ``grad`` is there.

    A compiler moves into the forward pass what does not depend on backward's gradients, where the
    scale is not known yet.
    """
    return scale.clone()


@_in_backward.register_fake
def _(scale: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(scale)


class _Inject(torch.autograd.Function):
    """Identity on the carrier; gives the loss the gradient ``scale`` in backward."""

    @staticmethod
    def forward(ctx, carrier: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.like = (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (scale,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            scale = _in_backward(scale, grads[0])
        dtype, device = ctx.like
        return grads[0], scale.to(device=device, dtype=dtype), None


def inject(carrier: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """``carrier`` unchanged; in backward ``loss`` gets the gradient ``scale``, a 0-d tensor."""
    return _Inject.apply(carrier, loss, scale)  # type: ignore[return-value]
