"""Quantised bases: bitsandbytes' own 4-bit and 8-bit linears, on the CPU.

A 4-bit linear of bitsandbytes 0.50 repacks its weight in the first pass without gradients on a
CPU with AVX512-BF16, and then has no backward pass: here every model trains before it is evaluated.
"""

from __future__ import annotations

import pytest
import torch
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

from peft import PeftModel

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.model import layers_of

SHAPE = {"hidden_size": 64, "intermediate_size": 128}  # nf4 has blocks of 64


def plain():
    return tiny.llama(**SHAPE)


@pytest.fixture(params=["4-bit nf4", "8-bit"])
def quantised(request, tmp_path):
    """Makes the plain model again, its linears quantised by transformers."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain().save_pretrained(tmp_path / "base")
    if request.param == "8-bit":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )

    def make():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=how, dtype=torch.float32, device_map={"": "cpu"}
        )
        weight = model.model.layers[0].self_attn.q_proj.weight
        assert not weight.is_floating_point(), "the base must be quantised in truth"
        return model

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(tiny.tokens()).logits


def test_trains_saves_and_reloads(quantised, tmp_path):
    model = tiny.adapted(model=quantised(), router_aux_loss_coef=0.5).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer, losses, ids = torch.optim.AdamW(trained, lr=1e-2), [], tiny.tokens()
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    want = logits(model)
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(quantised(), tmp_path / "a")
    assert torch.equal(logits(again), want)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(quantised()))
    assert torch.equal(logits(again.unload()), logits(quantised()))


def test_each_layer_adds_what_it_adds_to_floats(quantised):
    """Δ(x) does not depend on how the base is stored."""
    on_floats, on_integers = tiny.adapted(model=plain()), tiny.adapted(model=quantised())
    x = torch.randn(3, 5, 64)
    for a, b in zip(layers_of(on_floats), layers_of(on_integers), strict=True):
        if a.in_features == 64:
            want = a(x) - a.base_layer(x)
            assert (b(x) - b.base_layer(x) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("system", ["goat", "goat_plus"])
def test_goat_is_made_on_floats_and_loaded_on_integers(quantised, system, tmp_path):
    with pytest.raises(HtsrError, match="is quantised, and GOAT needs the singular values") as told:
        tiny.adapted(system, model=quantised())
    assert "Make and save the adapter on the unquantised model" in str(told.value.hint)
    made = tiny.adapted(system, model=plain(), trained=False)
    made.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(quantised(), tmp_path / "a", is_trainable=True)
    x, bases = torch.randn(3, 5, 64), 0
    for a, b in zip(layers_of(made), layers_of(loaded), strict=True):
        if a.in_features == 64:
            want = a(x) - a.base_layer(x)
            bases += int((a.base_layer(x) - b.base_layer(x)).abs().max() > 1e-3)
            assert want.abs().max() > 0
            assert (b(x) - b.base_layer(x) - want).abs().max() < 1e-4
    assert bases > 0, "quantising must change something"
    ids = tiny.tokens()
    loaded.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in loaded.parameters() if p.requires_grad)
    # With equal gates the experts give back what W_res takes: the quantised base's own logits.
    for layer in layers_of(loaded):
        torch.nn.init.zeros_(layer.lora_moe_router["default"])
        object.__setattr__(layer.mixture["default"], "top_k", 4)
    assert (logits(loaded) - logits(quantised())).abs().max() < 1e-3


def test_em_dora_needs_the_rows_themselves(quantised, tmp_path):
    sentence = "EM-DoRA needs the norms of its rows in every pass"
    with pytest.raises(HtsrError, match=sentence):
        tiny.adapted("em_lora", model=quantised(), em_dora=True)
    tiny.adapted("em_lora", model=plain(), em_dora=True).save_pretrained(tmp_path / "a")
    with pytest.raises(HtsrError, match=sentence):
        PeftModel.from_pretrained(quantised(), tmp_path / "a")
    assert logits(tiny.adapted("em_lora", model=quantised())).isfinite().all()
