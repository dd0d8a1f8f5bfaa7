"""Evaluation of models whose cache cannot lose tokens, or who have none, and tables of positions.

Every number is compared with one pass over each text by itself.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import moe_tiny as tiny
from helpers import training_tiny

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.evaluate import evaluate
from htsr_alloc.training.generate import generate
from htsr_alloc.training.models import open_causal_lm
from htsr_alloc.training.positions import positions_of
from htsr_alloc.training.reading import cache_of, goes_back
from htsr_alloc.training.rows import parse

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "mistral": {**HEADS, "sliding_window": 4},
    "gemma2": {**HEADS, "head_dim": 8, "sliding_window": 4},
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "jamba": {
        **HEADS,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
    "openai-gpt": GPT,
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16},
    "roberta": {**SIZE, "is_decoder": True, "max_position_embeddings": 17, "pad_token_id": 0},
}


def small(kind: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    shared = {"vocab_size": tiny.VOCABULARY, "initializer_range": 0.2, "pad_token_id": 0}
    config: Any = CONFIG_MAPPING[kind](**{**shared, **KINDS[kind]})
    config.eos_token_id = config.bos_token_id = 1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    if kind == "rwkv":  # it starts without a memory
        tiny.move(model)
    return model


def naive(model, ids, part):
    """log p of a continuation, from one pass without a cache or padding."""
    labels = torch.tensor([[-100] * len(ids) + part])  # EM-LoRA reads the prompt from it
    logits = model(input_ids=torch.tensor([ids + part]), labels=labels, use_cache=False).logits[0]
    logs = logits.double().log_softmax(-1)
    return sum(float(logs[len(ids) - 1 + i, t]) for i, t in enumerate(part))


def agrees(model, batch_size):
    tokenizer = training_tiny.tokenizer()
    rows = [parse(row) for row in training_tiny.choice_rows(12)]
    score = evaluate(model, tokenizer, rows, batch_size=batch_size)
    hits, losses = "", []
    for row in rows:
        ids, right = tokenizer(row.prompt)["input_ids"], row.answer
        assert right is not None
        parts = [tokenizer(choice)["input_ids"] for choice in row.choices]
        logs = [naive(model, ids, part) for part in parts]
        each = [x / len(c.strip()) for x, c in zip(logs, row.choices, strict=True)]
        hits += "1" if each.index(max(each)) == right else "0"
        losses.append(-logs[right] / len(parts[right]))
    assert score.hits == hits
    assert score.losses == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "gemma2", "lfm2", "jamba", "mamba", "rwkv", "openai-gpt", "gpt2", "opt"],
)
@torch.no_grad()
def test_choices_are_those_of_one_pass_over_each_text(kind, batch_size):
    agrees(small(kind), batch_size)


@torch.no_grad()
def test_em_lora_chooses_by_the_prompt_where_texts_are_read_whole():
    agrees(tiny.adapted("em_lora", model=small("mistral")).eval(), 4)


@torch.no_grad()
def test_only_a_cache_that_loses_tokens_again_is_read_over():
    caches = {kind: cache_of(small(kind)) for kind in KINDS}
    back = {kind for kind, cache in caches.items() if goes_back(cache, 9)}
    assert back == {"llama", "gpt2", "gptj", "opt", "roberta"}
    assert goes_back(caches["mistral"], 3)
    assert not goes_back(caches["mistral"], 4)


@pytest.mark.parametrize("kind", ["mistral", "lfm2", "mamba", "rwkv", "openai-gpt"])
@torch.no_grad()
def test_what_is_written_is_what_one_text_at_a_time_gives(kind):
    model, tokenizer = small(kind), training_tiny.tokenizer()
    rows = []
    for i, row in enumerate(training_tiny.choice_rows(8)):
        ids = tokenizer(row["prompt"])["input_ids"]
        made = list(ids)
        while len(made) < len(ids) + 4 and made[-1] != tokenizer.eos_token_id:
            logits = model(input_ids=torch.tensor([made]), use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
        text = tokenizer.decode(made[len(ids) :], skip_special_tokens=True)
        rows.append(parse({"prompt": row["prompt"], "completion": " " + text + " w9" * (i % 2)}))
    score = evaluate(model, tokenizer, rows, batch_size=4, max_new_tokens=4)
    assert score.hits == "10" * 4


@pytest.mark.parametrize("kind", ["openai-gpt", "gpt2", "gptj", "opt", "roberta"])
@torch.no_grad()
def test_as_many_positions_as_the_model_reads(kind):
    model = small(kind)
    most = positions_of(model)
    assert most == 16
    model(input_ids=tiny.tokens(1, most))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=tiny.tokens(1, most + 1))


def test_positions_that_are_no_table_have_no_end():
    assert [positions_of(small(kind)) for kind in ("llama", "mamba", "lfm2")] == [None] * 3
    assert positions_of(tiny.adapted(model=small("gpt2"), target_modules=["c_fc"])) == 16


def words(count):
    return " ".join(f"w{6 + i}" for i in range(count))


@torch.no_grad()
def test_a_text_may_fill_the_positions():
    """The last token is not read; the row beside is not as long."""
    model, tokenizer = small("gpt2"), training_tiny.tokenizer()
    full = {"prompt": words(15), "choices": [" w7 w8", " w9"], "answer": 0}
    beside = {"prompt": words(14), "choices": [" w7", " w8 w9 w10"], "answer": 0}
    rows = [parse(full), parse(beside), parse({"prompt": words(15), "completion": " w7 w8"})]
    rows.append(parse({"prompt": words(3), "completion": " w7 w8 w9 w10"}))
    score = evaluate(model, tokenizer, rows, batch_size=4)
    ids = tokenizer(words(15))["input_ids"]
    assert score.losses[0] == pytest.approx(-naive_but_last(model, ids, [7, 8]) / 2, abs=1e-4)
    assert score.losses[2] == pytest.approx(score.losses[0], abs=1e-4)
    with pytest.raises(HtsrError, match="Line 1 has 18 tokens, and the model's positions are 16"):
        evaluate(model, tokenizer, [parse({"prompt": words(16), "completion": " w7 w8"})])


def naive_but_last(model, ids, part):
    logs = model(input_ids=torch.tensor([ids + part[:-1]])).logits[0].double().log_softmax(-1)
    return sum(float(logs[len(ids) - 1 + i, t]) for i, t in enumerate(part))


def test_what_is_written_ends_with_the_positions():
    model, tokenizer = small("gpt2"), training_tiny.tokenizer()
    model.generation_config.eos_token_id = None
    made = generate(model, tokenizer, words(12), max_new_tokens=20)
    assert len(made.split()) <= 5
    with pytest.raises(HtsrError, match="The prompt has 17 tokens"):
        generate(model, tokenizer, words(17), max_new_tokens=1)


def test_rows_longer_than_the_positions_are_refused_by_the_commands(invoke, tmp_path):
    small("gpt2").save_pretrained(tmp_path / "model")
    training_tiny.tokenizer().save_pretrained(tmp_path / "model")
    long = [{"prompt": words(30), "completion": " w7"}]
    training_tiny.write(tmp_path / "long.jsonl", long)
    options = ["--model", "model", "--data", "long.jsonl", *training_tiny.QUICK[:4]]
    train = ["train", *options, "--system", "lora", "--steps", "1", "-o", "out"]
    (tmp_path / "a.json").write_text(allocation())
    train.insert(1, "a.json")
    for command in (["evaluate", *options], train):
        done = invoke(*command)
        assert done.rc == 1, done.stdout
        said = " ".join(done.stderr.split())
        assert "the model's positions are 16." in said
        assert "Traceback" not in said
    assert "at most 16" in said
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    cut = invoke(*train, "--max-length", "16")
    assert cut.rc == 0, cut.stderr


def allocation():
    from htsr_alloc.allocation import allocate
    from htsr_alloc.records import dumps

    return dumps(allocate(None, strategy="explicit", experts=(3, 2)))


@pytest.mark.parametrize("command", ["evaluate", "build"])
def test_a_checkpoint_without_its_head_is_refused(command, invoke, tmp_path):
    training_tiny.folder(tmp_path / "whole")
    model = open_causal_lm(tmp_path / "whole", torch.float32)
    model.model.save_pretrained(tmp_path / "model")
    training_tiny.tokenizer().save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    made = json.loads(config.read_text())
    config.write_text(json.dumps({**made, "architectures": ["LlamaForCausalLM"]}))
    training_tiny.write(tmp_path / "rows.jsonl", training_tiny.learnable_rows(2))
    (tmp_path / "a.json").write_text(allocation())
    more = {"evaluate": ["--data", "rows.jsonl", "--device", "cpu"], "build": ["a.json", "-o", "o"]}
    done = invoke(command, "--model", "model", *more[command])
    assert done.rc == 1, done.stdout
    assert "does not hold lm_head.weight, which" in " ".join(done.stderr.split())


def test_a_tied_head_is_not_missing(tmp_path):
    training_tiny.folder(tmp_path / "model", tie_word_embeddings=True)
    model = open_causal_lm(tmp_path / "model", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
