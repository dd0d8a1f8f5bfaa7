"""Held-out accuracy: multiple choice by log-likelihood, and exact match of what is generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.routing import evaluating
from htsr_alloc.training.positions import positions_of
from htsr_alloc.training.reading import cache_of, likelihoods, padded
from htsr_alloc.training.rows import Row
from htsr_alloc.training.tokens import answer, continuation, pad_id, question
from htsr_alloc.training.wilson import wilson

Progress = Callable[[int], None]  # told how many rows are done


@dataclass(frozen=True)
class Score:
    """What a model does on some rows.

    Attributes:
        n: rows. correct: of them. accuracy: their share. low, high: its 95 % Wilson interval.
        loss: mean over rows of the right answer's negative log-likelihood, per token of a text.
        hits: "1" or "0" a row, in the file's order, so that two models can be compared in pairs.
        losses: each row's part of ``loss``, in the same order.
    """

    n: int
    correct: int
    accuracy: float
    low: float
    high: float
    loss: float
    hits: str
    losses: tuple[float, ...]


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> Score:
    """Rows with choices by likelihood, the others by exact match; a file may hold both.

    Args:
        max_new_tokens: of what is generated. Default: the longest right answer's, and 2 more, as
            what has not ended by then is not one of them.

    Raises:
        HtsrError: no row, one that is longer than the model's positions, or a model that gives NaN.
    """
    if not rows:
        raise HtsrError("There is no row to evaluate.")
    _refuse_beyond_positions(model, tokenizer, rows)
    hits, losses = ["0"] * len(rows), [0.0] * len(rows)
    done = 0
    choosing = [i for i, row in enumerate(rows) if row.choices]
    writing = [i for i, row in enumerate(rows) if not row.choices]
    weights = next(model.parameters())
    half = torch.autocast(weights.device.type, torch.bfloat16, weights.dtype == torch.bfloat16)
    with evaluating(model), torch.inference_mode(), half:
        cache = cache_of(model)
        for batch, prompts in _batches(rows, choosing, tokenizer, batch_size):
            made = _choose(model, tokenizer, prompts, [rows[i] for i in batch], cache)
            _refuse_nan(made)
            for i, values in zip(batch, made, strict=True):
                right = rows[i].answer
                assert right is not None
                best = max(range(len(values)), key=lambda j: values[j].score)
                hits[i] = "1" if best == right else "0"
                losses[i] = -values[right].total / values[right].tokens
            progress(done := done + len(batch))
        for batch, prompts in _batches(rows, writing, tokenizer, batch_size):
            longest = max_new_tokens or 2 + max(
                len(continuation(p, answer(rows[i]), rows[i], tokenizer))
                for i, p in zip(batch, prompts, strict=True)
            )
            made = _choose(model, tokenizer, prompts, [rows[i] for i in batch], cache)
            _refuse_nan(made)
            texts = _generate(model, tokenizer, prompts, longest, cache)
            for i, (only,), text in zip(batch, made, texts, strict=True):
                losses[i] = -only.total / only.tokens
                hits[i] = "1" if first_line(text) == first_line(answer(rows[i])) else "0"
            progress(done := done + len(batch))
    return score_of("".join(hits), losses)


def score_of(hits: str, losses: Sequence[float]) -> Score:
    """The score of rows that are right ("1") or wrong ("0")."""
    n, correct = len(hits), hits.count("1")
    mean = sum(losses) / len(losses)
    interval = wilson(correct, n)
    return Score(n, correct, correct / n, *interval, loss=mean, hits=hits, losses=tuple(losses))


class NotNumbers(HtsrError):
    """A model that gives NaN."""


def _refuse_nan(made: Sequence[Sequence[Choice]]) -> None:
    if any(math.isnan(choice.total) for choices in made for choice in choices):
        raise NotNumbers("The model's answers are not numbers: it gives NaN.", "Train it again.")


def first_line(text: str) -> str:
    """What is compared: the first line that is not empty, without spaces around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


Prompt = tuple[list[int], str]


def _batches(rows: Sequence[Row], chosen: Sequence[int], tokenizer: Any, size: int):
    """(indices, their prompts), of like length together, the longest first."""
    prompts = {i: question(rows[i], tokenizer) for i in chosen}
    order = sorted(chosen, key=lambda i: -len(prompts[i][0]))
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        yield batch, [prompts[i] for i in batch]


@dataclass(frozen=True)
class Choice:
    """One choice's log-likelihood: the sum over its tokens, and the sum over its characters."""

    total: float
    tokens: int
    score: float


def _choose(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], rows: Sequence[Row], cache: Any
) -> list[list[Choice]]:
    """The log-likelihood of every choice, or of the only answer."""
    choices = [row.choices or (answer(row),) for row in rows]
    turns = [[own[min(j, len(own) - 1)] for own in choices] for j in range(max(map(len, choices)))]
    parts = [
        [continuation(p, t, row, tokenizer) for p, t, row in zip(prompts, texts, rows, strict=True)]
        for texts in turns
    ]
    ids = [own for own, _ in prompts]
    read = likelihoods(model, ids, parts, pad_id(tokenizer), cache)
    made: list[list[Choice]] = [[] for _ in rows]
    for j, totals in enumerate(read):
        for place, total in enumerate(totals):
            if j < len(choices[place]):
                score = total / len(turns[j][place].strip())
                made[place].append(Choice(total, len(parts[j][place]), score))
    return made


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], most: int, cache: Any
) -> list[str]:
    """What the model writes after each prompt, greedily, as far as it has positions."""
    last, ids = positions_of(model), [own for own, _ in prompts]
    groups = [ids]
    if cache is None or (last is not None and len(ids[0]) + most - 1 > last):
        groups = [[own] for own in ids]  # RWKV masks no padding, and mixes the rows of a batch
    texts: list[str] = []
    for group in groups:
        given, mask = padded(group, pad_id(tokenizer), model.device, left=True)
        length = given.shape[1]
        made = model.generate(
            input_ids=given,
            attention_mask=mask,
            max_new_tokens=most if last is None else min(most, last + 1 - length),
            do_sample=False,
            pad_token_id=pad_id(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )
        texts += tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
    return texts


def _refuse_beyond_positions(model: Any, tokenizer: Any, rows: Sequence[Row]) -> None:
    most = positions_of(model)
    if most is None:
        return
    for row in rows:
        prompt = question(row, tokenizer)
        texts = row.choices or (answer(row),)
        longest = max(len(continuation(prompt, text, row, tokenizer)) for text in texts)
        if (length := len(prompt[0]) + longest) > most + 1:  # the last token is not read
            raise HtsrError(
                f"Line {row.line} has {length} tokens, and the model's positions are {most}.",
                "Shorten its prompt.",
            )
