"""The routing report and collapse."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import PeftModel

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.collapse import collapse
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.routing import plot_routing, routing_report

SYSTEMS = ["alphalora", "goat", "goat_plus", "mor", "hydra", "adamole", "em_lora"]


def batches():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    return [{"input_ids": tiny.tokens(2, 7, seed), "attention_mask": mask} for seed in (0, 1)]


def test_report_counts_by_hand():
    model = tiny.adapted(expert_pattern={"layers.1": 1}).train()
    rows = routing_report(model, batches())
    assert model.training
    assert len(rows) == 7
    name = "model.layers.0.mlp.up_proj"
    (layer,) = [x for x in layers_of(model) if x.name == name]
    seen = []
    hook = layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.eval()
    chosen, gates, entropy, tokens = [0] * 4, [0.0] * 4, 0.0, 0
    for batch in batches():
        model(**batch)
        for row, kept in zip(seen.pop(), batch["attention_mask"], strict=True):
            for x, real in zip(row, kept, strict=True):
                if real:
                    logits = (x @ layer.lora_moe_router["default"].T).detach()
                    tokens += 1
                    entropy -= sum(float(p) * math.log(float(p)) for p in naive.softmax(logits))
                    for i, g in naive.top_k_gate(logits, 2).items():
                        chosen[i] += 1
                        gates[i] += float(g)
    hook.remove()
    (got,) = [row for row in rows if row.name == name]
    assert got.tokens == tokens == 24
    assert got.load == pytest.approx([c / 48 for c in chosen])
    assert got.idle == pytest.approx([1 - c / 24 for c in chosen])
    assert got.gate == pytest.approx([g / 24 for g in gates], abs=1e-6)
    assert got.entropy == pytest.approx(entropy / 24 / math.log(4), abs=1e-6)
    assert sum(got.load) == pytest.approx(1)


def test_report_of_prompts():
    rows = routing_report(tiny.adapted("em_lora"), batches())
    assert [row.name for row in rows] == ["model.layers.0", "model.layers.1"]
    assert all(row.tokens == 4 and len(row.load) == 7 for row in rows)


def test_figure(tmp_path):
    plot_routing(routing_report(tiny.adapted(), batches()), tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("system", "drawn"), [("mor", "gate"), ("hydra", "gate"), ("alphalora", "load")]
)
def test_figure_of_dense_routers_has_the_gate(system, drawn):
    rows = routing_report(tiny.adapted(system), batches())
    axes = plot_routing(rows).axes[0]
    cells = axes.images[0].get_array()
    assert cells.tolist() == [[4 * x for x in getattr(row, drawn)] for row in rows]
    assert cells.max() > 1.01 * cells.min(), "not a constant"
    words = {"gate": "mean gate times N", "load": "load times N"}
    assert axes.figure.axes[1].get_ylabel().startswith(words[drawn])


@pytest.mark.parametrize("system", SYSTEMS)
def test_collapse_is_a_lora_with_the_error_it_says(system, tmp_path):
    model = tiny.adapted(system, trained=False)
    tiny.move(model, size=0.05)
    model.eval()
    made = collapse(model, batches())
    made.save(tmp_path)
    label = json.loads((tmp_path / "collapse.json").read_text())
    assert label == {"approximate": True, "relative_logits_error": made.error}
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path).eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    pairs = [(model(**b).logits.double(), plain(**b).logits.double()) for b in batches()]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    total = sum(float(a.square().sum()) for a, _ in pairs)
    assert made.error == pytest.approx((difference / total) ** 0.5, rel=1e-3)
    assert 1e-6 < made.error < 1


@pytest.mark.parametrize("system", ["alphalora", "goat", "mor"])
def test_one_expert_collapses_exactly(system):
    made = collapse(tiny.adapted(system, num_experts=1).eval(), batches())
    assert made.exact
    assert made.error < 1e-5


def test_equal_gates_collapse_exactly():
    """A dense router of zeros gives every expert 1/N for every token."""
    model = tiny.adapted("hydra").eval()
    for layer in layers_of(model):
        torch.nn.init.zeros_(layer.lora_moe_router["default"])
    assert collapse(model, batches()).error < 1e-5


def test_refusals():
    with pytest.raises(HtsrError, match="needs calibration batches"):
        collapse(tiny.adapted(), [])
    with pytest.raises(HtsrError, match="EM-DoRA's experts"):
        collapse(tiny.adapted("em_lora", em_dora=True), batches())
    with pytest.raises(HtsrError, match="No router was seen"):
        routing_report(tiny.adapted(num_experts=1), batches())


@pytest.mark.parametrize(
    "held", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 6]}]
)
def test_an_adapter_that_holds_more_than_experts_is_not_collapsed(held):
    with pytest.raises(HtsrError, match="also holds trained modules or tokens"):
        collapse(tiny.adapted(**held), batches())


def test_only_the_active_adapter_is_measured():
    from htsr_alloc.lora_moe import LoraMoeConfig

    model = tiny.adapted(num_experts=1)
    model.add_adapter("other", LoraMoeConfig(r=2, num_experts=1, lora_dropout=0.0))
    for run in (routing_report, collapse):
        with pytest.raises(HtsrError, match="Of the adapters default acts, and not other alone"):
            run(model, batches(), "other")
        with model.disable_adapter(), pytest.raises(HtsrError, match="none acts"):
            run(model, batches())
    model.set_adapter("other")
    assert collapse(model, batches(), "other").error < 1e-5
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(HtsrError, match="default and other acts"):
        collapse(model, batches())
