"""A model of images and text: one stack of it analysed, allocated, built and trained on text."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import training_tiny

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from safetensors.torch import load_file

QUICK = ["--device", "cpu", "--dtype", "float32", "--lora-dropout", "0", "--lora-r", "2"]
TEXT = "language_model.model.layers"
VISION = "vision_tower.encoder.layers"


@pytest.fixture
def here(tmp_path):
    """A folder with a LLaVA of two layers of text and three of vision, and rows of text."""
    import transformers

    shared = {"intermediate_size": 48, "num_attention_heads": 4, "hidden_size": 32}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **shared, "num_hidden_layers": 2, "vocab_size": 64},
        vision_config={
            **{"model_type": "clip_vision_model", **shared, "num_hidden_layers": 3},
            **{"image_size": 16, "patch_size": 8},
        },
        image_token_index=63,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    training_tiny.tokenizer().save_pretrained(tmp_path / "m")
    training_tiny.write(tmp_path / "rows.jsonl", training_tiny.learnable_rows(32))
    return tmp_path


def test_one_stack_all_the_way(here, invoke):
    def ran(*arguments):
        done = invoke(*arguments)
        assert done.rc == 0, done.stderr
        return done

    whole = json.loads(ran("inspect", "m", "--json").stdout)
    assert {p.rpartition(".")[0] for p in whole["layers"]} == {TEXT, VISION}
    ran("analyze", "m", "--stack", "language_model", "-o", "text.metrics.json")
    metrics = json.loads((here / "text.metrics.json").read_text())
    assert [layer["prefix"] for layer in metrics["layers"]] == [f"{TEXT}.{i}" for i in range(2)]
    ran("allocate", "text.metrics.json", "--T", "6", "-o", "text.json")
    ran("train", "text.json", "--model", "m", "--data", "rows.jsonl", "-o", "out", *QUICK)
    weights = load_file(here / "out" / "adapter_model.safetensors")
    trained = [v for k, v in weights.items() if "lora_moe_B" in k]
    assert len(trained) == 2 * 7
    assert all(b.abs().max() > 0 for b in trained)
    assert not any("vision" in name for name in weights)


def test_each_stack_with_its_budget_is_built_and_refused_for_text_rows(here, invoke):
    assert invoke("analyze", "m", "-o", "m.metrics.json").rc == 0
    budget = "language_model=4,vision_tower=9"
    assert invoke("allocate", "m.metrics.json", "--T", budget, "-o", "both.json").rc == 0
    done = invoke("build", "both.json", "--model", "m", "--dry-run", "--json")
    assert done.rc == 0, done.stderr
    layers = json.loads(done.stdout)["layers"]
    assert sum(x["experts"] for x in layers if "language_model" in x["prefix"]) == 4
    assert sum(x["experts"] for x in layers if "vision_tower" in x["prefix"]) == 9
    done = invoke("train", "both.json", "--model", "m", "--data", "rows.jsonl", "-o", "o", *QUICK)
    assert done.rc == 1
    assert "18 of 32 adapted linears read no text; the first is model.vision_tower" in done.stderr
    done = invoke("analyze", "m", "--stack", "audio")
    assert done.rc == 1
    assert f"{TEXT} (2 layers), {VISION} (3 layers)" in " ".join(done.stderr.split())


def test_a_score_goes_to_the_stack_that_it_is_of(here, invoke):
    """transformers names and orders the stacks in another way than the checkpoint."""
    assert invoke("analyze", "m", "-o", "m.metrics.json").rc == 0
    assert invoke("score", "norm", "--model", "m", "-o", "s.csv").rc == 0
    done = invoke("allocate", "m.metrics.json", "--scores", "s.csv", "--T", "40", "-o", "a.json")
    assert done.rc == 0, done.stderr
    weights = {}
    for name, value in load_file(here / "m" / "model.safetensors").items():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight")) and ".layers." in name:
            block = ".".join(name.split(".")[: name.split(".").index("layers") + 2])
            weights.setdefault(block, []).append(value.double().norm().item())
    rows = json.loads((here / "a.json").read_text())["evidence"]
    assert len(rows) == len(weights) == 5
    for row in rows:
        own = weights[row["prefix"]]
        assert row["score"] == pytest.approx(sum(own) / len(own), rel=1e-6)
