"""What the commands of ``htsr`` share: the app, common options, exit codes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from htsr_alloc.errors import HtsrError
from htsr_alloc.screen import Screen

app = typer.Typer(
    name="htsr",
    help="Decide from a model's weights how many LoRA experts each layer gets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)

Source = Annotated[str, typer.Argument(help="A .safetensors file, a folder, or a hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit of a hub id.")]
Token = Annotated[Optional[str], typer.Option(help="Access token of the hub.")]
CacheDir = Annotated[Optional[Path], typer.Option(help="Where hub files are cached.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use the hub's local cache only.")]
Include = Annotated[
    Optional[list[str]], typer.Option(help="Only tensors like this, as '*self_attn*'; repeatable.")
]
Exclude = Annotated[Optional[list[str]], typer.Option(help="No tensors like this; repeatable.")]
OutFile = Annotated[
    Optional[Path], typer.Option("--output", "-o", help="Where to write; - is stdout.")
]
ESTIMATOR_HELP = "official, paper, band, median or ks."


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose known failures end in one sentence and an exit code."""

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

    return app.command(name=function.__name__.lstrip("_"))(run)
