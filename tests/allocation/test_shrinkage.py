import dataclasses
import math
import random
import statistics
import subprocess
import sys

import pytest
from scipy.stats import chi2

from htsr_alloc.allocation.shrinkage import Estimate, chi2_cdf, random_effects, shrink
from htsr_alloc.errors import HtsrError

VALUES = [0.31, -0.42, 0.05, 0.88, -0.13, 0.27, -0.66, 0.49]
ERRORS = [0.05, 0.21, 0.08, 0.4, 0.11, 0.06, 0.3, 0.15]
# (tuberculosis, none) of the vaccinated, and of the others: Colditz et al. (1994), metafor's
# `dat.bcg`, whose documentation prints the numbers below
# (read there; metafor itself was not run).
BCG = [
    (4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619),
    (33, 5036, 47, 5761), (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892),
    (29, 7470, 45, 7232), (17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338),
    (27, 16886, 29, 17825),
]  # fmt: skip


def test_statsmodels_gives_the_same_random_effects():
    """statsmodels 0.15.0: combine_effects(values, errors**2, method_re="iterated", atol=1e-15)."""
    found = random_effects(VALUES, ERRORS)
    assert found.tau2 == pytest.approx(0.16455980069659149, rel=1e-12)
    assert found.mean == pytest.approx(0.09221695158347759, rel=1e-12)
    assert found.q == pytest.approx(42.23972009921974, rel=1e-12)


def test_the_interval_is_the_one_that_metafors_documentation_prints():
    """Q = 152.2330 and I^2 from 81.92 to 97.68 %, by the Q-profile method."""
    values = [math.log(a / (a + b)) - math.log(c / (c + d)) for a, b, c, d in BCG]
    errors = [math.sqrt(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)) for a, b, c, d in BCG]
    found = random_effects(values, errors)
    assert found.q == pytest.approx(152.2330, abs=1e-4)
    assert found.i2_low == pytest.approx(0.8192, abs=5e-5)
    assert found.i2_high == pytest.approx(0.9768, abs=5e-5)
    assert found.i2_low < found.i2 < found.i2_high


@pytest.mark.parametrize("degrees", [1, 2, 5, 30, 200, 4000, 100_000])
def test_chi_squared_equals_scipys(degrees):
    sd = math.sqrt(2 * degrees)
    for x in (0.0, 0.01, degrees / 2, degrees, degrees + 3 * sd, degrees + 29 * sd, 99 * degrees):
        assert chi2_cdf(x, degrees) == pytest.approx(chi2.cdf(x, degrees), abs=1e-9)


def planted(seed: int, layers: int, roles: int, sd: float, common: float):
    """(true layer scores, estimates): half of the errors are 0.08 and half 0.4."""
    generator = random.Random(seed)
    shared = [generator.gauss(0, math.sqrt(common)) for _ in range(layers)]
    truth, estimates = [0.0] * layers, []
    for role in range(roles):
        for layer in range(layers):
            own = generator.gauss(0, math.sqrt(1 - common))
            z = 0.2 * role + sd * (shared[layer] + own)
            truth[layer] += (1 + math.exp(z)) / roles
            error = generator.choice([0.08, 0.4])
            alpha = 1 + math.exp(z + generator.gauss(0, error))
            estimates.append(Estimate(layer, f"role {role}", alpha, error * (alpha - 1)))
    return truth, estimates


def plain(estimates: list[Estimate], layers: int) -> list[float]:
    return [statistics.fmean(e.alpha for e in estimates if e.layer == i) for i in range(layers)]


def distance(scores: list[float], truth: list[float]) -> float:
    """Variance of the ratio's logarithm: a common factor changes no allocation."""
    return statistics.pvariance([math.log(a / b) for a, b in zip(scores, truth, strict=True)])


@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sd", [0.0, 0.05, 0.1, 0.3, 0.6])
@pytest.mark.parametrize(("layers", "roles"), [(6, 6), (30, 7)])
def test_shrunk_scores_are_nearer_the_planted_truth_than_plain_means(layers, roles, sd, common):
    ours, theirs = 0.0, 0.0
    for seed in range(30):
        truth, estimates = planted(seed, layers, roles, sd, common)
        found = shrink(estimates)
        ours += distance([found.scores[i] for i in range(layers)], truth)
        theirs += distance(plain(estimates, layers), truth)
    assert ours < theirs


