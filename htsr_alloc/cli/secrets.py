"""Keeping a token out of tracebacks and logs."""

from __future__ import annotations

import os
from contextlib import suppress

from htsr_alloc.checkpoints.sentences import without_queries

HIDDEN = "[token]"


def redacted(text: str, token: str | None) -> str:
    """``text`` without any token that this process knows, and without signed addresses."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    known = {token, *(os.environ.get(name) for name in names)}
    with suppress(Exception):  # a file of tokens that cannot be read holds none that we used
        from huggingface_hub import get_token

        known.add(get_token())
    for secret in known:
        if secret:
            text = text.replace(secret, HIDDEN)
    return without_queries(text)
