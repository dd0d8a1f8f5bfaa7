"""``htsr allocate``."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.choices import ADAPTER, OVER, POOL, REPAIR, STRATEGY
from htsr_alloc.cli.options import OutFile, pairs
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from htsr_alloc.allocation.linears import Linears
    from htsr_alloc.records import Allocation, Metrics


def allocate(
    metrics: Annotated[
        Path | None, typer.Argument(help="A metrics file; default the newest here.")
    ] = None,
    T: Annotated[
        str | None,
        "Budget T: experts of all layers together; or of each stack, as "
        "language_model=160,vision_tower=40.",
    ] = None,
    params: Annotated[
        str | None,
        "Budget in trainable parameters, such as 100M, in place of --T; at most so many are spent.",
    ] = None,
    target_share: Annotated[
        str | None, "The same budget as a share of the base model's parameters, such as 1%."
    ] = None,
    r: Annotated[
        int | None, "Rank r of one expert, for --params and --target-share; default 8."
    ] = None,
    model: Annotated[
        str | None,
        "Folder or hub id of the model, on whose linears, known from its config alone, a budget in "
        "parameters is counted; default on the matrices of its checkpoint.",
    ] = None,
    adapter_kind: Annotated[
        str,
        "What gets the budget: experts of a LoRA mixture, or ranks of plain LoRA (with --rank).",
        ADAPTER,
    ] = "lora-moe",
    rank: Annotated[
        int | None,
        "Budget of --for lora: as many trainable parameters as this rank on every adapted linear.",
    ] = None,
    beta: Annotated[float | None, "Exponent beta of AlphaLoRA's eq. 6; default 2.5."] = None,
    spread: Annotated[
        float | None, "Ratio of the largest quota to the smallest, from which beta is solved."
    ] = None,
    metric: Annotated[
        str | None,
        "Metric that scores layers: pl_alpha_hill (default), alpha_hat, stable_rank, or a "
        "mixture such as pl_alpha_hill:0.5,stable_rank:0.5.",
    ] = None,
    scores: Annotated[Path | None, "CSV or JSON file of scores, in place of a metric."] = None,
    column: Annotated[str | None, "Column of the --scores file; default score."] = None,
    per_module: Annotated[bool, "Decide a count for each linear, not for each layer."] = False,
    pool: Annotated[
        str | None,
        "Linears that --per-module compares: those of one role (the default), or all.",
        POOL,
    ] = None,
    targets: Annotated[
        list[str] | None,
        "Name of linears that are adapted, for parameter budgets and --per-module; with --for lora "
        "also experts, a mixture's own. Repeatable.",
    ] = None,
    stack: Annotated[
        str | None, "Allocate one stack of layers only, as language_model or visual."
    ] = None,
    score_over: Annotated[
        str,
        "Matrices that a layer's score is the mean over; adapted are those that get experts.",
        OVER,
    ] = "all",
    strategy: Annotated[str, "How counts are decided.", STRATEGY] = "alphalora",
    repair: Annotated[
        str, "How quotas become whole numbers; official is eq. 7 as released.", REPAIR
    ] = "remainder",
    low: Annotated[int, "Fewest experts, or lowest rank, of a layer."] = 1,
    high: Annotated[int | None, "Most experts, or highest rank, of a layer."] = None,
    top_k: Annotated[int, "Experts K that a token uses at most."] = 2,
    groups: Annotated[str | None, "Groups of the mola strategy, as 2468 or 4-6-8-10."] = None,
    experts: Annotated[str | None, "Counts of the explicit strategy, as 1,3,5."] = None,
    settings: Annotated[
        list[str] | None,
        "Setting of the strategy as NAME=VALUE; repeatable. Names: {allocation.settings:SETTINGS}.",
    ] = None,
    layers: Annotated[int | None, "Number of layers, where there is no metrics file."] = None,
    sensitivity: Annotated[
        bool, "Also show how the counts change with estimator, beta and matrices."
    ] = False,
    draws: Annotated[int | None, "Bootstrap draws of --sensitivity; default 200."] = None,
    seed: Annotated[int | None, "Seed of a random strategy or of --sensitivity; default 0."] = None,
    output: OutFile = None,
    force: Annotated[bool, "Replace an output file that differs."] = False,
    *,
    screen: Screen,
) -> None:
    """Turn scores into experts, or ranks, per layer and write MODEL.allocation.json.

    Ranks go to MODEL.ranks.allocation.json.

    Examples:
        htsr allocate --T 160 --beta 2.5
        htsr allocate smollm2.metrics.json --params 10M --per-module --target q_proj -o -
        htsr allocate --for lora --rank 16 -o lora.allocation.json
    """
    from htsr_alloc import allocation, files, records
    from htsr_alloc.allocation.units import experts_left_alone
    from htsr_alloc.records.keeping import refuse_to_replace

    to_stdout = output is not None and str(output) == "-"
    _refuse_idle(
        {
            "--column names a column of --scores": column is not None and scores is None,
            "--draws belongs to --sensitivity": draws is not None and not sensitivity,
            "--sensitivity is a table, and -o - prints the allocation": sensitivity and to_stdout,
        }
    )
    loaded, source, stem = None, None, strategy
    given = allocation.read_scores(scores, column or "score") if scores is not None else None
    own = {
        "beta": beta,
        "spread": spread,
        "groups": allocation.parse_groups(groups) if groups is not None else None,
        "experts": allocation.parse_counts(experts) if experts is not None else None,
    }
    if not sensitivity or "seed" in allocation.keywords_of(strategy):
        own["seed"] = seed
    for name, value in allocation.read_settings(strategy, pairs(settings or ())).items():
        if own.get(name) is not None:
            raise HtsrError(f"`{name}` is given twice.", f"Remove --set {name}.")
        own[name] = value
    request = allocation.Request.of(
        strategy,
        T=_experts(T),
        params=allocation.parse_params(params) if params is not None else None,
        target_share=allocation.parse_share(target_share) if target_share is not None else None,
        r=r,
        adapter_kind=adapter_kind,
        rank=rank,
        metric=metric,
        scores=given,
        per_module=per_module,
        pool=pool,
        targets=targets or (),
        repair=repair,
        bounds=allocation.Bounds(low, high),
        top_k=top_k,
        layers=layers,
        stack=stack,
        score_over=score_over,
        **own,
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
        loaded = records.loads(records.Metrics, text, str(metrics))
        source = records.File(metrics.name, hashlib.sha256(text).hexdigest())
        stem = metrics.name.removesuffix(".json").removesuffix(".metrics")
        for layer in loaded.layers:
            if layer.unfitted:
                screen.warn(f"{layer.prefix}: {layer.reason}; its value is the mean of the rest.")
    if model is not None:
        request = replace(request, linears=_linears(model, loaded))
    kind = ".ranks" if adapter_kind == "lora" else ""
    path = output or Path(f"{stem}{kind}.allocation.json")
    files.refuse_overwriting(path, [read for read in (metrics, scores) if read is not None])
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
    if not force:
        refuse_to_replace(path, records.Allocation, lambda there: _difference(there, result))
    files.write_text(path, records.dumps(result))
    screen.show(views.allocation(result, report, metrics))
    left = experts_left_alone(loaded, request.targets) if loaded is not None else 0
    if left and (result.modules or result.parameters is not None):
        screen.note(f"{left} matrices of the base's own experts are passed over: they get none.")
    for said in allocation.known(result):
        screen.note(said)
    screen.note(f"wrote {path}")


def _difference(there: Allocation, result: Allocation) -> str | None:
    """Only dates and the hash of the metrics may differ."""
    origin = {"tool": None, "metrics": None}
    same = replace(there, **origin) == replace(result, **origin)
    return None if same else "differs from this allocation"


def _refuse_idle(idle: dict[str, bool]) -> None:
    """Options that would do nothing: name -> whether it is given without what it is for."""
    for text, is_idle in idle.items():
        if is_idle:
            raise HtsrError(f"{text}.", "Leave it out.")


def _linears(model: str, metrics: Metrics | None) -> Linears:
    from htsr_alloc.cli.opening import Hub
    from htsr_alloc.lora_moe.build import empty_model
    from htsr_alloc.lora_moe.resolve import linears_of
    from htsr_alloc.training.models import silence

    if metrics is None:
        raise HtsrError("`model` is about a budget in parameters.", "Leave it out.")
    silence()
    return linears_of(empty_model(Hub().folder(model, weights=False)), metrics)


def newest_metrics() -> Path:
    found = sorted(Path().glob("*.metrics.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    if not found:
        raise HtsrError(
            "There is no *.metrics.json in this folder.",
            "Name a metrics file, or run htsr analyze first.",
        )
    return found[-1]


def _experts(text: str | None) -> Any:
    """``--T``; a wrong one is wrong usage."""
    from htsr_alloc import allocation

    try:
        return None if text is None else allocation.parse_experts(text)
    except HtsrError as error:
        raise typer.BadParameter(error.message, param_hint="--T") from None
