"""What gets a count (every layer, or every targeted linear), and what an expert on it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix, Metrics, Model

# Classes whose linears are stored transposed, (d_in, d_out): transformers' Conv1D.
CONV1D = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")

# Which linears share a budget: those with the same key.
POOLS: dict[str, Callable[[Matrix], str]] = {
    "role": lambda matrix: matrix.role,
    "all": lambda matrix: "",
}


@dataclass(frozen=True)
class ExpertCost:
    """Trainable parameters of N experts: N lora, and N router where there is a choice (N > 1).

    ``lora`` is r (d_in + d_out) and ``router`` d_in of a linear; of several linears with N
    experts each, the sums.
    """

    lora: int
    router: int

    def of(self, experts: int) -> int:
        """Parameters of a whole number of experts."""
        return experts * (self.lora + (self.router if experts > 1 else 0))

    def at(self, experts: float) -> float:
        """The same, and straight lines between whole numbers."""
        below = math.floor(experts)
        step = self.of(below + 1) - self.of(below)
        return self.of(below) + (experts - below) * step


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
    cost: ExpertCost | None = None
    score: float | None = None


def layer_units(prefixes: Sequence[str | None]) -> list[Unit]:
    """One unit a layer, without a cost."""
    return [Unit(i, str(i) if name is None else name) for i, name in enumerate(prefixes)]


def costed_layers(
    metrics: Metrics, targets: Sequence[str], r: int, routers: bool = True
) -> list[Unit]:
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
                f"{layer.prefix} has no linear to adapt.", "Name other linears as `targets`."
            )
        units.append(Unit(layer.layer, layer.prefix, cost=cost_of(own, r, metrics.model, routers)))
    return units


def linear_units(
    metrics: Metrics, targets: Sequence[str], r: int | None, routers: bool = True
) -> list[Unit]:
    """One unit a targeted linear, in the metrics' order; with costs where ``r`` is given.

    Raises:
        HtsrError: a target that no layer has, or a stack of experts in one tensor.
    """
    units = []
    for matrix in selected(metrics, targets):
        refuse_slices(matrix)
        name = re.sub(r"[._]?weight$", "", matrix.tensor)
        cost = None if r is None else cost_of([matrix], r, metrics.model, routers)
        units.append(Unit(matrix.layer, name, matrix, cost))
    if not units:
        raise HtsrError("The metrics hold no matrices.")
    return units


def cost_of(matrices: Iterable[Matrix], r: int, model: Model, routers: bool = True) -> ExpertCost:
    """The cost of one expert of rank ``r`` on each of these linears, with or without routers.

    Raises:
        HtsrError: a slice of a 3-d tensor, which no adapter of linears can reach.
    """
    lora = router = 0
    transposed = (model.architecture or "").startswith(CONV1D)
    for matrix in matrices:
        refuse_slices(matrix)
        d_in = matrix.shape[0] if transposed else matrix.shape[1]
        lora += r * sum(matrix.shape)
        router += d_in if routers else 0
    return ExpertCost(lora, router)


def refuse_slices(matrix: Matrix) -> None:
    """Raise HtsrError on a slice of a 3-d tensor, which is not a linear of its own."""
    if matrix.tensor.endswith("]"):
        raise HtsrError(
            f"{matrix.tensor} is one of several experts in one tensor, not a linear that can be "
            "adapted by itself.",
            "Name the linears to adapt as `targets`: q_proj, v_proj, ...",
        )


def groups_of(units: Sequence[Unit], pool: str | None) -> list[list[int]]:
    """Indices of the units that share a budget: by ``POOLS[pool]``, or all layers."""
    groups: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        key = POOLS[pool](unit.matrix) if pool is not None and unit.matrix is not None else ""
        groups.setdefault(key, []).append(i)
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
