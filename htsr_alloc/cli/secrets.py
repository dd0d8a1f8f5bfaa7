"""Keeping a token out of sight: of the process list and of tracebacks."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from htsr_alloc.checkpoints.sentences import without_queries

HIDDEN = "[token]"


def hide_from_others(token: str | None) -> None:
    """Overwrite ``--token``'s value in this process's command line, as ``ps`` shows it.

    Linux only; elsewhere, and in the moment before, HF_TOKEN is the way that nobody sees.
    """
    if not token:
        return
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[45]), int(fields[46])  # arg_start, arg_end of proc(5)
        secret = os.fsencode(token)
        line = ctypes.string_at(begin, end - begin)
        place = line.find(secret)
        while place >= 0:
            ctypes.memset(begin + place, ord("x"), len(secret))
            place = line.find(secret, place + len(secret))


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
