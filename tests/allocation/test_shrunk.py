"""The strategy ``shrunk``: alphas are shrunk before eq. 6 and 7."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.records_made import made_metrics

from htsr_alloc import allocate
from htsr_alloc.allocation.shrinkage import Estimate, shrink
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Farms, Metrics, Settings, dumps, loads

DATA = Path(__file__).parents[2] / "data" / "smollm2.metrics.json"


def with_errors(metrics: Metrics, relative: float) -> Metrics:
    matrices = tuple(
        dataclasses.replace(m, alpha_se=relative * (m.pl_alpha_hill - 1)) for m in metrics.matrices
    )
    return dataclasses.replace(metrics, matrices=matrices)


def test_smollm2_is_shared_out_by_shrunk_scores():
    metrics = loads(Metrics, DATA.read_text(), DATA.name)
    result = allocate(metrics, T=160, strategy="shrunk", beta=2.5)
    found = shrink(
        [Estimate(m.layer, m.role, m.pl_alpha_hill, m.alpha_se) for m in metrics.matrices]
    )
    total = math.fsum(found.scores[i] ** 2.5 for i in range(30))
    for row in result.evidence:
        assert row.score == pytest.approx(found.scores[row.layer], rel=1e-12)
        assert row.quota == pytest.approx(160 * found.scores[row.layer] ** 2.5 / total, rel=1e-9)
    assert sum(result.experts) == 160
    signal = result.strategy.signal
    assert {x.role: (x.i2_low, x.i2, x.i2_high) for x in signal.roles} == {
        role: (x.i2_low, x.i2, x.i2_high) for role, x in found.roles.items()
    }
    assert (signal.common, signal.p, signal.uniform) == (found.common, found.p, None)
    assert loads(Allocation, dumps(result), "x.json") == result
    plain = allocate(metrics, T=160)
    assert plain.strategy.signal is None
    assert max(plain.experts) - min(plain.experts) > max(result.experts) - min(result.experts)


def test_common_is_a_strategy_of_its_own():
    metrics = loads(Metrics, DATA.read_text(), DATA.name)
    result = allocate(metrics, T=160, strategy="common")
    estimates = [Estimate(m.layer, m.role, m.pl_alpha_hill, m.alpha_se) for m in metrics.matrices]
    scores = shrink(estimates, own=False).scores
    assert [row.score for row in result.evidence] == pytest.approx(list(scores.values()))
    assert result.strategy.name == "common"
    assert max(result.experts) == 8


def test_each_linear_gets_its_own_shrunk_alpha():
    metrics = loads(Metrics, DATA.read_text(), DATA.name)
    result = allocate(metrics, T=160, strategy="shrunk", per_module=True)
    found = shrink(
        [Estimate(m.layer, m.role, m.pl_alpha_hill, m.alpha_se) for m in metrics.matrices]
    )
    assert [m.score for m in result.modules] == list(found.alphas)


def test_without_signal_it_is_uniform_and_says_why(tmp_path, invoke):
    table = 3 + 0.02 * np.random.default_rng(0).standard_normal((8, 7))
    metrics = with_errors(made_metrics(table), 0.2)
    result = allocate(metrics, T=40, strategy="shrunk")
    assert result.experts == (5,) * 8
    (tmp_path / "x.metrics.json").write_text(dumps(metrics))
    done = invoke("allocate", "x.metrics.json", "--T", 40, "--strategy", "shrunk")
    assert done.rc == 0
    assert "uniform: the spread" in done.stderr
    written = json.loads((tmp_path / "x.allocation.json").read_text())
    assert written["strategy"]["signal"]["uniform"] == result.strategy.signal.uniform
    clear = allocate(with_errors(made_metrics(table), 0.001), T=40, strategy="shrunk")
    assert clear.strategy.signal.uniform is None


@pytest.mark.parametrize(
    ("change", "request_", "sentence"),
    [
        ({}, {}, "56 of 56 alphas have no standard error"),
        ({"settings": Settings("median", farms=Farms())}, {}, "FARMS"),
        ({}, {"metric": "stable_rank"}, "needs metric pl_alpha_hill"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(change, request_, sentence):
    metrics = dataclasses.replace(made_metrics(np.full((8, 7), 3.0)), **change)
    with pytest.raises(HtsrError, match=sentence):
        allocate(metrics, T=40, strategy="shrunk", **request_)
