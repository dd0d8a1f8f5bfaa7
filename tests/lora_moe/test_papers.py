"""Adapters of the public API against the papers' equations (helpers/papers.py), in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import papers

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import PeftModel

from htsr_alloc import fit
from htsr_alloc.allocation import quotas, repair_official
from htsr_alloc.lora_moe import router_aux_loss

R, N, K, ALPHA = 2, 4, 2, 16
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made(system, trained=True, layers=2, **settings):
    model = tiny.llama(layers=layers, dtype=torch.float64)
    if system == "em_lora":  # one linear a prompt, and eq. 6 as printed
        settings = {"top_k": 1, "em_activation": "rational_unlimited", **settings}
    return tiny.adapted(system, trained=trained, model=model, **{"top_k": K, **settings})


def close(got, want, scale=1.0):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * scale)


def adapted_layers(model):
    """name -> module, in the order of the model."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_moe_A")}


def own(layer, name):
    """A parameter of the adapter, such as A or router."""
    return getattr(layer, f"lora_moe_{name}")["default"].detach()


def experts(layer, n=N, r=R):
    """[(A, B)]: rows of A and columns of B in blocks of r; HydraLoRA has one A for all."""
    a, b = own(layer, "A"), own(layer, "B")
    parts = a.split(r) if len(a) > r else [a] * n
    return list(zip(parts, b.split(r, dim=1), strict=True))


def watched(model, *args, **kwargs):
    """What model(...) returns, and name -> (x, output) of every adapted linear, rows flattened."""
    seen, hooks = {}, []
    for name, layer in adapted_layers(model).items():

        def keep(module, given, got, name=name):
            seen[name] = (given[0].detach().flatten(0, -2), got.detach().flatten(0, -2))

        hooks.append(layer.register_forward_hook(keep))
    out = model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return out, seen


def weight(layer):
    return layer.get_base_layer().weight.detach()


def alphalora(x, layer):
    gates, _, _ = papers.mola_gates(x, own(layer, "router"), K)
    return papers.mixture(x, weight(layer), gates, experts(layer), [ALPHA / R] * N)


def hydra(x, layer):
    gates = papers.soft_gates(x, own(layer, "router"))
    return papers.mixture(x, weight(layer), gates, experts(layer), [ALPHA / R] * N)


def adamole(x, layer):
    threshold = own(layer, "tau")[0], own(layer, "tau_bias")[0]
    gates, *_ = papers.adamole_gates(x, own(layer, "router"), *threshold)
    return papers.mixture(x, weight(layer), gates, experts(layer), [ALPHA / R] * N)


def mor(x, layer):
    parts = [own(layer, name) for name in ("router", "A", "B", "lambda_A", "lambda_B")]
    return papers.mor(x, weight(layer), *parts, ALPHA)


def goat(x, layer, plus=False, segment="O", s=None):
    w = weight(layer)
    s = s or papers.goat_scale(w.shape[1], R)
    firsts = papers.goat_first(segment, min(w.shape), R, N)
    start = papers.goat_start(w, firsts, R, s, rho=10)
    scales = papers.goat_plus_scales(s, [sigma for *_, sigma in start]) if plus else [s] * N
    residual = papers.goat_residual([(a, b) for a, b, _ in start], scales)
    gates, _, _ = papers.goat_gates(x, own(layer, "router"), K)
    return papers.mixture(x, w - residual, gates, experts(layer), scales)


def goat_plus(x, layer):
    return goat(x, layer, plus=True)


@pytest.mark.parametrize("forward", [alphalora, hydra, adamole, mor, goat, goat_plus])
def test_forward_of_every_linear(forward):
    model = made(forward.__name__).eval()
    with torch.no_grad():
        _, seen = watched(model, tiny.tokens())
    assert len(seen) == (6 if forward is mor else 14)
    for name, layer in adapted_layers(model).items():
        x, got = seen[name]
        want = forward(x, layer)
        assert (got - x @ weight(layer).T).norm() > 1e-2 * got.norm(), "the adapter does nothing"
        close(got, want, scale=float(want.abs().max()))


def goat_zero(x, layer):
    """Table 5, last row: "original zero initialization", W_res = 0; MoE scaling stays."""
    s = papers.goat_scale(x.shape[1], R)
    gates, _, _ = papers.goat_gates(x, own(layer, "router"), K)
    return papers.mixture(x, weight(layer), gates, experts(layer), [s] * N)


def goat_single(x, layer):
    """Table 5, "Without MoE": all segments in one LoRA, every weight 1 and so W_res = s Σ B A."""
    w = weight(layer)
    s = papers.goat_scale(w.shape[1], R)
    start = papers.goat_start(w, papers.goat_first("O", min(w.shape), R, N), R, s, rho=10)
    residual = N * papers.goat_residual([(a, b) for a, b, _ in start], [s] * N)
    return papers.mixture(x, w - residual, torch.ones(len(x), N).double(), experts(layer), [s] * N)


