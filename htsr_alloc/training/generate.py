"""Text from a model and its adapter."""

from __future__ import annotations

from typing import Any

import torch

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.positions import positions_of
from htsr_alloc.training.rows import Row
from htsr_alloc.training.tokens import as_chat, pad_id, question


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 128, chat: bool = False
) -> str:
    """The model's continuation of a prompt: greedy, without the prompt and special tokens.

    Args:
        chat: write the prompt as a user's message in the tokenizer's chat template.

    Raises:
        HtsrError: an empty prompt, one longer than the model's positions, no room for a token, or
            no chat template.
    """
    if not prompt.strip():
        raise HtsrError("The prompt is empty.")
    if max_new_tokens < 1:
        raise HtsrError(f"`max_new_tokens` must be at least 1, not {max_new_tokens}.")
    row = Row(1, prompt, completion="-")  # its answer is what is asked for
    ids, _ = question(as_chat([row])[0] if chat else row, tokenizer)
    if (last := positions_of(model)) is not None:
        if len(ids) > last:
            raise HtsrError(
                f"The prompt has {len(ids)} tokens, and the model's positions are {last}.",
                "Shorten it.",
            )
        max_new_tokens = min(max_new_tokens, last + 1 - len(ids))
    inputs = torch.tensor([ids], device=model.device)  # (1, S)
    made = model.eval().generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id(tokenizer),
    )
    return tokenizer.decode(made[0, inputs.shape[1] :], skip_special_tokens=True)
