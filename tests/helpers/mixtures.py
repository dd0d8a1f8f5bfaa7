"""Tiny random mixtures as transformers makes them, and how each one's experts lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

HIDDEN, INNER, EXPERTS = 16, 24, 3
SHARED: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LATENT = {
    "n_routed_experts": EXPERTS,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Mixture:
    """A family: ``name`` of its classes, ``inside`` a block the module that holds the experts.

    ``inputs_first`` is how its forward uses a weight: x @ W[e], and not W[e] @ x (read in
    transformers' source). ``first`` is the first layer that has experts.
    """

    name: str
    inside: str
    settings: dict[str, Any]
    inputs_first: bool = False
    first: int = 0
    head: str = "ForCausalLM"
    config: str = "Config"

    def model(self, seed: int = 0) -> Any:
        """Random, float32."""
        import transformers

        known = getattr(transformers, self.name + self.config)
        settings = {**SHARED, **self.settings}
        torch.manual_seed(seed)
        return getattr(transformers, self.name + self.head)(known(**settings)).float().eval()


MIXTURES = {
    "mixtral": Mixture("Mixtral", "mlp.experts", {"num_local_experts": EXPERTS}),
    "qwen3_moe": Mixture("Qwen3Moe", "mlp.experts", {"num_experts": EXPERTS}),
    "olmoe": Mixture("Olmoe", "mlp.experts", {"num_experts": EXPERTS}),
    "deepseek_v3": Mixture("DeepseekV3", "mlp.experts", LATENT, first=1),
    "glm4_moe": Mixture(
        "Glm4Moe",
        "mlp.experts",
        {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1,
         "n_group": 1, "topk_group": 1},
        first=1,
    ),
    "granitemoe": Mixture(
        "GraniteMoe", "block_sparse_moe.experts", {"num_local_experts": EXPERTS}
    ),
    "gpt_oss": Mixture(
        "GptOss",
        "mlp.experts",
        {"num_local_experts": EXPERTS, "sliding_window": 16},
        inputs_first=True,
    ),
    "llama4": Mixture(
        "Llama4",
        "feed_forward.experts",
        {"num_local_experts": EXPERTS, "intermediate_size_mlp": INNER, "num_experts_per_tok": 1,
         "interleave_moe_layer_step": 1},
        inputs_first=True,
        config="TextConfig",
    ),
}  # fmt: skip
