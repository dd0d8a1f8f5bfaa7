"""The picture of a run: the layers of its routers, and labels that have room."""

from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.lora_moe import RouterReport
from htsr_alloc.training.figure import _drawn

LOG = [{"step": i, "loss": 2.0 - i / 10, "router_aux_loss": 0.01} for i in range(1, 9)]


def reports(layers: int, roles: int = 7) -> list[RouterReport]:
    return [
        RouterReport(f"model.layers.{i}.self_attn.r{j}", 9, (0.5, 0.5), (0, 0), (0.5, 0.5), 1.0)
        for i in range(layers)
        for j in range(roles)
    ]


@pytest.mark.parametrize(("layers", "ticks"), [(2, [0, 1]), (29, list(range(0, 29, 2)))])
def test_the_heat_map_is_ticked_by_layer(layers, ticks):
    figure = _drawn(LOG, reports(layers))
    axes = figure.axes[1]
    assert axes.get_ylabel() == f"layer ({7 * layers} routers)"
    assert [int(label.get_text()) for label in axes.get_yticklabels()] == ticks
    assert list(axes.get_yticks()) == [7 * tick for tick in ticks]


def test_no_text_lies_on_another():
    figure: Any = _drawn(LOG, reports(29))
    figure.draw_without_rendering()
    boxes = [
        text.get_window_extent()
        for axes in figure.axes
        for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels())
        if text.get_text() and text.get_visible()
    ]
    boxes += [figure.axes[0].get_legend().get_window_extent()]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    left, right = figure.axes[0].get_position(), figure.axes[1].get_position()
    assert left.x1 < right.x0
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["training", "router_aux_loss (right)"]
