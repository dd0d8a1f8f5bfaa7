"""How an allocation changes with its estimator, beta and matrices: against doing it again."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.records_made import linears

from htsr_alloc.allocation import Request, allocate
from htsr_alloc.allocation.sensitivity import sensitivity_of
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Layer, Metrics, Settings, loads
from htsr_alloc.spectra.estimators import AT_PEAKS


def smollm2():
    path = ROOT / "data" / "smollm2.metrics.json"
    return loads(Metrics, path.read_text(), path.name), path


@pytest.mark.parametrize(("strategy", "draws"), [("alphalora", 40), ("common", 10)])
def test_sensitivity_is_what_allocating_again_gives(strategy, draws):
    metrics, path = smollm2()
    request = {"T": 160, "beta": 2.5, "strategy": strategy}
    found = sensitivity_of(metrics, path, Request.of(**request), draws=draws, seed=3)
    own = allocate(metrics, **request)
    assert list(found.causes) == ["estimator", "beta", "matrices"]
    assert set(found.causes["estimator"]) == set(AT_PEAKS) - {"official"}
    assert found.causes["beta"] == [2.0, 3.0]
    betas = [allocate(metrics, **request | {"beta": beta}).experts for beta in (2.0, 3.0)]
    # The bootstrap again, in the plainest words.
    generator = np.random.default_rng(3)
    z = {(m.layer, m.role): math.log(m.pl_alpha_hill - 1) for m in metrics.matrices}
    roles = list(dict.fromkeys(m.role for m in metrics.matrices))
    middle = {role: np.mean([z[i, role] for i in range(30)]) for role in roles}
    spread = {role: np.std([z[i, role] for i in range(30)]) for role in roles}
    sure = {(m.layer, m.role): m.alpha_se / (m.pl_alpha_hill - 1) for m in metrics.matrices}
    drawn = []
    for _ in range(draws):
        alphas, errors, means = {}, {}, []
        for i in range(30):
            chosen = [roles[j] for j in generator.integers(7, size=7)]
            for role, other in zip(roles, chosen, strict=True):
                unit = spread[role] / spread[other]
                alpha = 1 + math.exp(middle[role] + unit * (z[i, other] - middle[other]))
                alphas[i, role], errors[i, role] = alpha, unit * sure[i, other] * (alpha - 1)
            means.append(float(np.mean([alphas[i, role] for role in roles])))
        layers = tuple(
            dataclasses.replace(layer, pl_alpha_hill=mean)
            for layer, mean in zip(metrics.layers, means, strict=True)
        )
        matrices = tuple(
            dataclasses.replace(
                m, pl_alpha_hill=alphas[m.layer, m.role], alpha_se=errors[m.layer, m.role]
            )
            for m in metrics.matrices
        )
        changed = dataclasses.replace(metrics, layers=layers, matrices=matrices)
        drawn.append(allocate(changed, **request).experts)
    for i, row in enumerate(found.layers):
        assert row.experts == own.experts[i]
        for cause, counts in (("beta", betas), ("matrices", drawn)):
            mine = sorted(experts[i] for experts in counts)
            seen = row.ranges[cause]
            assert seen.same == mine.count(row.experts) / len(mine)
            assert seen.near == sum(abs(n - row.experts) <= 1 for n in mine) / len(mine)
            assert (seen.low, seen.high) == (
                mine[math.ceil(0.05 * len(mine)) - 1],
                mine[math.ceil(0.95 * len(mine)) - 1],
            )
        assert row.stable == all(seen.near >= 0.9 for seen in row.ranges.values())


def test_refits_are_those_of_htsr_fit(tmp_path, invoke):
    for name in ("minilm.metrics.json", "minilm.spectra.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "data" / name).read_bytes())
    path = tmp_path / "minilm.metrics.json"
    metrics = loads(Metrics, path.read_text(), path.name)
    found = sensitivity_of(metrics, path, Request.of(T=30), draws=1)
    counts = []
    for estimator in found.causes["estimator"]:
        assert invoke("fit", path.name, "--estimator", estimator, "-q").rc == 0
        fitted = tmp_path / f"minilm.{estimator}.metrics.json"
        counts.append(allocate(fitted, T=30).experts)
    for i, row in enumerate(found.layers):
        column = [experts[i] for experts in counts]
        assert (row.ranges["estimator"].low, row.ranges["estimator"].high) == (
            min(column),
            max(column),
        )


def test_a_roles_own_level_is_no_noise():
    """Two roles at very different levels, which every layer has alike."""
    levels = [[2.0, 8.0], [2.2, 8.2], [2.4, 8.4], [2.6, 8.6]]
    metrics = linears({"q_proj": (4, 4), "v_proj": (4, 4)}, levels)
    layers = tuple(
        Layer(i, f"layers.{i}", 2, 0, sum(own) / 2, 0.5, 2.5, None) for i, own in enumerate(levels)
    )
    metrics = dataclasses.replace(metrics, layers=layers, settings=Settings("median"))
    found = sensitivity_of(metrics, ROOT, Request.of(T=40), draws=50)
    assert all(row.ranges["matrices"].near == 1 for row in found.layers)


def test_equal_matrices_are_perfectly_stable_under_the_bootstrap():
    metrics = linears({"q_proj": (4, 4), "v_proj": (4, 4)}, [[2.0, 2.0], [4.0, 4.0]])
    layers = tuple(
        Layer(x.layer, x.prefix, 2, 0, x.pl_alpha_hill, 0.5, 2.5, None) for x in metrics.layers
    )
    metrics = dataclasses.replace(metrics, layers=layers)
    found = sensitivity_of(metrics, ROOT, Request.of(T=10, metric="stable_rank"), draws=20)
    assert list(found.causes) == ["beta", "matrices"]
    assert all(row.stable and row.ranges["matrices"].same == 1 for row in found.layers)


def test_the_null_is_the_same_counts_on_layers_drawn_by_chance():
    metrics, path = smollm2()
    found = sensitivity_of(metrics, path, Request.of(T=160), draws=400)
    counts = [row.experts for row in found.layers]
    pairs = [abs(one - other) <= 1 for one in counts for other in counts]
    assert found.chance.near == pytest.approx(sum(pairs) / len(pairs), abs=0.02)  # any on any
    assert found.chance.near < found.chance.high < 0.6
    for cause, near in found.near.items():
        own = [row.ranges[cause].near for row in found.layers]
        assert near == pytest.approx(sum(own) / len(own))
        assert near > found.chance.high  # the spectra say more than chance
    assert found.as_far_as_chance == ()


def test_counts_that_another_draw_of_the_matrices_puts_elsewhere_are_named():
    """Two roles that disagree: a layer's mean depends on which of them is drawn."""
    levels = [[4.0, 1.2], [1.2, 4.0]] * 4
    metrics = linears({"q_proj": (4, 4), "v_proj": (4, 4)}, levels)
    layers = tuple(
        Layer(i, f"layers.{i}", 2, 0, sum(own) / 2 + 0.1 * i, 0.5, 2.5, None)
        for i, own in enumerate(levels)
    )
    metrics = dataclasses.replace(metrics, layers=layers, settings=Settings("median"))
    found = sensitivity_of(metrics, ROOT, Request.of(T=80), draws=100)
    assert found.near["beta"] == 1
    assert found.as_far_as_chance == ("matrices",)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"T": 160, "per_module": True}, "matrices of a layer"),
        ({"T": 160, "strategy": "uniform"}, "scores that the metrics hold"),
    ],
)
def test_what_has_no_sensitivity(request_, sentence):
    metrics, path = smollm2()
    with pytest.raises(HtsrError, match=sentence):
        sensitivity_of(metrics, path, Request.of(**request_))
    with pytest.raises(HtsrError, match="draws must be at least 1"):
        sensitivity_of(metrics, path, Request.of(T=160), draws=0)


