"""What a notebook needs: a path in, a record out, a table of it."""

from __future__ import annotations

import sys

import pytest
from helpers.commands import ROOT

import htsr_alloc
from htsr_alloc import HtsrError, Metrics, Settings, allocate, analyze, loads, open_checkpoint

DATA = ROOT / "data"


def smollm2() -> Metrics:
    return loads(Metrics, (DATA / "smollm2.metrics.json").read_text(), "smollm2")


def test_analyze_takes_a_path_a_checkpoint_and_single_settings(model, tmp_path):
    found = analyze(model, estimator="median")
    again = analyze(open_checkpoint(str(model)), Settings("median"))
    assert found.matrices == again.matrices
    assert found.settings == Settings("median", noise=0.01)
    assert analyze(str(model)).settings.estimator == "official"
    assert analyze(model, Settings("ks"), bins=50).settings == Settings("ks", bins=50, noise=0.01)
    farms = analyze(model, farms=htsr_alloc.Farms(rows=8, windows=2))
    assert farms.settings.estimator == "median"
    written = analyze(model, output=tmp_path / "x.metrics.json")
    assert loads(Metrics, (tmp_path / "x.metrics.json").read_text(), "x") == written
    with pytest.raises(TypeError, match="unexpected keyword argument 'estimater'"):
        analyze(model, estimater="ks")


def test_allocate_takes_a_path_and_says_which():
    path = DATA / "smollm2.metrics.json"
    by_path = allocate(path, T=160, beta=2.5)
    by_record = allocate(smollm2(), budget=160)
    assert by_path.experts == by_record.experts
    assert by_path.metrics.file == "smollm2.metrics.json"
    assert allocate(str(path), T=160).metrics == by_path.metrics


def test_tables():
    pytest.importorskip("pandas")
    metrics = smollm2()
    layers = metrics.to_pandas()
    assert list(layers.pl_alpha_hill) == [layer.pl_alpha_hill for layer in metrics.layers]
    matrices = metrics.to_pandas("matrices")
    assert len(matrices) == 210
    means = matrices.groupby("layer").pl_alpha_hill.mean()
    assert means.tolist() == pytest.approx(layers.pl_alpha_hill.tolist())
    assert set(metrics.to_pandas("skipped").columns) == {"tensor", "reason"}
    made = allocate(metrics, T=160, per_module=True)
    assert made.to_pandas().experts.sum() == 160
    assert list(made.to_pandas().top_k) == list(made.top_k)
    assert made.to_pandas("modules").groupby("role").experts.sum().eq(160).all()
    bare = allocate(None, strategy="uniform", layers=3, T=6)
    assert bare.to_pandas().experts.tolist() == [2, 2, 2]
    assert bare.to_pandas("modules").empty
    for record in (metrics, made):
        with pytest.raises(HtsrError, match="no table 'rows'"):
            record.to_pandas("rows")


def test_without_pandas_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(HtsrError, match="A table needs pandas") as caught:
        smollm2().to_pandas()
    assert caught.value.hint == "pip install pandas"
