import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Farms
from htsr_alloc.spectra import engines
from htsr_alloc.spectra.devices import choose_device
from htsr_alloc.spectra.engines import ENGINES
from htsr_alloc.spectra.spectrum import spectrum


def weights(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def reference(weight: torch.Tensor) -> np.ndarray:
    """Squared singular values, ascending, from numpy's float64 SVD."""
    return np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1] ** 2


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(40, 40), (300, 70), (70, 300), (2500, 30), (30, 2500), (1, 9), (9, 1), (2, 2)]
)
def test_equals_numpys_svd(shape, dtype, engine):
    weight = weights(*shape, dtype=dtype)
    found = spectrum(weight, engine=engine)
    expected = reference(weight)
    assert len(found.eigenvalues) + found.n_zero == min(shape)
    if engine == "fast":  # float32 keeps singular values to eps32 * s_max, absolutely
        error = np.abs(np.sqrt(found.eigenvalues) - np.sqrt(expected))
        assert error.max() < 1e-6 * np.sqrt(expected[-1])
    else:  # a Gram matrix keeps eigenvalues to eps64 * lambda_max, absolutely
        np.testing.assert_allclose(
            found.eigenvalues, expected, rtol=1e-12, atol=1e-13 * expected[-1]
        )
    assert (np.diff(found.eigenvalues) >= 0).all()
    assert found.eigenvalues.dtype == np.float64


def test_float8_is_upcast_exactly():
    weight = weights(50, 20).to(torch.float8_e4m3fn)
    np.testing.assert_allclose(spectrum(weight).eigenvalues, reference(weight), rtol=1e-11)


