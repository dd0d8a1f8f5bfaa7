"""The LoRA-MoE papers' equations, token by token in float64, written from the papers alone.

W is (d_out, d_in) and x (tokens, d_in). ``experts`` is a list of (A (r, d_in), B (d_out, r)).

AlphaLoRA 2410.10054 · MoLA 2402.08562 · Switch 2101.03961 · GOAT 2502.16894 · MoR 2410.13408 ·
HydraLoRA 2404.19245 · AdaMoLE 2405.00361 · EM-LoRA (MiLoRA) 2410.18035 · Molina et al. 1907.06732 ·
DoRA 2402.09353.
"""

from __future__ import annotations

import math

import torch


def softmax(z):
    """(n,) -> (n,): exp(z_i) / Σ_j exp(z_j) (GOAT eq. 9, MoR eq. 11)."""
    e = [math.exp(float(v - max(z))) for v in z]
    return torch.tensor([v / sum(e) for v in e], dtype=torch.float64)


def top(z, k):
    """Ω_k: the indices of the k largest (GOAT, above eq. 10)."""
    return sorted(range(len(z)), key=lambda i: -float(z[i]))[:k]


def mola_gates(x, router, k):
    """MoLA eq. 4: TopK(Softmax(W_r x))_i over the sum of the K that are kept; also p and Ω."""
    gates, p, chosen = _empty(x, router)
    for t in range(len(x)):
        p[t] = softmax(router @ x[t])
        omega = top(p[t], k)
        for i in omega:
            gates[t, i] = p[t, i] / sum(p[t, j] for j in omega)
            chosen[t, i] = 1
    return gates, p, chosen


def goat_gates(x, router, k):
    """GOAT eq. 10: exp(z_i) over the sum of exp(z_j) for j in Ω_k; also eq. 9's p and Ω."""
    gates, p, chosen = _empty(x, router)
    for t in range(len(x)):
        z = router @ x[t]
        p[t] = softmax(z)
        omega = top(z, k)
        for i in omega:
            gates[t, i] = math.exp(z[i]) / sum(math.exp(z[j]) for j in omega)
            chosen[t, i] = 1
    return gates, p, chosen


def adamole_gates(x, router, tau, bias):
    """AdaMoLE eq. 6-8: τ = τ_max σ(W_τ x + b_τ), τ_max = 1/N; the experts with p_i ≥ τ weigh
    (p_i − τ) / Σ (p_j − τ). Also p, who is chosen, and τ."""
    gates, p, chosen = _empty(x, router)
    taus = torch.zeros(len(x), dtype=torch.float64)
    n = len(router)
    for t in range(len(x)):
        p[t] = softmax(router @ x[t])
        taus[t] = 1 / n / (1 + math.exp(-float(tau @ x[t] + bias)))
        omega = [i for i in range(n) if p[t, i] >= taus[t]]
        for i in omega:
            gates[t, i] = (p[t, i] - taus[t]) / sum(p[t, j] - taus[t] for j in omega)
            chosen[t, i] = 1
    return gates, p, chosen, taus


def soft_gates(x, router):
    """HydraLoRA eq. 5 and MoR eq. 11: ω = softmax(W x), every expert."""
    return torch.stack([softmax(router @ row) for row in x])


def mixture(x, weight, gates, experts, scales):
    """AlphaLoRA eq. 2, GOAT eq. 12 and 83 (one s an expert), HydraLoRA eq. 5 (one A):
    W x + Σ_i w_i s_i B_i A_i x."""
    out = []
    for t in range(len(x)):
        o = weight @ x[t]
        for i, (a, b) in enumerate(experts):
            o = o + gates[t, i] * scales[i] * (b @ (a @ x[t]))
        out.append(o)
    return torch.stack(out)


def mor(x, weight, router, a, b, lambda_a, lambda_b, alpha):
    """MoR eq. 10-12: W x + Σ_i G_i(x) D_i x, D_i = α/r diag(λ_Bi) B diag(λ_Ai) A."""
    gates, out = soft_gates(x, router), []
    for t in range(len(x)):
        o = weight @ x[t]
        for i in range(len(lambda_a)):
            d = alpha / len(a) * torch.diag(lambda_b[i]) @ b @ torch.diag(lambda_a[i]) @ a
            o = o + gates[t, i] * (d @ x[t])
        out.append(o)
    return torch.stack(out)


def mor_parameters(d_in, d_out, r, n):
    """MoR table 2, 2dr + N(2d + r), where the sides differ: A, B, R, Ω_A and Ω_B."""
    return r * (d_in + d_out) + n * (d_in + d_out + r)


def mixture_parameters(d_in, d_out, r, n):
    """GOAT appendix F.1 for MoLoRA and GOAT, one linear, r the rank of one of n experts."""
    return n * r * (d_in + d_out) + n * d_in


def hydra_parameters(d_in, d_out, r, n):
    """GOAT appendix F.1 for HydraLoRA: one A of rank r, n B and the router."""
    return r * d_in + n * r * d_out + n * d_in


def balance(p, chosen, k):
    """GOAT eq. 26-28: Σ_i f_i P_i, f_i = E/(kT) Σ_t 1(t on i), P_i = 1/T Σ_t p_i(t).

    With k = 1 this is Switch eq. 4-6 without its α."""
    tokens, n = p.shape
    loss = 0.0
    for i in range(n):
        f = n / (k * tokens) * sum(float(c) for c in chosen[:, i])
        loss += f * sum(float(v) for v in p[:, i]) / tokens
    return loss


