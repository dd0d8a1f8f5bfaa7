import dataclasses
import itertools
import math

import numpy as np
import pytest
from helpers.records_made import metrics_with
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from htsr_alloc.allocation import (
    Bounds,
    allocate,
    mola_counts,
    parse_counts,
    parse_groups,
    quotas,
    repair_official,
    repair_remainder,
)
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import dumps

SCORES = st.lists(st.floats(0.5, 20.0), min_size=1, max_size=40)
BETAS = st.sampled_from([0.0, 1.0, 2.0, 2.5, 3.0, 10.0, -2.0])
FREE = Bounds(0)


def hamilton(quota: list[float], budget: int) -> list[int]:
    """Largest remainder: floors first, then one each to the largest fractions."""
    counts = [math.floor(q) for q in quota]
    order = sorted(range(len(quota)), key=lambda i: (-(quota[i] - counts[i]), i))
    for i in order[: budget - sum(counts)]:
        counts[i] += 1
    return counts


def has_ties(quota: list[float]) -> bool:
    """Whether rounding errors could decide: close fractions, or fractions near 0, 1/2 and 1."""
    fractions = sorted(q - math.floor(q) for q in quota)
    close = any(b - a < 1e-9 for a, b in itertools.pairwise(fractions))
    return close or any(min(f, 1 - f, abs(f - 0.5)) < 1e-9 for f in fractions)


def golden_cases() -> list[tuple[str, int, float]]:
    return list(itertools.product(("llama-7b", "llama2-7b"), (32, 80, 160, 224), (2.0, 2.5, 3.0)))


@pytest.mark.parametrize(("model", "budget", "beta"), golden_cases())
def test_published_values_give_the_published_allocations(golden, model, budget, beta):
    expected = golden(model)
    scores = np.mean(expected["pl_alpha_hill"], axis=1).tolist()
    assert scores == pytest.approx(expected["layer_mean"], abs=1e-9)
    wanted = expected["allocations"][f"T={budget},beta={beta}"]
    quota = quotas(scores, budget, beta)
    assert repair_remainder(quota, budget, FREE) == wanted["remainder"]
    vector = wanted["official"]
    assert repair_official(scores, quota, budget, beta) == vector
    arguments = {"budget": budget, "beta": beta, "repair": "official", "bounds": FREE}
    if min(vector) < 0:
        with pytest.raises(HtsrError, match="which is negative"):
            allocate(metrics_with(scores), **arguments)
    else:
        assert list(allocate(metrics_with(scores), **arguments).experts) == vector


def test_the_published_default_is_what_the_command_gives(golden):
    """T = 160, beta = 2.5, the default repair and --min 1: no layer needs the bound."""
    expected = golden("llama2-7b")
    result = allocate(metrics_with(expected["layer_mean"]), budget=160)
    assert list(result.experts) == expected["allocations"]["T=160,beta=2.5"]["remainder"]
    assert result.top_k == tuple(min(2, n) for n in result.experts)


@given(scores=SCORES, budget=st.integers(1, 400), beta=BETAS)
def test_quotas_are_equation_6(scores, budget, beta):
    total = math.fsum(v**beta for v in scores)
    expected = [v**beta / total * budget for v in scores]
    assert quotas(scores, budget, beta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(scores=SCORES, budget=st.integers(1, 400), beta=BETAS)
def test_remainder_meets_the_budget_and_stays_within_one_of_the_quota(scores, budget, beta):
    quota = quotas(scores, budget, beta)
    counts = repair_remainder(quota, budget, FREE)
    assert sum(counts) == budget
    assert all(abs(s - q) < 1 + 1e-9 for s, q in zip(counts, quota, strict=True))
    if not has_ties(quota):
        assert counts == hamilton(quota, budget)


@given(scores=SCORES, budget=st.integers(1, 400), beta=BETAS, seed=st.integers(0, 999))
def test_remainder_does_not_depend_on_order_or_scale(scores, budget, beta, seed):
    quota = quotas(scores, budget, beta)
    assume(not has_ties(quota))
    counts = repair_remainder(quota, budget, FREE)
    order = np.random.default_rng(seed).permutation(len(scores))
    shuffled = quotas([scores[i] for i in order], budget, beta)
    assert repair_remainder(shuffled, budget, FREE) == [counts[i] for i in order]
    scaled = quotas([v * 8.0 for v in scores], budget, beta)
    assert repair_remainder(scaled, budget, FREE) == counts


@given(scores=SCORES, budget=st.integers(1, 400), beta=st.floats(0.1, 5))
@example(scores=[0.5, 0.5000000000000001], budget=1, beta=1.0)  # equal quotas: a tie
def test_a_larger_score_never_gets_fewer(scores, budget, beta):
    """Larger by more than rounding errors, which can make the quotas equal: see ``quotas``."""
    quota = quotas(scores, budget, beta)
    counts = repair_remainder(quota, budget, FREE)
    for i, j in itertools.permutations(range(len(scores)), 2):
        if quota[i] > quota[j]:
            assert counts[i] >= counts[j]
        if scores[i] > scores[j] * (1 + 1e-12):
            assert quota[i] > quota[j]


@settings(max_examples=200)
@given(
    scores=st.lists(st.floats(0.5, 20.0), min_size=1, max_size=6),
    budget=st.integers(1, 30),
    low=st.integers(0, 4),
    extra=st.integers(0, 6),
)
def test_bounds_are_kept_and_nothing_nearer_to_the_quota_exists(scores, budget, low, extra):
    bounds = Bounds(low, low + extra) if low + extra else Bounds(0, 1)
    layers = len(scores)
    quota = quotas(scores, budget, 2.5)
    high = bounds.high
    if not layers * low <= budget <= layers * high:
        with pytest.raises(HtsrError):
            repair_remainder(quota, budget, bounds)
        return
    counts = repair_remainder(quota, budget, bounds)
    assert sum(counts) == budget
    assert all(bounds.low <= s <= high for s in counts)
    # Least squares over integers in a box: no single move between two layers may be better.
    for i in range(layers):
        for j in range(layers):
            if i != j and counts[i] < high and counts[j] > bounds.low:
                gain = (quota[i] - counts[i]) - (quota[j] - counts[j])
                assert gain <= 1 + 1e-9


def test_the_official_repair_is_the_literal_loop():
    scores, budget, beta = [3.1, 2.2, 4.4], 7, 2.0
    quota = quotas(scores, budget, beta)
    counts = np.round(quota)
    power = np.array(scores) ** beta
    while counts.sum() < budget:
        counts[np.argmin(power - counts)] += 1
    while counts.sum() > budget:
        counts[np.argmax(power - counts)] -= 1
    assert repair_official(scores, quota, budget, beta) == counts.astype(int).tolist()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("2468", (2, 4, 6, 8)),
        ("8642", (8, 6, 4, 2)),
        ("2882", (2, 8, 8, 2)),
        ("5555", (5, 5, 5, 5)),
        ("46810", (4, 6, 8, 10)),
        ("4-6-8-10", (4, 6, 8, 10)),
        ("4,6,8,10", (4, 6, 8, 10)),
        ("7", (7,)),
        ("12-3", (12, 3)),
    ],
)
def test_mola_groups_are_read(text, groups):
    assert parse_groups(text) == groups


@pytest.mark.parametrize("text", ["", "2a68", "4--6", "-4", "2 4", "4-6-"])
def test_what_is_no_group_is_refused(text):
    with pytest.raises(HtsrError, match="is not like 2468"):
        parse_groups(text)


