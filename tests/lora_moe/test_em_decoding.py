"""EM-LoRA after the prompt: what no row chose is not computed, and k linears of a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import LoraMoeConfig, experts
from htsr_alloc.lora_moe.linears import base_weight
from htsr_alloc.lora_moe.model import STATE, layers_of
from htsr_alloc.lora_moe.state import Choice
from htsr_alloc.lora_moe.systems.em_lora import SYSTEM, EmLora

GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def em(**settings):
    return tiny.adapted("em_lora", **{"r": 2, **settings}).eval()


def choices(model):
    """By block, the (B, N) choice of the latest pass."""
    state = getattr(model.get_base_model(), STATE)
    return {block: routing.chosen for (block, _), routing in state.current.decisions.items()}


@pytest.fixture
def computed(monkeypatch):
    """The names of the linears whose expert is computed, call by call."""
    names, own = [], EmLora.delta

    def delta(self, layer, *args):
        names.append(layer.name)
        return own(self, layer, *args)

    monkeypatch.setattr(EmLora, "delta", delta)
    return names


def chosen_linears(model):
    return {
        layer.name
        for layer in layers_of(model)
        if choices(model)[layer.place["default"][0]][:, layer.place["default"][1]].any()
    }


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_only_what_a_row_chose_is_computed(monkeypatch, computed, beams, dora):
    model, ids = em(em_dora=dora), tiny.tokens(3, 7)
    got = model.generate(input_ids=ids, num_beams=beams, **GENERATE)
    chosen = chosen_linears(model)
    linears = len(list(layers_of(model)))
    assert 0 < len(chosen) < linears
    assert len(computed) == linears + 5 * len(chosen)  # the prompt's pass, then five tokens
    assert set(computed[linears:]) == chosen
    monkeypatch.setattr(EmLora, "idle", lambda *args: False)
    assert torch.equal(model.generate(input_ids=ids, num_beams=beams, **GENERATE), got)


def test_by_hand_too_and_for_other_rows_anew(computed):
    model = em()
    for seed in (0, 1):
        ids = tiny.tokens(1, 6, seed)
        first = model(input_ids=ids, use_cache=True)
        computed.clear()
        model(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
        assert set(computed) == chosen_linears(model)
        assert len(computed) == 2


def test_the_device_is_asked_once_a_generation(monkeypatch):
    asked, own = [], Choice.settle

    def settle(self):
        before = bool(self.used)
        own(self)
        asked.append(before)

    monkeypatch.setattr(Choice, "settle", settle)
    em().generate(input_ids=tiny.tokens(2, 7), **GENERATE)
    assert asked == [False, True, True, True, True]


def test_a_traced_graph_computes_all(monkeypatch, computed):
    model, ids = em(), tiny.tokens(2, 7)
    want = model.generate(input_ids=ids, **GENERATE)
    computed.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(model.generate(input_ids=ids, **GENERATE), want)
    assert len(computed) == 6 * len(list(layers_of(model)))


def test_row_norms_are_computed_once(monkeypatch):
    calls, own = [], experts.row_norm
    monkeypatch.setattr(experts, "row_norm", lambda *args: calls.append(0) or own(*args))
    model, ids = em(em_dora=True), tiny.tokens(1, 7)
    model.generate(input_ids=ids, **GENERATE)
    linears, chosen = len(list(layers_of(model))), len(chosen_linears(model))
    assert len(calls) == linears + chosen
    # Weights that changed between two generations have new norms.
    before = model(ids).logits
    with torch.no_grad():
        for layer in layers_of(model):
            base_weight(layer.base_layer).mul_(2)
            layer.base_layer.weight.data /= 2
            layer.lora_moe_B["default"].mul_(3)
    after = model(ids).logits
    assert not torch.allclose(after, before)
    fresh = em(em_dora=True)  # with no norm computed yet
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, after)


@pytest.mark.parametrize("k", [2, 5, 7])
def test_k_linears_of_a_layer(k):
    """Fig. 3: each of the k likeliest linears, weighted by its p; load N Σ f p̄ with f up to 1."""
    model = em(top_k=k, em_pooler="last")
    block, seen = model.get_base_model().model.layers[1], {}
    block.register_forward_pre_hook(lambda m, args: seen.update(block=args[0][:, -1]))
    for layer in layers_of(block):
        layer.register_forward_hook(lambda m, args, out: seen.update({m.name: (args[0], out)}))
    model(tiny.tokens())
    layers = list(layers_of(block))
    state = getattr(model.get_base_model(), STATE)
    routing = state.current.decisions["model.layers.1", "default"]
    for row in range(2):
        p = naive.softmax(routing.logits[row].double())
        best = sorted(range(7), key=lambda i: -float(p[i].detach()))[:k]
        for i, layer in enumerate(layers):
            x, out = (value[row].double() for value in seen[layer.name])
            a, b = (getattr(layer, f"lora_moe_{n}")["default"].double() for n in "AB")
            weight = layer.base_layer.weight.double()
            want = x @ weight.T + (p[i] if i in best else 0) * 8.0 * (x @ a.T @ b.T)
            assert (out - want).abs().max() < 1e-5


def test_all_linears_with_weight_1_are_lora():
    model, ids = em(top_k=7, em_weighting="straight_through"), tiny.tokens()
    plain = copy.deepcopy(tiny.llama())
    with torch.no_grad():
        for layer in layers_of(model):
            a, b = layer.lora_moe_A["default"], layer.lora_moe_B["default"]
            plain.get_submodule(layer.name).weight.add_(8.0 * b @ a)
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)


def test_one_linear_by_default_and_no_pattern():
    assert LoraMoeConfig(system="em_lora").top_k == 1
    assert LoraMoeConfig().top_k == 2
    assert SYSTEM.top_k == 1
    with pytest.raises(HtsrError, match="top_k counts linears of a layer"):
        LoraMoeConfig(system="em_lora", top_k_pattern={"q_proj": 1})
