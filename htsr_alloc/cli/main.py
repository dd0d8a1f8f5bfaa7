"""The ``htsr`` command: arguments in, one call each, output through ``Screen``.

One file a command. Heavy imports stand inside the commands: ``--help`` and ``allocate`` load no
torch, and a command's own help loads what its choices come from.
"""

from __future__ import annotations

import functools
import importlib
import signal
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from htsr_alloc.cli.failures import ends_well, exit_at_once, say_stopped, stop_on_signals
from htsr_alloc.cli.options import Command, declared, split_examples
from htsr_alloc.cli.screen import open_streams
from htsr_alloc.version import __version__

NAMES = (  # of the commands and their modules, in the order of --help
    "inspect",
    "analyze",
    "fit",
    "explain",
    "score",
    "allocate",
    "plot",
    "report",
    "compare",
    "export",
    "build",
    "train",
    "evaluate",
    "generate",
    "serve",
    "collapse",
    "study",
)


class Commands(Mapping):
    """The commands by name; one is imported and declared when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        if name not in NAMES:
            raise KeyError(name)
        return _command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(NAMES)

    def __len__(self) -> int:
        return len(NAMES)


@functools.cache
def _command(name: str) -> Any:
    run = getattr(importlib.import_module(f"htsr_alloc.cli.{name}"), name)
    text, examples = split_examples(run)
    sentence = " ".join(text.partition("\n\n")[0].split())  # typer cuts one that it finds itself
    alone = typer.Typer(add_completion=False, **STYLE)
    register = alone.command(cls=Command, help=text, short_help=sentence, epilog=examples)
    register(ends_well(declared(run)))
    return typer.main.get_command(alone)


class Group(TyperGroup):
    """All commands, none of them imported yet."""

    def __init__(self, **given: Any) -> None:
        given["commands"] = Commands()
        super().__init__(**given)


STYLE: dict[str, Any] = {"pretty_exceptions_enable": False, "rich_markup_mode": None}
app = typer.Typer(
    cls=Group,
    name="htsr",
    help="Decide from a model's weights how many LoRA experts each layer gets.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **STYLE,
)


def main() -> None:
    """Entry point."""
    open_streams()
    stop_on_signals()
    code: str | int | None = None
    try:
        app()
    except SystemExit as end:
        code = end.code
        if code == 128 + signal.SIGINT:  # it may have come while typer was at work
            code = say_stopped()
    except KeyboardInterrupt:  # while typer was still making the commands
        code = say_stopped()
    exit_at_once(code)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        print(f"htsr {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass
