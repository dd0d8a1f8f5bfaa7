"""htsr explain: the parts of a layer's mean."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.records_made import made_metrics

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, loads
from htsr_alloc.records.results import read_result
from htsr_alloc.reports.cautions import cautions
from htsr_alloc.reports.explain import explain
from htsr_alloc.reports.plots.layers import mean_errors

DATA = Path(__file__).parents[2] / "data" / "smollm2.metrics.json"


def test_the_parts_are_those_of_the_mean():
    metrics = made_metrics(np.array([[2.0, 4.0], [3.0, math.nan]]), roles=("q_proj", "v_proj"))
    matrices = tuple(dataclasses.replace(m, alpha_se=0.3) for m in metrics.matrices)
    first, second = explain(dataclasses.replace(metrics, matrices=matrices))
    assert (first.score, first.se) == (3.0, pytest.approx(math.sqrt(2 * 0.09) / 2))
    assert [(p.role, p.share, p.without) for p in first.parts] == [
        ("v_proj", pytest.approx(4 / 6), 2.0),
        ("q_proj", pytest.approx(2 / 6), 4.0),
    ]
    assert [(p.role, p.share, p.without) for p in second.parts] == [("q_proj", 1.0, None)]
    assert explain(metrics, 1)[0].se is None
    with pytest.raises(HtsrError, match="no layer 2"):
        explain(metrics, 2)


def test_smollm2_layer_10_is_explained_by_its_short_tail():
    metrics = loads(Metrics, DATA.read_text(), DATA.name)
    (layer,) = explain(metrics, 10)
    assert layer.score == pytest.approx(metrics.layers[10].pl_alpha_hill, rel=1e-12)
    assert (layer.parts[0].role, layer.parts[0].k) == ("v_proj", 11)
    assert layer.parts[0].reasons == ("short",)


@pytest.mark.parametrize("more", [[], ["--layer", 10]])
def test_it_is_one_screen_of_80_columns(invoke, more):
    done = invoke("explain", DATA, *more)
    assert done.rc == 0
    lines = done.stdout.splitlines()
    assert len(lines) == (8 if more else 31)
    assert max(len(line.rstrip()) for line in lines) <= 80
    found = json.loads(invoke("explain", DATA, *more, "--json").stdout)
    assert len(found["layers"]) == (1 if more else 30)
    assert invoke("explain", DATA, "--layer", 30).rc == 1


ALLOCATION = DATA.with_name("smollm2.allocation.json")


def test_an_allocation_is_explained_to_the_count(invoke, tmp_path):
    """Against ``allocate`` by a file of scores, in which layer 10 has the mean of the rest."""
    metrics = loads(Metrics, DATA.read_text(), DATA.name)
    done = invoke("explain", ALLOCATION, "--layer", "model.layers.10", "--json")
    assert done.rc == 0, done.stderr
    found = json.loads(done.stdout)
    (own,), (layer,) = found["counts"], found["layers"]
    assert (own["count"], round(own["quota"], 3)) == (21, 20.830)
    assert len(own["without"]) == 7
    for part in layer["parts"]:
        rest = [m.pl_alpha_hill for m in metrics.matrices if m.layer == 10]
        rest.remove(part["alpha"])
        scores = [row.pl_alpha_hill for row in metrics.layers]
        scores[10] = sum(rest) / len(rest)
        text = "layer,score\n" + "".join(f"{i},{v!r}\n" for i, v in enumerate(scores))
        (tmp_path / "s.csv").write_text(text)
        made = invoke("allocate", "--scores", "s.csv", "--T", 160, "-q", "-o", "-")
        assert json.loads(made.stdout)["experts"][10] == own["without"][part["tensor"]]
    assert own["without"]["model.layers.10.self_attn.v_proj.weight"] == 11
    shown = invoke("explain", ALLOCATION, "--layer", 10)
    assert "the quota 20.830: 21 experts" in shown.stderr
    assert "experts then" in shown.stdout


def test_an_allocation_is_one_screen_too(invoke):
    lines = invoke("explain", ALLOCATION).stdout.splitlines()
    assert len(lines) == 31
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert lines[11].split()[4:7] == ["20.830", "21", "v_proj"]


def test_other_budgets_are_explained_and_other_scores_are_refused(invoke, tmp_path):
    asked = [
        ["--for", "lora", "--rank", 4],
        ["--params", "3M", "--max", 9],
        ["--T", 90, "--repair", "official", "--spread", 4],
        ["--T", 90, "--score-over", "adapted", "--target", "q_proj"],
    ]
    for i, more in enumerate(asked):
        path = tmp_path / f"{i}.json"
        assert invoke("allocate", DATA, *more, "-q", "-o", path).rc == 0
        done = invoke("explain", path, "--metrics", DATA, "--json")
        assert done.rc == 0, done.stderr
        counts = [row["count"] for row in json.loads(done.stdout)["counts"]]
        assert counts == json.loads(path.read_text())["experts"]
    assert "There is no " in invoke("explain", path).stderr  # its metrics are elsewhere
    other = invoke("explain", path, "--metrics", DATA.with_name("smollm2.paper.metrics.json"))
    assert "does not follow from these metrics" in other.stderr
    for other in (
        "--metric stable_rank",
        "--per-module",
        "--strategy uniform",
        "--strategy shrunk",
    ):
        more = ["--T", 90, *other.split()]
        assert invoke("allocate", DATA, *more, "-q", "--force", "-o", path).rc == 0
        done = invoke("explain", path, "--metrics", DATA)
        assert (done.rc, done.stdout) == (1, "")
        assert "Only a count for each layer, by alphalora on pl_alpha_hill" in done.stderr
    assert "hint: For a layer write --layer 10." in invoke("explain", 10).stderr
    assert "There is no layer abc" in invoke("explain", DATA, "--layer", "abc").stderr


def test_the_cautions_name_what_is_doubtful():
    result = read_result(DATA)
    metrics = result.record
    found = {c.text.partition(":")[0]: c for c in cautions(result, metrics, ())}
    jumps = [m for m in metrics.matrices if m.alpha_start_se > m.alpha_hill_se]
    short = [m for m in metrics.matrices if m.k < 50]
    (first,) = [c for text, c in found.items() if "where the tail starts" in text]
    (second,) = [c for text, c in found.items() if "fewer than 50" in text]
    assert len(first.items) == len(jumps) == 149  # as docs/ESTIMATORS.md says
    assert f"k from {jumps[0].k_low} to {jumps[0].k_high}" in first.items[0]
    assert len(second.items) == len(short) == 35
    assert any("kde-mean" in c.text for c in found.values())


def test_the_error_bars_are_those_of_the_means():
    metrics = read_result(DATA).record
    expected = [layer.se for layer in explain(metrics)]
    assert mean_errors(metrics, "alpha_se") == pytest.approx(expected, rel=1e-12)
