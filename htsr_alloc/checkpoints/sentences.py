"""The failures of huggingface_hub and of the network, as one sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from htsr_alloc.errors import HtsrError

NO_ANSWER = {"ConnectError", "ConnectTimeout"}  # of whatever client


@contextmanager
def sentences(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn huggingface_hub's and the network's errors into one sentence each."""
    from huggingface_hub import errors

    # Whatever client the installed version uses (httpx, httpx2): the base of its own errors.
    network = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    at = f" at revision {revision}" if revision else ""
    try:
        yield
    except errors.GatedRepoError as error:
        raise HtsrError(
            f"{repo_id} is gated and this account has no access to it.",
            "Ask for access on its page, then run `hf auth login` or give `token`.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HtsrError(
            f"There is no repository {repo_id}, or it is private.",
            "Check the id; for a private one run `hf auth login` or give `token`.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HtsrError(f"{repo_id} has no revision {revision}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HtsrError(
            f"{repo_id}{at} is not in the local cache and the hub was not reached.",
            "Check the network, or remove `offline` and HF_HUB_OFFLINE.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise HtsrError(f"A file of {repo_id}{at} is not there: {short(error)}.") from error
    except (network, errors.SafetensorsParsingError) as error:
        if {kind.__name__ for kind in type(error).__mro__} & NO_ANSWER:
            raise HtsrError(
                f"The hub cannot be reached for {repo_id}{at}: {short(error)}.",
                "Check the network, or give a file or folder on this machine.",
            ) from error
        raise HtsrError(
            f"The hub's answer for {repo_id}{at} cannot be used: {short(error)}.",
            "Run the same command again: it resumes.",
        ) from error
    except errors.HFValidationError as error:
        raise HtsrError(f"{repo_id} is not a valid hub id: {short(error)}.") from error
    except (ValueError, RuntimeError) as error:  # an answer that the client cannot read
        raise HtsrError(
            f"The hub's answer for {repo_id}{at} cannot be used: {short(error)}."
        ) from error
    except OSError as error:
        raise HtsrError(f"Downloading {repo_id}{at} failed: {short(error)}.") from error


def short(error: Exception) -> str:
    """The first line of an error, without signed addresses."""
    return without_queries((str(error).strip() or type(error).__name__).splitlines()[0].rstrip("."))


def without_queries(text: str) -> str:
    """``text`` with every address cut at its ``?``, where a store's signature stands."""
    return re.sub(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*", r"\1?...", text)
