"""Parameter budgets and counts by linears: exact or the closest below, and fair."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.records_made import linears, matrix, metrics_with
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from htsr_alloc.allocation import Bounds, allocate, parse_params, parse_share, quotas
from htsr_alloc.allocation.scorefile import read_scores
from htsr_alloc.allocation.spend import spend
from htsr_alloc.allocation.units import ExpertCost, cost_of
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics, Model, dumps, loads

LLAMA_7B = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (4096, 4096)),
    **dict.fromkeys(("gate_proj", "up_proj"), (11008, 4096)),
    "down_proj": (4096, 11008),
}
COSTS = st.builds(ExpertCost, st.integers(1, 12), st.integers(0, 5))
UNITS = st.lists(st.tuples(st.floats(0.5, 20.0), COSTS), min_size=1, max_size=6)


def parameters(cost: ExpertCost, n: int) -> int:
    """METHODS 3: N r (d_in + d_out), and N d_in where there is a choice."""
    return 0 if n == 0 else cost.lora if n == 1 else n * cost.lora + n * cost.router


def llama_7b(scores) -> Metrics:
    return linears(LLAMA_7B, [[score] * 7 for score in scores])


@settings(max_examples=300, deadline=None)
@given(units=UNITS, share=st.floats(0, 1), low=st.integers(0, 2), extra=st.integers(0, 6))
def test_no_rounding_of_the_quotas_comes_closer(units, share, low, extra):
    """Against every rounding down or up there is, in the stated order of preference."""
    weights, costs = [v for v, _ in units], [c for _, c in units]
    bounds = Bounds(low, low + extra + 1)
    least = sum(parameters(c, bounds.low) for c in costs)
    most = sum(parameters(c, bounds.high) for c in costs)
    params = max(least + round(share * (most - least)), 1)
    quota, counts = spend(weights, costs, params, bounds)
    assert all(bounds.low <= n <= bounds.high for n in counts)
    floors = [math.floor(q) for q in quota]
    choices = [[1, 0] if n < bounds.high else [0] for n in floors]
    order = sorted(range(len(units)), key=lambda i: (floors[i] - quota[i], -weights[i], i))
    best, found = -1, None
    for ups in itertools.product(*(choices[i] for i in order)):  # in order of preference
        tried = list(floors)
        for i, up in zip(order, ups, strict=True):
            tried[i] += up
        total = sum(parameters(c, n) for c, n in zip(costs, tried, strict=True))
        if best < total <= params:
            best, found = total, tried
    assert counts == found
    # The quotas are one multiple of the weights, within the bounds, and cost the budget.
    inner = [i for i, q in enumerate(quota) if bounds.low < q < bounds.high]
    taus = [quota[i] / weights[i] for i in inner]
    assert taus == pytest.approx([taus[0]] * len(taus) if taus else [])
    for i, q in enumerate(quota):
        if inner and i not in inner:
            assert min(max(taus[0] * weights[i], bounds.low), bounds.high) == pytest.approx(q)
    whole = [np.interp(q, *table(c, bounds.high)) for q, c in zip(quota, costs, strict=True)]
    assert sum(whole) == pytest.approx(params)


def table(cost: ExpertCost, high: int) -> tuple[list[int], list[int]]:
    return list(range(high + 1)), [parameters(cost, n) for n in range(high + 1)]


@settings(max_examples=200, deadline=None)
@given(
    scores=st.lists(st.floats(0.5, 20.0), min_size=1, max_size=30),
    cost=COSTS,
    params=st.integers(1, 3000),
    beta=st.floats(0.1, 5),
    low=st.integers(0, 1),
)
def test_at_equal_costs_a_larger_score_never_gets_fewer(scores, cost, params, beta, low):
    assume(params >= parameters(cost, low) * len(scores))
    weights = quotas(scores, 1, beta)
    _, counts = spend(weights, [cost] * len(scores), params, Bounds(low))
    for (v, s), (w, t) in itertools.permutations(zip(weights, counts, strict=True), 2):
        assert s >= t or v <= w
    spent = sum(parameters(cost, n) for n in counts)
    dearest = max(parameters(cost, n + 1) - parameters(cost, n) for n in range(3))
    assert params - dearest < spent <= params


@settings(max_examples=200, deadline=None)
@given(units=UNITS, params=st.integers(1, 400), seed=st.integers(0, 99))
def test_a_parameter_budget_does_not_depend_on_order_or_scale(units, params, seed):
    weights, costs = [v for v, _ in units], [c for _, c in units]
    quota, counts = spend(weights, costs, params, Bounds(0))
    fractions = sorted(q - math.floor(q) for q in quota)
    assume(all(b - a > 1e-6 for a, b in itertools.pairwise([0.0, *fractions, 1.0])))
    order = np.random.default_rng(seed).permutation(len(units))
    shuffled = spend([weights[i] for i in order], [costs[i] for i in order], params, Bounds(0))
    assert shuffled[1] == [counts[i] for i in order]
    assert spend([v * 8.0 for v in weights], costs, params, Bounds(0))[1] == counts


def test_llama_2_7b_costs_what_was_published():
    """660,224 parameters an expert and layer; 105,635,840 for T = 160."""
    metrics = llama_7b([3.0] * 32)
    assert cost_of(metrics.matrices[:7], 8, Model("x")).of(5) == 5 * 660_224
    result = allocate(metrics, params=105_635_840, beta=0.0)
    assert result.experts == (5,) * 32
    assert result.parameters.spent == 105_635_840


def test_the_price_of_an_allocation_buys_it_again(golden):
    """T = 160 as published, priced (routers of layers with one expert left out), then bought."""
    scores = golden("llama2-7b")["layer_mean"]
    metrics = llama_7b(scores)
    by_experts = allocate(metrics, T=160, beta=2.5)
    unit = cost_of(metrics.matrices[:7], 8, Model("x"))
    price = sum(parameters(unit, n) for n in by_experts.experts)
    bought = allocate(metrics, params=price, beta=2.5)
    assert sum(bought.experts) == 160
    assert bought.parameters.spent == price


def test_grouped_queries_make_v_cheap():
    wide = {"q_proj": (64, 64), "v_proj": (64, 64)}
    narrow = {"q_proj": (64, 64), "v_proj": (16, 64)}
    bought = [
        allocate(linears(roles, [[3.0, 3.0]] * 2), params=50_000).experts
        for roles in (wide, narrow)
    ]
    q, wide_v, narrow_v = (8 * (64 + out) + 64 for out in (64, 64, 16))
    assert sum(bought[0]) == 50_000 // (q + wide_v)
    assert sum(bought[1]) == 50_000 // (q + narrow_v) > sum(bought[0])


def test_conv1d_is_stored_the_other_way_round():
    one = [matrix(0, role="c_attn", shape=(64, 192))]
    assert cost_of(one, 8, Model("x", architecture="GPT2LMHeadModel")) == ExpertCost(8 * 256, 64)
    assert cost_of(one, 8, Model("x", architecture="LlamaForCausalLM")) == ExpertCost(8 * 256, 192)


def test_targets_are_all_that_is_paid_for():
    metrics = linears({"q_proj": (64, 64), "up_proj": (96, 64)}, [[3.0, 3.0]] * 2)
    result = allocate(metrics, params=8 * 128 * 2, targets=["q_proj"])
    assert (result.experts, result.parameters.spent) == ((1, 1), 8 * 128 * 2)
    assert result.strategy.targets == ("q_proj",)
    with pytest.raises(HtsrError, match="No linear is a k_proj") as caught:
        allocate(metrics, params=9999, targets=["k_proj"])
    assert "q_proj, up_proj" in caught.value.hint


def test_a_share_of_the_base():
    model = Model("tiny", None, "ab" * 32, "LlamaForCausalLM", 2, parameters=200_000)
    metrics = linears({"q_proj": (64, 64)}, [[3.0], [4.0]], model=model)
    result = allocate(metrics, target_share=0.05)
    assert result.parameters == dataclasses.replace(
        allocate(metrics, params=10_000).parameters, share=0.05
    )
    with pytest.raises(HtsrError, match="is not known"):
        allocate(linears({"q_proj": (64, 64)}, [[3.0]]), target_share=0.05)


# --- one count a linear -----------------------------------------------------------------------

ROLES = {"q_proj": (64, 64), "v_proj": (16, 64), "down_proj": (64, 96)}
ALPHAS = st.integers(1, 8).flatmap(
    lambda n: st.lists(
        st.lists(st.floats(0.5, 20.0), min_size=3, max_size=3), min_size=n, max_size=n
    )
)


@settings(max_examples=100, deadline=None)
@given(alphas=ALPHAS, each=st.integers(1, 12), beta=st.floats(0, 4))
def test_each_role_shares_t_by_itself(alphas, each, beta):
    budget = each * len(alphas)
    result = allocate(linears(ROLES, alphas), T=budget, beta=beta, per_module=True)
    loads(Allocation, dumps(result), "x.json")
    assert result.budget == budget
    for j, role in enumerate(ROLES):
        own = [module for module in result.modules if module.role == role]
        alone = allocate(metrics_with([row[j] for row in alphas]), T=budget, beta=beta)
        assert tuple(module.experts for module in own) == alone.experts
        assert [m.name for m in own] == [f"model.layers.{i}.{role}" for i in range(len(alphas))]
    for i, experts in enumerate(result.experts):
        mean = sum(m.experts for m in result.modules if m.layer == i) / 3
        assert abs(experts - mean) < 1 + 1e-9


def test_all_linears_can_be_compared_with_each_other():
    alphas = [[2.0, 8.0, 4.0], [4.0, 4.0, 4.0]]
    result = allocate(linears(ROLES, alphas), T=20, beta=1.0, per_module=True, pool="all")
    expected = quotas([2.0, 8.0, 4.0, 4.0, 4.0, 4.0], 60, 1.0)
    assert [m.quota for m in result.modules] == expected
    assert sum(m.experts for m in result.modules) == 60
    assert result.strategy.pool == "all"


@settings(max_examples=50, deadline=None)
@given(alphas=ALPHAS, params=st.integers(30_000, 200_000))
def test_linears_within_a_parameter_budget(alphas, params):
    result = allocate(linears(ROLES, alphas), params=params, per_module=True)
    spent = 0
    for module in result.modules:
        d_out, d_in = ROLES[module.role]
        n = module.experts
        spent += n * 8 * (d_in + d_out) + (n * d_in if n > 1 else 0)
    assert result.parameters.spent == spent <= params
    assert params - spent < 8 * 160 + 2 * 96  # no linear could still have one more


def test_what_the_budget_buys_is_what_build_trains(tmp_path):
    pytest.importorskip("peft", reason="needs the extra [train]")
    from helpers import moe_tiny as tiny

    from htsr_alloc import analyze, open_checkpoint
    from htsr_alloc.lora_moe import build
    from htsr_alloc.lora_moe.model import layers_of

    tiny.llama(layers=3).save_pretrained(tmp_path / "m")
    metrics = analyze(open_checkpoint(tmp_path / "m"), estimator="median")
    every = sum(p.numel() for p in tiny.llama(layers=3).parameters())
    assert metrics.model.parameters == every
    for per_module in (False, True):
        allocation = allocate(metrics, params=60_000, r=4, per_module=per_module, spread=3)
        model = build(tiny.llama(layers=3), allocation, r=4)
        assert model.get_nb_trainable_parameters()[0] == allocation.parameters.spent
    for layer in layers_of(model):
        (module,) = (m for m in allocation.modules if m.name == layer.name)
        mixture = layer.mixture["default"]
        assert (mixture.experts, mixture.top_k) == (module.experts, module.top_k)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"params": 10, "T": 3}, "T and params are both budgets"),
        ({"T": 3, "budget": 3}, "T and budget are both budgets"),
        ({"params": 10}, "10 parameters cannot give every count at least 1, which takes 3,072"),
        ({"params": 10**9, "bounds": Bounds(1, 2)}, "more than 2 experts everywhere"),
        ({"params": 9999, "target_share": 0.5}, "params and target_share are both budgets"),
        ({"params": 9999, "r": 0}, "^r must be at least 1"),
        ({"params": 9999, "repair": "official"}, "repairs a sum of experts"),
        ({"T": 9, "targets": ["q_proj"]}, "means nothing"),
        ({"T": 9, "per_module": True, "pool": "some"}, "no pool 'some'"),
        ({"T": 9, "per_module": True, "strategy": "uniform"}, "uses no score"),
        ({"params": 9999, "strategy": "explicit", "experts": (1, 1, 1)}, "are given"),
    ],
)
def test_impossible_budgets_say_so(arguments, sentence):
    metrics = linears({"q_proj": (64, 64)}, [[3.0]] * 3)
    with pytest.raises(HtsrError, match=sentence):
        allocate(metrics, **arguments)


def mixture(*tensors):
    """One layer of 64 x 64 matrices: (tensor, role, expert) each."""
    rows = [matrix(0, tensor=name, role=role, expert=expert) for name, role, expert in tensors]
    return dataclasses.replace(metrics_with([3.0]), matrices=tuple(rows))


EXPERTS = [(f"model.layers.0.experts.up[{i}]", "up", i) for i in range(2)]
ATTENTION = [("model.layers.0.attn.q_proj.weight", "q_proj", None)]


def test_only_what_build_adapts_is_counted():
    """Neither the base's experts, in one tensor or numbered, nor what an adapter cannot reach."""
    alone = allocate(mixture(*ATTENTION), params=9999).parameters
    assert alone is not None
    numbered = [(f"model.layers.0.moe.experts.{i}.w1.weight", "w1", i) for i in range(2)]
    for others in (EXPERTS, numbered, [("model.layers.0.mixer.dt_proj.weight", "dt_proj", None)]):
        metrics = mixture(*ATTENTION, *others)
        assert allocate(metrics, params=9999).parameters == alone
        (listed,) = allocate(metrics, T=4, per_module=True).modules
        assert listed.role == "q_proj"
        with pytest.raises(HtsrError, match=f"No {others[0][1]} is adapted: .* is left alone"):
            allocate(metrics, params=9999, targets=[others[0][1]])
    for request in ({"params": 9999}, {"T": 4, "per_module": True}):
        with pytest.raises(HtsrError, match="all are the base's own experts"):
            allocate(mixture(*EXPERTS), **request)
    with pytest.raises(HtsrError, match="known from metrics only"):
        allocate(None, strategy="uniform", layers=3, params=9999)


