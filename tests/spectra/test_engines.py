import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.spectra import band, certificate, engines, lapack
from htsr_alloc.spectra.estimators import ESTIMATORS, fit
from htsr_alloc.spectra.least import _bound, least
from htsr_alloc.spectra.spectrum import spectrum

needs_lapack = pytest.mark.skipif(
    lapack.load() is None, reason="the package scipy-openblas64 is not installed"
)


def heavy(m: int, n: int, seed: int = 0, dtype=torch.float16) -> torch.Tensor:
    """A heavy-tailed (m, n) matrix: columns of very unequal strength."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, generator=generator) ** -0.5
    return (0.02 * torch.randn(m, n, generator=generator) * scale).to(dtype)


def reference(weight: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1] ** 2


@needs_lapack
@pytest.mark.parametrize("n", [2, 63, 64, 65, 200, 513])
@pytest.mark.parametrize("kd", [0, 8, 64])
def test_one_stage_and_two_give_the_same_eigenvalues(n, kd, monkeypatch):
    monkeypatch.setattr(engines, "bandwidth", lambda n, size=8: kd if n > kd else 0)
    weight = heavy(n + 30, n)
    values, name = engines.exact(weight)
    np.testing.assert_allclose(values, reference(weight), rtol=1e-10)
    assert name.endswith("two stages" if kd and n > kd else "one stage")


@needs_lapack
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "width"), [(1, 4), (5, 4), (9, 4), (300, 48), (700, 64)])
def test_the_symmetric_band_is_similar_to_the_matrix(n, width, kind):
    made = np.random.default_rng(n).standard_normal((n, n))
    whole = (made + made.T).astype(kind)
    lower = np.asfortranarray(np.tril(whole))
    lower[np.triu_indices(n, 1)] = np.nan  # is not read
    found = band.symmetric_band(lapack.load(), lower, width)
    assert found.dtype == kind
    full = np.zeros((n, n))
    for k in range(min(width + 1, n)):
        full += np.diag(found[k, : n - k], -k)
        assert not found[k, n - k :].any()
    eps = 20 * np.finfo(kind).eps * np.sqrt(n)
    expected = np.linalg.eigvalsh(whole.astype(np.float64))
    np.testing.assert_allclose(np.linalg.eigvalsh(full), expected, atol=eps * abs(expected).max())


@needs_lapack
def test_two_stages_are_taken_where_they_are_faster():
    n = engines.TWO_STAGE
    assert engines.bandwidth(n - 1) == 0
    assert engines.bandwidth(n) > 0
    weight = heavy(n, n)
    values, name = engines.exact(weight)
    assert name == "float64 Gram, two stages"
    assert values.sum() == pytest.approx(float(weight.double().square().sum()), rel=1e-12)
    expected = torch.linalg.eigvalsh(weight.double().T @ weight.double()).numpy()
    np.testing.assert_allclose(values, expected, atol=1e-13 * expected[-1])


@needs_lapack
@pytest.mark.parametrize("shape", [(3000, 40), (1025, 40), (40, 3000), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_gram_matrix_of_chunks_in_either_order(shape, dtype):
    weight = heavy(*shape, dtype=dtype)
    tall = weight if shape[0] >= shape[1] else weight.T  # a view that is not contiguous
    expected = tall.double().T.numpy() @ tall.double().numpy()
    np.testing.assert_allclose(
        np.tril(engines.gram(tall)), np.tril(expected), atol=1e-14 * expected.max()
    )


@needs_lapack
@pytest.mark.parametrize("shape", [(130, 130), (400, 64), (200, 65), (500, 129), (64, 64), (3, 2)])
def test_the_band_has_the_matrix_singular_values(shape):
    weight = heavy(*shape, dtype=torch.float32)
    library = lapack.load()
    packed = band.band(library, weight)
    n = shape[1]
    full = np.zeros((n, n))
    for k in range(min(band.WIDTH + 1, n)):
        full += np.diag(packed[k, : n - k], -k) + (np.diag(packed[k, : n - k], k) if k else 0)
    found = np.sqrt(np.maximum(np.linalg.eigvalsh(full), 0))
    expected = np.sqrt(reference(weight))
    assert np.abs(found - expected).max() < 2e-6 * expected[-1]
    assert not full[np.abs(np.subtract.outer(range(n), range(n))) > band.WIDTH].any()


@needs_lapack
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_fast_leaves_what_float32_cannot_hold_to_exact(scale):
    weight = heavy(50, 40, dtype=torch.float32) * scale
    values, name = engines.fast(weight)
    assert name.startswith("float64 Gram")
    np.testing.assert_allclose(values, reference(weight), rtol=1e-10)


@needs_lapack
@pytest.mark.parametrize("power", [55, 56, 57, 58, 59, 60, 61, 63, 80])
def test_auto_leaves_a_gram_matrix_that_float32_cannot_hold_to_exact(power, monkeypatch):
    """At 2^58 the diagonal fits float32, and the reduction to a tridiagonal does not."""
    monkeypatch.setattr(engines, "TWO_STAGE", 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2304, 100, generator=generator) * 2.0**power
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, name = engines.auto(weight)
    assert name.startswith("float64 Gram")
    np.testing.assert_allclose(values, reference(weight), rtol=1e-5)


@needs_lapack
def test_fast_leaves_tiny_singular_values_to_exact():
    weight = torch.diag(torch.logspace(-7, 0, 60))
    assert engines.fast(weight)[1].startswith("float64 Gram")
    assert engines.fast(torch.diag(torch.logspace(-3, 0, 60)))[1] == "float32 band"


@needs_lapack
def test_auto_takes_float32_only_where_every_estimator_agrees(monkeypatch):
    monkeypatch.setattr(engines, "TWO_STAGE", 100)
    taken = 0
    for seed, bins in itertools.product(range(12), (100, 400)):
        weight = heavy(500, 150, seed)
        values, name = engines.auto(weight, bins)
        expected = reference(weight)
        if "guarded" not in name:
            np.testing.assert_allclose(values, expected, rtol=1e-10)
            continue
        taken += 1
        assert np.abs(values - expected).max() > 0
        assert (np.abs(values - expected) <= certificate.float32_error(expected)).all()
        if "refined" in name:
            assert values[0] == pytest.approx(expected[0], rel=1e-6)
        for estimator in ESTIMATORS:
            mine, theirs = fit(values, estimator, bins), fit(expected, estimator, bins)
            assert mine.alpha == pytest.approx(theirs.alpha, rel=2e-6)
            assert mine.k == theirs.k
    assert 0 < taken < 24


@needs_lapack
@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(500, 150),  # lambda_min is zero
        heavy(500, 150) * 0,
        heavy(500, 150, dtype=torch.float32) * 1e-25,  # squares leave float32
        heavy(500, 150, dtype=torch.float32) * 1e25,
        heavy(500, 150, dtype=torch.float64),
        heavy(200, 150),  # nearly square
    ],
)
def test_auto_leaves_what_float32_cannot_vouch_for_to_float64(weight, monkeypatch):
    monkeypatch.setattr(engines, "TWO_STAGE", 100)
    name = engines.auto(weight)[1]
    assert name.startswith("float64")
    tried = weight.dtype != torch.float64 and weight.shape[0] >= engines.TALL * weight.shape[1]
    assert name.endswith("(float32 not certain)") == tried


@needs_lapack
def test_float32_is_dropped_where_the_peak_of_these_bins_is_uncertain(monkeypatch):
    """For every seed some number of bins puts an edge within float32's error."""
    monkeypatch.setattr(engines, "TWO_STAGE", 100)
    weight = heavy(500, 150, seed=0)
    values = engines.symmetric_eigenvalues(engines.gram(weight, np.float32))
    error = certificate.float32_error(values)
    true = values.copy(), error.copy()
    true[0][0], true[1][0] = reference(weight)[0], 0
    seen = set()
    for bins in range(2, 200, 3):
        name = engines.auto(weight, bins)[1]
        certain = certificate.peak_is_certain(values, error, bins)
        refined = certificate.peak_is_certain(*true, bins)
        how = "guarded" if certain else "least one refined" if refined else "(float32 not certain)"
        assert name.endswith(how), bins
        seen.add(how)
    assert len(seen) == 3


