"""Rows of JSON lines: a prompt with its completion or its choices. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.files import read_bytes

# Alpaca's own text, which the LoRA-MoE papers train with.
ALPACA = {
    False: "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
    True: "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
}
SHAPES = (
    'a row is {"prompt", "completion"}, {"instruction", "response"} (with "input" if there is '
    'one), {"messages"}, or {"prompt", "choices", "answer"}, answer counting from 0'
)
MOST_NAMED = 5  # bad rows in one error
UNREADABLE = {
    json.JSONDecodeError: "is not JSON",
    UnicodeError: "is not UTF-8",
    RecursionError: "is nested too deeply",
}


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Exactly one of ``prompt`` and ``messages`` is set. ``choices`` is empty unless it is a
    multiple choice, of which ``answer`` is the right one; otherwise ``completion`` is the answer,
    but in a conversation, which holds its own.
    """

    line: int
    prompt: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    completion: str | None = None
    choices: tuple[str, ...] = ()
    answer: int | None = None

    @property
    def right(self) -> str | None:
        """The right choice, or the completion."""
        return self.completion if self.answer is None else self.choices[self.answer]


def read_rows(path: Path) -> list[Row]:
    """Every row of a JSON lines file; empty lines are passed over.

    Raises:
        HtsrError: the file cannot be read or holds nothing, or rows are bad; it names their lines.
    """
    rows, bad = [], []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line.decode("utf-8"))
            json.dumps(data, ensure_ascii=False).encode("utf-8")  # no half of a surrogate pair
            rows.append(parse(data, number))
        except (ValueError, RecursionError) as error:
            what = next((said for kind, said in UNREADABLE.items() if isinstance(error, kind)), "")
            bad.append((number, what or str(error)))
    if bad:
        named = "; ".join(f"line {number} {what}" for number, what in bad[:MOST_NAMED])
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        raise HtsrError(f"{path.name}: {named}{more}.", f"{SHAPES[0].upper()}{SHAPES[1:]}.")
    if not rows:
        raise HtsrError(f"{path.name} holds no row.")
    return rows


def parse(data: Any, line: int = 1) -> Row:
    """One decoded row.

    Raises:
        ValueError: it has none of the shapes; the text goes on from "line 3 ...".
    """
    if not isinstance(data, dict):
        raise ValueError("is not an object")
    prompt, messages = None, ()
    if "messages" in data:
        messages = _messages(data["messages"])
    elif "instruction" in data:
        extra = _text(data, "input") if data.get("input") else ""
        text = {"instruction": _text(data, "instruction"), "input": extra}
        prompt = ALPACA[bool(extra)].format(**text)
    else:
        prompt = _text(data, "prompt")
        if not prompt:
            raise ValueError("has an empty prompt")
    if "choices" in data:
        choices, answer = _choices(data)
        return Row(line, prompt, messages, choices=choices, answer=answer)
    if messages:
        if messages[-1]["role"] != "assistant":
            raise ValueError("does not end with the assistant's message")
        return Row(line, messages=messages)
    names = [n for n in ("completion", "response", "output") if n in data]
    if not names:
        raise ValueError("has no completion")
    completion = _text(data, names[0])
    if not completion.strip():
        raise ValueError(f"has an empty {names[0]}")
    return Row(line, prompt, completion=completion)


def _text(data: Mapping[str, Any], name: str) -> str:
    if name not in data:
        raise ValueError(f"has no {name}")
    if not isinstance(data[name], str):
        raise ValueError(f"has a {name} that is not text")
    return data[name]


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("has messages that are not a list")
    for message in value:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(name), str) for name in ("role", "content")
        ):
            raise ValueError("has a message without a role and a content")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _choices(data: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    choices, answer = data["choices"], data.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("has fewer than two choices")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("has a choice that is not text")
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise ValueError("has choices without an answer that counts from 0")
    if not 0 <= answer < len(choices):
        raise ValueError(f"has the answer {answer}, and choices 0 to {len(choices) - 1}")
    return tuple(choices), answer


def share_of(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """The first ``limit`` rows, or all."""
    return list(rows if limit is None else rows[:limit])
