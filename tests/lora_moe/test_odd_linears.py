"""Linears that do not return W₀x alone: with something beside it, or for groups of inputs."""

from __future__ import annotations

import pytest
import torch
from helpers import moe_tiny as tiny
from torch import nn

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.linears import left_alone_in, widths


class TupleLinear(nn.Linear):
    """As I-BERT's: the output, and the scale that it was given."""

    def forward(self, input, scale=None):
        return super().forward(input), scale


class GroupedLinear(nn.Linear):
    """As DeepSeek-V4's, whose output has a row for each group."""


class Blocks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        block = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "o_a_proj": kind(8, 6)})
        self.layers = nn.ModuleList([block])

    def forward(self, x, **more):
        return self.layers[0]["o_a_proj"](x, **more)


def adapted(kind):
    return tiny.adapted(model=Blocks(kind), target_modules=["o_a_proj"], task_type=None)


def test_what_a_linear_returns_beside_its_output_is_passed_on():
    x, scale = torch.randn(3, 5, 8), torch.tensor([2.0])
    model, plain = adapted(TupleLinear), adapted(nn.Linear)
    got, beside = model(x, scale=scale)
    assert beside is scale
    assert torch.equal(got, plain(x))
    with model.disable_adapter():
        base, beside = model(x, scale=scale)
    assert beside is scale
    assert not torch.allclose(base, got)


def test_a_grouped_linear_is_no_linear_and_is_listed():
    base = Blocks(GroupedLinear)
    assert widths(base.layers[0]["o_a_proj"]) is None
    (left,) = left_alone_in(base, ["layers.0"])
    assert (left.name, left.reason) == (
        "layers.*.o_a_proj",
        "each group of its inputs meets its own rows",
    )
    with pytest.raises(HtsrError, match="o_a_proj is a GroupedLinear, and only linear modules"):
        adapted(GroupedLinear)
