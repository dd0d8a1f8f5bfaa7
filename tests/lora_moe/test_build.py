"""build and htsr build: every layer resolved or refused, counts as they are trained."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import LoraConfig, PeftModel, get_peft_model

from htsr_alloc.allocation import allocate
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import build
from htsr_alloc.lora_moe.build import describe, resolve_layers
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.plain import control
from htsr_alloc.records import Evidence, Module, dumps


def given(*experts, prefix="model.layers", top_k=2):
    made = allocate(None, strategy="explicit", experts=experts, top_k=top_k)
    if prefix is None:
        return dataclasses.replace(made, evidence=())
    rows = tuple(
        Evidence(i, f"{prefix}.{i}", None, None, n, "given") for i, n in enumerate(experts)
    )
    return dataclasses.replace(made, evidence=rows)


@pytest.mark.parametrize("prefix", ["model.layers", "layers", None])
def test_each_layer_gets_its_experts(prefix):
    model = build(tiny.llama(layers=3), given(3, 1, 0, prefix=prefix), r=2)
    found = {layer.name: layer for layer in layers_of(model)}
    assert len(found) == 14
    for name, layer in found.items():
        want = (3, 2) if ".0." in name else (1, 1)
        assert (layer.mixture["default"].experts, layer.mixture["default"].top_k) == want
        assert bool(layer.lora_moe_router) == (want[0] > 1)
    rows = describe(model, [f"model.layers.{i}" for i in range(3)])
    assert [(row.experts, row.top_k, row.modules) for row in rows] == [
        (3, 2, 7),
        (1, 1, 7),
        (0, None, 0),
    ]
    assert sum(row.trainable for row in rows) == model.get_nb_trainable_parameters()[0]
    block = sum(p.numel() for p in tiny.llama().model.layers[0].parameters())
    assert rows[1].share == rows[1].trainable / block
    assert model(tiny.tokens()).logits.isfinite().all()


def test_top_k_of_the_allocation_or_given():
    allocation = dataclasses.replace(given(4, 4), top_k=(1, 3))
    built = [
        layer.mixture["default"].top_k for layer in layers_of(build(tiny.llama(), allocation, r=2))
    ]
    assert built == [1] * 7 + [3] * 7
    built = [
        x.mixture["default"].top_k
        for x in layers_of(build(tiny.llama(), given(4, 1), r=2, top_k=2))
    ]
    assert built == [2] * 7 + [1] * 7


@pytest.mark.parametrize("system", ["mor", "hydra", "goat", "goat_plus", "adamole"])
def test_every_system_takes_an_allocation(system):
    model = build(tiny.llama(), given(3, 2), r=2, system=system)
    assert len(list(layers_of(model))) == (6 if system == "mor" else 14)
    assert model(tiny.tokens()).logits.isfinite().all()


def test_two_stacks_and_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=16,
        d_ff=24,
        d_kv=4,
        num_heads=4,
        num_layers=2,
        vocab_size=40,
        decoder_start_token_id=0,
    )
    t5 = T5ForConditionalGeneration(config)
    rows = [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in range(2)]
    allocation = dataclasses.replace(
        given(2, 2, 3, 3),
        evidence=tuple(
            Evidence(i, p, None, None, [2, 2, 3, 3][i], "given") for i, p in enumerate(rows)
        ),
    )
    assert resolve_layers(t5, allocation) == rows
    model = build(t5, allocation, r=2).train()
    ids, labels = (
        torch.tensor([[3, 4, 0, 0, 0], [5, 6, 7, 8, 9]]),
        torch.tensor([[3, 4, 5], [6, 7, 8]]),
    )
    out = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)
    out.loss.backward()
    assert {x.mixture["default"].experts for x in layers_of(model) if "decoder" in x.name} == {3}
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40)
    made = build(
        GPT2LMHeadModel(config), given(2, 2, prefix="transformer.h"), r=2, system="goat"
    ).eval()
    assert made(ids).logits.isfinite().all()
    with pytest.raises(HtsrError, match=r"c_proj is in transformer.h.0 2 times"):
        build(
            GPT2LMHeadModel(config), given(2, 2, prefix="transformer.h"), target_modules=["c_proj"]
        )


@pytest.mark.parametrize(
    ("allocation", "config", "sentence"),
    [
        (given(2, 2, 2), {}, r"for 3 layers, and the model's layers are 2 \(model.layers\)"),
        (given(2), {}, "for 1 layers"),
        (given(2, 2, 2, prefix=None), {}, "for 3 layers"),
        (given(2, 2, prefix="gpt.h"), {}, "no module gpt.h.0"),
        (given(2, 2), {"target_modules": ["w1"]}, "no linear w1"),
        (given(2, 2), {"target_modules": "all-linear"}, "list of names"),
        (given(2, 2), {"num_experts": 3}, "takes num_experts from the allocation"),
        (given(2, 2), {"system": "em_lora"}, "takes no allocation of experts"),
        (given(4, 2), {"top_k_pattern": {"layers.1": 3}}, "asks for 3 of 2 experts"),
    ],
)
def test_what_does_not_fit_is_refused(allocation, config, sentence):
    with pytest.raises(HtsrError, match=sentence):
        build(tiny.llama(), allocation, **config)


def by_linears(counts, prefix="model.layers"):
    """An allocation of {linear: experts} a layer."""
    listed = [
        Module(i, f"{prefix}.{i}.{name}", name.rpartition(".")[2], 3.0, float(n), n, min(2, n))
        for i, row in enumerate(counts)
        for name, n in row.items()
    ]
    layers = [round(sum(row.values()) / len(row)) for row in counts]
    return dataclasses.replace(given(*layers, prefix=prefix), modules=tuple(listed))


COUNTS = [{"self_attn.q_proj": 3, "mlp.up_proj": 1}, {"self_attn.q_proj": 0, "mlp.up_proj": 4}]


@pytest.mark.parametrize("prefix", ["model.layers", "layers"])
def test_each_linear_gets_its_own_experts(prefix):
    """Also where the checkpoint has shorter names than the model."""
    model = build(tiny.llama(), by_linears(COUNTS, prefix), r=2)
    found = {layer.name: layer.mixture["default"] for layer in layers_of(model)}
    assert {name: (how.experts, how.top_k) for name, how in found.items()} == {
        "model.layers.0.self_attn.q_proj": (3, 2),
        "model.layers.0.mlp.up_proj": (1, 1),
        "model.layers.1.mlp.up_proj": (4, 2),
    }
    rows = describe(model, ["model.layers.0", "model.layers.1"])
    assert [(row.fewest, row.experts, row.modules) for row in rows] == [(1, 3, 2), (4, 4, 1)]
    assert model(tiny.tokens()).logits.isfinite().all()


def test_linears_have_their_own_top_k_and_can_be_chosen_among():
    made = by_linears(COUNTS)
    modules = list(made.modules)
    modules[3] = dataclasses.replace(modules[3], top_k=1)
    made = dataclasses.replace(made, modules=tuple(modules))
    model = build(tiny.llama(), made, r=2, target_modules=["up_proj"])
    assert {m.name: m.mixture["default"].top_k for m in layers_of(model)} == {
        "model.layers.0.mlp.up_proj": 1,
        "model.layers.1.mlp.up_proj": 1,
    }
    built = build(tiny.llama(), made, r=2)
    assert [m.mixture["default"].top_k for m in layers_of(built)] == [2, 1, 1]


def test_an_adapter_of_linears_is_saved_and_loaded(tmp_path):
    model = build(tiny.llama(), by_linears(COUNTS), r=2).eval()
    tiny.move(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter").eval()
    assert torch.equal(model(tiny.tokens()).logits, again(tiny.tokens()).logits)


def test_the_control_of_linears():
    made = by_linears(COUNTS)
    config = json.loads(control(tiny.llama(), made, r=2))
    config.pop("peft_type")
    plain = get_peft_model(tiny.llama(), LoraConfig(**config))
    built = build(tiny.llama(), made, r=2)
    routers = sum(
        m.lora_moe_router["default"].numel() for m in layers_of(built) if m.lora_moe_router
    )
    assert plain.get_nb_trainable_parameters()[0] == (
        built.get_nb_trainable_parameters()[0] - routers
    )


@pytest.mark.parametrize(
    ("allocation", "config", "sentence"),
    [
        (by_linears([{"mlp.w1": 2}, {"mlp.w1": 2}]), {}, r"mlp\.w1, which is not a linear"),
        (by_linears(COUNTS), {"target_modules": ["v_proj"]}, "no linear v_proj"),
        (by_linears([{"mlp.up_proj": 0}, {"mlp.up_proj": 0}]), {}, "No layer has an expert"),
        (dataclasses.replace(by_linears(COUNTS), evidence=()), {}, "layer 0, which has no block"),
    ],
)
def test_listed_linears_that_do_not_fit_are_refused(allocation, config, sentence):
    with pytest.raises(HtsrError, match=sentence):
        build(tiny.llama(), allocation, **config)


def test_a_layer_found_twice_is_refused():
    both = torch.nn.ModuleDict({"a": tiny.llama(), "b": tiny.llama()})
    with pytest.raises(HtsrError, match=r"model.layers.0 is in the model 2 times"):
        build(both, given(2, 2))


def test_the_control_has_the_experts_parameters():
    text = control(tiny.llama(layers=3), given(3, 1, 0), r=2)
    config = json.loads(text)
    config.pop("peft_type")
    plain = get_peft_model(tiny.llama(layers=3), LoraConfig(**config))
    built = build(tiny.llama(layers=3), given(3, 1, 0), r=2)
    routers = sum(
        layer.lora_moe_router["default"].numel()
        for layer in layers_of(built)
        if layer.lora_moe_router
    )
    trainable = built.get_nb_trainable_parameters()[0]
    assert plain.get_nb_trainable_parameters()[0] == trainable - routers


def test_dry_run_reads_no_weights(invoke, tmp_path):
    tiny.llama().config.save_pretrained(tmp_path / "m")
    (tmp_path / "a.json").write_text(dumps(given(3, 1)))
    done = invoke("build", "a.json", "--model", "m", "--dry-run", "--r", 2, "--control", "c.json")
    assert done.rc == 0
    lines = done.stdout.splitlines()
    assert re.split(r" {2,}", lines[0].strip()) == [
        *("layer", "prefix", "experts", "top_k", "modules", "trainable", "of the layer"),
    ]
    model = build(tiny.llama(), given(3, 1), r=2)
    rows = describe(model, ["model.layers.0", "model.layers.1"])
    for line, row in zip(lines[1:], rows, strict=True):
        assert line.split()[1:6] == [
            row.prefix,
            str(row.experts),
            str(row.top_k),
            "7",
            f"{row.trainable:,}",
        ]
    assert f"{model.get_nb_trainable_parameters()[0]:,} trainable" in done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["rank_pattern"]
    as_json = json.loads(invoke("build", "a.json", "--model", "m", "--dry-run", "--json").stdout)
    assert [row["experts"] for row in as_json["layers"]] == [3, 1]
    assert invoke("build", "a.json", "--model", "m").rc == 1
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "adapter_config.json").write_text("{}")
    done = invoke("build", "a.json", "--model", "m", "-o", "trained")
    assert done.rc == 2
    assert "trained holds an adapter already" in done.stderr
    assert (tmp_path / "trained" / "adapter_config.json").read_text() == "{}"
    assert "no config.json" in invoke("build", "a.json", "--model", "nowhere", "--dry-run").stderr


def test_build_writes_an_adapter(invoke, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "m")
    (tmp_path / "a.json").write_text(dumps(given(3, 1)))
    done = invoke("build", "a.json", "--model", "m", "--r", 2, "-o", "adapter", "--system", "goat")
    assert done.rc == 0
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    assert len(list(layers_of(model))) == 14


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_local_experts": -1}, r"negative dimension .*\(RuntimeError\)"),
        ({"hidden_size": 32, "num_attention_heads": 0}, r"zero.*\(ZeroDivisionError\)"),
        ({"hidden_act": "no such"}, r"no such.*\(KeyError\)"),
    ],
)
def test_what_transformers_raises_is_one_sentence(config, said, tmp_path):
    from htsr_alloc.lora_moe.build import empty_model

    whole = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    whole |= {"num_hidden_layers": 1, **config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(HtsrError, match=f"^transformers cannot make a model of .*: .*{said}"):
        empty_model(tmp_path)