def uneven(m, n, seed, spread):
    """A heavy-tailed matrix whose columns have unequal sizes, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(n, generator=generator))
    return (heavy(m, n, seed, torch.float32) * sizes).half()


@needs_lapack
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [12, 40, 200])
def test_the_least_eigenvalue_is_refined_within_its_bound(n, spread, wide):
    library = engines._library()
    for seed in range(4):
        weight = uneven(3 * n, n, seed, spread)
        weight = weight.T.contiguous().T if wide else weight
        a = engines.gram(weight, np.float32)
        values = engines.symmetric_eigenvalues(a.copy(order="F"))
        error = certificate.float32_error(values)
        true = reference(weight)[0]
        value, bound = least(library, weight, a, values, error)
        assert abs(value - true) <= bound + 1e-13 * values[-1]
        assert bound <= error[0]
        if true > 1e-4 * values[-1] and n > 100:
            assert bound < 1e-6 * true


@needs_lapack
def test_a_bound_is_not_believed_where_a_smaller_eigenvalue_was_missed():
    """Vectors of the second and later eigenvalues: exact Ritz pairs, but of the wrong ones."""
    diagonal = np.linspace(1.0, 2.0, 40)
    ritz, residual = diagonal[1:17], np.zeros((40, 16))
    assert _bound(ritz, residual, diagonal * (1 - 1e-7)) == np.inf
    assert _bound(diagonal[:16], residual, diagonal * (1 - 1e-7)) < 1e-10


@needs_lapack
def test_what_float32_cannot_factor_is_not_refined():
    weight = heavy(60, 30, dtype=torch.float32)
    a = engines.gram(weight, np.float32)
    values = engines.symmetric_eigenvalues(a.copy(order="F"))
    a[np.diag_indices(30)] -= 2 * values[0]
    assert least(engines._library(), weight, a, values, certificate.float32_error(values)) is None


@needs_lapack
@pytest.mark.parametrize("engine", ["exact", "fast", "auto"])
def test_threads_do_not_change_a_bit(engine):
    weights = [heavy(300 + 7 * i, 280, seed=i) for i in range(8)]
    alone = [engines.ENGINES[engine](weight, 100)[0] for weight in weights]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda w: engines.ENGINES[engine](w, 100)[0], weights * 3))
    for i, values in enumerate(together):
        assert np.array_equal(values, alone[i % 8])


def test_without_the_package_torch_does_the_work_and_is_named(monkeypatch):
    monkeypatch.setattr(lapack, "load", lambda: None)
    weight = heavy(80, 60)
    found = spectrum(weight)
    assert found.engine == "float64 Gram, eigvalsh"
    np.testing.assert_allclose(found.eigenvalues, reference(weight), rtol=1e-10)
    for engine in ("exact", "fast"):
        with pytest.raises(HtsrError, match="need the package scipy-openblas64") as caught:
            spectrum(weight, engine=engine)
        assert "portable" in caught.value.hint


def test_cpu_engines_are_refused_on_a_gpu():
    with pytest.raises(HtsrError, match="runs on the CPU only"):
        engines.check_engine("exact", "cuda")
    engines.check_engine("auto", "cuda")
    engines.check_engine("cuda", "cuda:1")
    with pytest.raises(HtsrError, match="needs a CUDA device"):
        engines.check_engine("cuda", "cpu")


@needs_lapack
def test_a_routine_that_fails_says_so():
    library = lapack.load()
    assert library.name.startswith("OpenBLAS ")
    with pytest.raises(lapack.LapackError, match="dsterf returned info"):
        library.sterf(np.array([np.nan, 1.0, 2.0]), np.array([1.0, 1.0]))
