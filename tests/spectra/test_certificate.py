"""The certificate of the float32 route: its error bound, and what follows for the peak."""

import importlib.util

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr_alloc.spectra import certificate, engines, lapack

needs_lapack = pytest.mark.skipif(
    lapack.load() is None, reason="the package scipy-openblas64 is not installed"
)


@pytest.fixture(scope="module")
def hard():
    """``benchmarks/hard.py``."""
    spec = importlib.util.spec_from_file_location("hard", ROOT / "benchmarks" / "hard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_lapack
def test_float32_uses_at_most_half_of_its_bound_on_hard_matrices(hard):
    """One stage and two, whatever the size; spectra that the route gives up do not count."""
    worst, believed, count = 0.0, 0, 0
    for _, weight in hard.hard((80, 144), seeds=3):
        count += 1
        exact = engines.exact(weight)[0]
        gram = engines.gram(weight, np.float32)
        two = engines.symmetric_eigenvalues(gram.copy(order="F"), 64)
        for values in (two, engines.symmetric_eigenvalues(gram)):
            error = certificate.float32_error(values)
            if values[0] >= certificate.LEAST * error[0] and not certificate.crowded(values, error):
                worst = max(worst, float((abs(values - exact) / error).max()))
                believed += 1
    assert count >= 200
    assert believed >= 200
    assert 0.1 < worst < 0.5


@needs_lapack
def test_a_few_huge_columns_take_more_than_their_share_of_the_error():
    """Found by search: the error of one eigenvalue goes with the largest, not with their mean."""
    draw = torch.Generator().manual_seed(1045)
    weight = torch.randn(1536, 512, generator=draw)
    weight *= torch.exp(0.3 * torch.randn(512, generator=draw))
    count = int(torch.randint(1, 12, (1,), generator=draw))
    size = 10 ** float(1 + 1.7 * torch.rand(1, generator=draw))
    weight[:, torch.randperm(512, generator=draw)[:count]] *= size
    values = engines.symmetric_eigenvalues(engines.gram(weight, np.float32), 64)
    off, error = abs(values - engines.exact(weight)[0]), certificate.float32_error(values)
    assert (off / error).max() < 0.5


@needs_lapack
def test_a_float32_diagonal_of_few_values_is_not_all_rounded_one_way():
    generator = torch.Generator().manual_seed(0)
    signs = 0.3377 * (2.0 * torch.randint(0, 2, (4096, 64), generator=generator) - 1)
    found, exact = engines.gram(signs, np.float32), engines.gram(signs)
    np.testing.assert_allclose(found.diagonal(), exact.diagonal(), rtol=certificate.EPS32)


def test_equal_eigenvalues_are_a_crowd():
    few = np.linspace(1.0, 2.0, 160)
    assert not certificate.crowded(few, certificate.float32_error(few))
    few[:10] = 1.0
    assert not certificate.crowded(few, certificate.float32_error(few))
    few[:11] = 1.0
    assert certificate.crowded(few, certificate.float32_error(few))


def test_a_peak_near_the_error_is_not_clear():
    values = np.concatenate([np.full(5, 1e-4), np.full(9, 1e-2), [1.0]])
    assert certificate.peak_is_clear(values, np.full(15, 9e-6), 100)
    assert not certificate.peak_is_clear(values, np.full(15, 1.1e-5), 100)


@settings(max_examples=300, deadline=None)
@given(
    exponents=st.lists(st.floats(-3, 3), min_size=3, max_size=60),
    relative=st.sampled_from([1e-12, 1e-6, 1e-3, 1e-2]),
    bins=st.integers(2, 40),
    seed=st.integers(0, 10**6),
)
def test_a_certain_peak_survives_every_error_within_the_bound(exponents, relative, bins, seed):
    values = np.sort(10.0 ** np.array(exponents))
    error = relative * values
    if values[0] == values[-1] or not certificate.peak_is_certain(values, error, bins):
        return
    expected = np.histogram(np.log10(values), bins)[0].argmax()
    rng = np.random.default_rng(seed)
    for size in (0.5, 0.999):
        signs = rng.choice([-1, 1], len(values)) if size > 0.9 else rng.uniform(-1, 1, len(values))
        moved = np.sort(values + size * error * signs)
        assert np.histogram(np.log10(moved), bins)[0].argmax() == expected


def test_a_tie_that_an_error_can_break_is_not_certain():
    edge = 10.0 ** np.array([0.0, 0.0999999999, 0.52, 0.55, 1.0])  # one of the first two at an edge
    assert not certificate.peak_is_certain(edge, 1e-6 * edge, 10)
    clear = 10.0 ** np.array([0.0, 0.02, 0.04, 0.55, 1.0])
    assert certificate.peak_is_certain(clear, 1e-6 * clear, 10)
