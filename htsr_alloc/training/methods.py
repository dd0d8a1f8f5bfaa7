"""All that can be trained by name: systems and baselines, their settings and their defaults."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import TrainerCallback

from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.lora_moe.build import build
from htsr_alloc.lora_moe.config import SETTINGS, LoraMoeConfig
from htsr_alloc.lora_moe.plain import control
from htsr_alloc.lora_moe.systems import DEFAULT, SYSTEMS, System
from htsr_alloc.records import Allocation
from htsr_alloc.records.convert import convert
from htsr_alloc.records.lora import Lora
from htsr_alloc.training.baselines import BASELINES, Baseline, Batch, start_batches
from htsr_alloc.training.settings import LEARNING_RATE, Recipe

METHODS: dict[str, System | Baseline] = {**SYSTEMS, **BASELINES}


def method_of(name: str) -> System | Baseline:
    """The system or baseline of this name.

    Raises:
        HtsrError: there is none.
    """
    check_choice("system", name, METHODS)
    return METHODS[name]


def read_settings(name: str, given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Settings of LoraMoeConfig for a system, checked; sorted by name.

    Args:
        given: values of the field's type, or texts as the command line has them.

    Raises:
        HtsrError: an unknown setting, one that the system does not use, a wrong type or value.
    """
    method, made = method_of(name), {}
    for key in sorted(given):
        check_choice("setting", key, SETTINGS)
        if key not in method.settings:
            its = f"Its settings are {', '.join(method.settings)}." if method.settings else None
            raise HtsrError(f"{method.title} does not use {key}.", its or "It has no settings.")
        try:
            made[key] = convert(SETTINGS[key], given[key], key, lax=isinstance(given[key], str))
        except ValueError as error:
            raise HtsrError(f"{error}.") from None
    if made:
        LoraMoeConfig(system=name, **made)  # refuses a value out of its range
    return tuple(made.items())


def recipe_for(name: str, recipe: Recipe) -> Recipe:
    """The recipe with the system's own learning rate, where none is given."""
    rate = recipe.learning_rate or method_of(name).defaults.get("learning_rate", LEARNING_RATE)
    return dataclasses.replace(recipe, learning_rate=rate)


@dataclass(frozen=True)
class Adapter:
    """What is put on a model; the defaults are the AlphaLoRA paper's.

    A baseline gets rank N r, rounded, on a layer of N experts; r may then be a fraction.
    """

    system: str = DEFAULT
    r: float = Lora.r
    lora_alpha: float = Lora.lora_alpha
    lora_dropout: float = Lora.lora_dropout
    target: tuple[str, ...] = ()  # empty: every linear of a layer, or the system's ``targets``
    settings: tuple[tuple[str, Any], ...] = ()  # of ``read_settings``

    @property
    def method(self) -> System | Baseline:
        """The system or baseline."""
        return method_of(self.system)

    @property
    def whole(self) -> bool:
        """Whether the model itself is trained, without an adapter."""
        return isinstance(self.method, Baseline) and self.method.whole

    def put_on(
        self,
        model: Any,
        allocation: Allocation | Path | None,
        *,
        task_type: str | None = "CAUSAL_LM",
        heads: Sequence[str] = (),
        steps: int = 1,
    ) -> Any:
        """The adapted model: a PeftModel, or for full fine-tuning the model itself.

        Args:
            task_type: PEFT's. heads: modules that are trained and saved whole.
            steps: of the run, for a method that plans by them.

        Raises:
            HtsrError: an unknown system; an allocation where the system takes none, or none where
                it takes one; an allocation that does not fit the model.
        """
        method = self.method
        if not method.takes_allocation and allocation is not None:
            raise HtsrError(
                f"{method.title} takes no allocation of experts.", "Remove the allocation."
            )
        if method.takes_allocation and allocation is None:
            raise HtsrError(f"{self.system} needs an allocation file.", "htsr allocate writes one.")
        shared: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": list(self.target) or None,
        }
        task = {"task_type": task_type, "modules_to_save": list(heads) or None}
        if isinstance(method, Baseline):
            plain = {} if allocation is None else json.loads(control(model, allocation, **shared))
            inside = plain.get("target_parameters")
            if inside and not method.parameters:
                raise HtsrError(
                    f"{method.title} cannot adapt a parameter, as {inside[0]} is.",
                    "Take the system lora or rslora.",
                )
            return method.put_on(model, {**plain, **task}, steps)
        shared |= {"system": self.system, **task, **dict(self.settings)}
        if allocation is None:
            return get_peft_model(model, LoraMoeConfig(**shared))
        return build(model, allocation, **shared)

    def start(
        self,
        model: Any,
        examples: Sequence[Any],
        collate: Callable[[Sequence[Any]], Batch],
        batch_size: int,
    ) -> None:
        """Start the adapted model from the training data, where the method does so.

        Raises:
            HtsrError: too little data.
        """
        method = self.method
        if isinstance(method, Baseline) and method.start is not None:
            method.start(model, start_batches(model, examples, collate, batch_size))

    def callbacks(self) -> list[TrainerCallback]:
        """What the Trainer must do for the method while it trains."""
        method = self.method
        return [made() for made in method.callbacks] if isinstance(method, Baseline) else []

    def weights_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the model's weights: float32 where they are trained themselves."""
        return torch.float32 if self.whole else dtype

    def refuse_resume(self) -> None:
        """Raise HtsrError where a checkpoint does not hold all of the method's state."""
        method = self.method
        if isinstance(method, Baseline) and not method.resumes:
            raise HtsrError(
                f"{method.title} cannot be resumed: PEFT does not save how important each rank "
                "has been.",
                "Train again, with another folder as `output`.",
            )


def adapter_for(
    system: str,
    allocation: Allocation | None = None,
    *,
    target: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    **given: float | None,
) -> Adapter:
    """An adapter with the system's own defaults for what is not given.

    Args:
        **given: ``r``, ``lora_alpha`` and ``lora_dropout``, None where they are not given.

    Raises:
        HtsrError: an unknown system or setting, or one that the system does not use.
    """
    method = method_of(system)
    named = {k: v for k, v in given.items() if v is not None}
    if isinstance(method, Baseline) and method.whole and (named or target):
        raise HtsrError(
            f"{method.title} does not use {next(iter(named), 'target')}.", "Remove the option."
        )
    ranks = allocation is not None and allocation.holds_ranks  # with a uniform rank of their own
    own = {k: v for k, v in method.defaults.items() if k in given and not ranks}
    lora = Lora.of(allocation, target_modules=target, **{**own, **named})  # type: ignore[arg-type]
    read = read_settings(system, settings or {})
    return Adapter(
        system, lora.r, lora.lora_alpha, lora.lora_dropout, tuple(lora.target_modules), read
    )
