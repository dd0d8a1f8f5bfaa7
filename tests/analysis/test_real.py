"""Real checkpoints against other implementations: naive float64, float32 svdvals, WeightWatcher."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import naive
from safetensors.numpy import load_file

from htsr_alloc.analysis.analyze import analyze
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.analysis.refit import refit
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.records import Metrics, Settings, loads
from htsr_alloc.spectra.estimators import ESTIMATORS, fit

ROOT = Path(__file__).parents[2]
WEIGHTWATCHER = Path(__file__).parents[1] / "fixtures" / "weightwatcher.json"

pytestmark = pytest.mark.checkpoints


@pytest.fixture(scope="session", params=["minilm", "smollm2", "mpnet"])
def analysed(request, tmp_path_factory, checkpoint):
    """(name, checkpoint, metrics, spectra, run files) of one analysis, official estimator."""
    opened = open_checkpoint(checkpoint(request.param))
    files = RunFiles(tmp_path_factory.mktemp("real") / f"{request.param}.metrics.json")
    metrics = analyze(opened, Settings("official"), files)
    return request.param, opened, metrics, load_file(files.spectra), files


@cache
def singular_values(folder: Path, name: str) -> np.ndarray:
    """LAPACK's float64 singular values, ascending, by another algorithm than the package's."""
    checkpoint = open_checkpoint(folder)
    ref = next(ref for ref in checkpoint.tensors if ref.name == name)
    return np.linalg.svd(checkpoint.read(ref).double().numpy(), compute_uv=False)[::-1]


def test_every_block_is_found(analysed):
    name, _, metrics, _, _ = analysed
    layers, each = {"minilm": (6, 6), "smollm2": (30, 7), "mpnet": (12, 6)}[name]
    assert [layer.matrices for layer in metrics.layers] == [each] * layers
    assert all(matrix.status == "ok" for matrix in metrics.matrices)
    assert all(matrix.n_eigs == min(matrix.shape) for matrix in metrics.matrices)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_alpha_equals_the_naive_statement_on_the_same_eigenvalues(analysed, estimator):
    _, _, metrics, spectra, _ = analysed
    for matrix in metrics.matrices:
        values = spectra[matrix.tensor]
        found = fit(values, estimator)
        assert found.alpha == pytest.approx(naive.alpha(values, estimator), rel=1e-9), matrix.tensor
        if estimator == "official":
            assert matrix.pl_alpha_hill == found.alpha


def test_alpha_equals_the_naive_statement_on_float64_svdvals(analysed):
    name, _, metrics, _, _ = analysed
    for matrix in metrics.matrices:
        values = singular_values(ROOT / ".cache" / "checkpoints" / name, matrix.tensor) ** 2
        expected = naive.alpha(values, "official")
        assert matrix.pl_alpha_hill == pytest.approx(expected, rel=1e-6), matrix.tensor
        assert matrix.lambda_max == pytest.approx(values[-1], rel=1e-12)
        assert matrix.stable_rank == pytest.approx(values.sum() / values[-1], rel=1e-10)
        assert matrix.alpha_hat == pytest.approx(expected * np.log10(values[-1]), rel=1e-6)


def test_float32_svdvals_agree_but_where_they_break_a_tie(analysed):
    """What the released script uses. float32 can move an eigenvalue to another histogram bin and
    with it the peak; which matrices that hits depends on the machine's LAPACK (here: none)."""
    _, checkpoint, metrics, _, _ = analysed
    refs = {ref.name: ref for ref in checkpoint.tensors}
    moved = []
    for matrix in metrics.matrices:
        weight = checkpoint.read(refs[matrix.tensor]).float()
        values = torch.linalg.svdvals(weight).flip(0).double().numpy() ** 2
        theirs = fit(values, "official").alpha
        if abs(theirs / matrix.pl_alpha_hill - 1) > 1e-4:
            moved.append(matrix)
    assert all(matrix.peak_gap <= 1 for matrix in moved), [m.tensor for m in moved]
    assert len(moved) <= len(metrics.matrices) / 50, [m.tensor for m in moved]


def test_ks_equals_weightwatcher_on_every_matrix(analysed):
    """WeightWatcher 0.7.7's own numbers (fixtures/make_weightwatcher.py)."""
    name, _, metrics, _, files = analysed
    rows = json.loads(WEIGHTWATCHER.read_text())["matrices"]
    theirs = {row["tensor"]: row for row in rows if row["checkpoint"] == name}
    if not theirs:
        pytest.skip(f"WeightWatcher was not run on {name}")
    assert {matrix.tensor for matrix in metrics.matrices} == theirs.keys()
    ks = refit(files.metrics, RunFiles(files.metrics.with_name("ks.metrics.json")), "ks")
    for matrix in ks.matrices:
        row = theirs[matrix.tensor]
        assert matrix.pl_alpha_hill == pytest.approx(row["alpha"], rel=1e-6)
        assert matrix.alpha_hat == pytest.approx(row["alpha_weighted"], rel=1e-6)
        assert matrix.stable_rank == pytest.approx(row["stable_rank"], rel=1e-6)
        assert matrix.xmin == pytest.approx(row["xmin"], rel=1e-6)
        assert matrix.ks_distance == pytest.approx(row["D"], rel=1e-6)
        assert matrix.k == row["num_pl_spikes"]


def test_the_reference_metrics_under_data_are_still_what_comes_out(analysed):
    name, _, metrics, _, _ = analysed
    path = ROOT / "data" / f"{name}.metrics.json"
    kept = loads(Metrics, path.read_bytes(), path.name)
    assert kept.model == metrics.model
    assert kept.skipped == metrics.skipped
    for ours, theirs in zip(metrics.layers, kept.layers, strict=True):
        assert ours.prefix == theirs.prefix
        for metric in ("pl_alpha_hill", "alpha_hat", "stable_rank"):
            assert getattr(ours, metric) == pytest.approx(getattr(theirs, metric), rel=1e-6)


@pytest.mark.parametrize("engine", ["fast", "portable"])
def test_engines_differ_by_less_than_the_estimator_can_tell(analysed, engine):
    """Stable_Rank and Alpha_Hat to 1e-6; alpha to 2e-5, or a tie that float32 may break."""
    _, checkpoint, metrics, _, _ = analysed
    other = analyze(checkpoint, Settings("official", engine=engine))
    for ours, theirs in zip(metrics.matrices, other.matrices, strict=True):
        assert ours.stable_rank == pytest.approx(theirs.stable_rank, rel=2e-6), ours.tensor
        if engine == "portable" or ours.peak_gap > 1:
            assert ours.pl_alpha_hill == pytest.approx(theirs.pl_alpha_hill, rel=2e-5), ours.tensor
            assert ours.alpha_hat == pytest.approx(theirs.alpha_hat, rel=3e-5), ours.tensor
