"""How a command ends: one sentence and an exit code, whatever happens and whenever."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer
from typer.models import OptionInfo

from htsr_alloc.cli.screen import Screen
from htsr_alloc.cli.secrets import hide_from_others, redacted
from htsr_alloc.errors import HtsrError

GOES_ON = "the same command goes on where this one stopped."
_received: list[int] = []  # signals that asked us to stop


def stop_on_signals() -> None:
    """Let Ctrl-C and SIGTERM end the command by way of ``ends_well``."""

    def stop(number: int, _: object) -> None:
        _received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


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
        hide_from_others(token)
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
            raise _ending(error, options_of(function)) from None

    return run


def say_stopped() -> int:
    """Say that a signal ended the command; the exit code."""
    number = _received[0] if _received else signal.SIGINT
    Screen().warn(f"{'terminated' if number == signal.SIGTERM else 'interrupted'}; {GOES_ON}")
    return 128 + number


def options_of(command: Callable[..., None]) -> dict[str, str]:
    """The options of a command, by its arguments' names: ``top_k`` is ``--top-k``."""
    options = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                # In Annotated the first name stands where a default otherwise stands.
                names = [str(words) for words in (info.default, *(info.param_decls or ()))]
                names = [words for words in names if words.startswith("--")]
                options[name] = (names or [f"--{name.replace('_', '-')}"])[0].partition("/")[0]
    return options


def _ending(error: BaseException, options: dict[str, str]) -> BaseException:
    """Say it in a sentence: the exit that follows. An unknown error stays what it is."""
    screen = Screen()
    # An import that a signal cuts short may turn it into an error of its own.
    if isinstance(error, KeyboardInterrupt) or _received:
        return typer.Exit(say_stopped())
    if isinstance(error, MemoryError):
        error = HtsrError("There was not enough memory.", "What an analysis finished is kept.")
    if isinstance(error, HtsrError):
        screen.error(error.renamed(lambda name: options.get(name, name)))
        return typer.Exit(1)
    return error
