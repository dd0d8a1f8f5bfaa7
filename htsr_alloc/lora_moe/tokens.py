"""Which token of the batch each position of a linear's input is, told by its shape and its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from torch import Tensor, nn

from htsr_alloc.checkpoints.rules import is_numbered_expert

ENCODER, DECODER = "attention_mask", "decoder_attention_mask"
# Keys and values of attention over an encoder's states.
CROSS_ATTENTION = re.compile(
    r"(EncDecAttention|encoder_attn|crossattention)\.(.*\.)?(k|v|k_proj|v_proj|key|value)$"
)
# The families of transformers whose layers, or some of them, see (sequence, batch).
TIME_FIRST = ("fsmt", "led", "longformer", "xlnet")


def mask_name(name: str, given: Sequence[str]) -> str:
    """Which of the masks given to a model describes the tokens of a linear."""
    decoder = DECODER in given and "decoder" in name.split(".")
    return DECODER if decoder and CROSS_ATTENTION.search(name) is None else ENCODER


def puts_time_first(model: nn.Module) -> bool:
    """Whether some layers of a model see (sequence, batch)."""
    return getattr(getattr(model, "config", None), "model_type", None) in TIME_FIRST


def without_padding(model: nn.Module) -> tuple[str, ...]:
    """The parts of a model that take no attention mask, as a vision tower: all tokens are real."""
    from transformers import PreTrainedModel

    return tuple(
        name + "."
        for name, part in model.named_modules()
        if name
        and isinstance(part, PreTrainedModel)
        and ENCODER not in inspect.signature(part.forward).parameters
    )


def batch_axis(shape: Sequence[int], batch: tuple[int, int], name: str, time: bool) -> int | None:
    """The axis of the batch's rows in tokens shaped (B, S, ...), (S, B, ...) or (B S).

    Args:
        shape: of a linear's input, without its features.
        batch: (B, S), the tokens that the model was given.
        name: of the linear. time: whether its model may put time first.

    Returns:
        0 or 1; None for other tokens, and where it cannot be known.
    """
    rows, length = batch
    if is_numbered_expert(name):  # it sees the tokens that a router chose, in that router's order
        return None
    if len(shape) == 1:
        return 0 if shape[0] == rows * length and not time else None
    if time and rows == length:
        return None
    if tuple(shape[:2]) == (rows, length):
        return 0
    return 1 if time and tuple(shape[:2]) == (length, rows) else None


def spread(mask: Tensor, shape: Sequence[int], axis: int) -> Tensor:
    """A mask (B, S) for tokens shaped ``shape``, flat, where the rows are on ``axis``."""
    if len(shape) == 1:
        return mask.reshape(-1)
    mask = mask.transpose(0, axis)
    return mask.reshape(*mask.shape, *[1] * (len(shape) - 2)).expand(*shape).reshape(-1)
