"""The standard errors of metrics.json, against the equations and the kept spectra."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.records_made import made_matrix

from htsr_alloc.analysis.measure import with_fit, with_noise
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Farms, Metrics, Settings, loads
from htsr_alloc.records.results import open_spectra
from htsr_alloc.spectra.uncertainty import uncertainty

DATA = Path(__file__).parents[2] / "data"


def test_the_kept_metrics_hold_the_errors_of_their_spectra():
    path = DATA / "minilm.metrics.json"
    metrics = loads(Metrics, path.read_bytes(), path.name)
    assert metrics.settings.noise == 0.01
    with open_spectra(metrics, path) as spectra:
        for matrix in metrics.matrices[:6]:
            values, (m, n) = spectra[matrix.tensor], matrix.shape
            rms = math.sqrt(values.sum() / (m * n))  # ||W||_F / sqrt(m n)
            found = uncertainty(values, rms)
            assert matrix.alpha_start_se == pytest.approx(found.start, rel=1e-6)
            assert (matrix.k_low, matrix.k_high) == (found.k_low, found.k_high)
    for matrix in metrics.matrices:
        hill = (matrix.pl_alpha_hill - 1) / math.sqrt(matrix.k)
        assert matrix.alpha_hill_se == pytest.approx(hill, rel=1e-12)
        assert matrix.alpha_se == pytest.approx(math.hypot(hill, matrix.alpha_start_se), rel=1e-12)
        assert matrix.k_low <= matrix.k <= matrix.k_high
    jumps = [m.alpha_start_se > m.alpha_hill_se for m in metrics.matrices]
    assert [m.start_jumps for m in metrics.matrices] == jumps
    assert sum(jumps) == 23  # as docs/ESTIMATORS.md says


def test_farms_and_failed_fits_have_no_errors():
    farms = Settings("median", farms=Farms())
    assert with_noise(farms).noise is None
    with pytest.raises(HtsrError, match="FARMS"):
        dataclasses.replace(farms, noise=0.01)
    settings = with_noise(Settings("median"))
    record = made_matrix(0, "q_proj", 3.0)
    values = np.sort(np.random.default_rng(0).pareto(2.0, 64) + 1)
    assert with_fit(record, values, settings).alpha_se > 0
    assert with_fit(record, values, farms).alpha_se is None
    failed = with_fit(record, np.ones(64), settings)
    assert failed.status == "failed"
    assert failed.alpha_se is failed.k_low is None
