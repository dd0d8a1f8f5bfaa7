"""Which part of the metrics a request is about: one stack of layers, and what a score is over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from htsr_alloc.allocation.units import selected
from htsr_alloc.checkpoints.stacks import chosen_stacks, stack_of
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, Metrics
from htsr_alloc.records.decisions import Evidence, Module
from htsr_alloc.records.means import summarise

EVERYTHING = "all"


def over_adapted(metrics: Metrics, targets: Sequence[str]) -> Metrics:
    """The metrics whose layers' values are means over the matrices that build adapts.

    Raises:
        HtsrError: a target that no matrix has, or nothing to adapt.
    """
    chosen = selected(metrics, targets)
    layers = summarise(chosen, [layer.prefix for layer in metrics.layers])
    return replace(metrics, matrices=tuple(chosen), layers=layers)


# The matrices that a layer's score is the mean over.
OVER: dict[str, Callable[[Metrics, Sequence[str]], Metrics]] = {
    EVERYTHING: lambda metrics, targets: metrics,
    "adapted": over_adapted,
}


def of_stack(metrics: Metrics, name: str) -> Metrics:
    """The metrics of one stack's layers, numbered from 0.

    Raises:
        HtsrError: there is no such stack.
    """
    kept = chosen_stacks((layer.prefix for layer in metrics.layers), name)
    layers = [layer for layer in metrics.layers if stack_of(layer.prefix) in kept]
    number = {layer.layer: i for i, layer in enumerate(layers)}
    return replace(
        metrics,
        layers=tuple(replace(layer, layer=number[layer.layer]) for layer in layers),
        matrices=tuple(
            replace(matrix, layer=number[matrix.layer])
            for matrix in metrics.matrices
            if matrix.layer in number
        ),
    )


def joined(parts: Sequence[Allocation], stacks: str) -> Allocation:
    """The allocations of several stacks as one, in their order.

    Raises:
        HtsrError: two of them are of one layer.
    """
    first = parts[0]
    evidence: list[Evidence] = []
    modules: list[Module] = []
    for part in parts:
        start = len(evidence)
        modules += [replace(module, layer=start + module.layer) for module in part.modules]
        evidence += [replace(row, layer=start + row.layer) for row in part.evidence]
    named = [row.prefix for row in evidence if row.prefix is not None]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise HtsrError(f"`T` {stacks} names the stack of {twice} twice.", "Give longer names.")
    strategy: Any = first.strategy
    own = {  # what each stack has of its own, such as the beta that its spread asks for
        name: None
        for name in ("beta", "signal")
        if any(getattr(part.strategy, name) != getattr(strategy, name) for part in parts)
    }
    return replace(
        first,
        budget=sum(part.budget for part in parts),
        experts=tuple(n for part in parts for n in part.experts),
        top_k=tuple(k for part in parts for k in part.top_k),
        strategy=replace(strategy, stack=stacks, **own),
        evidence=tuple(evidence),
        modules=tuple(modules),
    )