@pytest.mark.parametrize(
    ("text", "number"), [("100M", 10**8), ("1.5B", 15 * 10**8), ("660k", 660_000), ("7", 7)]
)
def test_numbers_of_parameters_are_read(text, number):
    assert parse_params(text) == number


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), (".02", 0.02)])
def test_shares_are_read(text, share):
    assert parse_share(text) == pytest.approx(share)


def test_what_is_neither_is_refused():
    for text in ("", "0", "M", "1e6", "-3", "10 MB"):
        with pytest.raises(HtsrError, match="not a number of parameters"):
            parse_params(text)
    for text in ("", "0", "0%", "101%", "-1%", "one"):
        with pytest.raises(HtsrError, match="not a share"):
            parse_share(text)
    for text in ("1", "1.5"):
        with pytest.raises(HtsrError, match=f"{float(text):.0%} of the base"):
            parse_share(text)


def test_smollm2_within_ten_million():
    """Grouped queries: k_proj and v_proj are 192 x 576."""
    metrics = loads(Metrics, (ROOT / "data" / "smollm2.metrics.json").read_text(), "smollm2")
    result = allocate(metrics, params=10_000_000, per_module=True)
    shapes = {m.tensor.removesuffix(".weight"): m.shape for m in metrics.matrices}
    spent = 0
    for module in result.modules:
        d_out, d_in = shapes[module.name]
        spent += module.experts * (8 * (d_in + d_out) + (d_in if module.experts > 1 else 0))
    assert spent == result.parameters.spent
    assert 0 <= 10_000_000 - spent < 576  # the steps' common divisor is 64 or more


