"""How many positions a model has: where they are a table, a longer text has none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from htsr_alloc.errors import HtsrError

TABLE = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")
SPARE = 8  # rows of a table before its first position, at most: OPT has 2, RoBERTa 1 and padding


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of a text, where the model has a table of positions; otherwise None."""
    config: Any = model.config
    given = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(given, int):
        return None
    sizes = [n for rows, n in _tables(model) if given <= rows <= given + SPARE]
    return min([given, *sizes]) if sizes else None


def refuse_longer(model: nn.Module, examples: Sequence[Any]) -> None:
    """Refuse examples, each with a ``length``, that are longer than the model's positions.

    Raises:
        HtsrError: there is one.
    """
    most, longest = positions_of(model), max((x.length for x in examples), default=0)
    if most is not None and longest > most:
        raise HtsrError(
            f"A row has {longest} tokens, and the model's positions are {most}.",
            f"Give a `max_length` of at most {most}.",
        )


def _tables(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Rows of each table of positions, and how many positions they are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and TABLE.search(name):
            rows, padding = module.num_embeddings, module.padding_idx
            yield rows, rows - (0 if padding is None else padding + 1)
    for name, buffer in model.named_buffers():
        if TABLE.search(name) and isinstance(buffer, Tensor) and buffer.dim() == 2:
            yield len(buffer), len(buffer)
