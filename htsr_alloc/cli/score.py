"""``htsr score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.choices import SCORE
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Device, Dtype, OutFile
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError
from htsr_alloc.training import check_installed


def score(
    method: Annotated[str, typer.Argument(help=f"What is measured. Choose from {SCORE.mark}.")],
    model: Annotated[str | None, "Folder or hub id of the model."] = None,
    metrics: Annotated[Path | None, "Metrics file with its spectra beside it, for snr."] = None,
    data: Annotated[str | None, "Rows: JSON lines, or a hub data set as org/name:split."] = None,
    limit: Annotated[int | None, "Number of rows, from the first; default 64."] = None,
    r: Annotated[int | None, "Rank r of gain and eva; default 8."] = None,
    batch_size: Annotated[int | None, "Rows of a batch of gain and eva; default 8."] = None,
    per_module: Annotated[bool, "Score each linear, not each layer by their mean."] = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    output: OutFile = None,
    *,
    hub: Hub,
    screen: Screen,
) -> None:
    """Score layers from weights or data and write MODEL.METHOD.csv, which allocate --scores reads.

    Examples:
        htsr score gain --model model --data train.jsonl
        htsr score snr --metrics smollm2.metrics.json -o snr.csv
        htsr score fisher --model model --data train.jsonl --per-module -o fisher.json
    """
    check_installed()
    from htsr_alloc import files
    from htsr_alloc.training.models import silence
    from htsr_alloc.training.scoring.run import FORMATS
    from htsr_alloc.training.scoring.run import score as compute

    SCORE.check(method)
    silence()
    stem = Path(model or metrics or method).name.removesuffix(".json").removesuffix(".metrics")
    path = output or Path(f"{stem}.{method}.csv")
    to_stdout = str(path) == "-"
    if not to_stdout and path.suffix not in FORMATS:
        raise HtsrError(f"A score file ends in .csv or .json, not in {path.suffix or 'nothing'}.")
    rows = None if data is None else hub.rows(data)
    files.refuse_overwriting(path, [read for read in (metrics, rows) if read is not None])
    found = compute(
        method,
        model=None if model is None else hub.folder(model),
        metrics=metrics,
        data=rows,
        r=r,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
    )
    text = found.text(path.suffix, per_module)
    if to_stdout:
        screen.text(text)
        return
    files.write_text(path, text)
    screen.show(views.scores(found.rows(per_module)))
    screen.note(f"wrote {path}")
