"""EM-LoRA's one choice a prompt, over the passes of a generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.state import Generation, Pass, state_in
from htsr_alloc.lora_moe.systems.em_lora import prompt

CACHES = ("cache", "past_key_values")  # from transformers 5.24 on, and before


def prompt_length(args: tuple, kwargs: dict[str, Any]) -> int:
    """S of generate's own arguments; 1 where it starts from nothing."""
    given = [args[0] if args else kwargs.get("inputs"), kwargs.get("inputs_embeds")]
    given.append(kwargs.get("input_ids"))
    return next((value.shape[1] for value in given if value is not None), 1)


def read_prompt(
    given: dict[str, Any], mask: Any, now: Pass, before: Pass, generation: Generation | None
) -> None:
    """Find a pass's prompt tokens, or keep to the choice of the prompt's own pass.

    Args:
        given: the model's arguments by name; mask, its attention mask.
        now: this pass, before: the one before it.

    Raises:
        HtsrError: the pass has a part of a prompt, several prompts in a row, or none.
    """
    if generation is not None and generation.decisions is not None:
        now.decisions = generation.decisions
        now.decisions.settle()
        return
    tokens, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if tokens is None:
        if embeds is None:
            raise HtsrError(
                "EM-LoRA routes by a prompt, and the model got neither input_ids nor inputs_embeds."
            )
        tokens = embeds[..., 0]  # (B, S)
    past = next((given[name] for name in CACHES if given.get(name) is not None), None)
    if past is not None and past.get_seq_length() > 0:
        if generation is not None or tokens.shape[1] > 1:
            raise HtsrError(
                "EM-LoRA chooses by the whole prompt, and the cache given holds a part of the text "
                f"already, with {tokens.shape[1]} tokens to come.",
                "Remove the cache; by hand, run the prompt, then one token at a time, or "
                "several inside after_prompt(model).",
            )
        now.decisions = before.decisions
        now.decisions.settle()
        return
    if isinstance(mask, Tensor) and mask.shape != tokens.shape:
        raise HtsrError(
            f"EM-LoRA needs an attention mask of the tokens' shape {tuple(tokens.shape)}, and was "
            f"given {tuple(mask.shape)}.",
            "Use the dynamic cache and a 2-d mask.",
        )
    prompt.refuse_packing(mask, given)
    now.prompt = prompt.prompt_tokens(mask, given.get("labels"), tokens)
    if generation is not None:
        if tokens.shape[1] < generation.length:
            raise HtsrError(
                f"EM-LoRA chooses by the whole prompt of {generation.length} tokens, and generate "
                f"ran the first {tokens.shape[1]} alone.",
                "Generate without prefill_chunk_size.",
            )
        now.prompt[:, generation.length :] = False
        generation.decisions = now.decisions


@contextmanager
def after_prompt(model: nn.Module) -> Iterator[None]:
    """Passes inside go on after the prompts that the last pass read, over its cache.

    EM-LoRA keeps to what it chose by them; other models are not concerned. For scoring several
    continuations of one prompt.
    """
    state = state_in(model)
    if state is None or not state.by_prompt:
        yield
        return
    outer, state.generation = state.generation, Generation(0, state.current.decisions)
    try:
        yield
    finally:
        state.generation = outer