@pytest.mark.parametrize("sd", [0.0, 0.05, 0.1, 0.3, 0.6])
def test_what_roles_agree_on_is_nearer_a_planted_quality_of_the_layer(sd):
    """Of layers whose roles share their quality, and where every layer has one wild alpha."""
    ours, theirs = 0.0, 0.0
    for seed in range(10):
        truth, estimates = planted(seed, 30, 7, sd, 1.0)
        found = shrink(estimates, own=False)
        ours += distance([found.scores[i] for i in range(30)], truth)
        theirs += distance(plain(estimates, 30), truth)
    assert ours < theirs


def test_one_role_makes_no_layer_where_only_the_common_part_counts():
    generator = random.Random(0)
    estimates = [
        Estimate(i, f"role {r}", 3 + 0.1 * i + 0.1 * generator.random(), 0.02)
        for r in range(5) for i in range(12)
    ]  # fmt: skip
    wild = [
        dataclasses.replace(e, alpha=18.3) if (e.layer, e.role) == (4, "role 2") else e
        for e in estimates
    ]
    both, shared = shrink(wild), shrink(wild, own=False)
    assert both.scores[4] > 5
    assert abs(shared.scores[4] - shared.scores[3]) < 0.5
    assert shared.common == both.common > 0
    # a of the module's text, of one layer
    y, weight = 0.0, 0.0
    for i, e in enumerate(wild):
        if e.layer == 7:
            role = shared.roles[e.role]
            common = min(shared.common, *(r.tau2 for r in shared.roles.values()))
            p = 1 / (role.tau2 - common + (e.se / (e.alpha - 1)) ** 2)
            y, weight = y + p * (math.log(e.alpha - 1) - role.mean), weight + p
            last = i
    effect = math.log(shared.alphas[last] - 1) - shared.roles[wild[last].role].mean
    assert effect == pytest.approx(common * y / (1 + common * weight), rel=1e-9)


def test_roles_that_agree_on_nothing_are_uniform_and_it_is_said():
    estimates = [Estimate(i, "q", 3 + i, 0.1) for i in range(6)]
    estimates += [Estimate(i, "v", 9 - i, 0.1) for i in range(6)]
    found = shrink(estimates, own=False)
    assert found.common == 0
    assert "nothing in common" in found.uniform
    assert max(found.scores.values()) - min(found.scores.values()) < 1e-12
    assert shrink(estimates).uniform is None


def test_without_signal_the_model_is_uniform_and_says_why():
    found = [shrink(planted(seed, 30, 7, 0.0, 0.0)[1]) for seed in range(60)]
    same = [f for f in found if f.uniform is not None]
    assert 52 <= len(same) <= 60  # 95 % of 60 is 57
    for f in same:
        assert max(f.scores.values()) - min(f.scores.values()) < 1e-12
        assert "on 203 degrees of freedom" in f.uniform
        assert f.p > 0.05


def test_a_clear_signal_stays_as_it_is():
    estimates = [Estimate(i, "q", alpha, 1e-6) for i, alpha in enumerate((2.0, 3.0, 5.0, 9.0))]
    found = shrink(estimates)
    assert found.alphas == pytest.approx([2.0, 3.0, 5.0, 9.0], rel=1e-9)
    assert list(found.scores.values()) == pytest.approx([2.0, 3.0, 5.0, 9.0], rel=1e-9)
    assert found.uniform is None
    assert found.roles["q"].i2 > 0.999999


def test_one_wild_and_uncertain_alpha_does_not_make_a_layer():
    estimates = [Estimate(i, "v", 3 + 0.3 * (i % 3), 0.1) for i in range(12)]
    wild = shrink([*estimates, Estimate(12, "v", 18.3, 15.0)])
    sure = shrink([*estimates, Estimate(12, "v", 18.3, 0.1)])
    assert wild.alphas[-1] < 4
    assert sure.alphas[-1] > 17


def test_layers_with_other_roles_are_not_told_apart_by_their_roles():
    """A hybrid: `attn`, twice as high, is in every second layer only. Nothing else differs."""
    estimates = [Estimate(i, "mlp", 3.0, 0.2) for i in range(8)]
    estimates += [Estimate(i, "attn", 6.0, 0.2) for i in range(0, 8, 2)]
    scores = shrink(estimates).scores
    assert max(scores.values()) - min(scores.values()) < 1e-9


def test_what_cannot_be_shrunk_is_refused():
    with pytest.raises(HtsrError, match="no alphas"):
        shrink([])
    with pytest.raises(HtsrError, match="above 1"):
        shrink([Estimate(0, "q", 1.0, 0.1)])
    with pytest.raises(HtsrError, match="positive and finite"):
        shrink([Estimate(0, "q", 2.0, 0.0)])


def test_it_needs_no_numpy():
    code = "import sys, htsr_alloc.allocation.shrinkage; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
