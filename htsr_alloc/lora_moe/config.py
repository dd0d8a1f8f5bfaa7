"""LoraMoeConfig: every system's settings, under the field's own names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from peft import PeftConfig

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.balance import REDUCTIONS
from htsr_alloc.lora_moe.register import LORA_MOE
from htsr_alloc.lora_moe.systems import DEFAULT, SYSTEMS, system_of
from htsr_alloc.lora_moe.systems.base import choose, positive
from htsr_alloc.records.lora import Lora

FORMAT_VERSION = 2  # the newest that can be read
T = TypeVar("T")
Setting = Annotated[T, "a setting"]  # what ``htsr train --set`` and a study's rows may give


@dataclass
class LoraMoeConfig(PeftConfig):
    """One mixture of LoRA experts on each targeted linear.

    Args:
        r: rank of one expert.
        lora_alpha: the scale is lora_alpha / r; for GOAT see goat_scale.
        lora_dropout: on the experts' input, never on the router's.
        target_modules: names, ends of names, a regular expression, or "all-linear". Default:
            every linear but the head, or the system's ``targets``.
        exclude_modules: linears that stay as they are, written as target_modules.
        num_experts: N wherever expert_pattern says nothing. 1 is plain LoRA.
        expert_pattern: N by layer ("model.layers.3", "layers.3") or module ("q_proj", a full
            name), each a regular expression for whole name parts. A full module name wins over
            the rest; two others that disagree on a module are refused. 0 means no adapter.
        top_k: experts a token uses; min(top_k, N) where a module has fewer. For EM-LoRA the linears
            of a layer that a prompt uses. Default 2; EM-LoRA 1.
        top_k_pattern: top_k by layer or module, as expert_pattern; more than N is refused.
        system: a name in ``systems.SYSTEMS``; alphalora is MoLA too.
        router_aux_loss_coef: weight of the balance loss; default the system's ``balance_coef``.
        router_aux_loss_reduction: how the modules' losses (1 each at balance) become one:
            "layers" sums over layers the mean of a layer's modules (as MoLA does), "sum" adds
            all modules (GOAT), "mean" averages them.
        init_lora_weights: True for kaiming(a=√5), "gaussian" for normal of deviation 1/r.
        goat_segment: O, P, M or R: which singular directions the experts get; "zero" starts B
            at 0 as theorem 3.5 does, with the same scale.
        goat_rho: ρ of GOAT's eq. 19.
        goat_eta: η of its scale √(3 d_in η / r).
        goat_scale: "theorem" for that scale, "alpha" for lora_alpha / r as the released scripts.
        goat_mixture: False makes the segments one LoRA of rank N r, without a router.
        mor_router: "learnt", or "mean", which gives every expert the gate 1 / N.
        em_pooler: attention, mean, max or last: how EM-LoRA's router reads a prompt.
        em_weighting: "prob" or "straight_through", what multiplies the chosen expert.
        em_activation: "rational" (learnable, started at GeLU), "gelu" or "relu": g of EM-LoRA's
            routers; several, as "gelu,relu", are for equal parts of the depth. "rational_unlimited"
            is eq. 6 beyond ±12 too, as adapters of format version 1 have it.
        em_dora: EM-DoRA, the experts being DoRA.
        modules_to_save: trained and saved whole, as a classification head.
        trainable_token_indices: rows of the embedding that are trained, as in ``LoraConfig``; TRL
            sets it when it adds tokens.
        check_base: refuse to load on a base whose weights differ from the ones trained on.
        base_probe: written by save_pretrained: a few numbers of every adapted weight.
        format_version: of the adapter's files.

    Raises:
        HtsrError: a value out of its range, or settings that contradict each other.
    """

    r: int = Lora.r
    lora_alpha: float = Lora.lora_alpha
    lora_dropout: float = Lora.lora_dropout
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    num_experts: int = 8
    expert_pattern: dict[str, int] = field(default_factory=dict)
    top_k: Setting[int | None] = None
    top_k_pattern: dict[str, int] = field(default_factory=dict)
    system: str = DEFAULT
    router_aux_loss_coef: Setting[float | None] = None
    router_aux_loss_reduction: Setting[str] = "layers"
    init_lora_weights: Setting[bool | Literal["gaussian"]] = True
    goat_segment: Setting[str] = "O"
    goat_rho: Setting[float] = 10.0
    goat_eta: Setting[float] = 1.0
    goat_scale: Setting[str] = "theorem"
    goat_mixture: Setting[bool] = True
    mor_router: Setting[str] = "learnt"
    em_pooler: Setting[str] = "attention"
    em_weighting: Setting[str] = "prob"
    em_activation: Setting[str] = "rational"
    em_dora: Setting[bool] = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    check_base: bool = True
    base_probe: dict[str, Any] | None = None
    format_version: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORA_MOE
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        system = system_of(self.system)
        if self.top_k is None:
            self.top_k = system.top_k
        if self.format_version is None:
            self.format_version = system.format_version
        choose(self, "router_aux_loss_reduction", REDUCTIONS)
        choose(self, "init_lora_weights", (True, "gaussian"))
        positive(self, "lora_alpha")
        for name, least in (("r", 1), ("num_experts", 0), ("top_k", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise HtsrError(f"{name} must be an integer of at least {least}, not {value!r}.")
        for pattern, least in (("expert_pattern", 0), ("top_k_pattern", 1)):
            for key, value in getattr(self, pattern).items():
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise HtsrError(f"{pattern}[{key!r}] must be at least {least}, not {value!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise HtsrError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}.")
        if self.router_aux_loss_coef is not None and self.router_aux_loss_coef < 0:
            raise HtsrError("router_aux_loss_coef must not be negative.")
        for system in SYSTEMS.values():
            system.check(self)

    @property
    def aux_coef(self) -> float:
        """router_aux_loss_coef, or the system's own default."""
        if self.router_aux_loss_coef is not None:
            return self.router_aux_loss_coef
        return SYSTEMS[self.system].balance_coef

    def experts_of(self, module: str) -> int:
        """N of the module with this full name."""
        listed = _lookup(self.expert_pattern, module, "expert_pattern")
        return SYSTEMS[self.system].count(self, listed)

    def top_k_of(self, module: str) -> int:
        """min(top_k, N) of the module with this full name; N where the system has no top_k.

        Raises:
            HtsrError: top_k_pattern asks for more experts than the module has.
        """
        experts = self.experts_of(module)
        if not SYSTEMS[self.system].has_top_k:
            return experts
        asked = _lookup(self.top_k_pattern, module, "top_k_pattern")
        if asked is not None and asked > experts:
            raise HtsrError(
                f"top_k_pattern asks for {asked} of {experts} experts on {module}.",
                "Lower it, or use top_k, which is cut to what a module has.",
            )
        assert self.top_k is not None  # __post_init__
        return min(self.top_k, experts) if asked is None else asked

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; the base's probe, taken when the adapter was made, is written too."""
        before = self.base_probe
        self.base_probe = getattr(self, "_probe", None) or before
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.base_probe = before

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse an adapter of a newer format before any of it is read; read an older one as it
        was meant."""
        version = kwargs.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise HtsrError(
                f"The adapter has format version {version!r}, newer than this htsr_alloc reads "
                f"({FORMAT_VERSION}).",
                "Upgrade htsr_alloc.",
            )
        system = system_of(kwargs.get("system", DEFAULT))
        if version < system.format_version:
            kwargs = {**kwargs, **system.before, "format_version": system.format_version}
        return super().check_kwargs(**kwargs)


SETTINGS: dict[str, Any] = {  # name -> type
    name: get_args(hint)[0]
    for name, hint in get_type_hints(LoraMoeConfig, include_extras=True).items()
    if get_origin(hint) is Annotated
}


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern names the module, or a part of the model that holds it."""
    return re.fullmatch(rf"(.*\.)?({pattern})(\..*)?", module) is not None


def _lookup(patterns: dict[str, int], module: str, what: str) -> int | None:
    if module in patterns:
        return patterns[module]
    found = {key: value for key, value in patterns.items() if matches(key, module)}
    if len(set(found.values())) > 1:
        raise HtsrError(
            f"{what}: {' and '.join(map(repr, found))} disagree on {module}.",
            "Make the patterns disjoint, or name the module in full.",
        )
    return next(iter(found.values()), None)
