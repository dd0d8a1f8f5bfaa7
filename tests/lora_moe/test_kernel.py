"""The dense kernel, the gates and the balance loss against naive statements of the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.lora_moe import balance, experts, gates

T, D_IN, D_OUT, N, R = 7, 6, 5, 4, 3
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def tensors(dtype, *shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(s, generator=generator, dtype=torch.float64) / 2).to(dtype).requires_grad_()
        for s in shapes
    ]


def experts_alone(x, a, b, gate, scale=1.0):
    """s Σ g_j B_j A_j x, on a base of zeros."""
    base = x.new_zeros(len(x), len(b))
    return experts.dense_experts(base, x @ a.T, b, gate, scale)


def agree(ours, theirs, inputs, dtype):
    """Values, and the gradients of a fixed random projection, within the tolerance."""
    weight = tensors(dtype, ours.shape, seed=9)[0].detach()
    scale = max(1.0, float(theirs.detach().abs().max()))
    assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * scale
    mine = torch.autograd.grad((ours * weight).sum(), inputs, retain_graph=True)
    naives = torch.autograd.grad((theirs * weight).sum(), inputs, retain_graph=True)
    for got, want in zip(mine, naives, strict=True):
        scale = max(1.0, float(want.abs().max()))
        assert (got - want).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("k", [1, 2, 3, N])
def test_top_k_mixture(dtype, k):
    x, a, b, router = tensors(dtype, (T, D_IN), (N * R, D_IN), (D_OUT, N * R), (N, D_IN))
    logits = gates.router_logits(x, router)
    ours = experts_alone(x, a, b, gates.top_k_softmax(logits, k).weights, 0.7)
    chosen = [naive.top_k_gate(x_t @ router.T, k) for x_t in x]
    theirs = naive.mixture(x, chosen, a.split(R), b.split(R, 1), [0.7] * N)
    agree(ours, theirs, (x, a, b, router), dtype)


def test_adamole(dtype):
    x, a, b, router, tau, bias = tensors(
        dtype, (T, D_IN), (N * R, D_IN), (D_OUT, N * R), (N, D_IN), (1, D_IN), (1,)
    )
    routing = gates.threshold(gates.router_logits(x, router), gates.router_logits(x, tau, bias))
    ours = experts_alone(x, a, b, routing.weights)
    chosen = [naive.adamole_gate(x_t @ router.T, (x_t @ tau.T + bias)[0]) for x_t in x]
    assert len({len(gate) for gate in chosen}) > 1, "the number of experts must vary"
    theirs = naive.mixture(x, chosen, a.split(R), b.split(R, 1), [1.0] * N)
    agree(ours, theirs, (x, a, b, router, tau, bias), dtype)


def test_adamole_may_use_no_expert():
    routing = gates.threshold(torch.zeros(2, 4), torch.full((2, 1), 50.0))
    assert torch.equal(routing.weights, torch.zeros(2, 4))
    assert not routing.chosen.any()


def test_mor(dtype):
    x, a, b, router, la, lb = tensors(
        dtype, (T, D_IN), (R, D_IN), (D_OUT, R), (N, D_IN), (N, R), (N, D_OUT)
    )
    weights = gates.dense_softmax(gates.router_logits(x, router)).weights
    gate = 1.3 * weights.unsqueeze(-1) * la
    ours = experts_alone(x, a, experts.scaled_b(b, lb), gate)
    agree(ours, naive.mor(x, x @ router.T, a, b, la, lb, 1.3), (x, a, b, router, la, lb), dtype)


def test_hydra(dtype):
    x, a, b, router = tensors(dtype, (T, D_IN), (R, D_IN), (D_OUT, N * R), (N, D_IN))
    weights = gates.dense_softmax(gates.router_logits(x, router)).weights
    ours = experts_alone(x, a, b, weights, 1.3)
    theirs = naive.hydra(x, x @ router.T, a, b.split(R, 1), 1.3)
    agree(ours, theirs, (x, a, b, router), dtype)


def test_dora(dtype):
    weight, a, b, m, x = tensors(dtype, (D_OUT, D_IN), (R, D_IN), (D_OUT, R), (D_OUT,), (T, D_IN))
    norm = experts.row_norm(weight, a, b, 0.5)
    ours = experts.dora_delta(x @ weight.T, 0.5 * x @ a.T @ b.T, m, norm)
    adapted = weight + 0.5 * b @ a
    fixed = adapted.detach().norm(dim=1)
    rows = [m[i] / fixed[i] * adapted[i] - weight[i] for i in range(D_OUT)]
    agree(ours, torch.stack([x @ row for row in rows], 1), (x, a, b, m), dtype)


@pytest.mark.parametrize("k", [1, 3, 5, 9])
@pytest.mark.parametrize("weighting", ["prob", "straight_through"])
def test_top_k_unnormalised(weighting, k):
    (logits,) = tensors(torch.float64, (3, 5))
    routing = gates.top_k_unnormalised(logits, weighting, k)
    best = []
    for row, weights in zip(logits, routing.weights, strict=True):
        p = naive.softmax(row)
        chosen = sorted(range(5), key=lambda i: -float(p[i].detach()))[:k]
        best.append(sum(p[i] for i in chosen))
        for i in range(5):
            want = 0.0 if i not in chosen else float(p[i].detach()) if weighting == "prob" else 1.0
            assert float(weights[i].detach()) == pytest.approx(want, abs=1e-12)
    # Both give the router p's gradient.
    grad = torch.autograd.grad(routing.weights.sum(), logits)[0]
    want = torch.autograd.grad(sum(best), logits)[0]
    assert torch.allclose(grad, want, atol=1e-12)


@pytest.mark.parametrize("system", ["top_k", "threshold", "mor", "hydra"])
def test_gradcheck(system):
    x, a, b, router, la, lb, tau = tensors(
        torch.float64,
        *[(3, D_IN), (N * R, D_IN), (D_OUT, N * R), (N, D_IN), (N, R), (N, D_OUT), (1, D_IN)],
    )

    def layer(x, a, b, router, la, lb, tau):
        logits = gates.router_logits(x, router)
        if system == "top_k":
            return experts_alone(x, a, b, gates.top_k_softmax(logits, 2).weights)
        if system == "threshold":
            routing = gates.threshold(logits, gates.router_logits(x, tau))
            return experts_alone(x, a, b, routing.weights)
        weights = gates.dense_softmax(logits).weights
        if system == "hydra":
            return experts_alone(x, a[:R], b, weights)
        gate = weights.unsqueeze(-1) * la
        return experts_alone(x, a[:R], experts.scaled_b(b[:, :R], lb), gate)

    assert torch.autograd.gradcheck(layer, (x, a, b, router, la, lb, tau))


@pytest.mark.parametrize("how", ["last", "mean", "max", "attention"])
def test_gradcheck_of_a_prompt_chosen_expert(how):
    from htsr_alloc.lora_moe.systems.em_lora import activation, prompt

    start = [
        torch.tensor(c, dtype=torch.float64) for c in (activation.NUMERATOR, activation.DENOMINATOR)
    ]

    def g(x):
        return activation.rational(x, *start)

    hidden, a, b, router, vector, magnitude = tensors(
        torch.float64, (2, 4, D_IN), (R, D_IN), (D_OUT, R), (N, D_IN), (D_IN,), (D_OUT,)
    )
    (weight,) = tensors(torch.float64, (D_OUT, D_IN), seed=4)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]).bool()
    norm = experts.row_norm(weight, a, b, 1.0)

    def layer(hidden, a, b, router, vector, magnitude):
        pooled = prompt.pool(hidden, mask, how, vector)
        gate = prompt.decide(pooled, router, g, "prob", 1).weights[:, 1].view(-1, 1, 1)
        plain = experts.add_product(hidden @ weight.T, hidden @ a.T * gate, b, 2.0)
        dora = experts.dora_delta(hidden @ weight.T, hidden @ a.T @ b.T, magnitude, norm)
        return plain, gate * dora

    assert torch.autograd.gradcheck(layer, (hidden, a, b, router, vector, magnitude))


@pytest.mark.parametrize("k", [1, 2])
def test_balance_loss_leaves_padding_out(dtype, k):
    (logits,) = tensors(dtype, (T, N))
    kept = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    routing = gates.top_k_softmax(logits, k)
    ours = balance.load_balance(routing.probs, routing.chosen, kept.bool(), k)
    sets = [set(naive.top_k_gate(row, k)) for row in logits]
    agree(ours[None], naive.balance(logits, sets, kept, k)[None], (logits,), dtype)
    grad = torch.autograd.grad(ours, logits)[0]
    assert grad[2].abs().max() == 0
    assert grad[0].abs().max() > 0


def test_balance_is_one_at_balance():
    logits = torch.eye(4).repeat(5, 1) * 1e-3
    routing = gates.top_k_softmax(logits, 1)
    loss = balance.load_balance(routing.probs, routing.chosen, None, 1)
    assert float(loss) == pytest.approx(1, abs=1e-6)


def test_injected_loss_has_the_gradient_of_a_sum():
    (w,) = tensors(torch.float64, (4,))
    scale = torch.tensor(3.0, dtype=torch.float64)
    carrier = balance.inject(w * 2, (w**3).sum(), scale)
    assert torch.equal(carrier, w * 2)
    (grad,) = torch.autograd.grad(carrier.sum(), w)
    assert torch.allclose(grad, 2 + 3 * 3 * w.detach() ** 2)


def test_gates_ignore_autocast():
    x, router = tensors(torch.float32, (T, D_IN), (N, D_IN))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = gates.router_logits(x.bfloat16(), router)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, x.bfloat16().float() @ router.T)
    assert math.isfinite(float(logits.detach().sum()))


@pytest.mark.parametrize("shape", [(T,), (2, T)])
def test_projection_is_two_products(dtype, shape):
    """Both have the gradients of x Aᵀ and x W_rᵀ, together and one alone."""
    x, a, router = tensors(dtype, (*shape, D_IN), (N * R, D_IN), (N, D_IN))
    hidden, logits = experts.project(x, a, router)
    agree(hidden, x @ a.T, (x, a), dtype)
    agree(logits, x @ router.T, (x, router), dtype)
    ours = torch.cat(experts.project(x, a, router), -1)
    agree(ours, torch.cat([x @ a.T, x @ router.T], -1), (x, a, router), dtype)
    with torch.no_grad():
        assert torch.equal(torch.cat(experts.project(x, a, router), -1), ours)


def test_projection_twice_differentiable():
    inputs = tensors(torch.float64, (2, 3, D_IN), (N * R, D_IN), (N, D_IN))
    assert torch.autograd.gradgradcheck(experts.project, inputs)


def test_an_expert_counts_though_its_weight_rounds_to_zero():
    routing = gates.top_k_softmax(torch.tensor([[0.0, 200.0, -1.0]]), 2)
    assert routing.weights.tolist() == [[0.0, 1.0, 0.0]]
    assert routing.chosen.tolist() == [[True, True, False]]
