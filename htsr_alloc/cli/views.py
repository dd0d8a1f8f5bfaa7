"""Records as views: JSON, tables and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from htsr_alloc.cli.screen import Table, View, bar, duration, size
from htsr_alloc.records import Module, as_json

if TYPE_CHECKING:
    from htsr_alloc.allocation.sensitivity import Sensitivity
    from htsr_alloc.analysis.cost import Cost
    from htsr_alloc.checkpoints.layers import LayerMap
    from htsr_alloc.checkpoints.listing import Transfer
    from htsr_alloc.checkpoints.reading import Checkpoint
    from htsr_alloc.lora_moe.build import LayerReport
    from htsr_alloc.records import Allocation, Metrics
    from htsr_alloc.training.evaluate import Score
    from htsr_alloc.training.run import Trained


def inspection(checkpoint: Checkpoint, layer_map: LayerMap, cost: Cost, moved: Transfer) -> View:
    """Layers, matrices, what is left out and why, and what an analysis will take."""
    skipped = [
        *layer_map.skipped,
        *((name, "not in the index") for name in checkpoint.listing.unindexed),
        *((name, "quantised to integers") for name in layer_map.quantised),
    ]
    shards = checkpoint.listing.shards
    nbytes = sum(shard.nbytes for shard in shards)
    data = {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "architecture": checkpoint.architecture,
        "layers": list(layer_map.prefixes),
        "matrices": [
            {
                "tensor": m.name,
                "layer": m.layer,
                "role": m.role,
                "expert": m.expert,
                "shape": m.shape,
                "dtype": m.ref.dtype,
            }
            for m in layer_map.matrices
        ],
        "skipped": [{"tensor": name, "reason": reason} for name, reason in skipped],
        "bytes": nbytes,
        "download_bytes": moved.download,
        "disk_bytes": moved.disk,
        "seconds": cost.seconds,
        "peak_bytes": cost.peak_bytes,
        "least_bytes": cost.least_bytes,
    }
    rows = []
    for number, prefix in enumerate(layer_map.prefixes):
        own = [m for m in layer_map.matrices if m.layer == number]
        roles = " ".join(dict.fromkeys(m.role for m in own))
        shapes = " ".join(sorted({f"{m.shape[0]}x{m.shape[1]}" for m in own}))
        rows.append([number, prefix, len(own), roles, shapes])
    columns = ["layer", "prefix", "matrices", "roles", "shapes"]
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    return View(
        data,
        [Table(columns, rows, left=["prefix", "roles", "shapes"])],
        [
            *(f"left out, {reason}: {_first(names)}" for reason, names in reasons.items()),
            f"{checkpoint.name}: {len(layer_map.prefixes)} layers, "
            f"{len(layer_map.matrices)} matrices, {size(nbytes)} in {len(shards)} "
            f"{'file' if len(shards) == 1 else 'files'}",
            f"analyze takes about {duration(cost.seconds or 0)} and at most "
            f"{size(cost.peak_bytes)} of memory on this machine's CPU; --max-memory can lower "
            f"that to {size(cost.least_bytes)}",
        ],
    )


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def metrics(found: Metrics) -> View:
    """One row a layer."""
    rows = [
        [x.layer, x.prefix, x.matrices, x.pl_alpha_hill, x.alpha_hat, x.stable_rank, x.reason or ""]
        for x in found.layers
    ]
    columns = ["layer", "prefix", "matrices", "pl_alpha_hill", "alpha_hat", "stable_rank", "note"]
    farms = ", FARMS windows" if found.settings.farms else ""
    return View(
        as_json(found),
        [Table(columns, rows, left=["prefix", "note"])],
        [f"estimator: {found.settings.estimator}{farms}"],
    )


def allocation(result: Allocation, found: Sensitivity | None = None) -> View:
    """One row a layer with a bar, or one row a linear; then how stable the counts are."""
    data = as_json(result)
    units = result.modules or result.evidence
    largest = max(unit.experts for unit in units)
    top_k = [unit.top_k for unit in result.modules] or result.top_k
    rows = [
        [
            unit.layer,
            (unit.name if isinstance(unit, Module) else unit.prefix) or "-",
            unit.score,
            unit.quota,
            unit.experts,
            k,
            bar(unit.experts, largest),
        ]
        for unit, k in zip(units, top_k, strict=True)
    ]
    name = "module" if result.modules else "prefix"
    columns = ["layer", name, "score", "quota", "experts", "top_k", ""]
    if result.holds_ranks:  # all ranks work on every token
        columns = ["layer", name, "score", "quota", "rank", ""]
        rows = [[*row[:5], row[6]] for row in rows]
    tables = [Table(columns, rows, left=[name, ""])]
    notes = []
    if found is not None:
        data = {"allocation": data, "sensitivity": asdict(found)}
        tables.append(_sensitivity(found))
        notes += _causes(found)
    if result.strategy is not None:
        strategy = result.strategy
        fields = as_json(strategy).items()
        given = {k: v for k, v in fields if v is not None and k not in ("name", "farms", "scores")}
        said = [f"{key} {_said(value)}" for key, value in given.items()]
        said += [f"scores {strategy.scores.file}"] if strategy.scores else []
        said += ["FARMS windows"] if strategy.farms else []
        what = "ranks" if result.holds_ranks else "T"
        line = f"{strategy.name}: {what} = {result.budget} over {len(result.experts)} layers"
        notes.append("; ".join([line, ", ".join(said)]) if said else line)
    if result.parameters is not None:
        money = result.parameters
        notes.append(
            f"{money.spent:,} of {money.asked:,} parameters"
            + (
                f", those of rank {money.r} on every linear"
                if result.holds_ranks
                else f" at r = {money.r}, routers included"
            )
        )
    return View(data, tables, notes)


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensitivity(found: Sensitivity) -> Table:
    """One row a layer: its range under each cause, and the share of draws within one expert."""
    rows = []
    for layer in found.layers:
        cells: list[object] = [layer.layer, layer.prefix or "-", layer.experts]
        for cause in found.causes:
            seen = layer.ranges[cause]
            cells += [f"{seen.low}-{seen.high}", f"{seen.near:.0%}"]
        rows.append([*cells, "stable" if layer.stable else ""])
    columns = [name for cause in found.causes for name in (cause, "±1")]
    return Table(["layer", "prefix", "experts", *columns, ""], rows, left=["prefix", ""])


def _causes(found: Sensitivity) -> list[str]:
    notes = []
    for cause, draws in found.causes.items():
        said = f"{draws} draws, seed {found.seed}" if isinstance(draws, int) else draws
        if isinstance(said, list):
            said = ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in said)
        notes.append(f"{cause}: {said}")
    stable = sum(layer.stable for layer in found.layers)
    notes.append(
        f"{stable} of {len(found.layers)} layers are stable: within one expert in 90 % of the "
        "draws of every cause"
    )
    return notes


def build(model: Any, layers: Sequence[LayerReport]) -> View:
    """One row a layer, then the sum."""
    trainable, _ = model.get_nb_trainable_parameters()
    frozen = sum(p.numel() for n, p in model.named_parameters() if "lora_moe_" not in n)
    rows = [
        [
            x.layer,
            x.prefix,
            x.experts if x.fewest == x.experts else f"{x.fewest}-{x.experts}",
            x.top_k,
            x.modules,
            f"{x.trainable:,}",
            f"{x.share:.2%}",
        ]
        for x in layers
    ]
    columns = ["layer", "prefix", "experts", "top_k", "modules", "trainable", "share"]
    return View(
        {"layers": [asdict(row) for row in layers], "trainable": trainable, "base": frozen},
        [Table(columns, rows, left=["prefix"])],
        [f"{trainable:,} trainable parameters, {trainable / frozen:.2%} of the base's {frozen:,}"],
    )


def trained(done: Trained) -> View:
    """One row a run."""
    columns = ["rows", "steps", "loss", "seconds", "trainable"]
    row = [done.rows, done.steps, done.loss, f"{done.seconds:.0f}", f"{done.trainable:,}"]
    return View(asdict(done), [Table(columns, [row])])


def score(found: Score) -> View:
    """One row an evaluation."""
    columns = ["rows", "right", "accuracy", "95 % interval", "loss"]
    interval = f"{found.low:.1%} to {found.high:.1%}"
    row = [found.n, found.correct, f"{found.accuracy:.1%}", interval, found.loss]
    return View(asdict(found), [Table(columns, [row])])
