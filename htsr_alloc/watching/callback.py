"""``watch`` every n steps of a transformers Trainer, in its logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import METRICS
from htsr_alloc.watching.weights import Watched, check_kinds, select, watch


class WatchCallback(TrainerCallback):
    """Logs the three metrics of chosen linears before the first step and after every n-th.

    Keys are ``htsr/<kind>/<metric>/<linear>``, with ``.expert_<j>`` after it in a mixture and
    ``@<adapter>`` unless there is but one. A number that does not exist yet (B is still zero) is
    not logged.

    A trainer hands its logs to the reporters (TensorBoard, W&B) before the callbacks it was given;
    ``WatchCallback(...).attach(trainer)`` puts this one before them. Given as
    ``Trainer(callbacks=[...])`` it writes to ``trainer.state.log_history`` and the console alone.

    Only the first process measures. A frozen base is measured once.

    Args:
        every: n, in optimizer steps.
        modules, kinds, estimator, bins, engine: of ``watch``.

    Raises:
        HtsrError: at the start of training, what ``watch`` refuses.
    """

    def __init__(
        self,
        every: int = 100,
        modules: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        if every < 1:
            raise HtsrError(f"every must be at least 1 step, not {every}.")
        self.every, self.modules, self.kinds, self.options = every, modules, kinds, options
        self._pending: dict[str, float] = {}
        self._frozen: dict[str, Watched] = {}

    def attach(self, trainer: Any) -> WatchCallback:
        """Put this callback before all others of a trainer."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        """Measure what training starts from."""
        if state.is_world_process_zero:
            self._frozen = {}
            self._pending = self._measure(model)

    def on_step_end(self, args, state, control, model=None, **kwargs: Any) -> None:
        """Measure, and ask for a log."""
        if state.global_step % self.every == 0:
            if state.is_world_process_zero:
                self._pending = self._measure(model)
            control.should_log = True  # on every process, as a log gathers the loss

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs: Any) -> None:
        """Write what was measured into this log."""
        if logs is None or not self._pending:
            return
        logs.update(self._pending)
        if state.log_history:
            state.log_history[-1].update(self._pending)
        self._pending = {}

    def _measure(self, model: Any) -> dict[str, float]:
        chosen = select(model, self.modules)
        kinds = check_kinds(self.kinds, chosen)
        found: list[Watched] = []
        changing = list(kinds)
        if "base" in kinds and not any(x.base.weight.requires_grad for x in chosen):
            changing.remove("base")
            if not self._frozen:
                rows = watch(model, self.modules, ["base"], **self.options)
                self._frozen = {row.module: row for row in rows}
            found += self._frozen.values()
        if changing:
            found += watch(model, self.modules, changing, **self.options)
        adapters = {row.adapter for row in found if row.adapter is not None}
        return {
            f"htsr/{row.kind}/{metric}/{_label(row, len(adapters) > 1)}": value
            for row in found
            for metric in METRICS
            if (value := getattr(row, metric)) is not None
        }


def _label(row: Watched, several: bool) -> str:
    expert = "" if row.expert is None else f".expert_{row.expert}"
    return row.module + expert + (f"@{row.adapter}" if several and row.adapter else "")
