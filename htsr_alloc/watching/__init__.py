"""The three metrics of a model in memory: weights, LoRA products, and both together.

``watch`` is a plain function; ``WatchCallback`` calls it in a transformers Trainer and is imported
on first use, as transformers is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.watching.products import product_spectrum
from htsr_alloc.watching.weights import Watched, watch

if TYPE_CHECKING:
    from htsr_alloc.watching.callback import WatchCallback

__all__ = ["WatchCallback", "Watched", "product_spectrum", "watch"]


def __getattr__(name: str) -> Any:
    if name == "WatchCallback":
        try:
            from htsr_alloc.watching.callback import WatchCallback
        except ImportError as error:
            raise HtsrError(
                f"WatchCallback needs transformers, which cannot be imported ({error}).",
                "pip install 'htsr-alloc[train]'",
            ) from None
        return WatchCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
