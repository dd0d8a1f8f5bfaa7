"""The ``htsr`` command: arguments in, one call each, output through ``Screen``.

One file a command. Heavy imports stand inside the commands: ``--help`` and ``allocate`` load no
torch, and a command's own help loads what its choices come from.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from htsr_alloc.cli.allocate import allocate
from htsr_alloc.cli.analyze import analyze
from htsr_alloc.cli.build import build
from htsr_alloc.cli.collapse import collapse
from htsr_alloc.cli.compare import compare
from htsr_alloc.cli.evaluate import evaluate
from htsr_alloc.cli.explain import explain
from htsr_alloc.cli.export import export
from htsr_alloc.cli.failures import ends_well, exit_at_once, say_stopped, stop_on_signals
from htsr_alloc.cli.fit import fit
from htsr_alloc.cli.generate import generate
from htsr_alloc.cli.inspect import inspect
from htsr_alloc.cli.options import Command, declared, split_examples
from htsr_alloc.cli.plot import plot
from htsr_alloc.cli.report import report
from htsr_alloc.cli.screen import open_streams
from htsr_alloc.cli.serve import serve
from htsr_alloc.cli.study import study
from htsr_alloc.cli.train import train
from htsr_alloc.version import __version__

app = typer.Typer(
    name="htsr",
    help="Decide from a model's weights how many LoRA experts each layer gets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)
COMMANDS = (
    inspect,
    analyze,
    fit,
    explain,
    allocate,
    plot,
    report,
    compare,
    export,
    build,
    train,
    evaluate,
    generate,
    serve,
    collapse,
    study,
)
for command in COMMANDS:  # the order of --help, which cuts sentences that are not given to it
    text, examples = split_examples(command)
    sentence = " ".join(text.partition("\n\n")[0].split())
    register = app.command(cls=Command, help=text, short_help=sentence, epilog=examples)
    register(ends_well(declared(command)))


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
