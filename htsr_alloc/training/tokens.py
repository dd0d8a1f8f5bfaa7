"""Rows to tokens: what is learnt, what is only read, and batches of like length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.bounds import bounded
from htsr_alloc.training.rows import Row

IGNORED = -100  # the label of a token that is only read
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
MEGABATCH = 50  # batches that are sorted together


@dataclass(frozen=True)
class Example:
    """One training text; ``labels`` are IGNORED on the prompt."""

    input_ids: list[int]
    labels: list[int]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.input_ids)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has a tokenizer of its own, or a GGUF file that may hold one."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES) or any(folder.glob("*.gguf"))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder; that of its one GGUF file if it has no other.

    Raises:
        HtsrError: there is none that transformers can load.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():  # else it would be looked for on the hub
        raise HtsrError(f"There is no folder {folder}.", "Give a model's folder.")
    ggufs = sorted(folder.glob("*.gguf"))
    inside = {}
    if len(ggufs) == 1 and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        inside = {"gguf_file": ggufs[0].name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **inside)
    except (ValueError, OSError, ImportError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise HtsrError(
            f"{folder} has no tokenizer that transformers can load: {reason}",
            "Put tokenizer.json and tokenizer_config.json beside the weights.",
        ) from None
    return tokenizer


def pad_id(tokenizer: Any) -> int:
    """Any token will do, as padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def as_chat(rows: Sequence[Row]) -> list[Row]:
    """Prompts as a user's message and completions as the assistant's."""
    made = []
    for row in rows:
        if row.prompt is None:
            made.append(row)
            continue
        messages: tuple[Mapping[str, str], ...] = ({"role": "user", "content": row.prompt.strip()},)
        if row.completion is not None:
            messages += ({"role": "assistant", "content": row.completion.strip()},)
        choices = tuple(choice.strip() for choice in row.choices)
        made.append(Row(row.line, messages=messages, choices=choices, answer=row.answer))
    return made


def question(row: Row, tokenizer: Any) -> tuple[list[int], str]:
    """A row's prompt, as tokens and as text; of a conversation all but its last answer."""
    if row.prompt is not None:
        return tokenizer(row.prompt)["input_ids"], row.prompt
    turns = row.messages if row.choices else row.messages[:-1]
    text = _rendered(tokenizer, turns, row, answering=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"], text


def answer(row: Row) -> str:
    """The right answer's text."""
    return row.messages[-1]["content"] if row.right is None else row.right


def continuation(prompt: tuple[list[int], str], text: str, row: Row, tokenizer: Any) -> list[int]:
    """The tokens of ``text`` after the prompt: those of both together, less the prompt's.

    Where the two would share a token, the text is taken by itself.
    """
    ids, before = prompt
    special = row.prompt is not None
    whole = tokenizer(before + text, add_special_tokens=special)["input_ids"]
    if len(whole) > len(ids) and whole[: len(ids)] == ids:
        return whole[len(ids) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(row: Row, tokenizer: Any, max_length: int) -> Example:
    """A row to train on: prompt, answer and end of text, of which the last two are learnt.

    In a conversation every answer of the assistant is learnt. A prompt that is too long loses its
    beginning.

    Raises:
        HtsrError: the answer alone is longer than ``max_length``; no chat template.
    """
    if row.messages and not row.choices:
        ids, labels = _conversation(row, tokenizer)
    else:
        prompt = question(row, tokenizer)
        learnt = continuation(prompt, answer(row), row, tokenizer)
        if tokenizer.eos_token_id is not None:
            learnt = [*learnt, tokenizer.eos_token_id]
        ids, labels = prompt[0] + learnt, [IGNORED] * len(prompt[0]) + learnt
    cut = max(0, len(ids) - max_length)
    if any(label != IGNORED for label in labels[: cut + 1]):
        raise HtsrError(
            f"Line {row.line} does not fit {max_length} tokens: its answer begins at token "
            f"{next(i for i, x in enumerate(labels) if x != IGNORED)} of {len(ids)}.",
            "Raise `max_length`, or shorten the row.",
        )
    return Example(ids[cut:], labels[cut:])


def _conversation(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for turn, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, row.messages[:turn], row, answering=True)
        after = _rendered(tokenizer, row.messages[: turn + 1], row, answering=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise HtsrError(
                f"The chat template changes what it wrote before (line {row.line}), so that the "
                "assistant's words cannot be told from the rest.",
                "Split the conversation into rows of one answer each.",
            )
        for text, learn in ((before[len(done) :], False), (after[len(before) :], True)):
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learn else [IGNORED] * len(part)
        done = after
    return ids, labels


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, str]], row: Row, answering: bool) -> str:
    if not tokenizer.chat_template:
        raise HtsrError(
            f"Line {row.line} is a conversation, and the tokenizer has no chat template.",
            "Write rows of prompt and completion.",
        )
    import jinja2

    with bounded("The chat template"):
        try:
            return tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=answering
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise HtsrError(f"The chat template fails (line {row.line}): {error}.") from None


class Collator:
    """Examples to one batch of tensors, padded at the end to its longest."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, (B, S)."""
        longest = max(len(example.input_ids) for example in examples)
        rows = []
        for example in examples:
            rest = longest - len(example.input_ids)
            ids = example.input_ids + [self.pad] * rest
            mask = [1] * len(example.input_ids) + [0] * rest
            rows.append((ids, mask, example.labels + [IGNORED] * rest))
        names = ("input_ids", "attention_mask", "labels")
        return {n: torch.tensor(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)}


class BucketSampler(Sampler[int]):
    """A new random order each epoch, in which the rows of a batch are of like length.

    The order depends on the seed and the epoch alone: every process draws the same, and so does
    a run that is resumed.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

        def shuffled(count: int) -> list[int]:
            return torch.randperm(count, generator=generator).tolist()

        order, size = shuffled(len(self.lengths)), self.batch_size
        batches = []
        for start in range(0, len(order), MEGABATCH * size):
            part = sorted(order[start : start + MEGABATCH * size], key=self.lengths.__getitem__)
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        whole = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]  # at most one, kept for the end
        for number in shuffled(len(whole)):
            yield from whole[number]
        for batch in rest:
            yield from batch
