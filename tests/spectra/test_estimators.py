import math

import numpy as np
import pytest
from helpers import naive
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import FAILED, MARKED, OK
from htsr_alloc.spectra.estimators import ESTIMATORS, _histogram, alpha_hat, fit, stable_rank

RNG = np.random.default_rng(0)


def spectra() -> dict[str, np.ndarray]:
    """Shapes of spectra that weights have, ascending."""
    gaussian = RNG.normal(size=(300, 200))
    heavy = RNG.standard_t(2.5, size=(200, 200))
    found = {
        "gaussian": np.linalg.svd(gaussian, compute_uv=False) ** 2,
        "heavy, square": np.linalg.svd(heavy, compute_uv=False) ** 2,
        "pareto": RNG.pareto(1.7, size=400) + 1,
        "lognormal": np.exp(RNG.normal(0, 3, size=150)),
        "wide range": 10.0 ** RNG.uniform(-30, 30, size=300),
        "large": 1e6 * (RNG.pareto(3.0, size=250) + 1),
        "few": RNG.pareto(1.0, size=7) + 1,
        "three": np.array([1.0, 2.0, 5.0]),
        "repeated": np.repeat(RNG.pareto(1.2, size=40) + 1, 3),
    }
    return {name: np.sort(values) for name, values in found.items()}


SPECTRA = spectra()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SPECTRA)
def test_every_estimator_equals_its_naive_statement(name, estimator):
    values = SPECTRA[name]
    found = fit(values, estimator)
    if found.alpha is None:
        assert "no eigenvalue qualifies" in found.reason
        q = naive.kernel_peak(values.tolist())
        assert estimator.startswith("kde-")
        assert not any(0.95 * q <= x <= 1.5 * q for x in values[:-1])
        return
    assert found.alpha == pytest.approx(naive.alpha(values, estimator), rel=1e-11)
    assert found.status == (OK if len(values) >= 50 else MARKED)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.integers(1, 10**6), min_size=3, max_size=60),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    estimator=st.sampled_from(list(ESTIMATORS)),
    bins=st.integers(2, 120),
)
def test_any_spectrum_gives_the_naive_alpha_or_a_reason(values, scale, estimator, bins):
    values = np.sort(np.array(values)) * scale
    found = fit(values, estimator, bins)
    if found.status == FAILED:
        assert found.alpha is None
        assert found.reason
        return
    assert math.isfinite(found.alpha)
    assert found.alpha > 1
    starts = len(values) - found.k - (estimator in ("paper", "kde"))
    assert found.xmin == values[starts]
    assert 0 <= found.ks_distance <= 1
    # Where two starts' distances differ by rounding only, either is right.
    expected = naive.alpha(values, estimator, bins)
    if not math.isclose(found.alpha, expected, rel_tol=1e-9):
        assert estimator in ("official", "band", "ks", "kde-band")
        theirs = min(naive.tail(values.tolist(), i)[1] for i in range(len(values) - 1))
        assert found.ks_distance == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("estimator", ["official", "band", "ks", "median", "kde-band"])
def test_the_reported_distance_is_that_of_the_reported_tail(estimator):
    values = SPECTRA["heavy, square"]
    found = fit(values, estimator)
    assert naive.tail(values.tolist(), len(values) - found.k) == pytest.approx(
        (found.alpha, found.ks_distance), rel=1e-11
    )


def test_a_pareto_tail_gives_its_exponent_back():
    """The density x^-alpha has alpha = 1 + shape, with standard error shape / sqrt(n)."""
    shape, n = 1.8, 20_000
    values = np.sort((RNG.pareto(shape, size=n) + 1) * 3.0)
    assert fit(values, "ks").alpha == pytest.approx(1 + shape, abs=6 * shape / math.sqrt(n))
    assert fit(values, "median").alpha == pytest.approx(1 + shape, abs=9 * shape / math.sqrt(n))


