"""A tiny model's folder with a tokenizer of numbered words, and rows for it."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import moe_tiny as tiny

CHAT = (
    "{% for m in messages %}{{ 'w3 ' if m.role == 'user' else 'w4 ' }}{{ m.content }} w5 "
    "{% endfor %}{% if add_generation_prompt %}w4 {% endif %}"
)


def tokenizer(chat: str | None = CHAT):
    """Padding, the end of text, the unknown, and words w3 to w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    words |= {f"w{i}": i for i in range(3, tiny.VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat
    return wrapped


def folder(path: Path, **config) -> Path:
    """The model and the tokenizer, as htsr train takes them."""
    made = tiny.llama(eos_token_id=1, **config)
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


QUICK = ["--device", "cpu", "--dtype", "float32", "--lora-dropout", "0", "--lora-r", "2"]


def work(path: Path) -> Path:
    """A folder with model/, train.jsonl, test.jsonl and a.json."""
    from htsr_alloc.allocation import allocate
    from htsr_alloc.records import dumps

    folder(path / "model")
    write(path / "train.jsonl", learnable_rows(64))
    write(path / "test.jsonl", learnable_rows(40, seed=1))
    (path / "a.json").write_text(dumps(allocate(None, strategy="explicit", experts=(3, 2))))
    return path


def write(path: Path, rows) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def choice_rows(count: int, seed: int = 0):
    """Multiple choice: prompts of 3 to 8 words, 2 to 4 choices of 1 to 3 words."""
    import random

    draw = random.Random(seed)

    def words(least, most):
        return " ".join(f"w{draw.randrange(6, 60)}" for _ in range(draw.randint(least, most)))

    rows = []
    for _ in range(count):
        choices = [" " + words(1, 3) for _ in range(draw.randint(2, 4))]
        answer = draw.randrange(len(choices))
        rows.append({"prompt": words(3, 8), "choices": choices, "answer": answer})
    return rows


def learnable_rows(count: int, seed: int = 0):
    """The answer follows from the prompt's last word, so that a few steps learn it."""
    import random

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        last = draw.choice([10, 11])
        words = [f"w{draw.randrange(20, 60)}" for _ in range(draw.randint(1, 4))]
        prompt = " ".join([*words, f"w{last}"])
        rows.append({"prompt": prompt, "completion": f" w{last + 5}"})
    return rows