@pytest.mark.parametrize("rank", [1, 5, 19])
@pytest.mark.parametrize("shape", [(60, 20), (20, 60), (20, 20)])
def test_low_rank_is_told_from_small(shape, rank):
    """Integer factors multiply without rounding, so that the zeros are exact."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(-3, 4, (shape[0], rank), generator=generator).double()
    right = torch.randint(-3, 4, (rank, shape[1]), generator=generator).double()
    found = spectrum(left @ right)
    assert found.n_zero == 20 - rank
    expected = reference(left @ right)[-rank:]
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-10)


def test_dead_rows_and_columns_are_zeros():
    weight = weights(30, 30)
    weight[[3, 7]] = 0
    weight[:, 5] = 0
    assert spectrum(weight).n_zero == 2


def test_small_singular_values_are_kept():
    """Condition 1e10: its square is beyond a Gram matrix in float64, not beyond svdvals."""
    left = torch.linalg.qr(weights(40, 40, dtype=torch.float64)).Q
    right = torch.linalg.qr(weights(40, 40, dtype=torch.float64, seed=1)).Q
    values = torch.logspace(-10, 0, 40, dtype=torch.float64)
    found = spectrum(left @ torch.diag(values) @ right)
    assert found.n_zero == 0
    assert found.engine.endswith("inverse iteration for 16")
    np.testing.assert_allclose(found.eigenvalues, values.numpy() ** 2, rtol=1e-4)


def test_an_svd_decides_where_too_many_are_small():
    left = torch.linalg.qr(weights(90, 90, dtype=torch.float64)).Q
    values = torch.logspace(-10, 0, 90, dtype=torch.float64)
    found = spectrum(left * values)
    assert found.engine == "float64 svdvals"
    np.testing.assert_allclose(found.eigenvalues, values.numpy() ** 2, rtol=1e-4)


def test_few_small_ones_that_the_gram_matrix_has_right_are_left_to_it_without_an_svd():
    values = torch.cat([torch.logspace(-6.2, -6.1, 40), torch.ones(1)]).double()
    found = spectrum(torch.linalg.qr(weights(41, 41, dtype=torch.float64)).Q * values)
    assert found.engine.startswith("float64 Gram")
    assert "inverse" not in found.engine
    np.testing.assert_allclose(found.eigenvalues, values.numpy() ** 2, rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e100, 1e150])
def test_huge_and_tiny_float64_weights(scale):
    weight = weights(30, 20, dtype=torch.float64)
    found = spectrum(weight * scale)
    np.testing.assert_allclose(found.eigenvalues / scale / scale, reference(weight), rtol=1e-11)


def test_denormal_float32_weights():
    weight = weights(30, 20) * 1e-40
    assert (weight.abs() < 1.2e-38).all()
    np.testing.assert_allclose(spectrum(weight).eigenvalues, reference(weight), rtol=1e-11)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(3, 4), "all weights are zero"),
        (torch.zeros(0, 4), "the matrix is empty"),
        (torch.tensor([[1.0, math.nan], [0, 1]]), "the matrix holds NaN"),
        (torch.tensor([[1.0, math.inf], [0, 1]]), "the matrix holds Inf"),
        (torch.tensor([[1.0, -math.inf], [0, math.nan]]), "the matrix holds NaN"),
        (weights(5, 5, dtype=torch.float64) * 1e200, "eigenvalues out of float64's range"),
        (weights(5, 5, dtype=torch.float64) * 1e-200, "eigenvalues out of float64's range"),
    ],
)
def test_no_spectrum_has_a_reason(weight, reason):
    found = spectrum(weight)
    assert (found.reason, len(found.eigenvalues)) == (reason, 0)


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 99), rank=st.integers(0, 12))
@example(m=8, n=8, seed=67, rank=8)  # its least eigenvalue is 3e-11 of the largest
def test_any_small_matrix(m, n, seed, rank):
    rank = min(rank, m, n)
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-5, 6, (m, rank), generator=generator).double()
    weight = left @ torch.randint(-5, 6, (rank, n), generator=generator).double()
    found = spectrum(weight)
    true_rank = int(np.linalg.matrix_rank(weight.numpy())) if weight.numel() else 0
    assert len(found.eigenvalues) == true_rank
    if true_rank:
        expected = reference(weight)[-true_rank:]
        # A Gram matrix has an absolute error; what is within 100 times that is computed again.
        error = min(m, n) * np.finfo(float).eps * expected[-1]
        again = expected < 90 * error
        np.testing.assert_allclose(found.eigenvalues[again], expected[again], rtol=1e-7)
        np.testing.assert_allclose(
            found.eigenvalues[~again], expected[~again], rtol=1e-10, atol=error
        )
    else:
        assert found.reason == "all weights are zero"


def test_orientation_and_order_do_not_matter():
    weight = weights(90, 40)
    shuffled = weight[torch.randperm(90, generator=torch.Generator().manual_seed(2))].T
    np.testing.assert_allclose(
        spectrum(weight).eigenvalues, spectrum(shuffled).eigenvalues, rtol=1e-11
    )


def test_farms_pools_the_eigenvalues_of_evenly_spaced_windows():
    weight = weights(50, 64)
    found = spectrum(weight, farms=Farms(rows=10, ratio=2.0, windows=4)).windows
    expected = []
    for i in (0, 13, 26, 39):  # steps of (50 - 10) // 3
        for j in (0, 14, 28, 42):  # and of (64 - 20) // 3
            expected += reference(weight[i : i + 10, j : j + 20]).tolist()
    np.testing.assert_allclose(found, sorted(expected), rtol=1e-11)


def test_farms_windows_shrink_to_fit_and_keep_their_ratio():
    found = spectrum(weights(30, 20), farms=Farms(rows=100, ratio=2.0, windows=3)).windows
    assert len(found) == 3 * 1 * 10  # 10 x 20 windows: three down, one across
    with pytest.raises(HtsrError, match="FARMS needs"):
        Farms(rows=0)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 2, 2), torch.ones(2, 2).int()])
def test_what_is_no_float_matrix_is_refused(weight):
    with pytest.raises(HtsrError, match="needs a float matrix"):
        spectrum(weight)


def test_an_unknown_engine_is_refused():
    with pytest.raises(HtsrError, match="no engine 'quick'") as caught:
        spectrum(weights(3, 3), engine="quick")
    assert "auto" in caught.value.hint


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "mps", ""])
def test_an_absent_device_is_refused(name):
    with pytest.raises(HtsrError):
        choose_device(name)


def test_auto_device_is_cuda_where_there_is_one():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("shape", [(300, 70), (128, 128), (64, 512)])
def test_cuda_equals_the_cpu(shape):
    weight = weights(*shape, dtype=torch.float16)
    found, expected = spectrum(weight, device="cuda"), spectrum(weight)
    np.testing.assert_allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-9)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.linalg.LinAlgError])
def test_a_device_that_gives_up_leaves_the_matrix_to_the_cpu(error, monkeypatch):
    """Stood in for by torch's meta device, on which nothing can be computed."""
    exact = engines.ENGINES["auto"]

    def gives_up(tall, bins):
        if tall.is_meta:
            raise error("device")
        return exact(tall, bins)

    monkeypatch.setitem(engines.ENGINES, "auto", gives_up)
    weight = weights(50, 30)
    found = spectrum(weight, device="meta")
    np.testing.assert_allclose(found.eigenvalues, reference(weight), rtol=1e-11)
    why = "out of memory" if error is torch.OutOfMemoryError else "no convergence"
    assert found.engine.endswith(f" on the CPU (meta: {why})")
    monkeypatch.setitem(engines.ENGINES, "auto", lambda tall, bins: gives_up(tall.to("meta"), bins))
    with pytest.raises(error):
        spectrum(weight)  # on the CPU there is nothing to fall back to
