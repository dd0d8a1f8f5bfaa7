"""``htsr study``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli.options import Device, Quiet
from htsr_alloc.cli.screen import Screen
from htsr_alloc.training import check_installed


def study(
    plan: Annotated[Path, typer.Argument(help="A study file, as data/study/smollm2.yaml.")],
    report: Annotated[bool, "Run nothing; only report the cells that are done."] = False,
    limit: Annotated[int | None, "Number of cells to run before stopping."] = None,
    baseline: Annotated[
        str | None, "Row from which differences are taken; default the study file's."
    ] = None,
    into: Annotated[Path | None, "Document that also gets the table, between its marks."] = None,
    figure: Annotated[Path | None, "Figure of the differences to write."] = None,
    evidence: Annotated[
        Path | None, "File of findings to bring up to date, as htsr_alloc/allocation/findings.json."
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Compare allocations and systems at equal trainable parameters, each at its best rate.

    Stop it at any moment: the same command continues. Several processes may run it at once.

    Examples:
        htsr study data/study/smollm2.yaml --report
        htsr study data/study/smollm2.yaml --report --baseline MoLA-2468 --figure study.svg
    """
    check_installed()
    from htsr_alloc.training.models import device_of, silence
    from htsr_alloc.training.study import table
    from htsr_alloc.training.study.plan import read_study
    from htsr_alloc.training.study.running import check, run
    from htsr_alloc.training.study.store import Store
    from htsr_alloc.training.study.summary import summarise

    screen = Screen(quiet=quiet)
    asked = read_study(plan, baseline)
    if not report:
        silence()
        run(asked, device_of(device), screen.note, limit)
    store = Store(asked.results)
    if asked.away is None:
        check(asked, store)
    else:  # which settings a line was made with is told by the model's and the tasks' files too
        screen.note(f"{asked.away} is not here, so the lines' settings are not compared")
    done = store.read()
    lines = summarise(asked, done)
    text = table.markdown(asked, lines, done)
    screen.text(text)
    if into is not None:
        table.write_into(into, text, plan.stem)
        screen.note(f"wrote {into}")
    if figure is not None:
        table.plot(asked, lines, figure)
        screen.note(f"wrote {figure}")
    if evidence is not None:
        from htsr_alloc.allocation.findings import write_findings
        from htsr_alloc.training.study.findings import findings

        write_findings(evidence, plan.name, findings(asked, done, plan))
        screen.note(f"wrote {evidence}")
