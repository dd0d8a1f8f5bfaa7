"""From spectra whose tails have known exponents to scores of layers."""

import math

import numpy as np
import pytest

from htsr_alloc.allocation.shrinkage import Estimate, Shrinkage, shrink
from htsr_alloc.spectra.estimators import fit
from htsr_alloc.spectra.uncertainty import uncertainty

LAYERS, ROLES, N, NOISE = 12, 4, 100, 0.01


def spectrum(alpha: float, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """(ascending eigenvalues, the weights' rms): 40 of a body, 60 of a Pareto tail, and noise.

    The matrix is diagonal, (150, 100), with Gaussian noise: rotations would change neither.
    """
    body = 10 ** (1.2 * np.sqrt(generator.uniform(size=N - 60)) - 1.2)
    tail = (1 - generator.uniform(size=60)) ** (-1 / (alpha - 1))
    weight = np.zeros((3 * N // 2, N))
    np.fill_diagonal(weight, np.sqrt(np.concatenate([body, tail])))
    rms = float(np.sqrt(np.mean(weight**2)))
    weight += NOISE * rms * generator.normal(size=weight.shape)
    return np.linalg.svd(weight, compute_uv=False)[::-1] ** 2, rms


def model(seed: int, sd: float, estimator: str, draws: int = 16) -> tuple[float, float, Shrinkage]:
    """Distances (sd of the log ratio) of plain and of shrunk scores from the planted truth."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=LAYERS)
    truth, plain, estimates = np.zeros(LAYERS), np.zeros(LAYERS), []
    for role in range(ROLES):
        for layer in range(LAYERS):
            own = 0.5 * generator.normal()
            alpha = 1 + math.exp(math.log(1 + 0.3 * role) + sd * (shared[layer] + own))
            values, rms = spectrum(alpha, generator)
            found, error = (
                fit(values, estimator).alpha,
                uncertainty(values, rms, estimator, draws=draws),
            )
            truth[layer] += alpha / ROLES
            plain[layer] += found / ROLES
            estimates.append(Estimate(layer, f"role {role}", found, error.se))
    result = shrink(estimates)
    ours = np.array([result.scores[i] for i in range(LAYERS)])
    return float(np.std(np.log(plain / truth))), float(np.std(np.log(ours / truth))), result


@pytest.mark.parametrize("sd", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("estimator", ["official", "kde-mean"])
def test_shrunk_scores_are_nearer_the_exponents_that_made_the_spectra(estimator, sd):
    found = [model(seed, sd, estimator, draws=6) for seed in range(3)]
    plain, ours = (np.sqrt(np.mean(np.square([f[i] for f in found]))) for i in (0, 1))
    assert ours < plain
    if sd == 0:
        assert ours < plain / 2
