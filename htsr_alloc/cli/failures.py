"""How a command ends: one sentence and an exit code."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError


def ends_well(function: Callable[..., None]) -> Callable[..., None]:
    """The command, whose known failures end in one sentence and an exit code."""

    @functools.wraps(function)
    def run(**arguments: Any) -> None:
        debug = os.environ.get("HTSR_DEBUG") == "1"
        try:
            function(**arguments)
        except HtsrError as error:
            if debug:
                raise
            Screen().error(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if debug:
                raise
            Screen().warn("interrupted; the same command goes on where this one stopped.")
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output (head, less) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return run
