"""Estimators that look for no histogram's peak take float32 spectra, which others refuse."""

import numpy as np
import pytest
import torch
from helpers.commands import write_shards

from htsr_alloc.allocation import Request
from htsr_alloc.allocation.sensitivity import sensitivity_of
from htsr_alloc.analysis.analyze import analyze
from htsr_alloc.analysis.decompose import peak_bins
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.analysis.refit import refit
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Farms, Settings
from htsr_alloc.spectra import engines, lapack
from htsr_alloc.spectra.estimators import ESTIMATORS, fit

pytestmark = pytest.mark.skipif(
    lapack.load() is None, reason="the package scipy-openblas64 is not installed"
)
SMOOTH = [name for name, row in ESTIMATORS.items() if row.smooth]
BAND = "float32 band, no peak certified"
GRAM = "float32 Gram, two stages, no peak certified"


@pytest.fixture
def everywhere(monkeypatch):
    """float32 on matrices that are small enough for a test."""
    monkeypatch.setattr(engines, "TWO_STAGE", 100)
    monkeypatch.setattr(engines, "BAND", 100)


@pytest.fixture
def model(tmp_path):
    """Two blocks of a square and a rectangular matrix with a heavy tail."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn.q": (160, 160), "mlp.up": (480, 160)}
    tensors = {
        f"layers.{i}.{name}.weight": torch.randn(*shape, generator=generator)
        * torch.rand(shape[1], generator=generator) ** -0.4
        for i in range(2)
        for name, shape in shapes.items()
    }
    return write_shards(tmp_path / "m", [tensors])


def test_what_computed_each_spectrum_is_said_and_alpha_is_near(model, everywhere):
    found = analyze(model, estimator="kde-mean")
    exact = analyze(model, estimator="kde-mean", engine="exact")
    assert [m.engine for m in found.matrices] == [BAND, GRAM] * 2
    assert {m.engine for m in analyze(model).matrices}.isdisjoint({BAND, GRAM})
    for ours, theirs in zip(found.matrices, exact.matrices, strict=True):
        assert ours.pl_alpha_hill == pytest.approx(theirs.pl_alpha_hill, abs=1e-4)
        assert ours.pl_alpha_hill != theirs.pl_alpha_hill
        assert ours.stable_rank == pytest.approx(theirs.stable_rank, rel=1e-5)


def test_an_estimator_that_needs_a_peak_is_refused_on_them(model, everywhere, tmp_path):
    output = RunFiles(tmp_path / "x.metrics.json")
    analyze(model, output=output, estimator="kde-mean")
    for name in SMOOTH:
        again = refit(output.metrics, RunFiles(tmp_path / f"{name}.metrics.json"), name)
        assert again.settings.estimator == name
    for name in set(ESTIMATORS) - set(SMOOTH):
        with pytest.raises(HtsrError, match=f"{name} looks for a histogram's peak") as caught:
            refit(tmp_path / "kde.metrics.json", RunFiles(tmp_path / "y.metrics.json"), name)
        assert "Analyze again" in caught.value.hint
    assert not (tmp_path / "y.metrics.json").exists()


def test_sensitivity_leaves_out_what_would_be_refused(model, everywhere, tmp_path):
    path = tmp_path / "x.metrics.json"
    metrics = analyze(model, output=path, estimator="kde-mean")
    found = sensitivity_of(metrics, path, Request.of(T=8), draws=1, seed=0)
    assert found.causes["estimator"] == ["kde", "kde-band"]


def test_only_a_run_that_looks_for_no_peak_asks_for_none():
    assert {name for name in ESTIMATORS if peak_bins(Settings(name)) is None} == set(SMOOTH)
    assert peak_bins(Settings("kde-mean", bins=50, engine="exact")) == 50
    assert peak_bins(Settings("median", farms=Farms())) == 100


def test_a_journal_of_float32_spectra_is_not_finished_by_another_kind(model, everywhere, tmp_path):
    output = tmp_path / "x.metrics.json"

    def stop(stream, layer_map):
        yield next(iter(stream))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(model, output=output, estimator="kde-mean", progress=stop)
    with pytest.raises(HtsrError, match=r"of a run with another bins \(null; now 100\)"):
        analyze(model, output=output, estimator="official")
    assert analyze(model, output=output, estimator="median") is not None


@pytest.mark.parametrize("shape", [(160, 160), (480, 160)])
def test_a_median_that_float32_does_not_know_is_left_to_float64(shape, everywhere):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator)
    assert engines.auto(weight, None)[1].startswith("float32")
    weight[:, 0] *= 1e4
    assert engines.auto(weight, None)[1].startswith("float64")


@pytest.mark.checkpoints
@pytest.mark.parametrize("name", ["minilm", "smollm2", "mpnet"])
def test_float32_moves_alpha_of_real_matrices_by_less_than_the_stated_bound(
    name, checkpoint, everywhere
):
    """1e-4; the worst of 318 was 7e-6 (kde-band)."""
    opened = open_checkpoint(checkpoint(name))
    found = map_layers(opened.tensors, num_hidden_layers=opened.num_hidden_layers)
    taken = 0
    for matrix in found.matrices:
        weight = opened.read(matrix.ref, matrix.index)
        tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
        values, how = engines.auto(tall, None)
        if how.startswith("float64"):
            continue
        taken += 1
        exact = engines.exact(tall)[0]
        for estimator in SMOOTH:
            ours, theirs = fit(values, estimator).alpha, fit(exact, estimator).alpha
            assert ours == pytest.approx(theirs, abs=1e-4), (matrix.name, estimator)
        assert np.isfinite(values).all()
    assert taken > 0.9 * len(found.matrices)
