"""An allocation's experts as a tuner of ms-swift (4.6).

    export HTSR_ALLOCATION=model.allocation.json
    swift sft --external_plugins $(python -m htsr_alloc.training.ms_swift) --tuner_type lora_moe ...

Rank, alpha and dropout are ms-swift's ``lora_rank``, ``lora_alpha`` and ``lora_dropout``;
HTSR_SYSTEM names another system than alphalora. The plugin is a file in a folder of its own,
because ms-swift puts its folder first on the path where Python looks for modules.
"""

from __future__ import annotations

import os
from typing import Any

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import build
from htsr_alloc.lora_moe.systems import DEFAULT


def put_on(args: Any, model: Any) -> Any:
    """A PeftModel with the experts of the allocation that the environment names.

    Raises:
        HtsrError: it names none, or one that does not fit the model.
    """
    allocation = os.environ.get("HTSR_ALLOCATION")
    if not allocation:
        raise HtsrError("HTSR_ALLOCATION is not set.", "Set it to the path of an allocation file.")
    return build(
        model,
        allocation,
        system=os.environ.get("HTSR_SYSTEM", DEFAULT),
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        task_type="CAUSAL_LM",
    )


def register() -> None:
    """Add ``lora_moe`` to ms-swift's tuners."""
    from swift.tuner_plugin.base import PeftTuner  # pyright: ignore[reportMissingImports]
    from swift.tuner_plugin.mapping import tuners_map  # pyright: ignore[reportMissingImports]

    class LoraMoeTuner(PeftTuner):
        prepare_model = staticmethod(put_on)

    tuners_map["lora_moe"] = LoraMoeTuner
