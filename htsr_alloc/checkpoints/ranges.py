"""Byte ranges of a hub's files through huggingface_hub's own client: its auth, its endpoint.

After a lost connection the download resumes at the same byte. A commit is immutable, so every
request names one; an answer for another commit, file or size is refused.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from htsr_alloc.errors import HtsrError

TRIES = 6  # in a row without progress
PATIENCE = 60.0  # seconds without progress, waits that the server asked for not counted
FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds between two tries
PROGRESS = 1 << 20  # bytes after which a try counts as progress
LONGEST_ASKED = 300.0  # seconds that a server may ask us to wait, in all
HEADERS = 3  # times the client's time-out: connection, redirects and headers of one answer
SLOWEST, GRACE = 1000.0, 20.0  # bytes per second of one answer, after so many seconds

FIRST = 100_000  # bytes of a file that are asked for first: most headers are shorter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteFile:
    """A file at one commit: where it is, its size, its SHA-256 if it is large, its git blob."""

    url: str
    name: str
    commit: str
    nbytes: int
    sha256: str | None
    blob: str | None = None


class Patience:
    """When to try again, and when to give up; progress starts it anew."""

    def __init__(self) -> None:
        self.progress()

    def progress(self) -> None:
        """Something arrived."""
        self.tries, self.asked, self.start = 0, 0.0, time.monotonic()

    def wait(self, error: Exception) -> None:
        """Wait for the next try, or raise ``error``: there were ``TRIES``, ``PATIENCE`` is over, or
        the server asks for longer than ``LONGEST_ASKED``."""
        self.tries += 1
        asked = asked_wait(error)
        spent = time.monotonic() - self.start - self.asked
        self.asked += asked
        if self.tries == TRIES or spent > PATIENCE or self.asked > LONGEST_ASKED:
            raise error
        if asked > 1:
            log.warning(f"The hub asks to wait for {asked:.0f} s.")
        time.sleep(asked or min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self.tries - 1)))


class Ranges:
    """A client for ranges of files, used from several threads."""

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = headers

    def read(self, file: RemoteFile, begin: int, into: memoryview, whole: bool = False) -> None:
        """Fill ``into`` with the file's bytes from ``begin`` on.

        Args:
            whole: ``into`` is the whole file, which a server without ranges sends as well.

        Raises:
            HtsrError: the answer is of another commit, file, size or range.
            Exception: the client's own, when ``Patience`` is over.
        """
        done, patience = 0, Patience()
        while done < len(into):
            span = None if whole and not done else (begin + done, begin + len(into))
            count, error = self._once(file, span, into[done:])
            done += count
            if done == len(into):
                return
            if count >= PROGRESS:
                patience.progress()
            patience.wait(
                error
                or HtsrError(
                    f"The hub's answer ends at byte {begin + done} of {file.name}, which has "
                    f"{file.nbytes}.",
                    "Run the same command again: it resumes.",
                )
            )

    def whole(self, url: str, limit: int, what: str) -> bytes:
        """The body of an answer of at most ``limit`` bytes.

        Raises:
            HtsrError: it has more, or its content is compressed, which was not asked for.
            Exception: the client's own, when ``Patience`` is over.
        """
        patience = Patience()
        while True:
            body = bytearray()
            try:
                with self._answer(url, {}) as response:
                    for chunk in chunks(response):
                        body += chunk
                        if len(body) > limit:
                            raise HtsrError(f"{what} has more than {limit} bytes.")
                return bytes(body)
            except Exception as error:
                if not worth_another_try(error):
                    raise
                patience.wait(error)

    def _once(
        self, file: RemoteFile, span: tuple[int, int] | None, into: memoryview
    ) -> tuple[int, Exception | None]:
        """One request: the bytes filled, and the network's error that ended it early, if any."""
        done = 0
        headers = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        try:
            with self._answer(file.url, headers) as response:
                _check(response, file, span)
                for chunk in chunks(response):
                    if len(chunk) > len(into) - done:
                        raise HtsrError(f"The hub sent more of {file.name} than was asked for.")
                    into[done : done + len(chunk)] = chunk
                    done += len(chunk)
        except Exception as error:
            if not worth_another_try(error):
                raise
            return done, error
        return done, None

    @contextmanager
    def _answer(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """The answer to a GET, its body unread; a refusal as huggingface_hub's error."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        client, timeout = get_session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        headers = {**self.headers, **headers, "Accept-Encoding": "identity"}
        request = client.build_request("GET", url, headers=headers, timeout=timeout)
        with closing(
            begun(lambda: client.send(request, stream=True), HEADERS * timeout)
        ) as response:
            if response.status_code >= 400:  # its body, of any length, is not read
                kept = {k: v for k, v in response.headers.items() if not k.startswith("content-")}
                bare = type(response)(
                    response.status_code, headers=kept, request=response.request, content=b"{}"
                )
                hf_raise_for_status(bare)
            yield response


class Start:
    """The first bytes of a file, asked for as far as they are read; ever more at a time."""

    def __init__(self, ranges: Ranges, file: RemoteFile) -> None:
        self.ranges, self.file, self.data = ranges, file, b""

    def read(self, begin: int, length: int) -> bytes:
        """Exactly these bytes."""
        here = len(self.data)
        if begin + length > here:
            more = 2 * here if here > FIRST else FIRST
            buffer = bytearray(min(max(begin + length, more), self.file.nbytes) - here)
            self.ranges.read(self.file, here, memoryview(buffer))
            self.data += buffer
        return self.data[begin : begin + length]


def begun(send: Callable[[], Any], seconds: float) -> Any:
    """What ``send`` returns. The client's own time-out is for each read, and headers may drip.

    Raises:
        TimeoutError: after ``seconds``. Exception: that of ``send``.
    """
    answers: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((send(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        response, error = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no whole header arrived in {seconds:.0f} s") from None
    if error is not None:
        raise error
    return response


def chunks(response: Any) -> Iterator[bytes]:
    """The body as it arrives, never decompressed.

    Raises:
        HtsrError: it is compressed. TimeoutError: it arrives at less than ``SLOWEST``.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HtsrError("The hub's answer is compressed, which was not asked for.")
    start, done = time.monotonic(), 0
    for chunk in response.iter_raw():
        done += len(chunk)
        seconds = time.monotonic() - start
        if seconds > GRACE and done < SLOWEST * seconds:
            raise TimeoutError(f"{done} bytes arrived in {seconds:.0f} s")
        yield chunk


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


def asked_wait(error: Exception) -> float:
    """Seconds that the server asks us to wait (Retry-After); 0 if it does not say."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if re.fullmatch("[0-9]{1,9}", asked) else 0.0


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return None if response is None else response.status_code


def _check(response: Any, file: RemoteFile, span: tuple[int, int] | None) -> None:
    """Refuse an answer that is not this range (None: all) of this file at this commit."""
    if span is not None and response.status_code != 206:
        raise HtsrError(f"The server of {file.name} does not send ranges.", "Remove `stream`.")
    if span is None:
        total = response.headers.get("Content-Length", str(file.nbytes))
        same = response.status_code == 200 and total == str(file.nbytes)
    else:
        found, _, total = response.headers.get("Content-Range", "").partition("/")
        same = total == str(file.nbytes) and found.startswith(f"bytes {span[0]}-")
    if not same:
        raise HtsrError(
            f"{file.name} has {total or 'an unknown number of'} bytes; the hub's listing says "
            f"{file.nbytes}.",
            "Run the same command again; if it stays so, the repository is broken.",
        )
    for answer in (*response.history, response):
        commit = answer.headers.get("X-Repo-Commit", file.commit)
        etag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if commit != file.commit or (file.sha256 and len(etag) == 64 and etag != file.sha256):
            raise HtsrError(
                f"The hub's {file.name} changed while it was read: commit {file.commit} was asked "
                f"for, and {commit} came.",
                "Run the command again.",
            )
