"""Accuracy against a naive statement: every choice by itself, every answer token by token."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import moe_tiny as tiny
from helpers import training_tiny

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.evaluate import evaluate, first_line
from htsr_alloc.training.rows import parse
from htsr_alloc.training.wilson import wilson


def naive_choice(model, ids, answer_ids):
    """log p of the answer's tokens, from one pass over both without a cache or padding."""
    whole = torch.tensor([ids + answer_ids])
    labels = torch.tensor([[-100] * len(ids) + answer_ids])  # EM-LoRA reads the prompt from it
    logits = model(input_ids=whole, labels=labels, use_cache=False).logits[0].double()
    logs = logits.log_softmax(-1)
    return sum(float(logs[len(ids) - 1 + i, t]) for i, t in enumerate(answer_ids))


@pytest.mark.parametrize("system", ["alphalora", "goat", "em_lora", None])
@torch.no_grad()
def test_choices_are_those_of_the_naive_statement(system):
    model = tiny.llama() if system is None else tiny.adapted(system)
    model.eval()
    tokenizer = training_tiny.tokenizer()
    rows = [parse(row) for row in training_tiny.choice_rows(30)]
    score = evaluate(model, tokenizer, rows, batch_size=7)
    hits, losses = "", []
    for row in rows:
        ids = tokenizer(row.prompt)["input_ids"]
        parts = [tokenizer(choice)["input_ids"] for choice in row.choices]
        logs = [naive_choice(model, ids, part) for part in parts]
        per_character = [x / len(c.strip()) for x, c in zip(logs, row.choices, strict=True)]
        best = per_character.index(max(per_character))
        hits += "1" if best == row.answer else "0"
        losses.append(-logs[row.answer] / len(parts[row.answer]))
    assert score.hits == hits
    assert score.losses == pytest.approx(losses, abs=1e-4)
    assert score.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert (score.n, score.correct) == (30, hits.count("1"))
    assert 0 < score.correct < 30


@torch.no_grad()
def test_generation_is_that_of_the_naive_statement():
    model, tokenizer = tiny.adapted().eval(), training_tiny.tokenizer()
    model.config.eos_token_id = 1
    rows = []
    for i, row in enumerate(training_tiny.choice_rows(12)):
        ids = tokenizer(row["prompt"])["input_ids"]
        made = list(ids)
        for _ in range(6):
            logits = model(input_ids=torch.tensor([made]), use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
        # What the model writes, then something else: right and wrong by turns.
        text = tokenizer.decode(made[len(ids) :], skip_special_tokens=True)
        rows.append(parse({"prompt": row["prompt"], "completion": " " + text + " w9" * (i % 2)}))
    score = evaluate(model, tokenizer, rows, batch_size=5, max_new_tokens=6)
    assert score.hits == "10" * 6


def test_the_mode_of_the_model_comes_back():
    model = tiny.llama()
    model.train()
    evaluate(model, training_tiny.tokenizer(), [parse(training_tiny.choice_rows(1)[0])])
    assert model.training


def test_first_line():
    assert first_line("\n  7 \n8") == "7"
    assert first_line(" \n") == ""


def test_wilson():
    # Wilson 1927; values of statsmodels.stats.proportion.proportion_confint(method="wilson").
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    low, high = wilson(10, 10)
    assert (low, high) == pytest.approx((0.722467, 1.0), abs=1e-6)


def test_no_rows_is_refused():
    with pytest.raises(HtsrError, match="no row"):
        evaluate(tiny.llama(), training_tiny.tokenizer(), [])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_keys_and_values_have_the_model_s_own_name_for_them(name):
    """transformers 5.24 calls them ``cache``, and warns of the other."""
    from htsr_alloc.training.models import cache_name

    made: dict = {}
    exec(f"class Own:\n def forward(self, input_ids, {name}=None): ...", made)
    assert cache_name(made["Own"]()) == name
