"""What is allocated by: combinations, spreads, score files, FARMS; and from the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
from helpers.commands import HEAVY, ROOT, environment
from helpers.records_made import linears, metrics_with
from hypothesis import assume, given
from hypothesis import strategies as st

from htsr_alloc.allocation import Bounds, allocate, beta_of_spread, layer_scores, read_scores
from htsr_alloc.allocation.scores import combined, parse_metric
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Farms, Metrics, Settings, dumps, loads

POSITIVE = st.floats(0.01, 1e4)
TABLE = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.lists(POSITIVE, min_size=n, max_size=n), st.lists(POSITIVE, min_size=n, max_size=n)
    )
)


def smollm2():
    path = ROOT / "data" / "smollm2.metrics.json"
    return loads(Metrics, path.read_text(), path.name), path


# --- combinations -------------------------------------------------------------------------------


@given(columns=TABLE, weight=st.floats(-1, 1))
def test_a_combination_is_the_stated_formula(columns, weight):
    weights = [1 - abs(weight), weight]
    logs = [[math.log(x) for x in column] for column in columns]
    mu = [statistics.fmean(column) for column in logs]
    sigma = [statistics.pstdev(column) for column in logs]
    assume(min(sigma) > 1e-6)
    z = np.array([(np.array(c) - m) / s for c, m, s in zip(logs, mu, sigma, strict=True)])
    size = np.abs(weights)
    expected = np.exp(size @ mu + (size @ sigma) * (np.array(weights) @ z))
    assert combined(columns, weights) == pytest.approx(expected.tolist(), rel=1e-6)


@given(columns=TABLE)
def test_a_metric_alone_is_itself_and_units_do_not_matter(columns):
    assert combined(columns[:1], [1.0]) == columns[0]
    both = combined(columns, [0.5, 0.5])
    scaled = combined([columns[0], [x * 8.0 for x in columns[1]]], [0.5, 0.5])
    ratios = [a / b for a, b in zip(scaled, both, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_weights_are_scaled_and_a_negative_one_turns_round():
    assert parse_metric("pl_alpha_hill:1,stable_rank:3") == {
        "pl_alpha_hill": 0.25,
        "stable_rank": 0.75,
    }
    assert parse_metric("pl_alpha_hill,stable_rank:-1") == {
        "pl_alpha_hill": 0.5,
        "stable_rank": -0.5,
    }
    metrics = metrics_with([2.0, 3.0, 4.0])
    assert layer_scores(metrics, "pl_alpha_hill:7") == [2.0, 3.0, 4.0]
    turned = layer_scores(metrics, "pl_alpha_hill:-1")
    assert sorted(turned, reverse=True) == turned


@pytest.mark.parametrize(
    "text",
    ["", "alpha", "pl_alpha_hill:", "pl_alpha_hill:0", "pl_alpha_hill:nan", "pl_alpha_hill:x",
     "pl_alpha_hill,pl_alpha_hill"],
)  # fmt: skip
def test_what_is_no_combination_is_refused(text):
    with pytest.raises(HtsrError, match=r"no metric|is not like"):
        parse_metric(text)


def test_a_combination_needs_positive_values():
    metrics = metrics_with([2.0, 3.0])
    layers = tuple(dataclasses.replace(layer, alpha_hat=-0.5) for layer in metrics.layers)
    with pytest.raises(HtsrError, match=r"model.layers.0 has alpha_hat -0.5, and a combination"):
        allocate(dataclasses.replace(metrics, layers=layers), T=9, metric="pl_alpha_hill,alpha_hat")


def test_a_combination_is_recorded():
    result = allocate(metrics_with([2.0, 3.0, 4.0]), T=9, metric="pl_alpha_hill,stable_rank")
    assert result.strategy.metric == "pl_alpha_hill,stable_rank"
    assert result.strategy.estimator == "official"
    assert allocate(metrics_with([2.0]), T=9, metric="stable_rank:1").strategy.estimator is None


# --- spread -------------------------------------------------------------------------------------


@given(scores=st.lists(st.floats(0.5, 20), min_size=2, max_size=20), spread=st.floats(1.001, 50))
def test_the_spread_is_what_was_asked_for(scores, spread):
    assume(max(scores) / min(scores) > 1.01)
    result = allocate(metrics_with(scores), T=100, spread=spread)
    quota = [row.quota for row in result.evidence]
    assert max(quota) / min(quota) == pytest.approx(spread)
    assert result.strategy.beta == pytest.approx(
        math.log(spread) / math.log(max(scores) / min(scores))
    )
    assert result.strategy.spread == spread
    again = allocate(metrics_with(scores), T=100, beta=result.strategy.beta)
    assert again.experts == result.experts


def test_of_several_roles_the_widest_has_the_spread():
    metrics = linears({"q_proj": (4, 4), "v_proj": (4, 4)}, [[2.0, 3.0], [4.0, 3.5]])
    result = allocate(metrics, T=20, spread=3, per_module=True)
    by_role = {
        role: [m.quota for m in result.modules if m.role == role] for role in ("q_proj", "v_proj")
    }
    ratios = [max(q) / min(q) for q in by_role.values()]
    assert ratios[0] == pytest.approx(3)
    assert 1 < ratios[1] < 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"spread": 0.5}, "at least 1, not 0.5"),
        ({"spread": math.inf}, "at least 1"),
        ({"spread": 3, "beta": 2.5}, "both cannot be given"),
    ],
)
def test_impossible_spreads(arguments, sentence):
    with pytest.raises(HtsrError, match=sentence):
        allocate(metrics_with([2.0, 3.0]), T=9, **arguments)


def test_equal_scores_have_no_spread_but_one():
    assert beta_of_spread([[3.0, 3.0]], 1) == 0
    with pytest.raises(HtsrError, match="All scores are equal"):
        beta_of_spread([[3.0, 3.0]], 2)


# --- score files --------------------------------------------------------------------------------


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("s.csv", "layer,score\n0,2\n2,4.0\n1,3e0\n"),
        ("s.csv", "\ufeffscore,layer,note\r\n2,0,x\r\n3,1,y\r\n4,2,z\r\n"),
        ("s.csv", "prefix,score\nmodel.layers.0,2\nmodel.layers.1,3\nmodel.layers.2,4\n"),
        ("s.json", "[2, 3.0, 4]"),
        ("s.json", '[{"layer": 0, "score": 2}, {"layer": 1, "score": 3},'
                   ' {"layer": 2, "score": "4"}]'),
    ],
)  # fmt: skip
def test_scores_by_layers(tmp_path, name, text):
    scores = read_scores(written(tmp_path, name, text))
    expected = allocate(metrics_with([2.0, 3.0, 4.0]), T=12)
    for metrics in (metrics_with([9.0, 9.0, 9.0]), None):
        found = allocate(metrics, T=12, scores=scores)
        assert found.experts == expected.experts
        assert [row.score for row in found.evidence] == [2.0, 3.0, 4.0]
        assert (found.strategy.metric, found.strategy.estimator) == ("score", None)
        assert found.strategy.scores.file == name
        assert loads(Allocation, dumps(found), "x.json") == found


def test_scores_come_in_place_of_a_metric(tmp_path):
    scores = read_scores(written(tmp_path, "s.json", "[1, 2]"))
    with pytest.raises(HtsrError, match="in place of metric stable_rank"):
        allocate(metrics_with([2.0, 3.0]), T=9, scores=scores, metric="stable_rank")


def test_scores_by_linears(tmp_path):
    metrics = linears({"q_proj": (4, 4), "v_proj": (4, 4)}, [[9.0, 9.0], [9.0, 9.0]])
    alphas = [[2.0, 3.0], [4.0, 3.5]]
    rows = [
        f"model.layers.{i}.{role},{alphas[i][j]}"
        for i in range(2)
        for j, role in enumerate(("q_proj", "v_proj"))
    ]
    path = written(tmp_path, "s.csv", "\n".join(["module,guilomo", *reversed(rows)]))
    scores = read_scores(path, "guilomo")
    found = allocate(metrics, T=8, scores=scores, per_module=True)
    wanted = allocate(linears({"q_proj": (4, 4), "v_proj": (4, 4)}, alphas), T=8, per_module=True)
    assert found.modules == wanted.modules
    with pytest.raises(HtsrError, match="scores by linears") as caught:
        allocate(metrics, T=8, scores=scores)
    assert "per_module" in caught.value.hint


def test_an_exported_allocation_can_be_read_back(tmp_path, invoke):
    made = allocate(metrics_with([2.0, 3.0, 4.0]), T=12)
    (tmp_path / "a.json").write_text(dumps(made))
    assert invoke("export", "a.json", "--to", "csv", "-o", "a.csv").rc == 0
    assert invoke("allocate", "--scores", "a.csv", "--T", 12, "-q", "-o", "b.json").rc == 0
    again = loads(Allocation, (tmp_path / "b.json").read_text(), "b.json")
    assert again.experts == made.experts


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("s.csv", "", "holds no scores"),
        ("s.csv", "layer,score\n", "holds no scores"),
        ("s.csv", "layer,value\n0,1\n", "row 1 has no 'score'"),
        ("s.csv", "number,score\n0,1\n", "does not say whose scores"),
        ("s.csv", "layer,score\n0,1\n0,2\n", "row 2: duplicate layer 0"),
        ("s.csv", "layer,score\n0,high\n", "row 1: 'high' is not a finite number"),
        ("s.csv", "layer,score\n0,nan\n", "is not a finite number"),
        ("s.csv", "layer,score\n0\n", "line 2 does not have 2 columns"),
        ("s.csv", "layer,score\n0,1,2\n", "line 2 does not have 2 columns"),
        ("s.csv", "score,score\n0,1\n", "duplicate column"),
        ("s.csv", "layer,score\n0,1\n1,2\n", "has no score of layer 2"),
        ("s.csv", "layer,score\n0,1\n1,2\n2,3\n3,4\n", "scores layer 3, which the model does not"),
        ("s.json", "{}", "it is not a list"),
        ("s.json", "[1, {}]", "mixes numbers and objects"),
        ("s.json", "[1, NaN, 2]", "NaN is not a number"),
        ("s.json", "[1, true, 2]", "True is not a finite number"),
        ("s.json", "[", "cannot be read as scores"),
        ("s.txt", "1\n2\n", "neither .csv nor .json"),
        ("s.csv", "layer,score\n0,1\n1,-2\n2,3\n", "Layer 1 scores -2"),
    ],
)
def test_a_wrong_score_file_is_refused_in_one_sentence(tmp_path, name, text, sentence):
    with pytest.raises(HtsrError, match=sentence) as caught:
        allocate(
            metrics_with([2.0, 3.0, 4.0]), T=9, scores=read_scores(written(tmp_path, name, text))
        )
    assert "\n" not in caught.value.message


@given(st.binary(max_size=60), st.sampled_from(["x.csv", "x.json"]))
def test_any_bytes_are_scores_or_a_sentence(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("scores") / name
    path.write_bytes(content)
    try:
        found = read_scores(path)
    except HtsrError as error:
        found = error
    assert found.message.endswith(".") if isinstance(found, HtsrError) else found.values


# --- FARMS --------------------------------------------------------------------------------------


def test_scores_of_farms_windows_are_allocated_and_said():
    farms = Farms(rows=8)
    metrics = metrics_with([2.0, 3.0], settings=Settings("median", farms=farms))
    assert allocate(metrics, T=9).strategy.farms == farms
    assert allocate(metrics, T=9, metric="stable_rank").strategy.farms is None
    plain = metrics_with([2.0, 3.0], settings=Settings("median"))
    assert "farms" not in json.loads(dumps(allocate(plain, T=9)))["strategy"]


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    for name in ("smollm2.metrics.json", "smollm2.spectra.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "data" / name).read_bytes())
    return tmp_path


def test_every_new_option_from_the_command_line(data, invoke):
    metrics, _ = smollm2()
    (data / "s.json").write_text(json.dumps(list(range(1, 31))))
    cases = {
        ("--params", "10M", "--r", 4): {"params": 10**7, "r": 4},
        ("--target-share", "2%"): {"target_share": 0.02},
        ("--T", 160, "--spread", 3): {"T": 160, "spread": 3.0},
        ("--T", 160, "--per-module", "--target", "v_proj"): {
            "T": 160, "per_module": True, "targets": ("v_proj",),
        },
        ("--T", 160, "--per-module", "--pool", "all", "--max", 20): {
            "T": 160, "per_module": True, "pool": "all", "bounds": Bounds(1, 20),
        },
        ("--T", 160, "--metric", "pl_alpha_hill,stable_rank:2"): {
            "T": 160, "metric": "pl_alpha_hill,stable_rank:2",
        },
        ("--T", 160, "--scores", "s.json"): {"T": 160, "scores": read_scores(data / "s.json")},
    }  # fmt: skip
    for arguments, request in cases.items():
        done = invoke("allocate", "smollm2.metrics.json", *arguments, "-o", "a.json", "--force")
        assert done.rc == 0, done.stderr
        found = loads(Allocation, (data / "a.json").read_text(), "a.json")
        wanted = allocate(metrics, **request)
        assert (found.experts, found.modules, found.parameters, found.strategy) == (
            wanted.experts, wanted.modules, wanted.parameters, wanted.strategy,
        )  # fmt: skip
        rows = found.modules or found.evidence
        assert len(done.stdout.splitlines()) == 1 + len(rows)


def test_the_plain_file_is_as_it_was(data, invoke):
    """An allocation has no later key that it does not use."""
    assert invoke("allocate", "--T", 160, "--beta", 2.5).rc == 0
    made = json.loads((data / "smollm2.allocation.json").read_text())
    kept = json.loads((ROOT / "data" / "smollm2.allocation.json").read_text())
    made.pop("tool"), kept.pop("tool")
    assert made == kept
    assert set(made["strategy"]) == {
        "name", "metric", "estimator", "beta", "repair", "min", "max", "groups",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        (["--params", "10M", "--per-module"], []),
        (["--T", "160", "--sensitivity", "--draws", "2"], ["numpy", "safetensors"]),
    ],
)
def test_the_new_options_load_nothing_heavy(data, arguments, allowed):
    script = (
        "import sys; from htsr_alloc.cli.main import app\n"
        "try: app()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "allocate", *arguments],
        cwd=data,
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stderr.splitlines()[-1] == str(allowed)


def test_a_layers_number_is_not_taken_for_another_block(tmp_path):
    metrics = metrics_with([9.0, 9.0, 9.0])
    text = "layer,prefix,score\n0,model.layers.1,2\n1,model.layers.0,3\n2,model.layers.2,4\n"
    scores = read_scores(written(tmp_path, "s.csv", text))
    with pytest.raises(HtsrError, match=r"calls layer 0 model\.layers\.1, and the metrics model"):
        allocate(metrics, T=12, scores=scores)
    shorter = text.replace("model.layers", "layers")
    shorter = shorter.replace("layers.1,2", "layers.0,2").replace("1,layers.0", "1,layers.1")
    found = allocate(metrics, T=12, scores=read_scores(written(tmp_path, "s.csv", shorter)))
    assert [row.score for row in found.evidence] == [2.0, 3.0, 4.0]


def test_blocks_without_metrics_are_in_numeric_order(tmp_path):
    names = sorted(f"model.layers.{i}" for i in range(12))
    rows = [f"{name},{float(name.rpartition('.')[2]) + 1}" for name in names]
    path = written(tmp_path, "s.csv", "\n".join(["prefix,score", *rows]))
    found = allocate(None, T=80, beta=1, scores=read_scores(path))
    assert [row.prefix for row in found.evidence] == [f"model.layers.{i}" for i in range(12)]
    assert list(found.experts) == sorted(found.experts)
    path = written(tmp_path, "s.csv", "prefix,score\nh.0,1\nh.1,2\nh.3,3\n")
    with pytest.raises(HtsrError, match=r"has no score of prefix h\.2"):
        allocate(None, T=12, scores=read_scores(path))


def test_a_score_is_a_plain_number(tmp_path):
    with pytest.raises(HtsrError, match="'1_0' is not a finite number"):
        read_scores(written(tmp_path, "s.csv", "layer,score\n0,1_0\n"))
