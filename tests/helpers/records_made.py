"""Metrics and allocations made from tables of numbers, for figures, reports and comparisons."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from htsr_alloc.allocation import allocate
from htsr_alloc.analysis.measure import summarise
from htsr_alloc.records import (
    FAILED,
    OK,
    Allocation,
    Evidence,
    Farms,
    File,
    Layer,
    Matrix,
    Metrics,
    Model,
    Module,
    Parameters,
    Settings,
    Skipped,
    StrategyRecord,
    Tool,
)

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOOL = Tool("htsr_alloc", "0.1.0", "2026-01-01T00:00:00+00:00")
MODEL = Model("tiny", None, "ab" * 32, "LlamaForCausalLM", 2)


def matrix(layer: int, **changes) -> Matrix:
    base = Matrix(
        tensor=f"model.layers.{layer}.self_attn.q_proj.weight",
        layer=layer,
        role="q_proj",
        expert=None,
        shape=(4, 4),
        dtype="F32",
        n_eigs=4,
        n_zero=0,
        lambda_min=0.5,
        lambda_max=2.0,
        pl_alpha_hill=3.25,
        alpha_hat=0.9,
        stable_rank=2.5,
        xmin=0.5,
        k=4,
        ks_distance=0.1,
        peak_gap=1,
        engine="float64 Gram",
        status="marked",
        reason="only 4 eigenvalues (< 50)",
    )
    return dataclasses.replace(base, **changes)


METRICS = Metrics(
    format="htsr.metrics",
    version=1,
    tool=TOOL,
    model=MODEL,
    settings=Settings("official", farms=Farms(), include=("*q_proj*",)),
    spectra=File("tiny.spectra.safetensors", "cd" * 32),
    matrices=(matrix(0), matrix(1)),
    layers=tuple(Layer(i, f"model.layers.{i}", 1, 0, 3.25, 0.9, 2.5, None) for i in range(2)),
    skipped=(Skipped("lm_head.weight", "output head"),),
)
ALLOCATION = Allocation(
    format="htsr.allocation",
    version=1,
    budget=5,
    experts=(2, 3),
    top_k=(2, 2),
    tool=TOOL,
    model=MODEL,
    metrics=File("tiny.metrics.json", "ef" * 32),
    strategy=StrategyRecord("alphalora", "pl_alpha_hill", "official", 2.5, "remainder", 1, None),
    evidence=tuple(
        Evidence(i, f"model.layers.{i}", 3.25, 2.5, experts) for i, experts in enumerate((2, 3))
    ),
)
# Every key that was added within version 1.
WHOLE = dataclasses.replace(
    ALLOCATION,
    model=dataclasses.replace(MODEL, parameters=1000),
    strategy=dataclasses.replace(
        ALLOCATION.strategy,
        spread=3.0,
        farms=Farms(),
        scores=File("scores.csv", "01" * 32),
        pool="role",
        targets=("q_proj",),
        stack="model.layers",
        score_over="adapted",
    ),
    modules=tuple(
        Module(i, f"model.layers.{i}.self_attn.q_proj", "q_proj", 3.25, 2.5, experts, 2)
        for i, experts in enumerate((2, 3))
    ),
    parameters=Parameters(900, 880, 8, 0.9, "model"),
)


def made_matrix(layer: int, role: str, alpha: float, prefix: str = "model.layers") -> Matrix:
    """A matrix of that alpha; NaN is one without a fit."""
    found = matrix(
        layer,
        tensor=f"{prefix}.{layer}.{role}.weight",
        role=role,
        shape=(64, 96),
        dtype="F16",
        n_eigs=64,
        lambda_min=0.1,
        lambda_max=10.0,
        stable_rank=20.0 + layer,
    )
    if math.isnan(alpha):
        nothing = dict.fromkeys(("pl_alpha_hill", "alpha_hat", "xmin", "k", "ks_distance"))
        why = "all eigenvalues are equal"
        return dataclasses.replace(found, **nothing, peak_gap=None, status=FAILED, reason=why)
    fit = {"pl_alpha_hill": alpha, "alpha_hat": alpha, "xmin": 1.0, "k": 60, "peak_gap": 3}
    return dataclasses.replace(found, **fit, status=OK, reason=None)


def made_metrics(table: np.ndarray, roles=ROLES, name="made", prefix="model.layers") -> Metrics:
    """Metrics whose alphas are the (L, R) table."""
    matrices = [
        made_matrix(layer, role, float(alpha), prefix)
        for layer, row in enumerate(table)
        for role, alpha in zip(roles, row, strict=True)
    ]
    return Metrics(
        format=Metrics.FORMAT,
        version=Metrics.VERSION,
        tool=TOOL,
        model=Model(name),
        settings=Settings("official"),
        spectra=None,
        matrices=tuple(matrices),
        layers=summarise(matrices, [f"{prefix}.{i}" for i in range(len(table))]),
        skipped=(Skipped("model.norm.weight", "1-d (norm, bias or scalar)"),),
    )


def deep_table(layers: int = 80, seed: int = 0) -> np.ndarray:
    """(layers, 7) alphas with outliers, as of a deep model."""
    generator = np.random.default_rng(seed)
    return 2 + np.abs(generator.standard_t(3, (layers, len(ROLES))))


def made_allocation(metrics: Metrics, budget: int, **options) -> Allocation:
    return allocate(metrics, budget=budget, tool=TOOL, **options)


def renamed(metrics: Metrics, text: str) -> Metrics:
    """The same metrics with ``text`` in every name that a file can choose."""
    matrices = [
        dataclasses.replace(
            matrix,
            tensor=matrix.tensor + text,
            role=matrix.role + text,
            dtype=text,
            engine=text,
            reason=f"why {text}",
        )
        for matrix in metrics.matrices
    ]
    return dataclasses.replace(
        metrics,
        tool=Tool(text, text, text),
        model=Model(text, text, text, text, len(metrics.layers)),
        settings=Settings(text, include=(text,), exclude=(text,), device=text, engine=text),
        matrices=tuple(matrices),
        layers=summarise(matrices, [layer.prefix + text for layer in metrics.layers]),
        skipped=(Skipped(text, text),),
    )


def metrics_with(scores, **changes) -> Metrics:
    layers = tuple(
        Layer(i, f"model.layers.{i}", 1, 0, score, 0.5 + i, 7.0, None)
        for i, score in enumerate(scores)
    )
    return dataclasses.replace(METRICS, layers=layers, matrices=(), **changes)


def linears(roles: dict[str, tuple[int, int]], alphas: list[list[float]], **changes) -> Metrics:
    """Metrics of layers x roles, with these shapes and alphas."""
    rows = [
        matrix(
            i,
            tensor=f"model.layers.{i}.{role}.weight",
            role=role,
            shape=shape,
            pl_alpha_hill=alphas[i][j],
        )
        for i in range(len(alphas))
        for j, (role, shape) in enumerate(roles.items())
    ]
    layers = tuple(
        Layer(i, f"model.layers.{i}", len(own), 0, math.fsum(own) / len(own), 0.5, 7.0, None)
        for i, own in enumerate(alphas)
    )
    return dataclasses.replace(METRICS, matrices=tuple(rows), layers=layers, **changes)
