"""Log-likelihoods of what may follow a prompt: over the prompt's cache, or from whole texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from htsr_alloc.lora_moe import after_prompt
from htsr_alloc.lora_moe.state import state_in
from htsr_alloc.training.models import cache_name, takes_kept_logits
from htsr_alloc.training.tokens import IGNORED

Ids = Sequence[Sequence[int]]  # a row's token ids each
EVERY_TOKEN = ("DynamicLayer", "DynamicIndexedLayer")  # layers of a cache that holds all tokens


def padded(rows: Ids, fill: int, device: Any, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, (B, S), padded at the end, or ``left`` at the beginning."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        rest, ones = longest - len(row), [1] * len(row)
        ids.append([fill] * rest + [*row] if left else [*row] + [fill] * rest)
        mask.append([0] * rest + ones if left else ones + [0] * rest)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def cache_of(model: Any) -> Any:
    """The cache that a model makes of one token; None where it keeps no keys and values."""
    size = model.config.get_text_config().vocab_size
    out = model(input_ids=torch.tensor([[size // 5]], device=model.device), use_cache=True)
    return getattr(out, cache_name(model), None)


def goes_back(cache: Any, length: int) -> bool:
    """Whether a cache of this kind loses its last tokens again where it holds ``length``.

    A recurrent state does not, nor a sliding window that is full.
    """
    if type(cache).__name__ != "DynamicCache":
        return False
    return all(
        type(layer).__name__ in EVERY_TOKEN
        or (type(layer).__name__ == "DynamicSlidingWindowLayer" and length < layer.sliding_window)
        for layer in cache.layers
    )


def likelihoods(
    model: Any, prompts: Ids, turns: Sequence[Ids], fill: int, cache: Any
) -> Iterator[list[float]]:
    """Each turn's log-likelihoods, of one continuation of every prompt: the sum over its tokens.

    Args:
        turns: continuations of the prompts, one of each. fill: the token of padding.
        cache: of ``cache_of``.
    """
    longest = max(map(len, prompts)) + max(len(part) for parts in turns for part in parts) - 1
    read = _over_cache if goes_back(cache, longest) else _whole
    for parts, logits in zip(turns, read(model, prompts, turns, fill), strict=True):
        tokens, kept = padded(parts, fill, logits.device)
        chosen = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        yield (chosen * kept).sum(-1).tolist()


def _over_cache(model: Any, prompts: Ids, turns: Sequence[Ids], fill: int) -> Iterator[Tensor]:
    """Each turn's logits, (B, C, V). The prompts are read once, the continuations after them."""
    device = model.device
    ids, mask = padded(prompts, fill, device, left=True)
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
    for number, parts in enumerate(turns, 1):
        tokens, kept = padded(parts, fill, device)  # (B, C)
        more = tokens.shape[1] - 1
        if more == 0:
            yield first
            continue
        read = kept[:, 1:]  # a row's last token is not read, so that it needs no position
        with after_prompt(model):
            after = model(
                input_ids=tokens[:, :-1],
                attention_mask=torch.cat([mask, read], -1),
                position_ids=positions[:, -1:] + read.cumsum(-1),
                use_cache=True,
                **{name: cache},
            )
        if number < len(turns):
            cache.crop(-more)
        yield torch.cat([first, after.logits.float()], 1)


def _whole(model: Any, prompts: Ids, turns: Sequence[Ids], fill: int) -> Iterator[Tensor]:
    """Each turn's logits, (B, C, V), from prompts and continuations read together.

    Padding stands at the end, where no causal model sees it, even one that takes no mask.
    """
    device, state = model.device, state_in(model)
    start = min(map(len, prompts)) - 1
    for parts in turns:
        texts = [[*p, *part][:-1] for p, part in zip(prompts, parts, strict=True)]
        ids, mask = padded(texts, fill, device)
        more: dict[str, Tensor] = {}
        if state is not None and state.by_prompt:
            learnt = [[IGNORED] * len(p) + [*q[:-1]] for p, q in zip(prompts, parts, strict=True)]
            more["labels"] = padded(learnt, IGNORED, device)[0]
        elif takes_kept_logits(model):
            more["logits_to_keep"] = torch.arange(start, ids.shape[1], device=device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        skipped = ids.shape[1] - logits.shape[1]
        places = torch.tensor([len(p) - 1 - skipped for p in prompts], device=device)
        places = places[:, None] + torch.arange(max(map(len, parts)), device=device)
        places = places.clamp(max=logits.shape[1] - 1)  # (B, C)
        yield logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1])).float()