@pytest.fixture
def data(tmp_path):
    for name in ("smollm2.metrics.json", "smollm2.spectra.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "data" / name).read_bytes())
    return tmp_path


def test_sensitivity_is_shown_and_is_json(data, invoke):
    done = invoke("allocate", "--T", 160, "--sensitivity", "--draws", 5)
    assert done.rc == 0
    header = done.stdout.splitlines()[32].split()
    assert header == ["layer", "experts", "estimator", "±1", "beta", "±1", "matrices", "±1"]
    assert len(done.stdout.splitlines()) == 63
    assert "matrices: 5 draws, seed 0" in done.stderr
    assert "where the same counts are on layers drawn by chance" in done.stderr
    result = json.loads(
        invoke("allocate", "--T", 160, "--sensitivity", "--draws", 5, "--json").stdout
    )
    assert result["allocation"]["budget"] == 160
    assert len(result["sensitivity"]["layers"]) == 30
    (data / "smollm2.spectra.safetensors").unlink()
    done = invoke("allocate", "--T", 160, "--sensitivity")
    assert (done.rc, done.stderr.splitlines()[-1].partition(":")[0]) == (1, "hint")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--r", 4), "--r matters to --params"),
        (("--column", "x"), "--column names a column of --scores"),
        (("--draws", 5), "--draws belongs to --sensitivity"),
        (("--seed", 0), "--seed belongs to the random strategy"),
        (("--sensitivity", "-o", "-"), "-o - prints the allocation"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, said, invoke):
    done = invoke("allocate", ROOT / "data" / "minilm.metrics.json", "--T", 30, *options)
    assert done.rc == 1
    assert said in done.stderr


def test_counts_that_chance_does_not_move_are_not_held_against_it():
    metrics, path = smollm2()
    found = sensitivity_of(metrics, path, Request.of(T=90, beta=0.1), draws=20)
    assert found.chance.high == 1.0
    assert found.as_far_as_chance == ()
