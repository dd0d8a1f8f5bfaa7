"""Logits are made from the first learnt token on, and the loss is that of the whole row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import moe_tiny as tiny
from helpers import training_tiny

from htsr_alloc.training import recipe, tokens
from htsr_alloc.training.models import takes_kept_logits

IGNORED = tokens.IGNORED
ROWS = (  # prompts of 5 and 3 tokens; a row without a prompt would keep them all
    tokens.Example([5, 6, 7, 8, 9, 10, 1], [IGNORED] * 5 + [10, 1]),
    tokens.Example([11, 12, 13, 14, 15, 1], [IGNORED] * 3 + [14, 15, 1]),
)


def small(kind: str):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "mixtral": {**size, "intermediate_size": 48, "num_key_value_heads": 2},
        "gemma2": {**size, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
        "qwen3_moe": {**size, "intermediate_size": 48, "moe_intermediate_size": 16},
        "phi3": {**size, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0},
    }[kind]
    extra = {"output_router_logits": True} if kind in ("mixtral", "qwen3_moe") else {}
    config: Any = CONFIG_MAPPING[kind](**{"vocab_size": tiny.VOCABULARY, **more, **extra})
    torch.manual_seed(0)
    # "eager" computes experts in float64 too.
    moe = {"experts_implementation": "eager"} if extra else {}
    return AutoModelForCausalLM.from_config(config, **moe).double().eval()


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gemma2", "qwen3_moe", "phi3"])
def test_the_loss_and_its_gradients_are_those_of_whole_rows(kind):
    model = small(kind)
    assert takes_kept_logits(model)
    collate = tokens.Collator(0)
    found = []
    for batch in (collate(ROWS), recipe.FromFirstLabel(collate)(ROWS)):
        out = model(**batch, num_items_in_batch=5)
        model.zero_grad()
        out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((out.loss.item(), grads, out.logits.shape[1]))
    whole, kept = found
    assert (whole[2], kept[2]) == (7, 5)
    assert kept[0] == pytest.approx(whole[0], rel=1e-12)
    for a, b in zip(whole[1], kept[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_rows_that_are_learnt_whole_and_rows_that_teach_nothing_keep_every_logit():
    collate = recipe.FromFirstLabel(tokens.Collator(0))
    for labels in ([5, 6, 7], [IGNORED] * 3):
        batch = collate([tokens.Example([5, 6, 7], labels)])
        assert batch["labels"].tolist() == [labels]
        assert batch["logits_to_keep"].tolist() == [0, 1, 2]


def test_the_trainer_asks_a_language_model_for_no_logit_of_a_prompt(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(training_tiny.folder(tmp_path / "model"))
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    trainer = recipe.make_trainer(
        model,
        ROWS,
        tmp_path / "out",
        recipe.Recipe(steps=1, batch_size=2),
        collate=tokens.Collator(0),
    )
    trainer.train()
    assert seen == [5]


def test_em_lora_trains_by_the_prompt_alone():
    """Its routers see the same tokens in training as afterwards."""
    from htsr_alloc.errors import HtsrError
    from htsr_alloc.lora_moe.systems.em_lora.prompt import prompt_tokens

    model = tiny.adapted("em_lora")
    assert not takes_kept_logits(model)
    assert takes_kept_logits(tiny.adapted("alphalora"))
    collate = tokens.Collator(0)
    batch = collate(ROWS)
    mask, labels = batch["attention_mask"], batch["labels"]
    assert prompt_tokens(mask, labels, batch["input_ids"]).sum(1).tolist() == [5, 3]
    kept = recipe.FromFirstLabel(collate)(ROWS)
    with pytest.raises(HtsrError, match=r"a label for each token, and \(2, 7\) tokens have \(2, 5"):
        prompt_tokens(mask, kept["labels"], kept["input_ids"])
    for classes in (torch.tensor([1, 0]), torch.zeros(2, 3)):  # a class a row, or several
        assert prompt_tokens(mask, classes, batch["input_ids"]).equal(mask.bool())
