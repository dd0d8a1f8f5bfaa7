"""Tiny random models and adapters for the LoRA-MoE tests."""

from __future__ import annotations

import warnings

import torch

torch.set_num_threads(1)
VOCABULARY = 64


def llama(seed=0, layers=2, dtype=torch.float32, **changes):
    """A random LLaMA of 2 layers and width 32, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype)


def adapted(system="alphalora", seed=0, trained=True, model=None, **settings):
    """A PeftModel; ``trained`` moves every trainable parameter off its start."""
    from peft import get_peft_model

    from htsr_alloc.lora_moe import LoraMoeConfig

    model = llama(seed) if model is None else model
    torch.manual_seed(seed + 1)
    defaults = {"r": 2, "num_experts": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        made = get_peft_model(model, LoraMoeConfig(system=system, **{**defaults, **settings}))
    if trained:
        move(made)
    return made


def move(model, seed=3, size=0.3):
    """Add noise to what is trainable."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise).to(parameter.dtype))


def tokens(rows=2, length=9, seed=0):
    """(rows, length) token ids without specials."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)
