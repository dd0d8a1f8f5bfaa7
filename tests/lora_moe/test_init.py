"""GOAT's start: segments, residual, theorem 3.4 and lemma 3.3."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import gates, init
from htsr_alloc.lora_moe.systems import goat

SHAPES = [(12, 20), (20, 12)]


def weight(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_segments():
    # h = 12, E = 3, d = 2, t = 4
    assert goat.segment_starts("O", 12, 3, 2) == [0, 4, 8]
    assert goat.segment_starts("P", 12, 3, 2) == [0, 2, 4]
    assert goat.segment_starts("M", 12, 3, 2) == [10, 8, 6]
    drawn = goat.segment_starts("R", 12, 3, 2, torch.Generator().manual_seed(0))
    assert len(set(drawn)) == 3
    assert all(start % 2 == 0 and 0 <= start <= 10 for start in drawn)
    with pytest.raises(HtsrError, match="need 14 singular directions"):
        goat.segment_starts("O", 12, 7, 2)
    with pytest.raises(HtsrError, match="no SVD segment 'Q'"):
        goat.segment_starts("Q", 12, 3, 2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("segment", goat.SEGMENTS)
@pytest.mark.parametrize("plus", [False, True])
def test_residual_is_the_segments_of_the_svd(shape, segment, plus):
    w = weight(shape)
    scale = goat.goat_scale(shape[1], 2)
    assert scale == math.sqrt(3 * shape[1] / 2)
    seed = torch.Generator().manual_seed(5)
    start = goat.goat_start(w, 3, 2, segment=segment, scale=scale, plus=plus, generator=seed)
    ours = start.b @ (start.scales.repeat_interleave(2).unsqueeze(1) * start.a) / 3
    starts = goat.segment_starts(segment, 12, 3, 2, torch.Generator().manual_seed(5))
    scales = naive.goat_scales(w, starts, 2, scale) if plus else [scale] * 3
    assert (ours - naive.goat_residual(w, starts, 2, 10, scales)).abs().max() < 1e-12
    for j in range(3):
        assert float(start.scales[j]) == pytest.approx(scales[j], rel=1e-12)
        # Balanced factors: A_j and B_j have the same singular values.
        own = torch.linalg.svdvals(start.b[:, 2 * j : 2 * j + 2])
        assert torch.allclose(own, torch.linalg.svdvals(start.a[2 * j : 2 * j + 2]))


@pytest.mark.parametrize("segment", goat.SEGMENTS)
def test_every_expert_of_goat_plus_has_the_same_gain(segment):
    """Eq. 79-82: s_i² ‖A_i‖² and s_i² ‖B_i‖², which stretch expert i's gradient, are equal."""
    start = goat.goat_start(weight((12, 20)), 3, 2, segment=segment, scale=4.0, plus=True)
    for factors in (start.a.split(2), start.b.split(2, 1)):
        own = zip(start.scales, factors, strict=True)
        gains = torch.stack([s**2 * f.square().sum() for s, f in own])
        assert torch.allclose(gains, gains[0].expand(3), rtol=1e-12, atol=0)
    plain = goat.goat_start(weight((12, 20)), 3, 2, segment="O", scale=4.0)
    gains = torch.stack([f.square().sum() for f in plain.a.split(2)])
    assert gains.max() > 2 * gains.min(), "the experts of GOAT differ"


def test_mean_gate_and_its_variance():
    """Lemma 3.3 over 40,000 router draws: mean 1/E exactly, variance at least (E − k)/(kE²)."""
    experts, k, draws = 4, 2, 40_000
    torch.manual_seed(0)
    logits = torch.randn(draws, experts, dtype=torch.float64)
    g = gates.top_k_softmax(logits, k).weights
    bound = (experts - k) / (k * experts**2)
    spread = float(g.var(0).mean())
    standard_error = math.sqrt(spread / draws)
    assert (g.mean(0) - 1 / experts).abs().max() < 4 * standard_error
    assert spread > bound * 1.05  # softmax weights differ among the chosen
    equal = gates.top_k_softmax(logits * 1e-9, k).weights
    assert float(equal.var(0).mean()) == pytest.approx(bound, rel=0.02)


def test_expected_output_equals_the_base():
    """Theorem 3.4 over 20,000 routers: E[(W₀ − W_res)x + s Σ g_j B_j A_j x] = W₀x."""
    torch.manual_seed(0)
    w, x = weight((12, 20)), weight((20,), 1)
    scale = goat.goat_scale(20, 2)
    start = goat.goat_start(w, 3, 2, scale=scale)
    outputs = torch.stack(
        [scale * b @ (a @ x) for a, b in zip(start.a.split(2), start.b.split(2, 1), strict=True)]
    )  # (E, d_out)
    router = torch.randn(20_000, 3, 20, dtype=torch.float64) / math.sqrt(20)
    g = gates.top_k_softmax(router @ x, 2).weights  # (draws, E)
    change = g @ outputs - outputs.mean(0)  # what is added to W₀x
    error = change.mean(0).abs()
    assert (error < 4 * change.std(0) / math.sqrt(len(g)) + 1e-12).all()
    assert change.std(0).max() > 0.1  # a single router does not give the base's output


def test_gaussian_and_kaiming():
    torch.manual_seed(0)
    a = torch.empty(8 * 4, 500)
    init.init_a(a, 4, "gaussian")
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.05)
    init.init_a(a, 4, True)
    bound = math.sqrt(6 / (1 + 5) / 500)
    assert 0.98 * bound < float(a.abs().max()) <= bound


def test_bad_weights_are_refused():
    w = weight((12, 20))
    w[0, 0] = math.nan
    with pytest.raises(HtsrError, match="NaN or infinity"):
        goat.goat_start(w, 3, 2, scale=1.0)
    with pytest.raises(HtsrError, match="all zero"):
        goat.goat_start(torch.zeros(12, 20), 3, 2, scale=1.0, plus=True)
