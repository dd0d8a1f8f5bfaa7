"""What the routers do on a data set: load, entropy and idle share, as data and as a figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.gates import Routing
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.state import state_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RouterReport:
    """One router over a data set; padding is not counted.

    Attributes:
        name: the linear; or the transformer layer, where its linears are the experts (EM-LoRA).
        tokens: how many tokens were routed; prompts, where those are.
        load: share of all choices that fell on each expert; sums to 1.
        idle: share of tokens that do not use each expert.
        gate: mean weight of each expert.
        entropy: mean of −Σ p ln p / ln N over tokens: 1 is undecided, 0 decided.
    """

    name: str
    tokens: int
    load: tuple[float, ...]
    idle: tuple[float, ...]
    gate: tuple[float, ...]
    entropy: float


class _Sums:
    """Running sums of one router, on its device."""

    def __init__(self) -> None:
        self.tokens: Any = 0
        self.chosen: Any = 0
        self.gate: Any = 0
        self.entropy: Any = 0

    def add(self, routing: Routing, mask: Tensor | None) -> None:
        """routing: (..., N). mask: (T,), false for padding."""
        flat = (x.flatten(0, -2).double() for x in (routing.weights, routing.chosen, routing.probs))
        weights, chosen, probs = flat  # (T, N)
        kept = torch.ones_like(probs[:, 0]) if mask is None else mask.double()
        entropy = -torch.special.xlogy(probs, probs).sum(-1)
        self.tokens = self.tokens + kept.sum()
        self.chosen = self.chosen + (chosen * kept[:, None]).sum(0)
        self.gate = self.gate + (weights * kept[:, None]).sum(0)
        self.entropy = self.entropy + (entropy * kept).sum()

    def report(self, name: str) -> RouterReport:
        """The means."""
        tokens, n = float(self.tokens), len(self.chosen)
        choices = max(float(self.chosen.sum()), 1.0)
        return RouterReport(
            name,
            int(tokens),
            load=tuple((self.chosen / choices).tolist()),
            idle=tuple((1 - self.chosen / tokens).tolist()),
            gate=tuple((self.gate / tokens).tolist()),
            entropy=float(self.entropy) / tokens / float(torch.tensor(n).double().log()),
        )


def routing_report(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter: str | None = None
) -> list[RouterReport]:
    """Run the model over batches of its own arguments, and sum up every router.

    Modules with one expert have no router and no row.

    Raises:
        HtsrError: no batch, no router, or an adapter that is not the active one.
    """
    sums: dict[str, _Sums] = {}
    state = state_in(model)
    if state is None:
        raise HtsrError("The model has no LoRA-MoE adapter.")
    adapter = active_adapter(model, adapter)

    def look(layer: Any, args: tuple) -> None:
        x = args[0]
        # A layer's own router (``place``) reads prompts, not what this linear reads.
        if adapter in layer.lora_moe_router and adapter not in layer.place:
            mask = state.mask(x.shape[:-1], layer.name)
            sums.setdefault(layer.name, _Sums()).add(layer.route(x, adapter), mask)

    with evaluating(model), torch.no_grad():
        hooks = [layer.register_forward_pre_hook(look) for layer in layers_of(model)]
        try:
            for batch in batches:
                model(**batch)
                for (block, name), routing in state.current.decisions.items():
                    if name == adapter:
                        sums.setdefault(block, _Sums()).add(routing, None)
        finally:
            for hook in hooks:
                hook.remove()
    if not sums:
        raise HtsrError("No router was seen.", "Give batches, and an adapter of several experts.")
    return [value.report(name) for name, value in sums.items()]


def active_adapter(model: nn.Module, adapter: str | None = None) -> str:
    """The one adapter that acts in the model.

    Raises:
        HtsrError: several do, or none, or another than ``adapter``.
    """
    layers = list(layers_of(model))
    active = {name for layer in layers for name in layer.active_adapters}
    if any(layer.disable_adapters for layer in layers):
        active = set()
    wanted = adapter or next(iter(active), None)
    if wanted is None or active != {wanted}:
        acting = " and ".join(sorted(active)) or "none"
        raise HtsrError(
            f"Of the adapters {acting} acts" + (f", and not {adapter} alone." if adapter else "."),
            "Activate one: model.set_adapter(NAME).",
        )
    return wanted


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() inside, the mode of before afterwards."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def plot_routing(reports: list[RouterReport], path: str | Path | None = None) -> Figure:
    """A heat map, one row a router and one column an expert: its load times N (1 is balance).

    Where every token uses every expert, all loads are equal, and the mean gate is drawn instead.

    Args:
        path: a file to write as well, in any format of matplotlib's.
    """
    from htsr_alloc import style

    most = max(len(row.load) for row in reports)
    with style.look():
        figure = style.new_figure(max(3.5, 2 + 0.5 * most), max(1.8, 1 + 0.18 * len(reports)))
        axes = figure.add_subplot()
        draw_load(axes, reports)
        names = [style.plain(row.name) for row in reports]
        axes.set_yticks(range(len(reports)), names, fontsize=5)
        if path is not None:
            figure.savefig(path)
    return figure


def draw_load(axes: Axes, reports: list[RouterReport]) -> None:
    """The heat map and its colour bar, on axes of a figure."""
    from matplotlib.ticker import MaxNLocator

    from htsr_alloc.style import COLOUR_MAP

    dense = not any(idle for row in reports for idle in row.idle)
    rows = [row.gate if dense else row.load for row in reports]
    most = max(map(len, rows))
    cells = [[x * len(row) for x in row] + [float("nan")] * (most - len(row)) for row in rows]
    image = axes.imshow(cells, aspect="auto", cmap=COLOUR_MAP, vmin=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("expert")
    axes.figure.colorbar(
        image, ax=axes, label=f"{'mean gate' if dense else 'load'} times N (1 is balance)"
    )
