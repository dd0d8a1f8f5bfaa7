"""vLLM's LoRA model, model manager and worker manager, which know mixtures beside plain LoRA."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm import envs
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path, parse_fine_tuned_lora_name
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe.gated import GatedLora
from htsr_alloc.lora_moe.saved import PREFIX, is_mixture, read_gated
from htsr_alloc.serving.vllm.layers import GatedLinear, gate, most_experts


class MixtureModel(LoRAModel):
    """A LoRA; of a mixture also each linear's record, under vLLM's name of the linear."""

    records: dict[str, GatedLora]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records = {}

    @classmethod
    def from_local_checkpoint(
        cls,
        lora_dir: str,
        *args: Any,
        lora_model_id: int | None = None,
        device: str = "cuda",
        dtype: Any = None,
        weights_mapper: Any = None,
        **kwargs: Any,
    ) -> LoRAModel:
        """As vLLM's; a mixture's experts become one LoRA of rank N r."""
        same = {"lora_model_id": lora_model_id, "device": device, "dtype": dtype}
        if not is_mixture(lora_dir):
            return super().from_local_checkpoint(
                lora_dir, *args, **same, weights_mapper=weights_mapper, **kwargs
            )
        loras, records = {}, {}
        for name, record in read_gated(lora_dir).items():
            tensor = f"{PREFIX}{name}.lora_A.weight"  # as vLLM's rule for names expects it
            name, _ = parse_fine_tuned_lora_name(tensor, weights_mapper)
            a, b = (part.to(device=device, dtype=dtype).contiguous() for part in record.flat())
            loras[name] = LoRALayerWeights(name, len(a), len(a), a, b, 1.0)
            records[name] = record
        made = cls(lora_model_id, max(len(record.ranks) for record in records.values()), loras)
        made.records = records
        return made


class ModelManager(LRUCacheLoRAModelManager):
    """Puts the gates beside the weights of each slot."""

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        for layer in self.modules.values():
            if isinstance(layer, BaseLinearLayerWithLoRA) and not isinstance(layer, GatedLinear):
                gate(layer, self.lora_slots)

    def parts_of(self, name: str) -> list[str]:
        """The names that an adapter has for a linear: one for each slice, or its own."""
        return self.packed_modules.get(name, [name])

    def activate_adapter(self, lora_id: int) -> bool:
        """As vLLM's, and the gates of the slot."""
        new = super().activate_adapter(lora_id)
        if new:
            slot, model = self.lora_index_to_id.index(lora_id), self._registered_adapters[lora_id]
            for name, layer in self.modules.items():
                if isinstance(layer, GatedLinear):
                    self._put(layer, slot, model, name)
        return new

    def _put(self, layer: GatedLinear, slot: int, model: LoRAModel, name: str) -> None:
        slices = len(layer.lora_a_stacked)
        weights = self._get_lora_layer_weights(model, name)
        a = None if weights is None else weights.lora_a
        ranks = [0 if own is None else len(own) for own in (a if isinstance(a, list) else [a])]
        if len(ranks) != slices:  # one pair for several slices, which vLLM splits
            ranks = [max(ranks)] * slices
        records: list[GatedLora | None] = [None] * slices
        if isinstance(model, MixtureModel) and model.records:
            records = [model.records.get(part) for part in self.parts_of(name)]
        layer.put(slot, ranks, records)

    def admit(self, model: MixtureModel, name: str) -> None:
        """Refuse a mixture that does not fit the linears or the slots.

        Raises:
            HtsrError: with the linear, or the setting that is too low.
        """
        fitting = {
            part: layer
            for own, layer in self.modules.items()
            if isinstance(layer, GatedLinear)
            and len(self.parts_of(own)) == len(layer.lora_a_stacked)
            for part in self.parts_of(own)
        }
        for part, record in model.records.items():
            if part not in fitting:
                raise HtsrError(
                    f"{name} adapts {part}, and the server has no such linear with LoRA.",
                    "Give lora_target_modules every linear of the adapter.",
                )
            if fitting[part].gates and record.experts > most_experts():
                raise HtsrError(
                    f"{name} has {record.experts} experts on {part}, and the server has room for "
                    f"{most_experts()}.",
                    "Raise HTSR_VLLM_MAX_EXPERTS.",
                )
        if model.rank > self.lora_config.max_lora_rank:
            raise HtsrError(
                f"{name} has {model.rank} ranks on a linear (all its experts together), and "
                f"max_lora_rank is {self.lora_config.max_lora_rank}.",
                "Raise max_lora_rank.",
            )


class WorkerManager(LRUCacheWorkerLoRAManager):
    """Loads mixtures, or refuses them with the reason."""

    _manager_cls = ModelManager

    def __init__(
        self,
        vllm_config: Any,
        device: Any,
        embedding_modules: Any,
        lora_model_cls: type[LoRAModel] = MixtureModel,
    ) -> None:
        super().__init__(vllm_config, device, embedding_modules, lora_model_cls)
        self.parallel = vllm_config.parallel_config

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        name = lora_request.lora_name
        folder = Path(get_adapter_absolute_path(lora_request.lora_path))
        if not is_mixture(folder):
            return super()._load_adapter(lora_request)
        for refused, reason in self._unsupported():
            if refused:
                raise HtsrError(f"{name} is a mixture of LoRA experts, and {reason}.")
        try:
            made = super()._load_adapter(lora_request)
            self._adapter_manager.admit(made, name)
        except HtsrError as error:  # the server shows the message alone
            raise HtsrError(" ".join(filter(None, (error.message, error.hint)))) from None
        return made

    def _unsupported(self) -> list[tuple[bool, str]]:
        parallel, lora = self.parallel, self.lora_config
        in_place = current_platform.is_cpu() or current_platform.is_cuda_alike()
        return [
            (parallel.tensor_parallel_size > 1, "its routers need tensor_parallel_size 1"),
            (parallel.pipeline_parallel_size > 1, "it needs pipeline_parallel_size 1"),
            (lora.fully_sharded_loras, "it cannot be served with fully_sharded_loras"),
            (
                bool(envs.VLLM_LORA_ENABLE_DUAL_STREAM),
                "it cannot be served with VLLM_LORA_ENABLE_DUAL_STREAM",
            ),
            (not in_place, f"{current_platform.device_name} is neither a CPU nor a GPU"),
        ]
