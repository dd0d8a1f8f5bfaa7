"""Records as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from htsr_alloc.cli.screen import Screen, bar, duration, size
from htsr_alloc.records import Module, as_json

COUNTS = ["score", "quota", "experts", "top_k", ""]

if TYPE_CHECKING:
    from htsr_alloc.allocation.sensitivity import Sensitivity
    from htsr_alloc.analysis.cost import Cost
    from htsr_alloc.checkpoints.layers import LayerMap
    from htsr_alloc.checkpoints.listing import Transfer
    from htsr_alloc.checkpoints.reading import Checkpoint
    from htsr_alloc.lora_moe.build import LayerReport
    from htsr_alloc.records import Allocation, Metrics


def show_inspection(
    screen: Screen, checkpoint: Checkpoint, layer_map: LayerMap, cost: Cost, moved: Transfer
) -> None:
    """Layers, matrices, what is left out and why, and what an analysis will take."""
    skipped = [
        *layer_map.skipped,
        *((name, "not in the index") for name in checkpoint.listing.unindexed),
    ]
    skipped += [(name, "quantised to integers") for name in layer_map.quantised]
    if screen.as_json:
        screen.result(
            {
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
                "bytes": sum(shard.nbytes for shard in checkpoint.listing.shards),
                "download_bytes": moved.download,
                "disk_bytes": moved.disk,
                "seconds": cost.seconds,
                "peak_bytes": cost.peak_bytes,
                "least_bytes": cost.least_bytes,
            }
        )
        return
    rows = []
    for number, prefix in enumerate(layer_map.prefixes):
        own = [m for m in layer_map.matrices if m.layer == number]
        shapes = sorted({f"{m.shape[0]}x{m.shape[1]}" for m in own})
        rows.append(
            [
                number,
                prefix,
                len(own),
                " ".join(dict.fromkeys(m.role for m in own)),
                " ".join(shapes),
            ]
        )
    screen.table(
        ["layer", "prefix", "matrices", "roles", "shapes"], rows, left=["prefix", "roles", "shapes"]
    )
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        screen.note(f"left out, {reason}: {names[0]}{more}")
    shards = checkpoint.listing.shards
    screen.note(
        f"{checkpoint.name}: {len(layer_map.prefixes)} layers, {len(layer_map.matrices)} matrices, "
        f"{size(sum(shard.nbytes for shard in shards))} in {len(shards)} "
        f"{'file' if len(shards) == 1 else 'files'}; analyze takes "
        f"about {duration(cost.seconds or 0)} and "
        f"at most {size(cost.peak_bytes)} of memory on this machine's CPU (--max-memory can bring "
        f"that down to {size(cost.least_bytes)})."
    )


def show_metrics(screen: Screen, metrics: Metrics) -> None:
    """One row a layer."""
    if screen.as_json:
        screen.result(as_json(metrics))
        return
    rows = [
        [x.layer, x.prefix, x.matrices, x.pl_alpha_hill, x.alpha_hat, x.stable_rank, x.reason or ""]
        for x in metrics.layers
    ]
    columns = ["layer", "prefix", "matrices", "pl_alpha_hill", "alpha_hat", "stable_rank", "note"]
    screen.table(columns, rows, left=["prefix", "note"])
    farms = ", FARMS windows" if metrics.settings.farms else ""
    screen.note(f"estimator: {metrics.settings.estimator}{farms}")


def show_allocation(
    screen: Screen, result: Allocation, sensitivity: Sensitivity | None = None
) -> None:
    """One row a layer with a bar, or one row a linear; then how stable the counts are."""
    if screen.as_json:
        found = as_json(result)
        both = {"allocation": found, "sensitivity": sensitivity and asdict(sensitivity)}
        screen.result(both if sensitivity else found)
        return
    rows = result.modules or result.evidence
    largest = max(row.experts for row in rows)
    top_k = [row.top_k for row in result.modules] or result.top_k
    screen.table(
        ["layer", "module" if result.modules else "prefix", *COUNTS],
        [
            [
                row.layer,
                (row.name if isinstance(row, Module) else row.prefix) or "-",
                row.score,
                row.quota,
                row.experts,
                k,
                bar(row.experts, largest),
            ]
            for row, k in zip(rows, top_k, strict=True)
        ],
        left=["prefix", "module", ""],
    )
    if sensitivity is not None:
        show_sensitivity(screen, sensitivity)
    strategy = result.strategy
    if strategy is not None:
        fields = as_json(strategy).items()
        given = {k: v for k, v in fields if v is not None and k not in ("name", "farms", "scores")}
        said = ", ".join(f"{key} {_said(value)}" for key, value in given.items())
        said += f", scores {strategy.scores.file}" if strategy.scores else ""
        said += ", FARMS windows" if strategy.farms else ""
        line = f"{strategy.name}: T = {result.budget} over {len(result.experts)} layers"
        screen.note(f"{line}; {said}" if said else line)
    if result.parameters is not None:
        money = result.parameters
        screen.note(
            f"{money.spent:,} of {money.asked:,} parameters at r = {money.r}, routers included"
        )


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_sensitivity(screen: Screen, found: Sensitivity) -> None:
    """One row a layer: its range under each cause, and the share of draws within one expert."""
    causes = list(found.causes)
    rows = []
    for layer in found.layers:
        cells: list[object] = [layer.layer, layer.prefix or "-", layer.experts]
        for cause in causes:
            seen = layer.ranges[cause]
            cells += [f"{seen.low}-{seen.high}", f"{seen.near:.0%}"]
        rows.append([*cells, "stable" if layer.stable else ""])
    columns = [name for cause in causes for name in (cause, "±1")]
    screen.table(["layer", "prefix", "experts", *columns, ""], rows, left=["prefix", ""])
    for cause, draws in found.causes.items():
        said = f"{draws} draws, seed {found.seed}" if isinstance(draws, int) else draws
        if isinstance(said, list):
            said = ", ".join(f"{x:g}" if isinstance(x, float) else str(x) for x in said)
        screen.note(f"{cause}: {said}")
    stable = sum(layer.stable for layer in found.layers)
    screen.note(
        f"{stable} of {len(found.layers)} layers are stable: within one expert in 90 % of the "
        "draws of every cause"
    )


def show_build(screen: Screen, model: Any, layers: Sequence[LayerReport]) -> None:
    """One row a layer, then the sum."""
    trainable, _ = model.get_nb_trainable_parameters()
    frozen = sum(p.numel() for n, p in model.named_parameters() if "lora_moe_" not in n)
    if screen.as_json:
        rows = [asdict(row) for row in layers]
        screen.result({"layers": rows, "trainable": trainable, "base": frozen})
        return
    columns = ["layer", "prefix", "experts", "top_k", "modules", "trainable", "share"]
    screen.table(
        columns,
        [
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
        ],
        left=["prefix"],
    )
    screen.note(
        f"{trainable:,} trainable parameters, {trainable / frozen:.2%} of the base's {frozen:,}"
    )
