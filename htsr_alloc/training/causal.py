"""Whether a language model is causal: found by asking it, whatever its architecture."""

from __future__ import annotations

from typing import Any

import torch

from htsr_alloc.errors import HtsrError


def refuse_unless_causal(model: Any, name: str) -> None:
    """Read two texts that differ in their last token only; what stands before must not differ.

    An encoder under a causal head (BERT, RoBERTa) reads the answers that it is trained to give.

    Raises:
        HtsrError: the model's output depends on tokens that follow.
    """
    size = model.config.get_text_config().vocab_size
    first, second, one, other = (size * part // 5 for part in (1, 2, 3, 4))
    ids = torch.tensor([[first, second, one], [first, second, other]], device=model.device)
    was = model.training
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids).logits[:, :2].float()  # (2, 2, V)
    model.train(was)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    allowed = max(1e-4, 4 * eps) * float(logits.abs().max())
    if float((logits[0] - logits[1]).abs().max()) > allowed:
        raise HtsrError(
            f"{name} is not a causal language model: {type(model).__name__} reads the tokens that "
            "follow, and so the answers it is to learn.",
            "Give a decoder, such as LLaMA or GPT-2, or `task` classification for an encoder.",
        )
