"""Byte ranges of a hub's files through huggingface_hub's own client: its auth, its endpoint.

A cut connection goes on at the byte where it was cut. A commit is immutable, so that every request
names one; an answer of another commit, another file or another size is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from htsr_alloc.errors import HtsrError

Result = TypeVar("Result")
TRIES = 6  # in a row without progress
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds between two of them
PROGRESS = 1 << 20  # bytes that make a try count as one that got somewhere
LONGEST_ASKED = 300.0  # seconds that a server may ask us to wait


@dataclass(frozen=True)
class RemoteFile:
    """A file at one commit: where it is, its size, and its SHA-256 where the hub gives it."""

    url: str
    name: str
    commit: str
    nbytes: int
    sha256: str | None


class Ranges:
    """A client for ranges of files, used from several threads."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = headers

    def read(self, file: RemoteFile, begin: int, into: memoryview) -> None:
        """Fill ``into`` with the file's bytes from ``begin`` on.

        Raises:
            HtsrError: the answer is of another commit, file, size or range.
            Exception: the client's own, after ``TRIES`` in a row without progress.
        """
        done = tries = 0
        while done < len(into):
            count, error = self._once(file, begin + done, into[done:])
            done += count
            if done == len(into):
                return
            tries = 0 if count >= PROGRESS else tries + 1
            if tries == TRIES:
                raise error or HtsrError(
                    f"The hub's answer ends at byte {begin + done} of {file.name}, which has "
                    f"{file.nbytes}.",
                    "Run the same command again: it goes on where it stopped.",
                )
            time.sleep(wait_after(error, tries))

    def _once(self, file: RemoteFile, begin: int, into: memoryview) -> tuple[int, Exception | None]:
        """One request: the bytes filled, and the network's error that ended it early, if any."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        done = 0
        span = f"bytes={begin}-{begin + len(into) - 1}"
        try:
            with get_session().stream(
                "GET",
                file.url,
                headers={**self.headers, "Range": span, "Accept-Encoding": "identity"},
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            ) as response:
                hf_raise_for_status(response)
                _check(response, file, begin)
                for chunk in response.iter_raw():
                    if len(chunk) > len(into) - done:
                        raise HtsrError(f"The hub sent more of {file.name} than was asked for.")
                    into[done : done + len(chunk)] = chunk
                    done += len(chunk)
        except Exception as error:
            if not worth_another_try(error):
                raise
            return done, error
        return done, None


def patiently(call: Callable[[], Result]) -> Result:
    """The result of a request that may be made again, after up to ``TRIES`` failures."""
    for tries in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            if tries == TRIES or not worth_another_try(error):
                raise
            time.sleep(wait_after(error, tries))
    raise AssertionError  # the last try returned or raised


def worth_another_try(error: Exception) -> bool:
    """Whether the network or a busy server is to blame."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):  # says why in its cause alone
        return isinstance(error.__cause__, Exception) and worth_another_try(error.__cause__)
    status = _status(error)
    if status is not None:
        return status in (408, 429) or 500 <= status < 600
    # Whatever client the installed version uses (httpx, httpx2): the base of its own errors.
    network = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    return isinstance(error, (network, TimeoutError, ConnectionError))


def wait_after(error: Exception | None, tries: int) -> float:
    """Seconds until the next try: what the server asks for, else twice as long each time."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    if asked.isdecimal() and float(asked) <= LONGEST_ASKED:
        return float(asked)
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** max(0, tries - 1))


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _check(response: Any, file: RemoteFile, begin: int) -> None:
    """Refuse an answer that is not this range of this file at this commit."""
    if response.status_code != 206:
        raise HtsrError(f"The server of {file.name} does not send ranges.", "Leave --stream away.")
    span, _, total = response.headers.get("Content-Range", "").partition("/")
    if total != str(file.nbytes) or not span.startswith(f"bytes {begin}-"):
        raise HtsrError(
            f"{file.name} is of {total or 'unknown'} bytes where the hub's listing says "
            f"{file.nbytes}.",
            "Run the same command again; if it stays so, the repository is broken.",
        )
    for answer in (*response.history, response):
        commit = answer.headers.get("X-Repo-Commit", file.commit)
        etag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if commit != file.commit or (file.sha256 and len(etag) == 64 and etag != file.sha256):
            raise HtsrError(
                f"The hub's {file.name} changed while it was read: commit {file.commit} was asked "
                f"for and {commit} came.",
                "Run the command again.",
            )
