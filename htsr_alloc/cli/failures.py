"""How a command ends: one sentence and an exit code, whatever happens and whenever."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from htsr_alloc.cli.choices import UnknownName
from htsr_alloc.cli.options import flags
from htsr_alloc.cli.screen import Screen
from htsr_alloc.cli.secrets import redacted
from htsr_alloc.errors import HtsrError

_received: list[int] = []  # signals that asked us to stop
_said: list[int] = []  # those of them of which the user was told


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the command by way of ``ends_well``."""

    def stop(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if _imports_torch(frame):
            os._exit(say_stopped())
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


def _imports_torch(frame: FrameType | None) -> bool:
    """Whether torch is being imported: an exception in its C++ then aborts the process.

    Nothing is at stake by then, no file is open.
    """
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            return True
        frame = frame.f_back
    return False


def exit_at_once(code: object) -> None:
    """After a signal: threads still at work would keep the process for minutes.

    What is finished is in the journal, synced; ``finally`` clauses have run.
    """
    if _received and code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        os._exit(int(str(code)))


def ends_well(function: Callable[..., None]) -> Callable[..., None]:
    """The command, whose known failures end in one sentence and an exit code."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        token = arguments.get("token")
        try:
            function(**arguments)
        except (typer.Exit, SystemExit):
            raise
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except BaseException as error:
            if os.environ.get("HTSR_DEBUG") == "1":
                sys.stderr.write(redacted(traceback.format_exc(), token))
            if isinstance(error, KeyboardInterrupt) or _received:
                # An import that a signal cuts short may turn it into an error of its own.
                kept = KEPT.get(function.__name__, lambda **_: "")(**arguments)
                raise typer.Exit(say_stopped(kept)) from None
            raise _ending(error, inspect.signature(function).parameters) from None

    return run


def _journal_is_kept(output: Path | None = None, **_: Any) -> str:
    """``analyze``: without a file to write it has no journal."""
    return "" if str(output) == "-" else "the same command goes on where this one stopped."


def _results_are_kept(**_: Any) -> str:
    """``study``: a line for each finished cell."""
    return "the same command goes on where this one stopped."


def _checkpoint_is_kept(output: Path, **_: Any) -> str:
    """``train``: what ``--resume`` would find."""
    from htsr_alloc.training import saves

    kept, _broken = saves.newest_whole(output / saves.CHECKPOINTS)
    if kept is None:
        return "no checkpoint is whole yet, so that the same command starts from the beginning."
    return f"{kept.name} is kept: the same command with --resume continues from it."


# What is kept of an interrupted command, told from its arguments; of the others nothing is.
KEPT: dict[str, Callable[..., str]] = {
    "analyze": _journal_is_kept,
    "study": _results_are_kept,
    "train": _checkpoint_is_kept,
}


def say_stopped(kept: str = "") -> int:
    """Say, once, that a signal ended the command, and what is kept; the exit code."""
    number = _received[0] if _received else signal.SIGINT
    if not _said:
        _said.append(number)
        said = "terminated" if number == signal.SIGTERM else "interrupted"
        Screen().warn(f"{said}; {kept}" if kept else f"{said}.")
    return 128 + number


def _ending(error: BaseException, parameters: Collection[str]) -> BaseException:
    """Say it in a sentence, with the command's options for the names of arguments.

    Returns:
        The exit that follows; an unknown error stays what it is.
    """
    screen = Screen()
    if isinstance(error, MemoryError):
        error = HtsrError("There was not enough memory.", "What an analysis finished is kept.")
    if isinstance(error, HtsrError):
        screen.error(error.renamed(lambda name: flags(name)[0] if name in parameters else name))
        return typer.Exit(2 if isinstance(error, UnknownName) else 1)
    return error
