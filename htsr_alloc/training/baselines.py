"""What the systems are compared with: PEFT's own tuners at the allocation's ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from peft import (
    AdaLoraConfig,
    EvaConfig,
    LoraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainerCallback

from htsr_alloc.errors import HtsrError

Batch = Mapping[str, Tensor]
STARTS = ("init_lora_weights", "eva_config")
EVA_BATCHES = 1000  # after so many its singular vectors are said not to converge


@dataclass(frozen=True)
class Baseline:
    """One of PEFT's tuners, or full fine-tuning.

    Attributes:
        put_on: adapts a model in place; it gets the model, the arguments of plain LoRA that has
            the allocation's parameters (ranks may be fractions), and the run's steps.
        start: starts the adapted model from batches of the training data.
        callbacks: what the Trainer must do while it trains.
        resumes: whether a checkpoint holds all that a run continues from.
        parameters: whether it adapts parameters, as those that stack a base's experts.
        whole: whether every weight is trained, so that there is no allocation, rank or budget.
    """

    title: str
    reference: str
    put_on: Callable[[Any, dict[str, Any], int], Any]
    start: Callable[[Any, Sequence[Batch]], None] | None = None
    callbacks: tuple[type[TrainerCallback], ...] = ()
    resumes: bool = True
    parameters: bool = False
    whole: bool = False

    settings: ClassVar[tuple[str, ...]] = ()
    defaults: ClassVar[Mapping[str, float]] = {}
    targets: ClassVar[tuple[str, ...]] = ()
    budget_knob: ClassVar[Literal["ranks"]] = "ranks"
    budget_experts: ClassVar[None] = None
    bilevel: ClassVar[bool] = False

    @property
    def takes_allocation(self) -> bool:
        """Whether an allocation of experts applies to it."""
        return not self.whole


def whole_ranks(ranks: Mapping[str, float]) -> dict[str, int]:
    """Each module's rank as a whole number; what rounding takes, the next modules get."""
    made, carry = {}, 0.0
    for name, rank in ranks.items():
        made[name] = max(1, round(rank + carry))
        carry += rank - made[name]
    return made


def _lora(model: Any, plain: dict[str, Any], steps: int, **more: Any) -> Any:
    """Plain LoRA; each linear's alpha grows with its rank, so that alpha / r is everywhere.

    A model without weights, on which parameters are counted, has none to start from.
    """
    if next(model.parameters()).is_meta:
        more = {k: v for k, v in more.items() if k not in STARTS}
    ranks = whole_ranks(plain["rank_pattern"])
    plain = {**plain, "r": max(1, round(plain["r"])), "rank_pattern": ranks}
    with warnings.catch_warnings():  # PEFT looks for the patterns among the modules alone
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        try:
            return get_peft_model(model, LoraConfig(**plain, **more))
        except ValueError as error:
            raise HtsrError(f"PEFT cannot adapt this model: {error}") from error


def _rslora(model: Any, plain: dict[str, Any], steps: int) -> Any:
    """The scale is alpha / √rank with one alpha for all ranks, as the paper has it."""
    return _lora(model, {**plain, "alpha_pattern": {}}, steps, use_rslora=True)


def _eva(model: Any, plain: dict[str, Any], steps: int) -> Any:
    """EVA without its moving of ranks between linears (ρ = 1): the allocation gives the ranks.

    All tokens count, not only the answers, which may be fewer in a batch than singular vectors.
    """
    how = EvaConfig(rho=1.0, use_label_mask=False)
    return _lora(model, plain, steps, init_lora_weights="eva", eva_config=how)


