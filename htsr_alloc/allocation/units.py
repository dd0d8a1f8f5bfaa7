"""What gets a count: every layer, or every linear of the targeted roles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.costs import Cost, cost_of, refuse_slices
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix, Metrics


@dataclass(frozen=True)
class Unit:
    """A layer, or one linear of a layer.

    ``name`` is the block's prefix (or the layer's number where there is none) or the linear's
    full name; ``matrix`` is the linear's. ``cost`` is known under a parameter budget only, and
    ``score`` where the strategy uses one.
    """

    layer: int
    name: str
    matrix: Matrix | None = None
    cost: Cost | None = None
    score: float | None = None


def layer_units(prefixes: Sequence[str | None]) -> list[Unit]:
    """One unit a layer, without a cost."""
    return [Unit(i, str(i) if name is None else name) for i, name in enumerate(prefixes)]


def costed_layers(metrics: Metrics, targets: Sequence[str], r: int) -> list[Unit]:
    """One unit a layer; its cost is that of one expert of rank ``r`` on each targeted linear.

    Raises:
        HtsrError: a target that no layer has, a layer without any, or a stack of experts in one
            tensor.
    """
    chosen = selected(metrics, targets)
    units = []
    for layer in metrics.layers:
        own = [matrix for matrix in chosen if matrix.layer == layer.layer]
        if not own:
            raise HtsrError(
                f"{layer.prefix} has no linear to adapt.", "Name other linears with --target."
            )
        units.append(Unit(layer.layer, layer.prefix, cost=cost_of(own, r, metrics.model)))
    return units


def linear_units(metrics: Metrics, targets: Sequence[str], r: int | None) -> list[Unit]:
    """One unit a targeted linear, in the metrics' order; with costs where ``r`` is given.

    Raises:
        HtsrError: a target that no layer has, or a stack of experts in one tensor.
    """
    units = []
    for matrix in selected(metrics, targets):
        refuse_slices(matrix)
        name = re.sub(r"[._]?weight$", "", matrix.tensor)
        cost = None if r is None else cost_of([matrix], r, metrics.model)
        units.append(Unit(matrix.layer, name, matrix, cost))
    if not units:
        raise HtsrError("The metrics hold no matrices.")
    return units


def groups_of(units: Sequence[Unit], pool: str) -> list[list[int]]:
    """Indices of the units that share among themselves: one role's linears, or all units."""
    groups: dict[str | None, list[int]] = {}
    for i, unit in enumerate(units):
        role = unit.matrix.role if unit.matrix is not None and pool == "role" else None
        groups.setdefault(role, []).append(i)
    return list(groups.values())


def selected(metrics: Metrics, targets: Sequence[str]) -> list[Matrix]:
    """The matrices whose role is a target or ends in one; all of them without targets.

    Raises:
        HtsrError: a target that no matrix has.
    """
    roles = sorted({matrix.role for matrix in metrics.matrices})
    for target in targets:
        if not any(_is(role, target) for role in roles):
            raise HtsrError(f"No linear is a {target}.", f"There are {', '.join(roles)}.")
    if not targets:
        return list(metrics.matrices)
    return [m for m in metrics.matrices if any(_is(m.role, target) for target in targets)]


def _is(role: str, target: str) -> bool:
    return role == target or role.endswith("." + target)
