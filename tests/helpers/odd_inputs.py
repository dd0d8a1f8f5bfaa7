"""Checkpoints that are strange, but readable: exit code 0, and what is said instead of an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.bad_inputs import ESCAPE, Build, good

ODD: dict[str, tuple[Build, str]] = {}


def odd(name: str, said: str) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        ODD[name] = (build, said)
        return build

    return add


def matrix(folder: Path, values: Any, name: str = "h.0.a.weight") -> list[object]:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {"h.1.a.weight": torch.randn(64, 64, generator=generator), name: values}
    save_file(tensors, folder / "model.safetensors")
    return ["analyze", folder, "-q", "-o", folder / "x.json"]


def odd_matrix(name: str, said: str, make: Callable[[Any], Any]) -> None:
    def build(folder: Path) -> list[object]:
        import torch

        return matrix(folder, make(torch))

    ODD[f"matrix: {name}"] = (build, said)


odd_matrix("NaN", "holds NaN", lambda t: t.full((64, 64), float("nan")))
odd_matrix("one NaN", "holds NaN", lambda t: t.eye(64).index_fill(0, t.tensor([3]), float("nan")))
odd_matrix("Inf", "holds Inf", lambda t: t.full((64, 64), float("inf"), dtype=t.bfloat16))
odd_matrix("minus Inf", "holds Inf", lambda t: t.full((64, 64), float("-inf"), dtype=t.float16))
odd_matrix("all zero", "all weights are zero", lambda t: t.zeros(64, 64))
odd_matrix("constant", "only 1 eigenvalues", lambda t: t.full((64, 64), 0.25))
odd_matrix("identity", "all eigenvalues are equal", lambda t: t.eye(64))
odd_matrix(
    "orthogonal, scaled",
    "equal within the rounding of float64",
    lambda t: (t.linalg.qr(t.randn(64, 64, dtype=t.float64))[0] / 3).contiguous(),
)
odd_matrix("subnormal float32", "", lambda t: t.full((64, 64), 1e-44))
odd_matrix("subnormal float64", "out of float64", lambda t: t.eye(64, dtype=t.float64) * 1e-310)
odd_matrix("largest float64", "out of float64", lambda t: t.eye(64, dtype=t.float64) * 1e308)
odd_matrix("empty", "the matrix is empty", lambda t: t.zeros(0, 64))
odd_matrix("one row", "only 1 eigenvalues", lambda t: t.ones(1, 64))
odd_matrix("one element", "only 1 eigenvalues", lambda t: t.ones(1, 1))
odd_matrix("0-d", "", lambda t: t.tensor(1.0))
odd_matrix("1-d", "", lambda t: t.ones(64))
odd_matrix("4-d", "", lambda t: t.ones(2, 2, 2, 2))
odd_matrix("float8", "", lambda t: t.eye(64).to(t.float8_e4m3fn))


@odd("names: terminal escapes", "")
def _(folder: Path) -> list[object]:
    import torch

    return matrix(folder, torch.zeros(64, 64), f"h.0.{ESCAPE}.weight")


@odd("names: a path", "")
def _(folder: Path) -> list[object]:
    import torch

    return matrix(folder, torch.eye(64), "../../h.0.a.weight")


@odd("files: links into another folder, as caches have", "")
def _(folder: Path) -> list[object]:
    (folder / "blobs").mkdir()
    good(folder / "blobs" / "0123")
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").symlink_to("../blobs/0123")
    return ["inspect", folder / "model"]


@odd("files: dated in the future", "")
def _(folder: Path) -> list[object]:
    os.utime(good(folder / "model.safetensors"), (2**33, 2**33))
    return ["inspect", folder]


@odd("files: dated before 1970", "")
def _(folder: Path) -> list[object]:
    os.utime(good(folder / "model.safetensors"), (-(2**30), -(2**30)))
    return ["inspect", folder]
