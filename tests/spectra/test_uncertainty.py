import math

import numpy as np
import pytest

from htsr_alloc.spectra.estimators import ESTIMATORS, fit
from htsr_alloc.spectra.uncertainty import uncertainty


def weight(seed: int, rows: int = 300, columns: int = 200) -> np.ndarray:
    """Noise plus 40 directions whose strength falls as a power law."""
    generator = np.random.default_rng(seed)
    left = generator.normal(size=(rows, 40)) / math.sqrt(rows)
    right = generator.normal(size=(40, columns)) / math.sqrt(columns)
    strength = 3 * (math.sqrt(rows) + math.sqrt(columns)) * np.arange(1, 41) ** -0.7
    return generator.normal(size=(rows, columns)) + (left * strength) @ right


def eigenvalues(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)[::-1] ** 2


def rms(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.mean(matrix**2)))


@pytest.mark.parametrize("estimator", ["official", "paper", "median", "kde", "kde-mean"])
def test_noise_on_the_matrix_moves_z_as_far_as_the_start_error_says(estimator):
    """The truth: 1 % Gaussian noise on the matrix itself, and its spectrum computed again."""
    measured, stated = [], []
    for seed in range(12):
        matrix = weight(seed)
        values = eigenvalues(matrix)
        alpha = fit(values, estimator).alpha
        generator = np.random.default_rng(100 + seed)
        for _ in range(8):
            noise = 0.01 * rms(matrix) * generator.normal(size=matrix.shape)
            again = fit(eigenvalues(matrix + noise), estimator).alpha
            measured.append(math.log((again - 1) / (alpha - 1)))
        stated.append(uncertainty(values, rms(matrix), estimator).start / (alpha - 1))
    truth, model = np.sqrt(np.mean(np.square(measured))), np.sqrt(np.mean(np.square(stated)))
    assert truth > 0
    assert 0.6 < model / truth < 1.6


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_hills_error_and_the_starts_make_one(estimator):
    values = eigenvalues(weight(0))
    fitted, found = fit(values, estimator), uncertainty(values, 1.0, estimator)
    assert found.hill == pytest.approx((fitted.alpha - 1) / math.sqrt(fitted.k))
    assert found.se == pytest.approx(math.sqrt(found.hill**2 + found.start**2))
    assert found.k_low <= fitted.k <= found.k_high
    assert found.jumps == (found.start > found.hill)


def test_hills_error_is_the_spread_of_fits_to_independent_draws():
    """`median`'s start is fixed, and Pareto draws are what Hill's error is about."""
    generator = np.random.default_rng(0)
    draws = [np.sort(generator.pareto(1.5, 400) + 1) for _ in range(300)]
    alphas = [fit(values, "median").alpha for values in draws]
    hill = uncertainty(draws[0], 0.0, "median").hill
    assert np.std(alphas) == pytest.approx(hill, rel=0.15)


def test_no_noise_no_error_of_the_start_and_the_same_numbers_twice():
    values = eigenvalues(weight(1))
    still = uncertainty(values, 1.0, noise=0.0)
    assert still.start == pytest.approx(0, abs=1e-12)
    assert still.k_low == still.k_high
    assert uncertainty(values, 1.0) == uncertainty(values.copy(), 1.0)
    assert uncertainty(values, 1.0) != uncertainty(values, 1.0, draws=15)


def test_the_error_does_not_depend_on_the_weights_scale():
    values = eigenvalues(weight(2))
    one, other = uncertainty(values, 1.0, "kde"), uncertainty(values * 2.0**20, 2.0**10, "kde")
    assert other.se == pytest.approx(one.se, rel=1e-9)


def test_a_histograms_peak_jumps_and_a_kernels_does_not():
    found = [
        [uncertainty(eigenvalues(weight(seed)), 1.0, name).jumps for seed in range(12)]
        for name in ("official", "kde-mean")
    ]
    assert sum(found[0]) >= 6
    assert not any(found[1])


def test_no_error_without_a_fit():
    assert uncertainty(np.array([2.0, 2.0, 2.0]), 1.0) is None
