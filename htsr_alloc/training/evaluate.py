"""Held-out accuracy: multiple choice by log-likelihood, and exact match of what is generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import after_prompt
from htsr_alloc.lora_moe.routing import evaluating
from htsr_alloc.training.models import cache_name
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
    """
    if not rows:
        raise HtsrError("There is no row to evaluate.")
    hits, losses = ["0"] * len(rows), [0.0] * len(rows)
    done = 0
    choosing = [i for i, row in enumerate(rows) if row.choices]
    writing = [i for i, row in enumerate(rows) if not row.choices]
    weights = next(model.parameters())
    half = torch.autocast(weights.device.type, torch.bfloat16, weights.dtype == torch.bfloat16)
    with evaluating(model), torch.inference_mode(), half:
        for batch, prompts in _batches(rows, choosing, tokenizer, batch_size):
            choices = [rows[i].choices for i in batch]
            made = _choose(model, tokenizer, prompts, choices, [rows[i] for i in batch])
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
            choices = [(answer(rows[i]),) for i in batch]
            made = _choose(model, tokenizer, prompts, choices, [rows[i] for i in batch])
            _refuse_nan(made)
            texts = _generate(model, tokenizer, prompts, longest)
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


def _left_padded(prompts: Sequence[Prompt], tokenizer: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (B, S), with every prompt's end at the end."""
    longest = max(len(ids) for ids, _ in prompts)
    rest = [longest - len(ids) for ids, _ in prompts]
    ids = [[pad_id(tokenizer)] * r + p[0] for r, p in zip(rest, prompts, strict=True)]
    mask = [[0] * r + [1] * (longest - r) for r in rest]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class Choice:
    """One choice's log-likelihood: the sum over its tokens, and the sum over its characters."""

    total: float
    tokens: int
    score: float


def _choose(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    choices: Sequence[Sequence[str]],
    rows: Sequence[Row],
) -> list[list[Choice]]:
    """The log-likelihood of every choice. The prompts are read once, the choices after them."""
    device = next(model.parameters()).device
    ids, mask = _left_padded(prompts, tokenizer, device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        # As a tensor: a slice would be no longer contiguous, and the head's weight copied B times.
        logits_to_keep=torch.tensor([ids.shape[1] - 1], device=device),
    )
    name = cache_name(model)
    cache, first = getattr(out, name), out.logits[:, -1:].float()  # (B, 1, V)
    made: list[list[Choice]] = [[] for _ in rows]
    for j in range(max(map(len, choices))):
        texts = [own[min(j, len(own) - 1)] for own in choices]
        parts = [
            continuation(p, t, row, tokenizer)
            for p, t, row in zip(prompts, texts, rows, strict=True)
        ]
        longest = max(map(len, parts))
        padded = [p + [pad_id(tokenizer)] * (longest - len(p)) for p in parts]
        tokens = torch.tensor(padded, device=device)  # (B, C)
        kept = torch.tensor([[1] * len(p) + [0] * (longest - len(p)) for p in parts], device=device)
        logits = first
        if longest > 1:
            with after_prompt(model):
                after = model(
                    input_ids=tokens[:, :-1],
                    attention_mask=torch.cat([mask, kept[:, :-1]], -1),
                    position_ids=positions[:, -1:] + 1 + torch.arange(longest - 1, device=device),
                    use_cache=True,
                    **{name: cache},
                )
            cache.crop(1 - longest)
            logits = torch.cat([first, after.logits.float()], 1)  # (B, C, V)
        chosen = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        totals = (chosen * kept).sum(-1).tolist()
        for place, total in enumerate(totals):
            if j < len(choices[place]):
                score = total / len(texts[place].strip())
                made[place].append(Choice(total, len(parts[place]), score))
    return made


def _generate(model: Any, tokenizer: Any, prompts: Sequence[Prompt], most: int) -> list[str]:
    """What the model writes after each prompt, greedily."""
    ids, mask = _left_padded(prompts, tokenizer, next(model.parameters()).device)
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
