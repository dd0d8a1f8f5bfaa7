"""``htsr study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli.options import Quiet
from htsr_alloc.cli.screen import Screen


def study(
    plan: Annotated[Path, typer.Argument(help="A study file, as data/study/smollm2.yaml.")],
    report: Annotated[bool, typer.Option("--report", help="Only report what is done.")] = False,
    limit: Annotated[Optional[int], typer.Option(help="Stop after so many cells.")] = None,
    baseline: Annotated[
        Optional[str], typer.Option(help="The row to take differences from; default the study's.")
    ] = None,
    into: Annotated[
        Optional[Path], typer.Option(help="Also put the table into this document, at its marks.")
    ] = None,
    figure: Annotated[Optional[Path], typer.Option(help="Also draw the differences.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Compare allocations and systems at equal trainable parameters.

    Stop it at any moment: the same command goes on, and may run several times at once.
    """
    import htsr_alloc.training  # noqa: F401 - says in a sentence what is not installed
    from htsr_alloc.training.models import device_of, silence
    from htsr_alloc.training.study import summary
    from htsr_alloc.training.study.plan import read_study
    from htsr_alloc.training.study.running import check, run
    from htsr_alloc.training.study.store import Store

    screen = Screen(quiet=quiet)
    asked = read_study(plan, baseline)
    if not report:
        silence()
        run(asked, device_of(device), screen.note, limit)
    store = Store(asked.results)
    if asked.model.exists():
        check(asked, store)
    else:  # which settings a line was made with is told by the model's files too
        screen.note(f"{asked.model.name} is not here, so the lines' settings are not compared")
    done = store.read()
    lines = summary.summarise(asked, done)
    table = summary.markdown(asked, lines, done)
    screen.text(table)
    if into is not None:
        summary.write_into(into, table)
        screen.note(f"wrote {into}")
    if figure is not None:
        summary.plot(asked, lines, figure)
        screen.note(f"wrote {figure}")