@pytest.mark.parametrize("text", ["", "1,,2", "1;2", "1,-2", "1.5"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(HtsrError, match="is not like 1,3,5"):
        parse_counts(text)


def test_mola_on_32_layers_is_the_published_one():
    result = allocate(None, strategy="mola", groups=(2, 4, 6, 8), layers=32)
    assert result.experts == (2,) * 8 + (4,) * 8 + (6,) * 8 + (8,) * 8
    assert result.budget == 160


@given(groups=st.lists(st.integers(1, 9), min_size=1, max_size=6), layers=st.integers(1, 50))
def test_mola_groups_of_any_number_share_any_number_of_layers(groups, layers):
    if len(groups) > layers:
        with pytest.raises(HtsrError, match="do not fit"):
            mola_counts(groups, layers)
        return
    counts = mola_counts(groups, layers)
    sizes = [sum(i * len(groups) // layers == g for i in range(layers)) for g in range(len(groups))]
    assert max(sizes) - min(sizes) <= 1
    assert counts == [count for count, n in zip(groups, sizes, strict=True) for _ in range(n)]


def test_mola_scaled_to_a_budget_keeps_its_proportions():
    result = allocate(None, strategy="mola", groups=(2, 4, 6, 8), layers=8, budget=80)
    assert result.experts == (4, 4, 8, 8, 12, 12, 16, 16)


def test_uniform_shares_what_does_not_divide_among_the_first():
    assert allocate(None, strategy="uniform", budget=10, layers=4).experts == (3, 3, 2, 2)
    assert allocate(None, strategy="uniform", budget=160, layers=32).experts == (5,) * 32


def test_explicit_counts_are_taken_as_they_are():
    result = allocate(None, strategy="explicit", experts=(0, 3, 1))
    assert (result.experts, result.top_k, result.budget) == ((0, 3, 1), (0, 2, 1), 4)


@pytest.mark.parametrize("metric", ["pl_alpha_hill", "alpha_hat", "stable_rank"])
def test_each_metric_can_be_the_score(metric):
    metrics = metrics_with([2.0, 3.0, 4.0])
    result = allocate(metrics, budget=12, metric=metric)
    values = [getattr(layer, metric) for layer in metrics.layers]
    assert [row.score for row in result.evidence] == values
    assert [row.quota for row in result.evidence] == quotas(values, 12, 2.5)
    assert result.strategy.metric == metric
    dumps(result)


def test_beta_zero_is_uniform_and_a_negative_one_inverts():
    metrics = metrics_with([2.0, 3.0, 4.0])
    assert allocate(metrics, budget=12, beta=0.0).experts == (4, 4, 4)
    assert allocate(metrics, budget=12, beta=-2.0).experts == (7, 3, 2)
    assert allocate(metrics, budget=12, beta=500.0).experts == (1, 1, 10)  # no overflow


@pytest.mark.parametrize(
    ("arguments", "sentence", "hint"),
    [
        ({}, "needs a budget", "T 160"),
        ({"budget": 2}, "2 experts cannot give 3 layers at least 1 each", "T 3 or more"),
        ({"budget": 0}, "allocates nothing", "Raise T"),
        ({"budget": 9, "bounds": Bounds(1, 2)}, "do not fit 3 layers of at most 2", "T 6"),
        ({"budget": 9, "bounds": Bounds(3, 2)}, "no count within low 3 and high 2", None),
        ({"budget": 9, "bounds": Bounds(-1)}, "no count within low -1", None),
        ({"budget": 9, "top_k": 0}, "^top_k must be at least 1, not 0", None),
        ({"budget": 9, "beta": math.nan}, "beta must be a finite number", None),
        ({"budget": 9, "metric": "alpha"}, "no metric 'alpha'", "pl_alpha_hill"),
        ({"budget": 9, "strategy": "best"}, "no strategy 'best'", "uniform"),
        ({"budget": 9, "repair": "none"}, "no repair 'none'", "remainder"),
        ({"budget": 9, "pool": "all"}, "^pool all is about per_module", "neither"),
        ({"budget": 9, "groups": (2, 4)}, "^groups belongs to the mola strategy", "strategy mola"),
        (
            {"budget": 9, "experts": (3, 3, 3)},
            "^experts belongs to the explicit",
            "strategy explicit",
        ),
        ({"budget": 9, "layers": 4}, "^layers 4 contradicts the 3 layers", None),
        ({"strategy": "mola"}, "^groups needs counts", None),
        ({"strategy": "mola", "groups": (1, 2, 3, 4)}, "4 groups do not fit 3 layers", None),
        ({"strategy": "mola", "groups": (0, 2)}, "gives layer 0 0 experts, outside low 1", None),
        ({"strategy": "explicit", "experts": (1, 2)}, "lists 2 counts for 3 layers", None),
        ({"strategy": "explicit", "experts": (1, 2, 3), "budget": 7}, "sums to 6, not to", None),
        ({"budget": 9, "repair": "official", "beta": 3000.0}, "too large", "remainder"),
    ],
)
def test_impossible_requests_say_what_would_work(arguments, sentence, hint):
    with pytest.raises(HtsrError, match=sentence) as caught:
        allocate(metrics_with([2.0, 3.0, 4.0]), **arguments)
    if hint:
        assert hint in caught.value.hint


def test_without_metrics_alphalora_has_nothing_to_go_by():
    with pytest.raises(HtsrError, match="need metrics"):
        allocate(None, budget=10, layers=3)
    with pytest.raises(HtsrError, match="number of layers is unknown"):
        allocate(None, strategy="uniform", budget=10)


def test_layers_without_a_value_are_named():
    metrics = metrics_with([2.0, None, 4.0])
    holes = list(metrics.layers)
    holes[1] = dataclasses.replace(holes[1], reason="no matrix of this layer was analysed")
    with pytest.raises(
        HtsrError, match=r"1 of 3 layers have no pl_alpha_hill; .*layers\.1: no mat"
    ):
        allocate(dataclasses.replace(metrics, layers=tuple(holes)), budget=9)


def test_a_negative_score_is_refused():
    with pytest.raises(HtsrError, match=r"Layer 1 scores -0\.5"):
        allocate(metrics_with([2.0, -0.5, 4.0]), budget=9)


def test_the_official_repair_keeps_the_bounds_or_refuses(golden):
    expected = golden("llama-7b")
    with pytest.raises(HtsrError, match="layer 27 a count of 0, which is outside low 1") as caught:
        allocate(metrics_with(expected["layer_mean"]), budget=32, beta=2.0, repair="official")
    assert "low 0" in caught.value.hint


def test_a_vanishing_quota_is_served_after_a_larger_one():
    quota = quotas([1.0, 1.4, 9.0], 10, 50.0)
    counts = repair_remainder(quota, 10, Bounds(low=0, high=5))
    assert counts == [2, 3, 5]
