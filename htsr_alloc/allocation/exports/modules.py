"""The linear modules of a model that an export may name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from htsr_alloc.errors import HtsrError

Modules = Mapping[str, Sequence[str]]  # block prefix -> full names of the linears in it


def refuse_modules(export: str, modules: Modules | None) -> None:
    """Raise HtsrError where a model is given to an export that does not name modules."""
    if modules is not None:
        raise HtsrError(
            f"The {export} export does not name modules, so that `model` means nothing.",
            "Leave it out.",
        )