def without_linears(metrics: Metrics, layer: int) -> Metrics:
    """The metrics where the linears of one layer are the base's own experts."""
    own = [m for m in metrics.matrices if m.layer == layer]
    experts = {
        m.tensor: dataclasses.replace(
            m, expert=0, tensor=f"model.layers.{layer}.experts.0.{m.role}"
        )
        for m in own
    }
    return dataclasses.replace(
        metrics, matrices=tuple(experts.get(m.tensor, m) for m in metrics.matrices)
    )


@pytest.mark.parametrize("strategy", ["alphalora", "uniform", "mola"])
def test_a_layer_of_experts_alone_gets_none_and_costs_nothing(strategy):
    """The others get what they get of a model that does not have this layer."""
    roles = {"q_proj": (8, 8), "up_proj": (16, 8)}
    alphas = [2.0, 3.0, 4.0, 5.0]
    metrics = without_linears(linears(roles, [[alpha] * 2 for alpha in alphas]), 2)
    more = {"groups": (1, 2)} if strategy == "mola" else {}
    made = allocate(metrics, strategy=strategy, params=2000, r=2, **more)
    assert made.experts[2] == made.top_k[2] == 0
    assert made.evidence[2].reason == "no linear of this layer is adapted"
    assert made.evidence[2].quota is made.evidence[2].score is None
    assert loads(Allocation, dumps(made), "here") == made
    if strategy != "mola":  # whose groups are of all the layers
        rest = linears(roles, [[alpha] * 2 for alpha in (2.0, 3.0, 5.0)])
        same = allocate(rest, strategy=strategy, params=2000, r=2)
        assert [n for i, n in enumerate(made.experts) if i != 2] == list(same.experts)
        assert made.parameters == same.parameters
    else:
        assert made.experts[3] > made.experts[0] == made.experts[1]