def mor_mean(x, layer):
    """Table 4, Mean Pooling: each expert weighs 1/N; nothing is learnt."""
    parts = [own(layer, name) for name in ("A", "B", "lambda_A", "lambda_B")]
    return papers.mor(x, weight(layer), torch.zeros(N, x.shape[1]).double(), *parts, ALPHA)


VARIANTS = {
    "P": ("goat", {"goat_segment": "P"}, lambda x, m: goat(x, m, segment="P")),
    "M": ("goat", {"goat_segment": "M"}, lambda x, m: goat(x, m, segment="M")),
    "without MS": ("goat", {"goat_scale": "alpha"}, lambda x, m: goat(x, m, s=ALPHA / R)),
    "zero": ("goat", {"goat_segment": "zero"}, goat_zero),
    "single": ("goat", {"goat_mixture": False}, goat_single),
    "mean": ("mor", {"mor_router": "mean"}, mor_mean),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_tables(name, tmp_path):
    """GOAT's table 5 and MoR's table 4; saved and loaded they answer the same."""
    system, setting, forward = VARIANTS[name]
    if system == "goat" and not setting.get("goat_mixture", True):
        setting = {**setting, "top_k": None}
    model = made(system, **setting).eval()
    with torch.no_grad():
        out, seen = watched(model, tiny.tokens())
    for path, layer in adapted_layers(model).items():
        x, got = seen[path]
        want = forward(x, layer)
        assert (got - x @ weight(layer).T).norm() > 1e-2 * got.norm(), "the adapter does nothing"
        close(got, want, scale=float(want.abs().max()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.llama(layers=2, dtype=torch.float64), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(tiny.tokens()).logits, out.logits)


def test_a_variant_that_starts_as_the_base():
    """Without MoE the start is W₀ exactly; with a mixture only in expectation (theorem 3.4)."""
    base = tiny.llama(dtype=torch.float64)(tiny.tokens()).logits
    single = made("goat", trained=False, goat_mixture=False, top_k=None).eval()
    with torch.no_grad():
        close(single(tiny.tokens()).logits, base)
        mixed = made("goat", trained=False).eval()(tiny.tokens()).logits
    assert (mixed - base).abs().max() > 1e-3


def test_start_of_goat_without_segments():
    """Theorem 3.5: A uniform on ±√(6 / d_in), of variance 2 / d_in, and B = 0."""
    for layer in adapted_layers(made("goat", trained=False, goat_segment="zero")).values():
        a, bound = own(layer, "A"), (6 / weight(layer).shape[1]) ** 0.5
        assert 0.9 * bound < a.abs().max() <= bound
        assert not own(layer, "B").any()


@pytest.mark.parametrize("system", ["alphalora", "hydra", "adamole", "mor", "em_lora"])
def test_start_at_zero(system):
    """B = 0 and A random (MoR table 2; AlphaLoRA below eq. 7): the adapted model is the base."""
    model = made(system, trained=False).eval()
    for layer in adapted_layers(model).values():
        assert not own(layer, "B").any()
        assert own(layer, "A").std() > 0
    with torch.no_grad():
        got = model(tiny.tokens()).logits
        close(got, tiny.llama(dtype=torch.float64)(tiny.tokens()).logits)


@pytest.mark.parametrize("segment", ["O", "P", "M"])
@pytest.mark.parametrize("plus", [False, True], ids=["goat", "goat_plus"])
def test_start_of_goat(segment, plus):
    """Eq. 13, 19 and E.3: the same s for all; singular vectors are free up to their sign."""
    rho, eta = 7.0, 1.5
    settings = {"goat_segment": segment, "goat_rho": rho, "goat_eta": eta}
    model = made("goat_plus" if plus else "goat", trained=False, **settings)
    for layer in adapted_layers(model).values():
        w = weight(layer)
        s = papers.goat_scale(w.shape[1], R, eta)
        firsts = papers.goat_first(segment, min(w.shape), R, N)
        start = papers.goat_start(w, firsts, R, s, rho)
        for (a, b), (want_a, want_b, _) in zip(experts(layer), start, strict=True):
            close(b @ a, want_b @ want_a)
            close(a @ a.T, want_a @ want_a.T)
            close(b.T @ b, want_b.T @ want_b)


def test_random_segments_of_goat():
    """E.3, R: each expert gets r directions in a row, from a start that is a multiple of r."""
    model = made("goat", trained=False, goat_segment="R")
    found = set()
    for layer in adapted_layers(model).values():
        w = weight(layer)
        s, h = papers.goat_scale(w.shape[1], R), min(w.shape)
        all_of_it = papers.goat_start(w, range(0, h, R), R, s, rho=10)
        for a, b in experts(layer):
            gaps = [float((b @ a - want_b @ want_a).abs().max()) for want_a, want_b, _ in all_of_it]
            assert min(gaps) < 1e-12
            found.add(gaps.index(min(gaps)))
    assert len(found) > N


def test_goat_plus_evens_the_gradients():
    """Eq. 82: s_i² σ_i is one number; by eq. 19 σ_i is the expert's |A_i|² but for s ρ."""
    model = made("goat_plus", trained=False)
    for layer in adapted_layers(model).values():
        scales = own(layer, "scale")
        gains = [
            float(s**2 * a.square().sum()) for s, (a, _) in zip(scales, experts(layer), strict=True)
        ]
        assert max(gains) == pytest.approx(min(gains), rel=1e-12)


@pytest.mark.parametrize("system", ["alphalora", "goat", "hydra", "adamole", "mor"])
def test_parameters(system):
    """GOAT appendix F.1 and MoR table 2; AdaMoLE adds a threshold of d_in weights and a bias."""
    model = made(system)
    for layer in adapted_layers(model).values():
        d_out, d_in = weight(layer).shape
        found = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        counts = {
            "hydra": papers.hydra_parameters(d_in, d_out, R, N),
            "mor": papers.mor_parameters(d_in, d_out, R, N),
            "adamole": papers.mixture_parameters(d_in, d_out, R, N) + d_in + 1,
        }
        assert found == counts.get(system, papers.mixture_parameters(d_in, d_out, R, N))


def test_mor_on_llama_2():
    """MoR table 1: 23.2 M parameters for 8 experts of rank 8 on LLaMA-2-7B's feed-forward."""
    config = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
    with torch.device("meta"):
        model = tiny.llama(layers=1, num_key_value_heads=32, **config)
        model = tiny.adapted("mor", model=model, trained=False, r=8, num_experts=8)
    assert round(model.get_nb_trainable_parameters()[0] * 32 / 1e6, 1) == 23.2


def loss_of(system, x, layer):
    """A module's balance loss: GOAT eq. 26-28, Switch eq. 4."""
    router = own(layer, "router")
    if system == "adamole":
        _, p, chosen, _ = papers.adamole_gates(
            x, router, own(layer, "tau")[0], own(layer, "tau_bias")
        )
        return papers.balance(p, chosen, k=1)
    gates = papers.goat_gates if system == "goat" else papers.mola_gates
    _, p, chosen = gates(x, router, K)
    return papers.balance(p, chosen, K)


@pytest.mark.parametrize("system", ["alphalora", "goat", "adamole"])
def test_balance_loss(system):
    """One layer's modules averaged, layers added up; and what it adds to a router's gradient."""
    gradients = {}
    for coefficient in (0.0, 0.25):
        model, ids = made(system, router_aux_loss_coef=coefficient).train(), tiny.tokens()
        out, seen = watched(model, ids, labels=ids)
        out.loss.backward()
        last = list(adapted_layers(model))[-1]
        gradients[coefficient] = adapted_layers(model)[last].lora_moe_router["default"].grad
    layers = adapted_layers(model)
    every = [loss_of(system, seen[name][0], layer) for name, layer in layers.items()]
    want = 0.25 * (sum(every[:7]) + sum(every[7:])) / 7
    assert router_aux_loss(model) == pytest.approx(want, rel=1e-12)

    way = torch.randn(gradients[0.0].shape, dtype=torch.float64, generator=torch.Generator())
    around = []
    for step in (1e-5, -2e-5):
        own(layers[last], "router").add_(step * way)
        around.append(loss_of(system, seen[last][0], layers[last]))
    slope = 0.25 / 7 * (around[0] - around[1]) / 2e-5
    assert float(((gradients[0.25] - gradients[0.0]) * way).sum()) == pytest.approx(slope, rel=1e-5)


def places_of(prompts, length=9):
    """(rows, length) attention mask with each row's tokens last, as in generation."""
    return torch.tensor([[0] * (length - n) + [1] * n for n in prompts])


def em_probabilities(model, states, prompts, pooler="attention"):
    """One (prompts, 7) a transformer layer; ``prompts`` is bool (rows, length), their tokens."""
    heads = [m for m in adapted_layers(model).values() if "default" in m.lora_moe_router]
    found = []
    for head, state in zip(heads, states, strict=True):
        query = own(head, "pool") if pooler == "attention" else None
        router = [own(head, name) for name in ("numerator", "denominator", "router")]
        rows = [row[place] for row, place in zip(state.detach(), prompts, strict=True)]
        found.append(torch.stack([papers.em_route(row, pooler, query, *router) for row in rows]))
    return found


def em_forward(x, layer, name, p, weighting, dora):
    """Eq. 1 for the linear that a row's prompt chose, the bare base for the other six."""
    w, (a, b) = weight(layer), experts(layer, n=1)[0]
    out = []
    for row, share in zip(x, p, strict=True):
        base = row @ w.T
        [best] = papers.top(share, 1)
        if not name.endswith(NAMES[best]):
            out.append(base)
        else:
            m = own(layer, "magnitude") if dora else None
            s = ALPHA / R
            moved = papers.dora(row, w, a, b, m, s) if dora else base + s * row @ a.T @ b.T
            factor = share[best] if weighting == "prob" else 1.0
            out.append(base + factor * (moved - base))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("pooler", "weighting", "dora"),
    [
        ("attention", "prob", False),
        ("mean", "straight_through", False),
        ("max", "prob", False),
        ("last", "straight_through", False),
        ("attention", "straight_through", True),
        ("attention", "prob", True),
    ],
)
def test_em_lora(pooler, weighting, dora):
    """EM-LoRA eq. 1-3 and 8; the paper does not say whether the probability is a factor."""
    settings = {"em_pooler": pooler, "em_weighting": weighting, "em_dora": dora}
    model = made("em_lora", **settings).eval()
    mask = places_of([9, 6, 4, 9])
    inputs = {"input_ids": tiny.tokens(rows=4), "attention_mask": mask}
    with torch.no_grad():
        out, seen = watched(model, **inputs, output_hidden_states=True)
    p = em_probabilities(model, out.hidden_states[:-1], mask.bool(), pooler)
    chosen = set()
    for i, (name, layer) in enumerate(adapted_layers(model).items()):
        x, got = (t.unflatten(0, (4, 9)) for t in seen[name])
        want = em_forward(x, layer, name, p[i // 7], weighting, dora)
        close(got[mask.bool()], want[mask.bool()], scale=float(want.abs().max()))
        chosen |= {(i // 7, *papers.top(row, 1)) for row in p[i // 7]}
    assert len(chosen) > 2


def test_em_balance_loss():
    """Eq. 4 and 5 over the prompts of a batch, the tokens without a label; layers add up."""
    model = made("em_lora", router_aux_loss_coef=0.25).train()
    ids = tiny.tokens(rows=4)
    prompts = torch.arange(9).expand(4, 9) < torch.tensor([[5], [3], [6], [4]])
    labels = ids.masked_fill(prompts, -100)
    out, _ = watched(model, ids, labels=labels, output_hidden_states=True)
    p = em_probabilities(model, out.hidden_states[:-1], prompts)
    want = 0.25 * sum(papers.em_balance(layer) for layer in p)
    assert router_aux_loss(model) == pytest.approx(want, rel=1e-12)


def test_em_routes_once():
    """Section 3.3: later tokens keep the prompt's choice, so that they equal one whole pass."""
    model = made("em_lora").eval()
    ids = tiny.tokens(rows=3)
    with torch.no_grad():
        first, _ = watched(model, ids, use_cache=True, output_hidden_states=True)
        p = em_probabilities(model, first.hidden_states[:-1], torch.ones(3, 9, dtype=torch.bool))
        after = {"past_key_values": first.past_key_values, "use_cache": True}
        _, seen = watched(model, tiny.tokens(rows=3, length=1, seed=5), **after)
    for i, (name, layer) in enumerate(adapted_layers(model).items()):
        x, got = (t.unflatten(0, (3, 1)) for t in seen[name])
        close(
            got, em_forward(x, layer, name, p[i // 7], "prob", False), scale=float(got.abs().max())
        )


def test_em_parameters():
    """Section 4.3: m = 6 and n = 5 of the rational, and one router of d x N_mod a layer."""
    model = made("em_lora", layers=1)
    extra = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad)
    for layer in adapted_layers(model).values():
        extra -= R * sum(weight(layer).shape)
    assert extra == 7 * 32 + 32 + 7 + 5


@pytest.mark.parametrize("seed", range(3))
def test_alpha_hill(seed):
    """AlphaLoRA eq. 5 with the k of "Fix-finger", and with the k of every other rule."""
    values = np.sort(np.random.default_rng(seed).pareto(1.5, 200) + 0.1)
    found = fit(values, "paper")
    assert found.k == papers.fix_finger(values)
    assert found.alpha == pytest.approx(papers.pl_alpha_hill(values, found.k), rel=1e-12)


def test_quotas_and_repair():
    """AlphaLoRA eq. 6, and eq. 7 as printed on v^β as the released script has it."""
    scores = [2.1, 3.4, 2.7, 2.2, 4.4, 3.1]
    for t, beta in itertools.product([12, 25, 31], [0.5, 1.0, 2.5]):
        quota = papers.alphalora_quota(scores, t, beta)
        assert quotas(scores, t, beta) == pytest.approx(quota, rel=1e-12)
        want = papers.alphalora_repair([v**beta for v in scores], quota, t)
        assert repair_official(scores, quota, t, beta) == want
