"""vLLM serves saved mixtures as they are (extra ``vllm``).

A mixture is a LoRA of rank N r with a multiplication between its two products, so the experts go
into vLLM's own LoRA slots, beside plain LoRA and the base in the same batch. vLLM finds
``register`` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Let vLLM's LoRA worker know mixtures; a second call changes nothing.

    With another vLLM than the ones that ``touched`` describes nothing is changed, and the log
    says so: vLLM then refuses a mixture's folder by the names of its tensors.
    """
    from htsr_alloc.serving.vllm.touched import differences

    found = differences()
    if found:
        logger.warning(
            "htsr_alloc adapters (LORA_MOE) are not served by this vLLM: %s. "
            "Plain LoRA and the base are served as without htsr_alloc.",
            "; ".join(found),
        )
        return
    from vllm.v1.worker import (  # pyright: ignore[reportMissingImports]
        lora_model_runner_mixin as runner,
    )

    from htsr_alloc.serving.vllm.managers import WorkerManager

    runner.LRUCacheWorkerLoRAManager = WorkerManager