def test_official_compares_with_the_logarithm_and_band_does_not():
    """A bump below the peak: `band` may not start there, `official` may."""
    pareto = 1e-3 * (1 - (np.arange(2000) + 0.5) / 2000) ** -2.0
    values = np.concatenate([pareto[pareto < 0.9], np.linspace(1.0, 1.001, 300)])
    assert fit(values, "official").alpha == pytest.approx(naive.alpha(values, "official"))
    assert fit(values, "band").alpha == pytest.approx(naive.alpha(values, "band"))
    assert fit(values, "official").xmin < 0.95 * naive.peak(values.tolist())
    assert fit(values, "band").xmin >= 0.95 * naive.peak(values.tolist())


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "official"])
def test_alpha_does_not_depend_on_the_scale(estimator):
    values = SPECTRA["heavy, square"]
    scaled = fit(values * 2.0**40, estimator)
    assert scaled.alpha == pytest.approx(fit(values, estimator).alpha, rel=1e-9)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "only 0 eigenvalues"),
        ([1.0, 2.0], "only 2 eigenvalues"),
        ([2.0, 2.0, 2.0], "all eigenvalues are equal"),
        ([1 / 3 * (1 + i * 2**-52) for i in range(64)], "equal within the rounding of float64"),
        ([0.0, 1.0, 2.0], "not positive and finite"),
        ([1.0, 2.0, math.inf], "not positive and finite"),
        ([1.0, 2.0, math.nan], "not positive and finite"),
    ],
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_number_without_a_fit(values, reason, estimator):
    found = fit(np.array(values), estimator)
    assert found.status == FAILED
    assert reason in found.reason
    assert (found.alpha, found.xmin, found.k, found.ks_distance, found.peak_gap) == (None,) * 5


def test_a_tail_of_equal_values_has_no_exponent():
    assert fit(np.array([1.0, 2.0, 5.0, 5.0, 5.0]), "median").reason == (
        "the tail's eigenvalues are all equal"
    )


def test_few_eigenvalues_are_marked_and_fifty_are_not():
    values = np.sort(RNG.pareto(2.0, size=50) + 1)
    assert fit(values[1:]).status == MARKED
    assert fit(values[1:]).reason == "only 49 eigenvalues (< 50)"
    assert (fit(values).status, fit(values).reason) == (OK, None)


@pytest.mark.parametrize("bins", [1, 7, 100, 1000])
def test_the_histogram_is_numpys(bins):
    rng = np.random.default_rng(bins)
    spectra = [np.log10(values) for values in SPECTRA.values()]
    grids = [np.sort(rng.integers(0, 60, 80)) / rng.integers(1, 50) for _ in range(200)]
    for x in (*spectra, *grids):  # a grid has values on the edges
        counts, edges = np.histogram(x, bins)
        found = _histogram(x, bins)
        assert found[0].tolist() == counts.tolist()
        assert found[1].tolist() == edges.tolist()


def test_the_gap_of_the_two_fullest_bins():
    values = 10.0 ** np.array([0.0, 0.01, 0.02, 0.55, 0.57, 1.0])
    assert fit(values, bins=10).peak_gap == 1
    assert fit(values[1:], bins=10).peak_gap == 0  # a tie: two and two
    assert fit(values, bins=1).peak_gap == 6


def test_wrong_arguments_are_refused():
    with pytest.raises(HtsrError, match="no estimator 'hill'"):
        fit(SPECTRA["pareto"], "hill")
    with pytest.raises(HtsrError, match="at least one bin"):
        fit(SPECTRA["pareto"], bins=0)
    with pytest.raises(HtsrError, match=r"at least 0\.01 decades, not nan"):
        fit(SPECTRA["pareto"], "kde", bandwidth=math.nan)


def test_alpha_hat_and_stable_rank():
    values = SPECTRA["gaussian"]
    assert alpha_hat(3.0, 1000.0) == pytest.approx(9.0)
    assert stable_rank(values) == pytest.approx(math.fsum(values) / max(values), rel=1e-14)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(3))
def test_ks_equals_the_powerlaw_package(seed):
    """An exponent below 3, beyond which powerlaw 2 does not look by default."""
    powerlaw = pytest.importorskip("powerlaw")
    values = np.sort(np.random.default_rng(seed).pareto(1.2, size=400) + 1)
    theirs, found = powerlaw.Fit(values, verbose=False), fit(values, "ks")
    assert found.alpha == pytest.approx(theirs.power_law.alpha, rel=1e-9)
    assert found.xmin == theirs.xmin
    assert found.ks_distance == pytest.approx(theirs.power_law.D, rel=1e-9)
