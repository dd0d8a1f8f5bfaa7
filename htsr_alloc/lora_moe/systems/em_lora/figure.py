"""The activations that EM-LoRA's routers have learnt, as a figure (the paper's appendix I)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.state import state_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPAN = 5.0  # of the x axis, to both sides


def plot_activations(
    model: nn.Module, path: str | Path | None = None, adapter: str | None = None
) -> Figure:
    """The learnt activation of every transformer layer's router, over GeLU.

    Args:
        path: a file to write as well: png, svg or pdf.
        adapter: default the active one.

    Raises:
        HtsrError: the model has no learnable activation; another suffix.
    """
    from htsr_alloc import style

    x = torch.linspace(-SPAN, SPAN, 401)
    state, curves = state_in(model), {}
    for block, router in (state.block_routers if state is not None else {}).items():
        for name in [adapter] if adapter in router.hosts else router.active():
            host, activation = router.hosts[name]
            own = {n: getattr(host, f"lora_moe_{n}")[name].detach() for n in activation.start}
            if own and adapter in (None, name):
                curves[block] = activation.apply(x.to(host.lora_moe_A[name].device), **own).cpu()
    if not curves:
        raise HtsrError(
            "The model has no learnable activation.",
            "Use it with LoraMoeConfig(system='em_lora').",
        )
    with style.look():
        figure = style.new_figure(6, 4)
        axes = figure.add_subplot()
        import matplotlib

        shades = matplotlib.colormaps[style.COLOUR_MAP]
        for i, (block, y) in enumerate(curves.items()):
            shade = shades(i / max(len(curves) - 1, 1))
            axes.plot(x, y, color=shade, linewidth=1, label=style.plain(block))
        axes.plot(x, F.gelu(x), color="black", linestyle="--", linewidth=1, label="GeLU")
        axes.set_xlabel("x, an entry of the pooled prompt")
        axes.set_ylabel("g(x)")
        axes.legend(
            loc="center left", bbox_to_anchor=(1, 0.5), fontsize=5, ncols=1 + len(curves) // 40
        )
    if path is not None:
        style.save(figure, path)
    return figure