def test_a_layer_of_experts_alone_may_have_a_score_of_its_own(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("layer,score\n0,1\n1,9\n2,2\n")
    metrics = without_linears(linears({"q_proj": (8, 8)}, [[2.0], [3.0], [4.0]]), 1)
    made = allocate(metrics, scores=read_scores(path), params=1500, r=2, beta=1.0)
    assert made.experts[1] == 0
    assert [row.score for row in made.evidence] == [1, None, 2]


@pytest.mark.parametrize(
    ("inside", "words"),
    [
        ("mlp.experts.1.{}.weight", ("gate_proj", "up_proj")),
        ("mlp.experts.gate_up_proj[1,{}]", ("gate_proj", "up_proj")),
        ("moe.experts.1.{}.weight", ("w1", "w3")),
    ],
)
def test_the_gate_and_the_up_of_an_expert_have_one_a(inside, words):
    """As transformers joins them: r (d_in + 2 d_out); apart from shared and dense ones."""
    gate, up = (
        matrix(
            0,
            tensor=f"model.layers.0.{inside.format(word)}",
            role=f"{start}{word}",  # each is cut to what is unambiguous
            expert=1,
            shape=(24, 16),
        )
        for word, start in zip(words, ("", "experts."), strict=True)
    )
    assert cost_of([gate, up], 2, Model("x"), routers=False).lora == 2 * (16 + 24 + 24)
    alone = cost_of([up], 2, Model("x"), routers=False)
    assert alone.lora == 2 * (16 + 24)  # of experts without a gate
    dense = [dataclasses.replace(m, expert=None) for m in (gate, up)]
    assert cost_of(dense, 2, Model("x"), routers=False).lora == 2 * 2 * (16 + 24)