def goat_scale(d_in, r, eta=1.0):
    """GOAT theorem 3.5: s = √(3 n η / r), n the input's size."""
    return math.sqrt(3 * d_in * eta / r)


def goat_first(segment, h, r, n):
    """k of GOAT eq. 13 and appendix E.3: where each expert's segment starts."""
    starts = {
        "O": [j * (h // n) for j in range(n)],
        "P": [j * r for j in range(n)],
        "M": [h - (j + 1) * r for j in range(n)],
    }
    return starts[segment]


def goat_start(weight, firsts, r, s, rho):
    """GOAT eq. 13 and 19: B = √(1/sρ) U' Σ'^½, A = √(1/sρ) Σ'^½ V'ᵀ, and σ of each segment."""
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    found = []
    for k in firsts:
        root = torch.diag(sigma[k : k + r].sqrt()) / math.sqrt(s * rho)
        found.append((root @ vt[k : k + r], u[:, k : k + r] @ root, float(sigma[k : k + r].sum())))
    return found


def goat_residual(experts, scales):
    """GOAT theorem 3.4: W_res = s/E Σ_i B_i A_i (an s_i for each with appendix D)."""
    return sum(s * (b @ a) for (a, b), s in zip(experts, scales, strict=True)) / len(experts)


def goat_plus_scales(s, sigmas):
    """GOAT eq. 83: s_i = s_1 √σ_0 / √σ_i, σ the sum over the segment."""
    return [s * math.sqrt(sigmas[0]) / math.sqrt(sigma) for sigma in sigmas]


def rational(x, numerator, denominator):
    """EM-LoRA eq. 6 as Molina et al. eq. 1 and 2 have it: Σ a_j x^j / (1 + |Σ b_i x^i|), i ≥ 1."""
    out = []
    for value in x.tolist():
        top_sum = sum(float(a) * value**j for j, a in enumerate(numerator))
        low_sum = sum(float(b) * value ** (i + 1) for i, b in enumerate(denominator))
        out.append(top_sum / (1 + abs(low_sum)))
    return torch.tensor(out, dtype=torch.float64)


def pool(hidden, pooler, query=None):
    """EM-LoRA eq. 2 and 8, one prompt's (n, d) -> (d,)."""
    if pooler == "last":
        return hidden[-1]
    if pooler == "mean":
        return sum(hidden) / len(hidden)
    if pooler == "max":
        return torch.stack([max(column) for column in hidden.T])
    share = softmax(hidden @ query)
    return sum(a * h for a, h in zip(share, hidden, strict=True))


def em_route(hidden, pooler, query, numerator, denominator, router):
    """EM-LoRA eq. 3, one prompt: Softmax(g(Pooler(H)) W)."""
    return softmax(router @ rational(pool(hidden, pooler, query), numerator, denominator))


def em_balance(p):
    """EM-LoRA eq. 4 and 5, (prompts, N_mod) -> N_mod Σ f_i p̂_i, f_i by the largest p."""
    prompts, n = p.shape
    loss = 0.0
    for i in range(n):
        f = sum(1 for row in p if top(row, 1) == [i]) / prompts
        loss += n * f * sum(float(v) for v in p[:, i]) / prompts
    return loss


def dora(x, weight, a, b, magnitude, s):
    """DoRA eq. 5: m (W + s B A) / ‖W + s B A‖, a norm for each output."""
    moved = weight + s * (b @ a)
    norms = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in moved]
    directed = torch.stack([m * row / n for m, row, n in zip(magnitude, moved, norms, strict=True)])
    return torch.stack([directed @ row for row in x])


def pl_alpha_hill(eigenvalues, k):
    """AlphaLoRA eq. 5, ascending λ: 1 + k / Σ_{i=1..k} ln(λ_{n−i+1} / λ_{n−k})."""
    n = len(eigenvalues)
    at = lambda i: float(eigenvalues[i - 1])  # noqa: E731 - the paper counts from 1
    return 1 + k / sum(math.log(at(n - i + 1) / at(n - k)) for i in range(1, k + 1))


def fix_finger(eigenvalues, bins=100):
    """AlphaLoRA below eq. 5: the k whose λ_min is at the peak of the density of log10 λ."""
    logs = [math.log10(v) for v in eigenvalues]
    low, high = min(logs), max(logs)
    counts = [0] * bins
    for v in logs:
        counts[min(int((v - low) / (high - low) * bins), bins - 1)] += 1
    peak = low + counts.index(max(counts)) * (high - low) / bins
    return sum(1 for v in logs if v > peak)


def alphalora_quota(scores, t, beta):
    """AlphaLoRA eq. 6 before its rounding: v_i^β / Σ v^β · T."""
    return [v**beta / sum(w**beta for w in scores) * t for v in scores]


def alphalora_repair(compared, quota, t):
    """AlphaLoRA eq. 6 and 7 as printed: round, then +1 at argmin, −1 at argmax of v̂ − s."""
    s = [round(q) for q in quota]
    while sum(s) != t:
        gap = [v - n for v, n in zip(compared, s, strict=True)]
        i = gap.index(min(gap) if sum(s) < t else max(gap))
        s[i] += 1 if sum(s) < t else -1
    return s


def _empty(x, router):
    shape = (len(x), len(router))
    return tuple(torch.zeros(shape, dtype=torch.float64) for _ in range(3))
