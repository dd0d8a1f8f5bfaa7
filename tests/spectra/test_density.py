"""The kernel density's mode against scipy's gaussian_kde."""

import numpy as np
import pytest
from scipy.stats import gaussian_kde

from htsr_alloc.spectra.density import mode


@pytest.mark.parametrize("n", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_higher_than_the_mode(n, seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n) * generator.uniform(0.1, 3)
    h = 0.15 * generator.uniform(0.3, 3)
    density = gaussian_kde(x, bw_method=h / x.std(ddof=1))
    found = mode(x, h)
    assert x.min() - 1e-9 <= found <= x.max() + 1e-9
    highest = density(np.linspace(x.min(), x.max(), 3000)).max()
    assert density([found])[0] >= highest * (1 - 1e-12)


def test_two_modes_are_told_apart_exactly():
    """Two clusters far apart, one value of a thousand more on one side."""
    left, right = np.linspace(0, 0.1, 500), np.linspace(3, 3.1, 500)
    more = np.concatenate([left, right, [3.05]])
    assert mode(more, 0.2) == pytest.approx(3.05, abs=1e-3)
    assert mode(-more, 0.2) == pytest.approx(-3.05, abs=1e-3)
    assert mode(np.concatenate([left, right]), 0.2) == pytest.approx(0.05, abs=1e-9)  # a tie


def test_the_mode_moves_with_the_values():
    x = np.random.default_rng(0).gamma(2, size=400)
    assert mode(5 + 3 * x, 0.6) == pytest.approx(5 + 3 * mode(x, 0.2), abs=1e-9)
    moved = x + 1e-6 * np.random.default_rng(1).normal(size=400)
    assert abs(mode(moved, 0.2) - mode(x, 0.2)) < 1e-5
