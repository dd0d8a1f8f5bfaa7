"""Budgets counted on a model's linears, where its checkpoint joins several of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from helpers import moe_tiny as tiny

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc import allocate, analyze
from htsr_alloc.allocation import Request
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import build, linears_of
from htsr_alloc.reports.counts import explain_counts

R = 2
WIDTHS = {  # (d_out, d_in) as transformers makes them of the file's qkv_proj and up_gate_proj
    "q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "o_proj": (32, 32),
    "gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48),
}  # fmt: skip


def gte():
    torch.manual_seed(0)
    config = transformers.GteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.GteForMaskedLM(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("gte") / "gte"
    gte().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def metrics(folder):
    return analyze(folder, estimator="median")


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cost(experts, names=tuple(WIDTHS)):
    """N r (d_in + d_out), and N d_in for the router where N > 1, of each linear."""
    total = 0
    for n in experts:
        for name in names:
            rows, columns = WIDTHS[name]
            total += n * R * (rows + columns) + (n * columns if n > 1 else 0)
    return total


def test_what_is_counted_on_the_model_is_what_becomes_trainable(metrics):
    linears = linears_of(gte(), metrics)
    made = allocate(metrics, params=12_000, r=R, linears=linears)
    assert made.parameters.spent == cost(made.experts) <= 12_000
    assert made.parameters.counted_on == "model"
    with pytest.raises(HtsrError, match="were counted on the model's linears"):
        explain_counts(made, metrics)
    assert trainable(build(gte(), made, r=R, lora_dropout=0.0)) == made.parameters.spent
    alone = allocate(metrics, params=12_000, r=R)
    assert trainable(build(gte(), alone, r=R, lora_dropout=0.0)) > alone.parameters.spent


def test_targets_are_the_models_names(metrics):
    linears = linears_of(gte(), metrics)
    made = allocate(metrics, params=5_000, r=R, targets=["q_proj"], linears=linears)
    assert made.parameters.spent == cost(made.experts, ["q_proj"])
    model = build(gte(), made, r=R, lora_dropout=0.0, target_modules=["q_proj"])
    assert trainable(model) == made.parameters.spent
    with pytest.raises(HtsrError, match="No linear of the model is a qkv_proj") as caught:
        allocate(metrics, params=5_000, r=R, targets=["qkv_proj"], linears=linears)
    assert "q_proj" in caught.value.hint


def test_ranks_have_no_router(metrics):
    linears = linears_of(gte(), metrics)
    made = allocate(metrics, adapter_kind="lora", rank=R, strategy="uniform", linears=linears)
    assert made.parameters.spent == 2 * R * sum(sum(pair) for pair in WIDTHS.values())


def test_where_file_and_model_agree_nothing_changes(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    metrics = analyze(tmp_path, estimator="median")
    linears = linears_of(tiny.llama(), metrics)
    asked = {"params": 20_000, "r": R}
    made, alone = allocate(metrics, linears=linears, **asked), allocate(metrics, **asked)
    assert replace(made, parameters=replace(made.parameters, counted_on="metrics")) == alone


@pytest.mark.parametrize(
    "asked", [{"T": 8}, {"params": 9_000, "per_module": True}, {"adapter_kind": "lora", "rank": 2,
                                                               "targets": ["experts"]}]
)  # fmt: skip
def test_other_budgets_take_no_model(asked, metrics):
    with pytest.raises(HtsrError, match="linears are for a budget in parameters, of layers"):
        Request.of(linears=linears_of(gte(), metrics), **asked)


def test_another_model_is_refused(metrics):
    with pytest.raises(HtsrError, match="no module gte"):
        linears_of(tiny.llama(), metrics)


def test_the_command_counts_on_the_config_alone(invoke, folder, tmp_path):
    assert invoke("analyze", folder, "--estimator", "median").rc == 0
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((folder / "config.json").read_bytes())
    build_it = ("build", "gte.allocation.json", "--model", "bare", "--dry-run", "--r", R)
    budget = ("--params", "12k", "--r", R)
    assert invoke("allocate", *budget).rc == 0
    assert "htsr allocate --model counts what it makes" in invoke(*build_it).stderr
    done = invoke("allocate", *budget, "--model", "bare", "--force")
    assert done.rc == 0, done.stderr
    assert "The allocation counted" not in invoke(*build_it).stderr
    refused = invoke("allocate", "--T", 8, "--model", "bare", "--force")
    assert refused.rc == 1
    assert "Leave out --model" in refused.stderr
