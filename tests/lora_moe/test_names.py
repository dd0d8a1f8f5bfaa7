"""A checkpoint's names, found in the model that transformers loads from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from helpers import moe_tiny as tiny
from safetensors import safe_open
from torch import nn

pytest.importorskip("peft", reason="needs the extra [train]")

from htsr_alloc.allocation import allocate
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.lora_moe.names import Names
from htsr_alloc.lora_moe.resolve import resolve_layers
from htsr_alloc.records import Evidence

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def llava():
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=63
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


@pytest.mark.parametrize("make", [llava, gemma3, vit])
def test_a_saved_checkpoints_blocks_are_the_models(make, tmp_path):
    """Each block's weights in the file are the weights of the block that is found for it."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path)
    layers = map_layers(open_checkpoint(tmp_path).tensors)
    names = Names(model)
    assert any(prefix not in names.modules for prefix in layers.prefixes)
    evidence = tuple(Evidence(i, p, None, None, 2, "given") for i, p in enumerate(layers.prefixes))
    allocation = allocate(None, strategy="explicit", experts=(2,) * len(evidence))
    blocks = resolve_layers(model, replace(allocation, evidence=evidence))
    assert len(set(blocks)) == len(blocks)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        for matrix in layers.matrices:
            own = names.module(matrix.module)
            assert own is not None, matrix.name
            assert own.startswith(blocks[matrix.layer] + "."), matrix.name
            weight = model.get_submodule(own).weight
            assert torch.equal(weight, file.get_tensor(matrix.ref.name)), matrix.name


def test_an_exact_name_beats_an_end():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            self.sub = nn.Module()
            self.sub.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
            self.other = nn.Module()
            self.other.sub = nn.Module()
            self.other.sub.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in "ab")

    def found(stack):
        evidence = tuple(Evidence(i, f"{stack}.{i}", None, None, 2, "given") for i in range(2))
        allocation = allocate(None, strategy="explicit", experts=(2, 2))
        return resolve_layers(Nested(), replace(allocation, evidence=evidence))

    assert found("layers") == ["layers.0", "layers.1"]
    assert found("sub.layers") == ["sub.layers.0", "sub.layers.1"]
    assert found("other.sub.layers") == ["other.sub.layers.0", "other.sub.layers.1"]


def test_names_of_a_model_that_is_renamed_nowhere():
    names = Names(tiny.llama())
    assert names.module("model.layers.1") == "model.layers.1"
    assert names.module("layers.1") == "model.layers.1"  # of a checkpoint without its head
    assert names.module("model.layers.7") is None