def _start_eva(model: Any, batches: Sequence[Batch]) -> None:
    """A of each linear: the first singular vectors of its inputs.

    Raises:
        HtsrError: a linear with fewer inputs than its rank, or no convergence.
    """
    seen = 0

    def forward(model: Any, inputs: Batch) -> Any:
        nonlocal seen
        seen += 1
        if seen > EVA_BATCHES:
            raise HtsrError(
                f"EVA's singular vectors do not converge in {EVA_BATCHES} batches.",
                "Lower the rank, or give more rows.",
            )
        return model(**inputs)

    masked = all("attention_mask" in batch and "pixel_values" not in batch for batch in batches)
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]

    def masks(batch: Any, config: Any) -> Tensor | None:
        return batch["attention_mask"].bool() if masked else None

    def tokens(x: Any, mask: Tensor | None, name: str) -> Tensor:
        x = x[0] if isinstance(x, tuple) else x
        if mask is not None and x.shape[:2] == mask.shape:
            return x[mask]
        return x.reshape(-1, x.shape[-1])

    initialize_lora_eva_weights(
        model,
        inputs,
        forward_fn=forward,
        prepare_model_inputs_fn=masks,
        prepare_layer_inputs_fn=tokens,
        show_progress_bar=False,
    )


def _adalora(model: Any, plain: dict[str, Any], steps: int) -> Any:
    """AdaLoRA: starts at the budget's ranks and prunes a third of them while it trains."""
    ranks, alphas = set(plain["rank_pattern"].values()), set(plain["alpha_pattern"].values())
    if len(ranks) > 1:
        raise HtsrError(
            "AdaLoRA finds its own ranks from one that all linears start with.",
            "Give an allocation with as many experts on every layer.",
        )
    start = max(1, round(ranks.pop()))
    given = {k: v for k, v in plain.items() if k not in ("r", "rank_pattern", "alpha_pattern")}
    given |= {"lora_alpha": alphas.pop(), "peft_type": "ADALORA", "init_r": start}
    config = AdaLoraConfig(
        **given,
        target_r=max(1, math.floor(start / 1.5)),
        total_step=steps,
        tinit=steps // 10,
        tfinal=steps // 3,
    )
    return get_peft_model(model, config)


class AllocateRanks(TrainerCallback):
    """AdaLoRA's pruning, after each step and before its gradients are dropped."""

    def on_optimizer_step(self, args, state, control, model: Any = None, **kwargs: Any) -> None:
        """``global_step`` counts finished steps; this one is not among them yet."""
        getattr(model, "module", model).base_model.update_and_allocate(state.global_step + 1)


def _full(model: Any, plain: dict[str, Any], steps: int) -> Any:
    """Every weight is trained."""
    return model.requires_grad_(True)


BASELINES: dict[str, Baseline] = {
    "lora": Baseline("LoRA", "arXiv 2106.09685", _lora, parameters=True),
    "dora": Baseline("DoRA", "arXiv 2402.09353", partial(_lora, use_dora=True)),
    "pissa": Baseline("PiSSA", "arXiv 2404.02948", partial(_lora, init_lora_weights="pissa")),
    "rslora": Baseline("rsLoRA", "arXiv 2312.03732", _rslora, parameters=True),
    "eva": Baseline("EVA", "arXiv 2410.07170", _eva, start=_start_eva),
    "adalora": Baseline(
        "AdaLoRA", "arXiv 2303.10512", _adalora, callbacks=(AllocateRanks,), resumes=False
    ),
    "full": Baseline("full fine-tuning", "every weight is trained", _full, whole=True),
}


def start_batches(
    model: Any,
    examples: Sequence[Any],
    collate: Callable[[Sequence[Any]], Batch],
    batch_size: int,
) -> list[Batch]:
    """Batches on the model's device, each with twice as many tokens as the largest rank.

    Fewer would not determine as many singular vectors. An image is counted as one token.

    Raises:
        HtsrError: the data is smaller than one such batch.
    """
    ranks = [r for m in model.modules() if isinstance(m, LoraLayer) for r in m.r.values()]
    least, device = 2 * max(ranks), next(model.parameters()).device
    batches, held, count = [], [], 0
    for example in examples:
        held.append(example)
        count += example.length
        if len(held) >= batch_size and count >= least:
            batch = collate(held)
            batches.append({name: value.to(device) for name, value in batch.items()})
            held, count = [], 0
    if not batches:
        raise HtsrError(
            f"The method starts from at least {batch_size} rows and {least} tokens of data.",
            "Give more rows, or a lower rank.",
        )
    return batches
