"""Singular values near zero by inverse iteration, against SVDs in float64 and in 60 digits."""

import numpy as np
import pytest
import torch

from htsr_alloc.spectra import smallest as module
from htsr_alloc.spectra.smallest import EPS, smallest
from htsr_alloc.spectra.spectrum import spectrum


def planted(n: int, low: list[float], seed: int = 0) -> np.ndarray:
    """(n, n) with the singular values ``low`` and, above them, 1/n, 2/n, ..."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    singular = np.arange(1, n + 1) / n
    singular[: len(low)] = low
    return (left * np.sort(singular)) @ right.T


def dead(n: int) -> np.ndarray:
    weight = np.random.default_rng(0).standard_normal((n, n))
    weight[[3, 9]] = 0
    weight[:, 7] = 0
    return weight


def equal_rows(n: int) -> np.ndarray:
    weight = np.random.default_rng(0).standard_normal((n, n))
    weight[5] = weight[6]
    return weight


CASES = {
    **{f"1e-{p}": planted(150, [10.0**-p]) for p in range(7, 17)},
    "zero": planted(150, [0.0]),
    "three zeros": planted(150, [0.0, 0.0, 0.0]),
    "a cluster": planted(150, [1e-9, 1e-9 * (1 + 1e-7), 1e-9 * (1 + 2e-7)]),
    "graded": planted(150, [10.0**-p for p in range(7, 15)]),
    "thirty": planted(150, [1e-10 * i for i in range(1, 31)]),
    "near the rest": planted(150, [1e-7, 1.4e-7, 2.1e-7, 1e-6]),
    "dead rows": dead(150),
    "equal rows": equal_rows(150),
    "huge": planted(150, [1e-12]) * 1e140,
    "tiny": planted(150, [1e-12]) * 1e-140,
}


@pytest.mark.parametrize("name", CASES)
def test_equals_a_float64_svd_to_its_own_rounding(name):
    weight = CASES[name]
    expected = np.linalg.svd(weight, compute_uv=False)[::-1]
    values = np.linalg.eigvalsh(weight.T @ weight)
    found = smallest(torch.from_numpy(weight), values)
    assert found is not None
    assert 0 < len(found) <= 30
    assert np.abs(found - expected[: len(found)]).max() <= 2 * EPS * expected[-1]


@pytest.mark.parametrize("power", [8, 11, 14])
def test_is_as_near_to_sixty_digits_as_an_svd_is(power):
    mpmath = pytest.importorskip("mpmath")
    n = 24
    weight = planted(n, [10.0**-power], seed=power)
    with mpmath.workdps(60):
        digits = mpmath.svd_r(mpmath.matrix(weight.tolist()), compute_uv=False)
        truth = np.array([float(x) for x in digits])[::-1]
    found = smallest(torch.from_numpy(weight), np.linalg.eigvalsh(weight.T @ weight))
    assert found is not None
    assert abs(found[0] - truth[0]) <= 2 * EPS * truth[-1]
    assert found[0] == pytest.approx(10.0**-power, abs=4 * EPS)


def test_without_convergence_there_is_no_answer(monkeypatch):
    weight = CASES["near the rest"]
    values = np.linalg.eigvalsh(weight.T @ weight)
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "SPARE", 0)
    assert smallest(torch.from_numpy(weight), values) is None
    found = spectrum(torch.from_numpy(weight))
    expected = np.linalg.svd(weight, compute_uv=False)[::-1]
    np.testing.assert_allclose(np.sqrt(found.eigenvalues), expected, rtol=1e-8)


def test_a_bound_is_not_believed_where_a_smaller_one_was_missed():
    """Exact vectors, but of the second to the ninth."""
    singular = np.concatenate([[1e-9, 2e-7], np.linspace(0.1, 1, 40)])
    zero = [np.zeros(8), np.zeros(8)]
    assert module._bound(singular[:8], zero, singular[2:], 2) < 1e-20
    assert module._bound(singular[1:9], zero, singular[2:], 2) == np.inf


@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (150, 150)])
def test_rectangular_matrices_are_refined_by_their_r(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator).double()
    tall = weight if shape[0] >= shape[1] else weight.T
    tall[:, 1] = tall[:, 0] * (1 + 1e-9)
    found = spectrum(weight)
    assert found.engine.endswith("inverse iteration for 1")
    expected = np.linalg.svd(weight.numpy(), compute_uv=False)[::-1]
    assert found.n_zero == int(expected[0] <= max(shape) * EPS * expected[-1])
    kept = expected[found.n_zero :]
    assert np.abs(np.sqrt(found.eigenvalues) - kept).max() < 1e-9 * kept[-1]
