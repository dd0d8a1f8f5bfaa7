"""Every name of vLLM that the plugin builds on, compared before anything is changed.

All but the entry point is private to vLLM, so the versions are pinned and each callable's
parameters are compared by name.
"""

from __future__ import annotations

import inspect
from importlib import import_module

FIRST, BEFORE = (0, 32), (0, 33)
BOUND = "vllm.v1.worker.lora_model_runner_mixin:LRUCacheWorkerLoRAManager"  # the one rebinding
WORKER = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
MANAGER = "vllm.lora.model_manager:LRUCacheLoRAModelManager"
MODEL = "vllm.lora.lora_model:LoRAModel"
LINEAR = "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA"
PUNICA = "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase"
PARAMETERS = {
    f"{WORKER}.__init__": "self vllm_config device embedding_modules lora_model_cls",
    f"{WORKER}._load_adapter": "self lora_request",
    f"{WORKER}.create_lora_manager": "self model vllm_config",
    f"{MANAGER}._create_lora_modules": "self",
    f"{MANAGER}.activate_adapter": "self lora_id",
    f"{MANAGER}._get_lora_layer_weights": "self lora_model module_name",
    f"{MODEL}.__init__": "self lora_model_id rank loras is_3d_lora_weight modules_to_save",
    f"{MODEL}.from_local_checkpoint": "lora_dir expected_lora_modules peft_helper lora_model_id "
    "device dtype model_vocab_size weights_mapper skip_prefixes moe_ep_spec",
    f"{LINEAR}._apply_lora_to_output": "self x output",
    f"{LINEAR}.set_mapping": "self punica_wrapper",
    f"{PUNICA}.add_shrink": "self y x lora_a_stacked scale kwargs",
    f"{PUNICA}.add_expand": "self y x lora_b_stacked output_slices offset_start add_inputs kwargs",
    "vllm.lora.lora_weights:LoRALayerWeights.__init__": "self module_name rank lora_alpha lora_a "
    "lora_b scaling",
    "vllm.lora.utils:parse_fine_tuned_lora_name": "name weights_mapper",
    "vllm.lora.utils:get_adapter_absolute_path": "lora_path",
}
SOURCES = {  # attributes that only a method's own text shows
    f"{WORKER}.create_lora_manager": ("self._manager_cls", "self._adapter_manager"),
    f"{LINEAR}.create_lora_weights": ("self.lora_a_stacked", "self.lora_b_stacked"),
    f"{LINEAR}._apply_lora_to_output": ("self.punica_wrapper", "self.output_slices"),
    f"{PUNICA}.__init__": ("self._token_lora_indices",),
    "vllm.lora.model_manager:LoRAModelManager.__init__": ("self.modules", "self.packed_modules"),
    "vllm.lora.model_manager:LoRAModelManager.activate_adapter": ("self.lora_index_to_id",),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": (
        "LRUCacheWorkerLoRAManager(",
    ),
}


def differences() -> list[str]:
    """What of the vLLM installed here is not as the plugin needs it, in words; empty if all is."""
    installed: str = import_module("vllm").__version__
    version = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if not FIRST <= version < BEFORE:
        pin = f">={FIRST[0]}.{FIRST[1]},<{BEFORE[0]}.{BEFORE[1]}"
        return [f"it is {installed} and not {pin}"]
    return [
        *(f"{name} {problem}" for name in PARAMETERS if (problem := _parameters(name))),
        *(f"{name} {problem}" for name in SOURCES if (problem := _source(name))),
        *([] if _bound() else [f"{BOUND} is another class than {WORKER}"]),
    ]


def found(name: str) -> object:
    """What "module:a.b" names; None where there is no such thing."""
    module, _, path = name.partition(":")
    try:
        held = import_module(module)
        for part in path.split("."):
            held = getattr(held, part)
    except (ImportError, AttributeError):
        return None
    return held


def _parameters(name: str) -> str | None:
    held = found(name)
    if not callable(held):
        return "is missing"
    given = " ".join(inspect.signature(held).parameters)
    return None if given == PARAMETERS[name] else f"takes ({given}) and not ({PARAMETERS[name]})"


def _source(name: str) -> str | None:
    held = found(name)
    if not callable(held):
        return "is missing"
    text = inspect.getsource(held)
    missing = [words for words in SOURCES[name] if words not in text]
    return f"has no {', '.join(missing)}" if missing else None


def _bound() -> bool:
    """Whether the rebound name still is vLLM's class, or already ours, which is made of it."""
    held, worker = found(BOUND), found(WORKER)
    return isinstance(held, type) and isinstance(worker, type) and issubclass(held, worker)
