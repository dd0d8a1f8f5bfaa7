"""What a LoRA-MoE system is: top-k mixtures of LoRA experts, and what a system may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import experts, gates, init
from htsr_alloc.lora_moe.gated import GatedLora

Shape = tuple[int, ...]
BALANCE = ("router_aux_loss_coef", "router_aux_loss_reduction")


class Inputs(NamedTuple):
    """What one adapter reads on one linear.

    Attributes:
        x: (..., d_in), as the linear got it.
        own: x in the adapter's dtype; under autocast x itself.
        dropped: ``own`` after the adapter's dropout.
        base: (..., d_out), W₀x.
        rows: which rows of the batch these are; None: all.
    """

    x: Tensor
    own: Tensor
    dropped: Tensor
    base: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class Product:
    """s B A of one expert: what it adds for a token whose whole gate weight is on it.

    Attributes:
        a: (r, d_in); one tensor for all experts that share it. b: (d_out, r). scale: s.
        residual: (R, d_in) and (d_out, R), whose product is taken off the weight; or None.
        sums: whether the adapted weight is W less the residual plus s B A (not so for DoRA).
    """

    expert: int
    a: Tensor
    b: Tensor
    scale: float
    residual: tuple[Tensor, Tensor] | None = None
    sums: bool = True


class System:
    """h = W₀x + s Σ_j g_j B_j A_j x, the experts j chosen token by token by a router.

    A system overrides what it does otherwise. Everywhere below ``config`` is a LoraMoeConfig and
    ``layer`` a LoraMoeLinear; N is the number of experts of a linear.

    Attributes:
        title: the name that its paper gives it. reference: the paper, and its equations.
        trained, frozen: its parameters, ``lora_moe_<name>`` in a file.
        has_top_k: whether a setting says how many experts a token uses. top_k: its default.
        balance_coef: default weight of the balance loss; 0 where there is none.
        takes_allocation: whether an allocation of experts applies to it.
        feed_forward_only: whether by default it adapts the feed-forward linears, not every one.
        budget_knob: what a study changes to meet a budget of parameters.
        budget_experts: experts of each layer while the rank is changed; None: as allocated.
        bilevel: whether some of its parameters learn from validation rows.
        format_version: of its files. before: settings that files of an older version mean without
            saying so.
        settings: which of the configuration's settings it uses.
        defaults: what its paper trains with, where that is not AlphaLoRA's: of ``r``,
            ``lora_alpha``, ``lora_dropout`` and ``learning_rate``. ``htsr train`` takes them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str]
    trained: ClassVar[tuple[str, ...]] = ("A", "B", "router")
    frozen: ClassVar[tuple[str, ...]] = ()
    has_top_k: ClassVar[bool] = True
    top_k: ClassVar[int] = 2
    balance_coef: ClassVar[float] = 1e-3
    takes_allocation: ClassVar[bool] = True
    feed_forward_only: ClassVar[bool] = False
    budget_knob: ClassVar[Literal["experts", "rank"] | None] = None
    budget_experts: ClassVar[int | None] = None
    bilevel: ClassVar[bool] = False
    format_version: ClassVar[int] = 1
    before: ClassVar[Mapping[str, Any]] = {}
    settings: ClassVar[tuple[str, ...]] = ("top_k", *BALANCE, "init_lora_weights")
    defaults: ClassVar[Mapping[str, float]] = {}

    def check(self, config: Any) -> None:
        """Refuse settings that contradict each other or are out of range.

        Every system is asked, so that settings of one are not silently ignored by another.

        Raises:
            HtsrError: with the setting.
        """
        if config.system != self.name:
            return
        if config.router_aux_loss_coef and BALANCE[0] not in self.settings:
            raise HtsrError(
                f"{self.name} gives every token all experts and has no balance loss.",
                "Remove router_aux_loss_coef.",
            )
        if not self.has_top_k and config.top_k_pattern:
            raise HtsrError(f"{self.name} has no top_k; remove top_k_pattern.")

    def admit(self, config: Any, name: str, weight: Tensor) -> None:
        """Refuse a linear whose weight (d_out, d_in) does not show what every pass needs."""

    def count(self, config: Any, listed: int | None) -> int:
        """N of a linear; ``listed`` is expert_pattern's number for it, if any."""
        return config.num_experts if listed is None else listed

    def shapes(self, config: Any, n: int, d_in: int, d_out: int) -> dict[str, Shape]:
        """The shape of every parameter of n experts on one linear, by name."""
        found: dict[str, Shape] = {"A": (n * config.r, d_in), "B": (d_out, n * config.r)}
        return {**found, "router": (n, d_in)} if self.routes(config, n) else found

    def routes(self, config: Any, n: int) -> bool:
        """Whether n experts of a linear have a router; else each has the gate ``share``."""
        return n > 1

    def share(self, config: Any, n: int) -> float:
        """Each expert's gate where there is no router."""
        return 1.0

    def scale(self, config: Any, d_in: int) -> float:
        """s of a linear."""
        return config.lora_alpha / config.r

    def start(self, own: Mapping[str, Tensor], config: Any, name: str, weight: Tensor) -> None:
        """Fill the parameters, which are zeros, in place.

        Args:
            own: of ``shapes``, by name.
            name: of the linear, for errors. weight: (d_out, d_in), its own.
        """
        init.init_a(own["A"], len(own["A"]) // config.r, config.init_lora_weights)
        if "router" in own:
            init.init_a(own["router"], 1, True)

    def attach(
        self, model: nn.Module, layers: Mapping[str, Any], adapter: str, config: Any, state: Any
    ) -> None:
        """Add what several linears share, once all of them are adapted.

        Args:
            layers: the adapted linears by name. state: the model's RouterState.
        """

    def gate(self, layer: Any, adapter: str, logits: Tensor, x: Tensor) -> gates.Routing:
        """The decision of a linear's router; without top_k all experts. logits: (..., N)."""
        return gates.top_k_softmax(logits, layer.mixture[adapter].top_k)

    def counted(self, routing: gates.Routing) -> Tensor:
        """The choices that the balance loss counts, (..., N) bool."""
        return routing.chosen

    def mix(self, layer: Any, adapter: str, given: Inputs) -> tuple[Tensor, Tensor]:
        """A_all x, (..., N r) or (..., r) of a shared A, and the experts' weights (..., N)."""
        a = layer.lora_moe_A[adapter]
        how = layer.mixture[adapter]
        if adapter not in layer.lora_moe_router:
            hidden = F.linear(given.dropped, a)
            share = self.share(how.config, how.experts)
            return hidden, hidden.new_full((*hidden.shape[:-1], how.experts), share)
        router = layer.lora_moe_router[adapter]
        autocast = torch.is_autocast_enabled(given.x.device.type)
        if given.dropped is given.own and not autocast and gates.is_wide(a.dtype):
            hidden, logits = experts.project(given.own, a, router)
        else:
            hidden, logits = F.linear(given.dropped, a), gates.router_logits(given.x, router)
        return hidden, layer.balanced(self.gate(layer, adapter, logits, given.x), adapter)

    def idle(self, layer: Any, adapter: str) -> bool:
        """Whether ``delta`` would add nothing to any token of this pass."""
        return False

    def delta(self, layer: Any, adapter: str, result: Tensor, given: Inputs) -> Tensor:
        """``result`` plus Δ(x). (..., d_out)."""
        hidden, gate = self.mix(layer, adapter, given)
        scale = layer.mixture[adapter].scale
        return experts.dense_experts(result, hidden, layer.lora_moe_B[adapter], gate, scale)

    def factors(self, layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
        """A (N r, d_in), or (r, d_in) if shared, and B (d_out, N r) of all experts, detached."""
        return layer.lora_moe_A[adapter].detach(), layer.lora_moe_B[adapter].detach()

    def products(self, layer: Any, adapter: str) -> Iterator[Product]:
        """The low-rank product of each expert."""
        (a, b), how = self.factors(layer, adapter), layer.mixture[adapter]
        every_a = a.chunk(how.experts) if len(a) == b.shape[1] else [a] * how.experts
        for j, (own_a, own_b) in enumerate(zip(every_a, b.chunk(how.experts, 1), strict=True)):
            yield Product(j, own_a, own_b, how.scale)

    def serves(self) -> None:
        """Refuse a system whose gates are not a function of each token alone.

        Raises:
            HtsrError: with what can be done instead.
        """

    def gated(self, layer: Any, adapter: str) -> GatedLora:
        """Its tensors on one linear as one LoRA with gated ranks.

        Raises:
            HtsrError: as ``serves``.
        """
        self.serves()
        how, made = layer.mixture[adapter], list(self.products(layer, adapter))
        router, scale = None, how.scale
        if adapter in layer.lora_moe_router:
            router = layer.lora_moe_router[adapter].detach()
        else:
            scale = scale * self.share(how.config, how.experts)
        ranks = torch.tensor([len(product.a) for product in made])
        return GatedLora(
            a=torch.cat([product.a for product in made]),
            b=torch.cat([product.b * (product.scale / how.scale) for product in made], 1),
            expert_of_rank=torch.arange(len(made)).repeat_interleave(ranks),
            router=router,
            gate="top_k",
            k=how.top_k,
            scale=scale,
            residual=made[0].residual,
        )


def choose(config: Any, name: str, allowed: Sequence[Any]) -> None:
    """Refuse a setting that is not one of those allowed.

    Raises:
        HtsrError: with those that are.
    """
    value = getattr(config, name)
    if value not in allowed:
        raise HtsrError(
            f"{name} cannot be {value!r}.", f"Choose from {', '.join(map(str, allowed))}."
        )


def positive(config: Any, *names: str) -> None:
    """Refuse settings that are not above zero.

    Raises:
        HtsrError: with the first of them.
    """
    for name in names:
        if not getattr(config, name) > 0:
            raise HtsrError(f"{name} must be positive, not {getattr(config, name)!r}.")
