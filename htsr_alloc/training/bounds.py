"""Bounds on what a file from a stranger can make a library do: seconds and bytes."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from htsr_alloc.errors import HtsrError

SECONDS = 20
BYTES = 1 << 30  # beyond what the process has already
PATTERNS = {  # key of adapter_config.json -> the regular expression that PEFT makes of its text
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r".*?\.{}\.(\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
}


@contextlib.contextmanager
def bounded(what: str, seconds: float = SECONDS, nbytes: int = BYTES) -> Iterator[None]:
    """Stop the block after some seconds, or when it takes more memory than so many bytes.

    The time is bounded on the main thread, the memory on Linux. Regular expressions and Python's
    own loops look for signals, so that an alarm ends them.

    Args:
        what: the sentence's subject, such as "The chat template".

    Raises:
        HtsrError: one of the two bounds was met.
    """

    def stop(*_: object) -> None:
        raise HtsrError(f"{what} takes more than {seconds:g} s.", "Do not use a file like this.")

    main = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop) if main else None
    try:
        most = _taken() + nbytes
        if most > nbytes and (soft == resource.RLIM_INFINITY or most < soft):
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if main:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except MemoryError:
        raise HtsrError(
            f"{what} takes more than {nbytes >> 20} MiB.", "Do not use a file like this."
        ) from None
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _taken() -> int:
    """Address space of this process in bytes; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def check_patterns(
    config: Mapping[str, Any], names: Iterable[str], seconds: float = SECONDS
) -> None:
    """Match an adapter's regular expressions with a model's module names, in bounded time.

    Args:
        config: of adapter_config.json.

    Raises:
        HtsrError: one is no regular expression, or takes too long.
    """
    patterns = []
    for key, form in PATTERNS.items():
        given = config.get(key)
        many = (
            [given] if isinstance(given, str) else given if isinstance(given, (list, dict)) else []
        )
        patterns += [form.format(text) for text in many if isinstance(text, str)]
    with bounded("A regular expression in adapter_config.json", seconds):
        for name in names:
            for text in patterns:
                try:
                    re.match(text, name)
                except (re.error, RecursionError, OverflowError) as error:
                    raise HtsrError(f"adapter_config.json: {text[:80]!r}: {error}.") from None
