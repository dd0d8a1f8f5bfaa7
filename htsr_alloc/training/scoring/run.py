"""``score``: what ``htsr score`` does, from a model or a metrics file to a score file."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.lora_moe.linears import block_of
from htsr_alloc.lora_moe.resolve import checkpoint_blocks
from htsr_alloc.training import models
from htsr_alloc.training.scoring.base import Opened, opened
from htsr_alloc.training.scoring.registry import SCORES

FORMATS = (".csv", ".json")
DEFAULTS: Mapping[str, int] = {"r": 8, "limit": 64, "batch_size": 8}


@dataclass(frozen=True)
class Scored:
    """A score of each linear, in the order of the metrics' layers."""

    method: str
    values: dict[str, float]

    def rows(self, per_module: bool = False) -> list[dict[str, Any]]:
        """A row a linear; or one a layer, whose score is the mean of its linears'."""
        layers: dict[str, list[float]] = {}
        for name, value in self.values.items():
            layers.setdefault(block_of(name), []).append(value)
        numbers = {prefix: i for i, prefix in enumerate(layers)}
        if per_module:
            return [
                {"module": name, "layer": numbers[block_of(name)], "score": value}
                for name, value in self.values.items()
            ]
        return [
            {"layer": numbers[prefix], "prefix": prefix, "score": statistics.fmean(values)}
            for prefix, values in layers.items()
        ]

    def text(self, suffix: str, per_module: bool = False) -> str:
        """A file that ``allocate`` reads as ``scores``, of a suffix in ``FORMATS``."""
        rows = self.rows(per_module)
        if suffix == ".json":
            return json.dumps(rows, indent=1, allow_nan=False) + "\n"
        made = io.StringIO()
        writer = csv.DictWriter(made, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return made.getvalue()


def score(
    method: str,
    *,
    model: Path | None = None,
    metrics: Path | None = None,
    data: Path | None = None,
    r: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Scored:
    """Score a model's linears.

    Args:
        method: of ``SCORES``, whose ``takes`` says which of the arguments it has.
        limit: rows, from the first; 64 by default. ``r`` and ``batch_size`` are 8.

    Raises:
        HtsrError: an argument that is missing, or that the method does not use.
    """
    check_choice("score", method, SCORES)
    asked = SCORES[method]
    given = {"model": model, "metrics": metrics, "data": data}
    given |= {"r": r, "limit": limit, "batch_size": batch_size}
    for name, value in given.items():
        if value is not None and name not in asked.takes:
            needed = " and ".join(f"`{x}`" for x in asked.takes if x not in DEFAULTS)
            raise HtsrError(f"{asked.title} does not use `{name}`.", f"It needs {needed}.")
        if value is None and name in asked.takes and name not in DEFAULTS:
            raise HtsrError(f"{asked.title} needs `{name}`.")
        if isinstance(value, int) and value < 1:
            raise HtsrError(f"`{name}` must be at least 1, not {value}.")
    if model is None and (device, dtype) != ("auto", "float32"):
        raise HtsrError(f"{asked.title} opens no model.", "Leave out `device` and `dtype`.")
    made: dict[str, Any] = {
        name: DEFAULTS.get(name) if given[name] is None else given[name] for name in asked.takes
    }
    if model is not None:
        where: torch.device = models.device_of(device)
        made["model"] = opened(model, where, models.dtype_of(dtype, where))
    values = asked.compute(**made)
    return Scored(method, values if model is None else _as_analysed(values, made["model"]))


def _as_analysed(values: Mapping[str, float], opened: Opened) -> dict[str, float]:
    """The scores by the checkpoint's names and in the order of its layers, as metrics have them.

    transformers may rename blocks as it loads them, and order the stacks of a model in another way.
    Linears outside these layers have no place in an allocation, and are left out.

    Raises:
        HtsrError: none of the checkpoint's layers is in the model.
    """
    found = {}
    for prefix, block in checkpoint_blocks(opened.model, opened.folder).items():
        start = f"{block}."
        inside = {n: value for n, value in values.items() if n.startswith(start)}
        found |= {f"{prefix}.{n.removeprefix(start)}": value for n, value in inside.items()}
    if not found:
        raise HtsrError(f"The layers of {opened.folder} are not those of its model.")
    return found
