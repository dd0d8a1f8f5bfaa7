"""Plain LoRA of an allocation of ranks, on models whose words are not their checkpoint's."""

from __future__ import annotations

import json
import warnings

import pytest
import transformers

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import LoraConfig, get_peft_model

from htsr_alloc import allocate, analyze
from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.plain import control
from htsr_alloc.training.methods import adapter_for


def vit():
    """Its file says attention.attention.query, and transformers 5 q_proj."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    return transformers.ViTForImageClassification(config)


def metrics_of(model, folder):
    model.save_pretrained(folder)
    return analyze(folder, estimator="median")


@pytest.mark.parametrize("more", [{}, {"per_module": True}])
def test_ranks_on_all_linears_need_no_words(more, tmp_path):
    made = allocate(metrics_of(vit(), tmp_path), adapter_kind="lora", rank=4, **more)
    assert "query" in made.strategy.targets
    base = vit()
    assert not any(name.endswith("query") for name, _ in base.named_modules())
    text = control(base, made, lora_dropout=0.0, target_modules=made.strategy.targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model = get_peft_model(base, LoraConfig(**json.loads(text)))
    assert model.get_nb_trainable_parameters()[0] == made.parameters.spent


def test_words_that_the_model_does_not_have_are_refused(tmp_path):
    made = allocate(
        metrics_of(vit(), tmp_path), adapter_kind="lora", rank=4, targets=("query", "value")
    )
    with pytest.raises(HtsrError, match="have no linear query"):
        control(vit(), made, lora_dropout=0.0, target_modules=made.strategy.targets)


def test_what_peft_refuses_is_one_sentence(tmp_path):
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2, time_step_rank=4
    )
    made = allocate(
        metrics_of(transformers.MambaForCausalLM(config), tmp_path), adapter_kind="lora", rank=2
    )
    with pytest.raises(HtsrError, match=r"PEFT cannot adapt this model: .*out_proj"):
        adapter_for("lora", made).put_on(transformers.MambaForCausalLM(config), made)
