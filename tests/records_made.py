"""Metrics and allocations made from tables of numbers, for figures, reports and comparisons."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from htsr_alloc.allocation import allocate
from htsr_alloc.measure import summarise
from htsr_alloc.records import (
    FAILED,
    OK,
    Allocation,
    Matrix,
    Metrics,
    Model,
    Settings,
    Skipped,
    Tool,
)

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOOL = Tool("htsr_alloc", "0.1.0", "2026-01-01T00:00:00+00:00")


def made_matrix(layer: int, role: str, alpha: float, prefix: str = "model.layers") -> Matrix:
    """A matrix of that alpha; NaN is one without a fit."""
    fitted = not math.isnan(alpha)
    return Matrix(
        tensor=f"{prefix}.{layer}.{role}.weight",
        layer=layer,
        role=role,
        expert=None,
        shape=(64, 96),
        dtype="F16",
        n_eigs=64,
        n_zero=0,
        lambda_min=0.1,
        lambda_max=10.0,
        pl_alpha_hill=alpha if fitted else None,
        alpha_hat=alpha if fitted else None,
        stable_rank=20.0 + layer,
        xmin=1.0 if fitted else None,
        k=20 if fitted else None,
        ks_distance=0.1 if fitted else None,
        peak_gap=3 if fitted else None,
        engine="float64 Gram",
        status=OK if fitted else FAILED,
        reason=None if fitted else "all eigenvalues are equal",
    )


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
