"""Train an allocation, evaluate it, and compare allocations and systems (extra ``train``)."""

from __future__ import annotations

from htsr_alloc.errors import HtsrError


def check_installed() -> None:
    """Say in a sentence that the extra is missing.

    Raises:
        HtsrError: transformers, PEFT or accelerate cannot be imported.
    """
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise HtsrError(
            f"Training needs transformers, PEFT and accelerate ({error}).",
            "pip install 'htsr-alloc[train]'",
        ) from None
