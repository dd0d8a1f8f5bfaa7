"""A request: what ``allocate`` is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from htsr_alloc.allocation.budget import (
    ADAPTERS,
    Budget,
    Experts,
    Params,
    Rank,
    Share,
    Stacks,
    check_rank,
)
from htsr_alloc.allocation.given import checked, whole
from htsr_alloc.allocation.linears import Linears
from htsr_alloc.allocation.rounding import REMAINDER, REPAIRS, Bounds
from htsr_alloc.allocation.scope import EVERYTHING, OVER
from htsr_alloc.allocation.scorefile import Scores
from htsr_alloc.allocation.scores import Metric
from htsr_alloc.allocation.settings import strategy_of
from htsr_alloc.allocation.strategies import STRATEGIES, AlphaLora, Strategy
from htsr_alloc.allocation.units import BASE_EXPERTS, POOLS
from htsr_alloc.errors import HtsrError, check_choice


@dataclass(frozen=True)
class Request:
    """How many experts each layer, or each linear, is to get.

    Attributes:
        strategy: one of ``STRATEGIES`` with its settings, as ``AlphaLora(beta=2.5)``.
        budget: ``Experts(160)``, ``Params(10**8)`` or ``Share(0.01)``; ``Stacks`` for a T of each
            stack; ``Rank(16)`` for ranks of plain LoRA in place of experts; None for a strategy
            whose settings say it.
        scores: what a strategy that uses scores goes by: a ``Metric``, by default PL_Alpha_Hill,
            or ``Scores`` of a file. None for the others.
        pool: None is a count a layer. ``role`` and ``all`` (of ``POOLS``) are a count a linear,
            compared with the linears of its role or with every other; T is then the experts of
            each role's linears together, so that T experts cost what they cost by layers.
        targets: roles (``q_proj``) that are adapted, for a budget in parameters and for counts by
            linears; all of them where it is empty. ``experts`` are the base's own experts, which
            can have ranks of plain LoRA.
        repair: of eq. 7, one of ``REPAIRS``. A budget in parameters has a rounding of its own
            (``allocation.spend``).
        bounds: of every count.
        top_k: K; a layer's own is min(K, its experts).
        layers: the number of layers, where there are no metrics.
        stack: one stack of layers, by its name or a part of it; None is all of them.
        score_over: of ``OVER``, the matrices that a layer's score is the mean over: ``all`` of the
            layer, or the ``adapted`` ones, which get experts.
        linears: the model's (``lora_moe.linears_of``), on which parameters are counted in place of
            the metrics' matrices, and whose names ``targets`` are then ends of.

    Raises:
        HtsrError: fields that contradict each other.
    """

    strategy: Strategy = field(default_factory=AlphaLora)
    budget: Budget | None = None
    scores: Metric | Scores | None = None
    pool: str | None = None
    targets: tuple[str, ...] = ()
    repair: str = REMAINDER
    bounds: Bounds = field(default_factory=Bounds)
    top_k: int = 2
    layers: int | None = None
    stack: str | None = None
    score_over: str = EVERYTHING
    linears: Linears | None = None

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise HtsrError(f"`top_k` must be at least 1, not {self.top_k}.")
        check_choice("repair", self.repair, REPAIRS)
        if self.pool is not None:
            check_choice("pool", self.pool, POOLS)
        check_choice("score_over", self.score_over, OVER)
        if isinstance(self.budget, Stacks) and self.stack is not None:
            raise HtsrError(
                "`T` names its stacks, and `stack` one of them.", "Give one of the two."
            )
        if self._adapted_alone and (self.pool or isinstance(self.scores, Scores)):
            raise HtsrError(
                f"`score_over` {self.score_over} is about the metric of a whole layer.",
                "Leave it out with `per_module` and with `scores`.",
            )
        if BASE_EXPERTS in self.targets and (self.pool or not isinstance(self.budget, Rank)):
            raise HtsrError(
                "The base's own experts can have ranks of plain LoRA alone, one for each layer.",
                "Give `adapter_kind` lora and `rank`, without `per_module`.",
            )
        by_params = self._by_params
        if self.targets and not self.pool and not by_params and not self._adapted_alone:
            raise HtsrError(
                "A count for each layer is for all linears of the layer, so that `targets` means "
                "nothing.",
                "Leave it out, or give `per_module`, or a budget in parameters.",
            )
        elsewhere = self.pool or not by_params or BASE_EXPERTS in self.targets
        if self.linears is not None and elsewhere:
            raise HtsrError(
                "A model's linears are for a budget in parameters, of layers.",
                "Leave out `model`, or `per_module` and the target experts, and give `params`.",
            )
        if self.repair != REMAINDER and by_params:
            raise HtsrError(f"`repair` {self.repair} repairs a sum of experts.", "Give `T`.")
        if isinstance(self.budget, Rank) and self.top_k != 2:
            raise HtsrError(
                "Plain LoRA has no router, so that `top_k` means nothing.", "Remove it."
            )
        if self.strategy.uses_scores:
            if self.scores is None:
                object.__setattr__(self, "scores", Metric())
            return
        idle = {
            "scores": isinstance(self.scores, Scores),
            "metric": isinstance(self.scores, Metric),
            "per_module": self.pool is not None,
            "repair": self.repair != REMAINDER,
            "score_over": self._adapted_alone,
        }
        for name, given in idle.items():
            if given:
                raise HtsrError(
                    f"The {self.strategy.name} strategy uses no score, so that `{name}` means "
                    "nothing.",
                    "Leave it out.",
                )

    @property
    def _by_params(self) -> bool:
        return isinstance(self.budget, Params | Share | Rank)

    @property
    def _adapted_alone(self) -> bool:
        return self.score_over != EVERYTHING

    @property
    def needs_metrics(self) -> bool:
        """Whether the scores, the layers or the parameters are known from metrics only."""
        if self.pool is not None or self._by_params or self.stack is not None:
            return True
        if isinstance(self.budget, Stacks):
            return True
        if self.strategy.uses_scores:
            return isinstance(self.scores, Metric)
        return not (self.layers or self.strategy.layers)

    @property
    def unscoped(self) -> Request:
        """The same of metrics that hold no more than the request is about (``scope.scoped``)."""
        targets = self.targets if self._by_params or self.pool else ()
        return replace(self, stack=None, score_over=EVERYTHING, targets=targets)

    @classmethod
    def of(
        cls,
        strategy: str = "alphalora",
        *,
        T: int | Mapping[str, int] | Experts | Stacks | None = None,
        params: int | None = None,
        target_share: float | None = None,
        r: int | None = None,
        adapter_kind: str = "lora-moe",
        rank: int | None = None,
        budget: Budget | int | None = None,
        metric: str | None = None,
        scores: Scores | None = None,
        per_module: bool = False,
        pool: str | None = None,
        targets: Sequence[str] = (),
        repair: str = REMAINDER,
        bounds: Bounds | None = None,
        top_k: int = 2,
        layers: int | None = None,
        stack: str | None = None,
        score_over: str = EVERYTHING,
        linears: Linears | None = None,
        **settings: Any,
    ) -> Request:
        """A request from keywords, as ``htsr allocate`` has options.

        Args:
            strategy: a name of ``STRATEGIES``; what its dataclass has as fields is given in
                ``settings`` (``beta``, ``spread``; ``groups``; ``experts``), None for its default.
            T: a budget of T experts, or {stack: T}; ``params`` and ``target_share`` (0.01 for 1 %)
                are ``Params`` and ``Share`` at rank ``r``, 8 by default. ``budget`` is any of
                them, or T.
            adapter_kind: of ``ADAPTERS``: ``lora-moe`` shares out experts, ``lora`` ranks of plain
                LoRA, whose parameters are those of ``rank`` on every linear.
            metric: see ``Metric``; ``scores`` of a file come in its place.
            per_module: a count for each linear, in a ``pool``, by default ``role``.

        The others are the fields of a ``Request``.

        Raises:
            HtsrError: what contradicts itself, would do nothing, or has another type.
        """
        settings = checked(settings)
        numbers = {"params": params, "target_share": target_share, "r": r, "rank": rank}
        numbers = checked(numbers | {"top_k": top_k, "layers": layers})
        check_choice("strategy", strategy, STRATEGIES)
        if metric is not None and scores is not None:
            raise HtsrError(f"`scores` come in place of `metric` {metric}.", "Give one of them.")
        if pool is not None and not per_module:
            raise HtsrError(f"`pool` {pool} is about `per_module`.", "Give both, or neither.")
        return cls(
            strategy_of(strategy, settings),
            _budget(
                adapter_kind,
                T,
                numbers["params"],
                numbers["target_share"],
                numbers["r"],
                numbers["rank"],
                budget,
            ),
            Metric(metric) if metric is not None else scores,
            (pool or "role") if per_module else None,
            tuple(targets),
            repair,
            bounds or Bounds(),
            numbers["top_k"],
            numbers["layers"],
            stack,
            score_over,
            linears,
        )


def _budget(
    adapter_kind: str,
    T: int | Mapping[str, int] | Experts | Stacks | None,
    params: int | None,
    target_share: float | None,
    r: int | None,
    rank: int | None,
    budget: Budget | int | None,
) -> Budget | None:
    """The one budget that is given, if any; it must be one of the adapter's."""
    check_choice("adapter_kind", adapter_kind, ADAPTERS)
    given = {
        "T": T,
        "params": params,
        "target_share": target_share,
        "rank": rank,
        "budget": budget,
    }
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) > 1:
        how = "both" if len(names) == 2 else "all"
        raise HtsrError(f"{' and '.join(names)} are {how} budgets.", "Give one of them.")
    if r is not None:
        check_rank(r)
        if params is None and target_share is None:
            plain = adapter_kind == "lora" and rank is None
            raise HtsrError(
                "`r` matters to `params` and `target_share` alone.",
                f"For ranks of plain LoRA give `rank` {r}." if plain else "Leave it out.",
            )
    chosen = budget if T is None else T
    if isinstance(chosen, Mapping):
        chosen = Stacks(tuple((name, whole("T", total)) for name, total in chosen.items()))
    elif chosen is not None and not isinstance(chosen, (Experts, Params, Share, Rank, Stacks)):
        chosen = Experts(whole("T" if budget is None else "budget", chosen))
    elif params is not None:
        chosen = Params(params, r or 8)
    elif target_share is not None:
        chosen = Share(target_share, r or 8)
    elif rank is not None:
        chosen = Rank(rank)
    words, kinds = ADAPTERS[adapter_kind]
    if not isinstance(chosen, kinds):
        raise HtsrError(
            f"The budget of `adapter_kind` {adapter_kind} is {words}.",
            "`rank` 16 is a budget of plain LoRA.",
        )
    return chosen
