"""The ``htsr`` command: arguments in, one call each, output through ``Screen``.

Heavy imports stand inside the commands: ``--help`` and ``allocate`` load no torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from htsr_alloc import __version__, views
from htsr_alloc.command import (
    ESTIMATOR_HELP,
    AsJson,
    CacheDir,
    Exclude,
    Include,
    Offline,
    OutFile,
    Quiet,
    Revision,
    Source,
    Token,
    app,
    command,
)
from htsr_alloc.errors import HtsrError
from htsr_alloc.screen import Screen, parse_size

if TYPE_CHECKING:
    from htsr_alloc.layers import LayerMap
    from htsr_alloc.reading import Checkpoint
    from htsr_alloc.records import Metrics


def main() -> None:
    """Entry point."""
    app()


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


@command
def inspect(
    source: Source,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    include: Include = None,
    exclude: Exclude = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """List a checkpoint's layers and matrices from its headers, and what analyze would take."""
    screen = Screen(as_json, quiet)
    checkpoint = _open(source, revision, token, cache_dir, offline)
    _inspect(screen, checkpoint, include, exclude)


@command
def analyze(
    source: Source,
    output: OutFile = None,
    estimator: Annotated[Optional[str], typer.Option(help=ESTIMATOR_HELP)] = None,
    bins: Annotated[int, typer.Option(help="Bins of the histogram that finds the peak.")] = 100,
    engine: Annotated[str, typer.Option(help="auto, exact, fast, portable or cuda.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    farms: Annotated[
        bool, typer.Option("--farms", help="Pool windows of one shape (default estimator: median).")
    ] = False,
    farms_rows: Annotated[int, typer.Option(help="Rows of a FARMS window.")] = 100,
    farms_ratio: Annotated[float, typer.Option(help="Columns of a window for each row.")] = 2.0,
    farms_windows: Annotated[int, typer.Option(help="Windows along each axis.")] = 10,
    include: Include = None,
    exclude: Exclude = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    workers: Annotated[
        Optional[int], typer.Option(help="Threads, a matrix each; default one a core.")
    ] = None,
    max_memory: Annotated[
        Optional[str], typer.Option(help="Bound on the whole process, as 8GB or 500MB.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Forget what an interrupted run finished.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a matrix could not be fitted.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As inspect.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fit every weight matrix's spectrum and write MODEL.metrics.json, one value a layer."""
    # Of torchrun's processes the first speaks.
    screen = Screen(as_json, quiet or os.environ.get("RANK", "0") != "0")
    checkpoint = _open(source, revision, token, cache_dir, offline)
    if dry_run:
        _inspect(screen, checkpoint, include, exclude)
        return
    from htsr_alloc import analysis, decompose, records
    from htsr_alloc.spectrum import choose_device

    limits = decompose.Limits(workers, parse_size(max_memory) if max_memory else None)

    chosen = choose_device(device)
    if device == "auto":
        screen.note(f"device: {chosen}")
    settings = records.Settings(
        estimator=estimator or ("median" if farms else "official"),
        bins=bins,
        engine=engine,
        device=chosen,
        farms=records.Farms(farms_rows, farms_ratio, farms_windows) if farms else None,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
    )
    to_stdout = output is not None and str(output) == "-"
    run_files = None
    if not to_stdout:
        name = checkpoint.name.rpartition("/")[2]
        run_files = analysis.RunFiles(output or Path(f"{name}.metrics.json"))
    metrics = analysis.analyze(
        checkpoint, settings, run_files, limits=limits, restart=restart, progress=screen.progress
    )
    if metrics is None:  # not the first rank
        return
    if to_stdout:
        screen.text(records.dumps(metrics))
    else:
        views.show_metrics(screen, metrics)
        screen.note(f"wrote {run_files.metrics} and {run_files.spectra.name}" if run_files else "")
    _warn_unfitted(screen, metrics, strict)


@command
def fit(
    metrics: Annotated[Path, typer.Argument(help="A metrics file with its spectra beside it.")],
    estimator: Annotated[str, typer.Option(help=ESTIMATOR_HELP)],
    bins: Annotated[int, typer.Option(help="Bins of the histogram that finds the peak.")] = 100,
    output: OutFile = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 3 when a matrix could not be fitted.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Estimate again from the kept spectra, without the checkpoint."""
    from htsr_alloc import analysis, refit

    screen = Screen(as_json, quiet)
    old = analysis.RunFiles(metrics)
    path = output or metrics.with_name(f"{old.stem}.{estimator}.metrics.json")
    fitted = refit.refit(metrics, analysis.RunFiles(path), estimator, bins)
    views.show_metrics(screen, fitted)
    screen.note(f"wrote {path}")
    _warn_unfitted(screen, fitted, strict)


@command
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
        metrics = _newest_metrics()
        screen.note(f"metrics: {metrics.name}")
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


@command
def export(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    to: Annotated[str, typer.Option(help="mola, peft-rank, axolotl or csv.")],
    model: Annotated[
        Optional[str], typer.Option(help="The checkpoint, whose module names are then checked.")
    ] = None,
    target: Annotated[
        Optional[list[str]], typer.Option(help="Adapt modules of this name; repeatable.")
    ] = None,
    r: Annotated[int, typer.Option("--r", help="Rank of one expert.")] = 8,
    lora_alpha: Annotated[int, typer.Option(help="Numerator of the LoRA scale.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout on the adapter's input.")] = 0.05,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    offline: Offline = False,
    output: OutFile = None,
    quiet: Quiet = False,
) -> None:
    """Write an allocation in the words of another trainer."""
    from htsr_alloc import export as exporting
    from htsr_alloc import files, records

    screen = Screen(quiet=quiet)
    loaded = records.loads(records.Allocation, files.read_bytes(allocation), allocation.name)
    lora = exporting.Lora(r, lora_alpha, lora_dropout, tuple(target or ()))
    if to == "mola":
        text = exporting.to_mola(loaded, lora)
    elif to == "peft-rank":
        modules = None
        if model is not None:
            modules = _modules(_open(model, revision, token, cache_dir, offline))
        text = exporting.to_peft_rank(loaded, lora, modules)
    elif to == "axolotl":
        text = exporting.to_axolotl(loaded, lora)
    elif to == "csv":
        text = exporting.to_csv(loaded)
    else:
        raise HtsrError(
            f"There is no export {to!r}.", f"Choose from {', '.join(exporting.EXPORTS)}."
        )
    if output is None or str(output) == "-":
        screen.text(text)
    else:
        files.write_text(output, text)
        screen.note(f"wrote {output}")


@command
def build(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    model: Annotated[Path, typer.Option(help="The model's folder; --dry-run reads its config.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what each layer would get.")
    ] = False,
    system: Annotated[
        str, typer.Option(help="alphalora, goat, goat_plus, mor, hydra or adamole.")
    ] = "alphalora",
    target: Annotated[
        Optional[list[str]], typer.Option(help="Adapt linears of this name; repeatable.")
    ] = None,
    r: Annotated[int, typer.Option("--r", help="Rank of one expert.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Numerator of the LoRA scale.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout on the experts' input.")] = 0.05,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="The adapter's folder.")
    ] = None,
    control: Annotated[
        Optional[Path], typer.Option(help="Also write plain LoRA of the same ranks, as JSON.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Put an allocation's experts on a model, and show what each layer got."""
    from htsr_alloc import files
    from htsr_alloc.lora_moe.build import build as put_on
    from htsr_alloc.lora_moe.build import control as plain_lora
    from htsr_alloc.lora_moe.build import describe, empty_model, load, open_model, resolve_layers

    screen = Screen(as_json, quiet)
    loaded = load(allocation)
    if not dry_run and output is None:
        raise HtsrError("An adapter needs a folder.", "Give -o FOLDER, or --dry-run.")
    base = empty_model(model) if dry_run else open_model(model)
    prefixes = resolve_layers(base, loaded)
    settings = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    text = None
    if control is not None:
        text = plain_lora(base, loaded, target_modules=target, **settings)  # type: ignore[arg-type]
    made = put_on(base, loaded, system=system, target_modules=target, **settings)
    views.show_build(screen, made, describe(made, prefixes))
    if control is not None and text is not None:
        files.write_text(control, text)
        screen.note(f"wrote {control}")
    if not dry_run:
        made.save_pretrained(str(output))
        screen.note(f"wrote {output}")


def _inspect(screen: Screen, checkpoint: Checkpoint, include, exclude) -> None:
    from htsr_alloc.cost import predict
    from htsr_alloc.schedule import available_cores

    layer_map = _layer_map(checkpoint, include, exclude)
    cost = predict(layer_map.matrices, available_cores())
    views.show_inspection(screen, checkpoint, layer_map, cost)


def _layer_map(checkpoint: Checkpoint, include=None, exclude=None) -> LayerMap:
    from htsr_alloc.layers import map_layers

    return map_layers(
        checkpoint.tensors,
        num_hidden_layers=checkpoint.num_hidden_layers,
        include=include or (),
        exclude=exclude or (),
    )


def _open(source, revision, token, cache_dir, offline) -> Checkpoint:
    from htsr_alloc.checkpoint import open_checkpoint

    return open_checkpoint(
        source, revision=revision, token=token, cache_dir=cache_dir, offline=offline
    )


def _modules(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Block prefix -> the names of its linear modules."""
    layer_map = _layer_map(checkpoint)
    modules: dict[str, list[str]] = {prefix: [] for prefix in layer_map.prefixes}
    for matrix in layer_map.matrices:
        names = modules[layer_map.prefixes[matrix.layer]]
        if matrix.module not in names:
            names.append(matrix.module)
    return modules


def _newest_metrics() -> Path:
    found = sorted(Path().glob("*.metrics.json"), key=lambda p: (p.stat().st_mtime_ns, p.name))
    if not found:
        raise HtsrError(
            "There is no *.metrics.json in this folder.",
            "Name a metrics file, or run htsr analyze first.",
        )
    return found[-1]


def _warn_unfitted(screen: Screen, metrics: Metrics, strict: bool) -> None:
    from htsr_alloc.records import FAILED

    failed = [matrix for matrix in metrics.matrices if matrix.status == FAILED]
    for matrix in failed[:10]:
        screen.warn(f"{matrix.tensor} has no fit: {matrix.reason}")
    if len(failed) > 10:
        screen.warn(f"... and {len(failed) - 10} more; see the metrics file.")
    if failed and strict:
        raise typer.Exit(3)


if __name__ == "__main__":
    main()
