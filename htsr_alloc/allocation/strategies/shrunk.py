"""AlphaLoRA on alphas that depart from their role's mean only as far as their errors warrant."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from htsr_alloc.allocation.scorefile import Scores
from htsr_alloc.allocation.scores import Metric
from htsr_alloc.allocation.shrinkage import Estimate, shrink
from htsr_alloc.allocation.strategies.alphalora import AlphaLora
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, RoleSignal, Signal


@dataclass(frozen=True)
class Shrunk(AlphaLora):
    """Eq. 6 and 7 on shrunk alphas (random effects, ``allocation.shrinkage``)."""

    name: ClassVar[str] = "shrunk"
    uses_errors: ClassVar[bool] = True
    own: ClassVar[bool] = True

    def prepared(
        self, metrics: Metrics | None, scores: Metric | Scores | None
    ) -> tuple[Metrics | None, Signal | None]:
        """The metrics with shrunk alphas, and how much of their spread is signal.

        Raises:
            HtsrError: scores other than PL_Alpha_Hill, or alphas without errors.
        """
        if metrics is None or scores != Metric():
            raise HtsrError(
                f"The {self.name} strategy needs `metric` pl_alpha_hill of a metrics file."
            )
        fitted = [m for m in metrics.matrices if m.pl_alpha_hill is not None]
        if metrics.settings.farms:
            raise HtsrError(
                "Alphas of FARMS windows have no standard error to shrink by.",
                "Choose `strategy` alphalora, or analyze without FARMS.",
            )
        estimates = [
            Estimate(m.layer, m.role, m.pl_alpha_hill, m.alpha_se)
            for m in fitted
            if m.pl_alpha_hill is not None and m.alpha_se is not None
        ]
        if len(estimates) < len(fitted):
            raise HtsrError(
                f"{len(fitted) - len(estimates)} of {len(fitted)} alphas have no standard error.",
                f"htsr fit with `estimator` {metrics.settings.estimator} adds them.",
            )
        found = shrink(estimates, self.own)
        alphas = dict(zip((m.tensor for m in fitted), found.alphas, strict=True))
        matrices = tuple(replace(m, pl_alpha_hill=alphas.get(m.tensor)) for m in metrics.matrices)
        layers = tuple(replace(x, pl_alpha_hill=found.scores.get(x.layer)) for x in metrics.layers)
        roles = tuple(
            RoleSignal(role, **{k: v for k, v in asdict(own).items() if k != "q"})
            for role, own in found.roles.items()
        )
        signal = Signal(roles, found.common, found.p, found.uniform)
        return replace(metrics, matrices=matrices, layers=layers), signal


STRATEGY = Shrunk
