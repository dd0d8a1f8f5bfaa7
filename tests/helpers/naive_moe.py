"""Naive statements of every LoRA-MoE formula: one token, one expert at a time, in plain loops.

Written from METHODS.md's formulas alone; nothing of htsr_alloc is used.
"""

from __future__ import annotations

import math

import torch


def softmax(logits):
    shifted = torch.stack([value - logits.max() for value in logits])
    total = sum(torch.exp(value) for value in shifted)
    return torch.stack([torch.exp(value) / total for value in shifted])


def top_k_gate(logits, k):
    """Top-k of p, renormalised."""
    p = softmax(logits)
    order = sorted(range(len(p)), key=lambda i: -float(p[i].detach()))[:k]
    total = sum(p[i] for i in order)
    return {i: p[i] / total for i in order}


def adamole_gate(logits, tau_logit):
    p = softmax(logits)
    tau = 1 / (1 + torch.exp(-tau_logit)) / len(p)
    above = {i: p[i] - tau for i in range(len(p)) if float((p[i] - tau).detach()) > 0}
    total = sum(above.values())
    return {i: value / total for i, value in above.items()}


def mixture(x, gates, a_list, b_list, scales):
    """Σ_j g_j s_j B_j A_j x for each token."""
    rows = []
    for token, gate in zip(x, gates, strict=True):
        y = torch.zeros(b_list[0].shape[0], dtype=x.dtype)
        for j, g in gate.items():
            y = y + g * scales[j] * (b_list[j] @ (a_list[j] @ token))
        rows.append(y)
    return torch.stack(rows)


def mor(x, logits, a, b, lambda_a, lambda_b, scale):
    """(α/r) Σ g_i λ_Bi ⊙ B(λ_Ai ⊙ A x)."""
    rows = []
    for token, row in zip(x, logits, strict=True):
        p = softmax(row)
        y = torch.zeros(b.shape[0], dtype=x.dtype)
        for i in range(len(p)):
            y = y + p[i] * lambda_b[i] * (b @ (lambda_a[i] * (a @ token)))
        rows.append(scale * y)
    return torch.stack(rows)


def hydra(x, logits, a, b_list, scale):
    """(α/r) Σ g_i B_i (A x)."""
    rows = []
    for token, row in zip(x, logits, strict=True):
        p = softmax(row)
        rows.append(scale * sum(p[i] * (b_list[i] @ (a @ token)) for i in range(len(p))))
    return torch.stack(rows)


def balance(logits, chosen_sets, kept, k):
    """N Σ f_i P_i over the kept tokens, f a plain number."""
    tokens = [t for t in range(len(logits)) if kept[t]]
    n = logits.shape[1]
    loss = torch.zeros((), dtype=logits.dtype)
    for i in range(n):
        f = sum(i in chosen_sets[t] for t in tokens) / (len(tokens) * k)
        p = sum(softmax(logits[t])[i] for t in tokens) / len(tokens)
        loss = loss + f * p
    return n * loss


def goat_scales(weight, starts, rank, first):
    """GOAT+'s s_i, so that s_i² σ_i is the same for every segment (eq. 82); s_1 is ``first``."""
    sigma = torch.linalg.svdvals(weight)
    mass = [float(sum(sigma[start : start + rank])) for start in starts]
    return [first * math.sqrt(mass[0] / own) for own in mass]


def goat_residual(weight, starts, rank, rho, scales=None):
    """W_res = (1/E) Σ s_j B_j A_j = 1/(E ρ) Σ_j (s_j/s) Σ_{i in segment j} σ_i u_i v_iᵀ.

    B_j and A_j are started with one s (eq. 19), ``scales[0]``; all s_j are s unless given.
    """
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    total = torch.zeros_like(weight)
    for j, start in enumerate(starts):
        factor = 1 if scales is None else scales[j] / scales[0]
        for i in range(start, start + rank):
            total = total + factor * sigma[i] * torch.outer(u[:, i], vt[i])
    return total / (len(starts) * rho)


def gelu(x):
    return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
