"""Stacks of layers: a model may have several (an encoder, a decoder, a vision tower)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from htsr_alloc.errors import HtsrError


def stack_of(prefix: str) -> str:
    """The stack that a block is in: ``model.layers`` of ``model.layers.7``."""
    return prefix.rpartition(".")[0]


def chosen_stacks(prefixes: Iterable[str], name: str) -> list[str]:
    """The stack of this name, or else every stack whose name has it as whole words.

    Args:
        prefixes: of every block.
        name: as ``model.language_model.layers``, or a part of it, as ``language_model``.

    Raises:
        HtsrError: there is none.
    """
    blocks = [stack_of(prefix) for prefix in prefixes]
    stacks = list(dict.fromkeys(blocks))
    found = [s for s in stacks if s == name] or [s for s in stacks if f".{name}." in f".{s}."]
    if not name or not found:
        sizes = ", ".join(f"{stack} ({blocks.count(stack)} layers)" for stack in stacks)
        raise HtsrError(f"There is no stack {name!r}.", f"Name one, or a part of it: {sizes}.")
    return found


def other_stacks(prefixes: Sequence[str], name: str) -> tuple[str, ...]:
    """Patterns that leave out the tensors of every other stack.

    Raises:
        HtsrError: there is no such stack.
    """
    kept = chosen_stacks(prefixes, name)
    stacks = dict.fromkeys(stack_of(prefix) for prefix in prefixes)
    return tuple(f"{stack}.*" for stack in stacks if stack not in kept)
