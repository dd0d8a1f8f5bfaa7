"""Rows and tokens: what is read, what is refused, what is learnt."""

from __future__ import annotations

import json

import pytest

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.rows import ALPACA, parse, read_rows

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import training_tiny

from htsr_alloc.training import tokens
from htsr_alloc.training.tokens import IGNORED

TALK = [
    {"role": "user", "content": "w20 w21"},
    {"role": "assistant", "content": "w22"},
    {"role": "user", "content": "w23"},
    {"role": "assistant", "content": "w24 w25"},
]


def test_every_shape_is_read():
    assert parse({"prompt": "a", "completion": "b"}).right == "b"
    assert parse({"prompt": "a", "choices": ["x", "y"], "answer": 1}).right == "y"
    assert parse({"messages": TALK}).messages[-1]["content"] == "w24 w25"
    alone = parse({"instruction": "do", "response": "done"})
    assert alone.prompt == ALPACA[False].format(instruction="do")
    both = parse({"instruction": "do", "input": "this", "output": "done"})
    assert both.prompt == ALPACA[True].format(instruction="do", input="this")
    assert both.right == "done"


def test_braces_in_an_instruction_stay():
    assert "{x}" in parse({"instruction": "print {x}", "response": "y"}).prompt


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "is not an object"),
        ({"completion": "b"}, "has no prompt"),
        ({"prompt": "", "completion": "b"}, "has an empty prompt"),
        ({"prompt": "a"}, "has no completion"),
        ({"prompt": "a", "completion": ""}, "has an empty completion"),
        ({"prompt": "a", "completion": 3}, "has a completion that is not text"),
        ({"prompt": "a", "choices": ["x"], "answer": 0}, "has fewer than two choices"),
        ({"prompt": "a", "choices": ["x", " "], "answer": 0}, "has a choice that is not text"),
        ({"prompt": "a", "choices": ["x", "y"]}, "has choices without an answer"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": True}, "has choices without an answer"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "has the answer 2, and choices 0 to"),
        ({"messages": []}, "has messages that are not a list"),
        ({"messages": [{"role": "user"}]}, "has a message without"),
        ({"messages": TALK[:1]}, "does not end with the assistant's message"),
    ],
)
def test_a_bad_row_is_named_by_its_line(row, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(HtsrError, match=r"rows\.jsonl: line 3 ") as caught:
        read_rows(path)
    assert said in caught.value.message
    assert "choices" in (caught.value.hint or "")


def test_all_bad_lines_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 7)
    with pytest.raises(HtsrError, match=r"line 1 is not JSON; .* line 5 is not JSON; and 2 more"):
        read_rows(path)


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n")
    with pytest.raises(HtsrError, match="holds no row"):
        read_rows(path)


def test_only_the_answer_is_learnt():
    made = tokens.encode(
        parse({"prompt": "w20 w21", "completion": " w22 w23"}), training_tiny.tokenizer(), 99
    )
    assert made.input_ids == [20, 21, 22, 23, 1]
    assert made.labels == [IGNORED, IGNORED, 22, 23, 1]


def test_a_choice_is_learnt_as_its_text():
    row = parse({"prompt": "w20", "choices": [" w7", " w8 w9"], "answer": 1})
    assert tokens.encode(row, training_tiny.tokenizer(), 99).labels == [IGNORED, 8, 9, 1]


def test_every_answer_of_a_conversation_is_learnt():
    made = tokens.encode(parse({"messages": TALK}), training_tiny.tokenizer(), 99)
    assert made.input_ids == [3, 20, 21, 5, 4, 22, 5, 3, 23, 5, 4, 24, 25, 5]
    none = IGNORED
    want = [none, none, none, none, none, 22, 5, none, none, none, none, 24, 25, 5]
    assert made.labels == want


def test_chat_writes_prompts_in_the_template():
    rows = [parse({"prompt": "w20", "completion": " w21"})]
    made = tokens.encode(tokens.as_chat(rows)[0], training_tiny.tokenizer(), 99)
    assert made.input_ids == [3, 20, 5, 4, 21, 5]
    assert made.labels == [IGNORED] * 4 + [21, 5]


def test_a_conversation_needs_a_template():
    with pytest.raises(HtsrError, match="Line 1 is a conversation, and the tokenizer has no chat"):
        tokens.encode(parse({"messages": TALK}), training_tiny.tokenizer(chat=None), 99)


def test_a_template_that_rewrites_the_past_is_refused():
    forgetful = "{% if add_generation_prompt %}w9 {% endif %}{{ messages[-1].content }} "
    with pytest.raises(HtsrError, match=r"changes what it wrote before \(line 1\)"):
        tokens.encode(parse({"messages": TALK}), training_tiny.tokenizer(forgetful), 99)


def test_a_long_prompt_loses_its_beginning_and_a_long_answer_is_refused():
    tokenizer = training_tiny.tokenizer()
    row = parse({"prompt": "w20 w21 w22", "completion": " w23 w24"}, line=7)
    assert tokens.encode(row, tokenizer, 4).input_ids == [22, 23, 24, 1]
    with pytest.raises(HtsrError, match="Line 7 does not fit 3 tokens"):
        tokens.encode(row, tokenizer, 3)


def test_a_token_across_the_boundary_is_never_made():
    """Where prompt and answer would share a token, the answer is tokenised by itself."""

    class Melting:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": {"a": [1], "ab": [3], "b": [2]}[text]}

    row = parse({"prompt": "a", "completion": "b"})
    assert tokens.continuation(([1], "a"), "b", row, Melting()) == [2]


def test_collator_pads_at_the_end():
    batch = tokens.Collator(0)([tokens.Example([5, 6], [IGNORED, 6]), tokens.Example([7], [7])])
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6], [7, IGNORED]]


def test_buckets_are_an_order_of_all_rows_with_like_lengths_together():
    lengths = [(7 * i) % 31 for i in range(203)]
    sampler = tokens.BucketSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(203))
    assert list(tokens.BucketSampler(lengths, 8, seed=3)) == first
    assert list(tokens.BucketSampler(lengths, 8, seed=4)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first

    def spread(order):
        parts = [[lengths[i] for i in order[k : k + 8]] for k in range(0, 200, 8)]
        return sum(max(part) - min(part) for part in parts)

    assert spread(first) < 0.2 * spread(range(203))
    longest = [max(lengths[i] for i in first[k : k + 8]) for k in range(0, 200, 8)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(HtsrError, match="has no tokenizer that transformers can load"):
        tokens.open_tokenizer(tmp_path)
    with pytest.raises(HtsrError, match="There is no folder"):
        tokens.open_tokenizer(tmp_path / "none")
