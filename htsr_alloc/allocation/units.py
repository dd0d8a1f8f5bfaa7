"""What gets a count (every layer, or every targeted linear), and what an expert on it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from htsr_alloc.allocation.linears import Linears
from htsr_alloc.checkpoints.rules import EXPERT, GATE_OF, left_alone
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Matrix, Metrics, Model

# Classes whose linears are stored transposed, (d_in, d_out): transformers' Conv1D.
CONV1D = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")

# The target that stands for the base's own experts, which plain LoRA alone adapts.
BASE_EXPERTS = "experts"

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
    metrics: Metrics,
    targets: Sequence[str],
    r: int,
    routers: bool = True,
    linears: Linears | None = None,
) -> list[Unit]:
    """One unit a layer; its cost is that of one expert of rank ``r`` on each targeted linear.

    A layer without any has no unit. The linears are the metrics' matrices, or the model's where
    they are given.

    Raises:
        HtsrError: a target that no layer has, or nothing to adapt.
    """
    if linears is None:
        chosen = selected(metrics, targets)
        found = {
            layer.layer: [matrix for matrix in chosen if matrix.layer == layer.layer]
            for layer in metrics.layers
        }
        costs = {i: cost_of(own, r, metrics.model, routers) for i, own in found.items() if own}
    else:
        costs = _costs_in(linears, metrics, targets, r, routers)
    return [
        Unit(layer.layer, layer.prefix, cost=costs[layer.layer])
        for layer in metrics.layers
        if layer.layer in costs
    ]


def _costs_in(
    linears: Linears, metrics: Metrics, targets: Sequence[str], r: int, routers: bool
) -> dict[int, ExpertCost]:
    """Layer -> the cost of one expert on each of the model's linears in it, if it has any."""
    found, costs = linears.targeted(targets), dict[int, ExpertCost]()
    for layer in metrics.layers:
        own = found.get(layer.prefix)
        if own is None:
            raise HtsrError(
                f"{layer.prefix} of the metrics is not among the model's blocks.",
                "Give the model that was analysed.",
            )
        if own:
            lora = sum(r * (linear.d_in + linear.d_out) for linear in own)
            costs[layer.layer] = ExpertCost(lora, routers * sum(linear.d_in for linear in own))
    if not costs:
        raise HtsrError("No linear of the model is adapted.")
    return costs


def linear_units(
    metrics: Metrics, targets: Sequence[str], r: int | None, routers: bool = True
) -> list[Unit]:
    """One unit a targeted linear, in the metrics' order; with costs where ``r`` is given.

    Raises:
        HtsrError: a target that no layer has.
    """
    units: list[Unit] = []
    for matrix in selected(metrics, targets):
        name = module_of(matrix)
        cost = None if r is None else cost_of([matrix], r, metrics.model, routers)
        units.append(Unit(matrix.layer, name, matrix, cost))
    if not units:
        raise HtsrError("The metrics hold no matrices.")
    return units


def cost_of(matrices: Iterable[Matrix], r: int, model: Model, routers: bool = True) -> ExpertCost:
    """The cost of one expert of rank ``r`` on each of these linears, with or without routers.

    transformers joins the gate and up of one of the base's own experts, so that they have one A.
    """
    lora = router = 0
    transposed = (model.architecture or "").startswith(CONV1D)
    matrices = list(matrices)
    experts = {m.tensor for m in matrices if m.expert is not None}
    for matrix in matrices:
        d_in = matrix.shape[0] if transposed else matrix.shape[1]
        up = matrix.role.rpartition(".")[2]
        start, _, end = matrix.tensor.rpartition(up)
        joined = up in GATE_OF and f"{start}{GATE_OF[up]}{end}" in experts
        lora += r * (matrix.shape[0] if joined else sum(matrix.shape))
        router += d_in if routers else 0
    return ExpertCost(lora, router)


def groups_of(units: Sequence[Unit], pool: str | None) -> list[list[int]]:
    """Indices of the units that share a budget: by ``POOLS[pool]``, or all layers."""
    groups: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        key = POOLS[pool](unit.matrix) if pool is not None and unit.matrix is not None else ""
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def selected(metrics: Metrics, targets: Sequence[str]) -> list[Matrix]:
    """The matrices that ``build`` adapts: of a target's role, or of one that ends in it, or any.

    The base's own experts and linears on which an adapter would never act are no such matrices
    (``checkpoints.rules.left_alone``): an allocation's parameters are those that become trainable.
    The target ``experts`` adds the base's own experts.

    Raises:
        HtsrError: a target that no matrix has, or none that is adapted; nothing to adapt.
    """
    if BASE_EXPERTS in targets:
        others = [target for target in targets if target != BASE_EXPERTS]
        linears = [m.tensor for m in selected(metrics, others)] if others else []
        if all(m.expert is None for m in metrics.matrices):
            raise HtsrError("The model has no experts of its own.", "Remove this target.")
        return [m for m in metrics.matrices if m.expert is not None or m.tensor in linears]
    roles = sorted({matrix.role for matrix in metrics.matrices})
    for target in targets:
        if not any(_is(role, target) for role in roles):
            raise HtsrError(f"No linear is a {target}.", f"There are {', '.join(roles)}.")
    chosen = [m for m in metrics.matrices if m.expert is None and left_alone(module_of(m)) is None]
    found = sorted({matrix.role for matrix in chosen})
    for target in targets:
        if not any(_is(role, target) for role in found):
            left = next(m for m in metrics.matrices if _is(m.role, target))
            why = EXPERT if left.expert is not None else left_alone(module_of(left))
            raise HtsrError(
                f"No {target} is adapted: {left.tensor} is left alone ({why}).",
                f"There are {', '.join(found)}." if found else None,
            )
    if not chosen and metrics.matrices:
        raise HtsrError("No linear of the model is adapted: all are the base's own experts.")
    if not targets:
        return chosen
    return [m for m in chosen if any(_is(m.role, target) for target in targets)]


def experts_left_alone(metrics: Metrics, targets: Sequence[str]) -> int:
    """How many matrices are of the base's own experts, which a count by linears or parameters
    passes over; 0 where they are a target."""
    if BASE_EXPERTS in targets:
        return 0
    return sum(matrix.expert is not None for matrix in metrics.matrices)


def module_of(matrix: Matrix) -> str:
    """The full name of the module that owns a matrix."""
    return re.sub(r"[._]?weight$", "", matrix.tensor)


def _is(role: str, target: str) -> bool:
    return role == target or role.endswith("." + target)
