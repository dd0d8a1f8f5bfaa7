"""Which linears are adapted only by name: the base's own routers, and those without effect."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.allocation import allocate
from htsr_alloc.checkpoints.rules import is_router
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import build
from htsr_alloc.lora_moe.build import describe
from htsr_alloc.lora_moe.linears import left_alone_in, left_out, widths
from htsr_alloc.lora_moe.model import layers_of
from htsr_alloc.lora_moe.resolve import resolve_layers
from htsr_alloc.records import Evidence, Module

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXTURES = {
    "Llama4ForCausalLM": ("Llama4TextConfig", {
        **SMALL, "num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 24,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}),
    "PhimoeForCausalLM": ("PhimoeConfig", {**SMALL, "num_local_experts": 2}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {
        **SMALL, "num_experts": 2, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1}),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", {
        **SMALL, "num_experts": 2, "head_dim": 8, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8, "num_experts_per_tok": 1,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}),
    "HunYuanMoEV1ForCausalLM": ("HunYuanMoEV1Config", {
        **SMALL, "num_experts": 2, "moe_topk": 1, "head_dim": 8}),
    "DbrxForCausalLM": ("DbrxConfig", {
        "vocab_size": 64, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 32,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}),
    "OlmoeForCausalLM": ("OlmoeConfig", {**SMALL, "num_experts": 2, "num_experts_per_tok": 1}),
}  # fmt: skip
ROUTERS = {  # of a block, that are linears or hold one
    "Llama4ForCausalLM": ["feed_forward.router"],
    "PhimoeForCausalLM": ["router"],
    "Qwen2MoeForCausalLM": ["mlp.shared_expert_gate"],
    "Qwen3NextForCausalLM": ["mlp.shared_expert_gate"],
    "HunYuanMoEV1ForCausalLM": ["mlp.gate.wg"],
    "DbrxForCausalLM": ["ffn.router.layer"],
    "OlmoeForCausalLM": [],
}


def made(name):
    config, settings = MIXTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_bases_own_routers_are_left_alone(name):
    base = made(name)
    linears = [n for n, m in base.named_modules() if widths(m)]
    routers = {n for n in linears if n.endswith(tuple("." + end for end in ROUTERS[name]))}
    assert len(routers) == 2 * len(ROUTERS[name])
    assert all(is_router(n) for n in routers)
    allocation = allocate(None, strategy="explicit", experts=(2, 2), top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for how in ("default", "all-linear", "build"):
            if how == "build":
                model = build(made(name), allocation, r=2)
            else:
                targets = {} if how == "default" else {"target_modules": how}
                model = tiny.adapted(model=made(name), num_experts=2, **targets)
            adapted = {layer.name for layer in layers_of(model)}
            assert not adapted & routers
            assert adapted == set(linears) - routers - {"lm_head"}
            loss = model.train()(input_ids=tiny.tokens(), labels=tiny.tokens()).loss
            assert torch.isfinite(loss)
    if routers and "gate" in next(iter(routers)):  # one that can be adapted, if it is asked for
        last = next(iter(routers)).rpartition(".")[2]
        assert {
            m.name for m in layers_of(tiny.adapted(model=base, target_modules=[last]))
        } == routers


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4
    )
    return transformers.MambaForCausalLM(config)


def test_every_adapter_that_is_made_acts():
    """An adapter on Mamba's dt_proj would never act: the model reads its weight."""
    base = mamba()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.adapted(model=base, num_experts=2)
        model.train()(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    layers = list(layers_of(model))
    assert {layer.name.rpartition(".")[2] for layer in layers} == {"in_proj", "x_proj", "out_proj"}
    for layer in layers:
        assert layer.lora_moe_B["default"].grad.abs().max() > 0, layer.name


def test_build_says_which_listed_linear_gets_none():
    names = ("in_proj", "dt_proj")
    modules = tuple(
        Module(i, f"backbone.layers.{i}.mixer.{n}", n, 3.0, 2.0, 2, 1)
        for i in range(2)
        for n in names
    )
    evidence = tuple(Evidence(i, f"backbone.layers.{i}", None, None, 2, "given") for i in range(2))
    allocation = allocate(None, strategy="explicit", experts=(2, 2), top_k=1)
    allocation = replace(allocation, modules=modules, evidence=evidence)
    with pytest.warns(UserWarning, match="dt_proj gets no experts: the model reads its weight"):
        model = build(mamba(), allocation, r=2)
    assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == {"in_proj"}
    rows = describe(model, resolve_layers(model.get_base_model(), allocation))
    assert [row.modules for row in rows] == [1, 1]


FEED_FORWARD = {  # of a block, by the classes of the base
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64},
                        {"mlp.c_fc", "mlp.c_proj"}),
    "BertForMaskedLM": ("BertConfig", SMALL, {"intermediate.dense", "output.dense"}),
    "OPTForCausalLM": ("OPTConfig", {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2,
                                     "num_attention_heads": 2, "vocab_size": 64,
                                     "word_embed_proj_dim": 16}, {"fc1", "fc2"}),
    "FalconForCausalLM": ("FalconConfig", {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
        "ffn_hidden_size": 24}, {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    "SeedOssForCausalLM": ("SeedOssConfig", {**SMALL, "head_dim": 8},
                           {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FEED_FORWARD)
def test_mor_adapts_the_feed_forward_linears_whatever_their_names(name):
    config, settings, wanted = FEED_FORWARD[name]
    torch.manual_seed(0)
    allocation = allocate(None, strategy="explicit", experts=(2, 2))
    for how in ("build", "default"):
        base = getattr(transformers, name)(getattr(transformers, config)(**settings))
        if how == "build":
            model = build(base, allocation, r=2, system="mor")
        else:
            model = tiny.adapted("mor", model=base, num_experts=2, task_type=None)
        blocks = {layer.name.partition(f".{i}.")[2] for i in "01" for layer in layers_of(model)}
        assert blocks - {""} == wanted
        assert len(list(layers_of(model))) == 2 * len(wanted)


def test_a_base_without_feed_forward_linears_is_refused():
    allocation = allocate(None, strategy="explicit", experts=(2, 2))
    with pytest.raises(HtsrError, match="no linear to adapt"):
        build(made("OlmoeForCausalLM"), allocation, r=2, system="mor")
    with pytest.raises(HtsrError, match="MoR adapts feed-forward linears, and the model has none"):
        tiny.adapted("mor", model=mamba(), num_experts=2)


def test_what_is_left_alone_is_listed():
    base = made("Qwen2MoeForCausalLM")
    prefixes = ["model.layers.0", "model.layers.1"]
    build(base, allocate(None, strategy="explicit", experts=(2, 2)), r=2)
    found = {(row.name, row.count, row.reason) for row in left_alone_in(base, prefixes)}
    experts = "one of the base's own experts, 2 in one tensor"
    assert found == {
        ("model.layers.*.mlp.experts.gate_up_proj", 2, experts),
        ("model.layers.*.mlp.experts.down_proj", 2, experts),
        ("model.layers.*.mlp.shared_expert_gate", 2, "router"),
    }
    assert {row.count for row in left_alone_in(base, prefixes[:1])} == {1}


def test_linears_that_predict_further_tokens_are_left_alone():
    def stack():
        return torch.nn.ModuleList([torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)})])

    stacks = {"layers": stack(), "mtp": stack()}
    found = left_out(torch.nn.ModuleDict({"model": torch.nn.ModuleDict(stacks)}))
    assert found["model.mtp.0.up_proj"] == "multi-token prediction"
    assert "model.layers.0.up_proj" not in found
