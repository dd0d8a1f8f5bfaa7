"""``htsr allocate``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.options import AsJson, OutFile, Quiet
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError


def allocate(
    metrics: Annotated[
        Optional[Path], typer.Argument(help="A metrics file; default the newest here.")
    ] = None,
    T: Annotated[Optional[int], typer.Option("--T", help="Experts of all layers together.")] = None,
    params: Annotated[
        Optional[str],
        typer.Option(help="Trainable parameters in place of --T: 100M, or the closest below."),
    ] = None,
    target_share: Annotated[
        Optional[str], typer.Option(help="The same as a share of the base model: 1%.")
    ] = None,
    r: Annotated[
        Optional[int],
        typer.Option("--r", "--lora-r", help="Rank of one expert, for --params; default 8."),
    ] = None,
    beta: Annotated[Optional[float], typer.Option(help="Exponent of eq. 6; default 2.5.")] = None,
    spread: Annotated[
        Optional[float], typer.Option(help="Solve beta for: largest quota / smallest.")
    ] = None,
    metric: Annotated[
        Optional[str],
        typer.Option(
            help="pl_alpha_hill (default), alpha_hat, stable_rank, or several: "
            "pl_alpha_hill:0.5,stable_rank:0.5."
        ),
    ] = None,
    scores: Annotated[
        Optional[Path], typer.Option(help="Scores from a CSV or JSON file, in place of a metric.")
    ] = None,
    column: Annotated[
        Optional[str], typer.Option(help="The column of --scores; default score.")
    ] = None,
    per_module: Annotated[
        bool, typer.Option("--per-module", help="A count for each linear, not for each layer.")
    ] = False,
    pool: Annotated[
        Optional[str],
        typer.Option(
            help="Which linears --per-module compares: role (default), those of one; all."
        ),
    ] = None,
    targets: Annotated[
        Optional[list[str]],
        typer.Option(
            "--target", help="Linears that are adapted, for --params and --per-module; repeatable."
        ),
    ] = None,
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
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Also show how the counts change with estimator, beta and matrices.",
        ),
    ] = False,
    draws: Annotated[
        Optional[int], typer.Option(help="Bootstrap draws of --sensitivity; default 200.")
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of the bootstrap; default 0.")] = None,
    output: OutFile = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Turn scores into experts per layer and write MODEL.allocation.json."""
    from htsr_alloc import allocation, files, records

    screen = Screen(as_json, quiet)
    to_stdout = output is not None and str(output) == "-"
    _refuse_idle(
        {
            "--column names a column of --scores": column is not None and scores is None,
            "--draws and --seed belong to --sensitivity": not sensitivity
            and (draws is not None or seed is not None),
            "--sensitivity is a table, and -o - prints the allocation": sensitivity and to_stdout,
        }
    )
    loaded, source, stem = None, None, strategy
    given = allocation.read_scores(scores, column or "score") if scores is not None else None
    request = allocation.Request.of(
        strategy,
        T=T,
        params=allocation.parse_params(params) if params is not None else None,
        target_share=allocation.parse_share(target_share) if target_share is not None else None,
        r=r,
        metric=metric,
        scores=given,
        per_module=per_module,
        pool=pool,
        targets=targets or (),
        repair=repair,
        bounds=allocation.Bounds(low, high),
        top_k=top_k,
        layers=layers,
        beta=beta,
        spread=spread,
        groups=allocation.parse_groups(groups) if groups is not None else None,
        experts=allocation.parse_counts(experts) if experts is not None else None,
    )
    if given is not None:
        stem = given.source.file.rpartition(".")[0]
    if metrics is None and request.needs_metrics:
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
    result = allocation.allocate(loaded, request, source=source, tool=records.this_tool())
    report = None
    if sensitivity:
        from htsr_alloc.allocation.sensitivity import sensitivity_of

        if loaded is None or metrics is None:
            raise HtsrError("--sensitivity needs a metrics file.")
        report = sensitivity_of(
            loaded, metrics, request, draws=200 if draws is None else draws, seed=seed or 0
        )
    if to_stdout:
        screen.text(records.dumps(result))
        return
    path = output or Path(f"{stem}.allocation.json")
    files.write_text(path, records.dumps(result))
    views.show_allocation(screen, result, report)
    screen.note(f"wrote {path}")


def _refuse_idle(idle: dict[str, bool]) -> None:
    """Options that would do nothing: name -> whether it is given without what it is for."""
    for text, is_idle in idle.items():
        if is_idle:
            raise HtsrError(f"{text}.", "Leave it out.")


def newest_metrics() -> Path:
    found = sorted(Path().glob("*.metrics.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    if not found:
        raise HtsrError(
            "There is no *.metrics.json in this folder.",
            "Name a metrics file, or run htsr analyze first.",
        )
    return found[-1]
