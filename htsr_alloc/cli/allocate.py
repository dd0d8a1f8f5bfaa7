"""``htsr allocate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.options import (
    AsJson,
    OutFile,
    Quiet,
)
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError


def allocate(
    metrics: Annotated[
        Optional[Path], typer.Argument(help="A metrics file; default the newest here.")
    ] = None,
    budget: Annotated[
        Optional[int], typer.Option("--T", help="Experts of all layers together.")
    ] = None,
    beta: Annotated[float, typer.Option(help="Exponent of eq. 6.")] = 2.5,
    metric: Annotated[str, typer.Option(help="pl_alpha_hill, alpha_hat or stable_rank.")] = (
        "pl_alpha_hill"
    ),
    strategy: Annotated[str, typer.Option(help="alphalora, uniform, mola or explicit.")] = (
        "alphalora"
    ),
    repair: Annotated[str, typer.Option(help="remainder, or official: eq. 7 as released.")] = (
        "remainder"
    ),
    low: Annotated[int, typer.Option("--min", help="Least experts of a layer.")] = 1,
    high: Annotated[Optional[int], typer.Option("--max", help="Most experts of a layer.")] = None,
    top_k: Annotated[int, typer.Option(help="K: experts a token uses, at most.")] = 2,
    groups: Annotated[Optional[str], typer.Option(help="MoLA's groups: 2468 or 4-6-8-10.")] = None,
    experts: Annotated[
        Optional[str], typer.Option(help="Counts of the explicit strategy: 1,3,5,...")
    ] = None,
    layers: Annotated[Optional[int], typer.Option(help="Layers, without a metrics file.")] = None,
    output: OutFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn scores into experts per layer and write MODEL.allocation.json."""
    from htsr_alloc import allocation, files, records

    screen = Screen(as_json, quiet)
    loaded, source, stem = None, None, strategy
    needs_no_metrics = strategy in ("uniform", "mola", "explicit") and (layers or experts)
    if metrics is None and not needs_no_metrics:
        metrics = newest_metrics()
        screen.note(f"metrics: {metrics.name}")
        if metrics.stat().st_mtime > time.time() + 60:
            screen.warn(f"{metrics.name} is dated in the future: name the one you mean.")
    if metrics is not None:
        text = files.read_bytes(metrics)
        loaded = records.loads(records.Metrics, text, metrics.name)
        source = records.File(metrics.name, files.sha256(metrics))
        stem = metrics.name.removesuffix(".json").removesuffix(".metrics")
        for layer in loaded.layers:
            if layer.unfitted:
                screen.warn(f"{layer.prefix}: {layer.reason}; its value is the mean of the rest.")
    result = allocation.allocate(
        loaded,
        strategy=strategy,
        budget=budget,
        beta=beta,
        metric=metric,
        repair=repair,
        bounds=allocation.Bounds(low, high),
        top_k=top_k,
        groups=allocation.parse_groups(groups) if groups is not None else (),
        experts=allocation.parse_counts(experts) if experts is not None else (),
        layers=layers,
        source=source,
        tool=records.this_tool(),
    )
    if output is not None and str(output) == "-":
        screen.text(records.dumps(result))
        return
    path = output or Path(f"{stem}.allocation.json")
    files.write_text(path, records.dumps(result))
    views.show_allocation(screen, result)
    screen.note(f"wrote {path}")


def newest_metrics() -> Path:
    found = sorted(Path().glob("*.metrics.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    if not found:
        raise HtsrError(
            "There is no *.metrics.json in this folder.",
            "Name a metrics file, or run htsr analyze first.",
        )
    return found[-1]
