"""A tiny random model of each of transformers' families, by the names of its numbers."""

import re
from typing import Any

import torch

VOCABULARY, POSITIONS, R = 128, 64, 2
LARGEST = 20_000_000  # parameters; a default that resists shrinking is left out
# What a configuration's numbers become, by their names; the first that matches.
SIZES = (
    (r"\w*vocab_size\w*", VOCABULARY),
    (r"\w*(intermediate_size|ffn_dim|ffn_size|ffn_hidden_size)\w*|d_ff|dff|n_inner|d_inner|mlp_dim",
     96),
    (r"(\w*_)?(hidden_size|hidden_dim|embed_dim|emb_dim|embedding_size|projection_dim)(_\w+)?"
     r"|d_model|n_embd|dim|projector_dim|word_embed_proj_dim", 64),
    (r"num_hidden_layers|n_layers?|depth|num_layers|\w*coder_layers|num_\w+coder_layers", 2),
    (r"num_key_value_heads|n_head_kv|kv_n_heads|num_kv_heads|n_kv_heads", 2),
    (r"num_attention_heads|n_heads?|num_heads|\w*coder_attention_heads", 4),
    (r"(\w+_)?head_dim|d_kv|kv_channels|\w*lora_rank", 16),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"first_k_dense_replace|num_nextn_predict_layers", 0),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions",
     POSITIONS),
    (r"image_size|input_size|img_size", 32),
    (r"patch_size|spatial_patch_size", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"sliding_window(_size)?|attention_window|window_size|rotary_dim", 16),
)  # fmt: skip
COMPUTED = {"layers_block_type", "moe_layers", "rope_scaling", "per_layer_config",
            "attention_layers", "qk_head_dim", "num_layers_per_stack", "down_ops",
            "model_type", "transformers_version", "dtype", "architectures",
            "_name_or_path", "out_features", "out_indices"}  # fmt: skip
KINDS = ("layer_types", "mlp_layer_types")  # of layers: two different ones, where there are
# Where a configuration leaves them open.
DEFAULTS = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "image_token_index": 104,
    "video_token_index": 105,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
HALF = {**DEFAULT_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
MROPE = {"rope_parameters": {**DEFAULT_ROPE, "mrope_section": [2, 3, 3]}}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
MIXED = {"layer_types": ["mamba", "attention"]}
STARTS = {"vision_start_token_id": 101, "audio_start_token_id": 102}
# What the names do not say, by model type.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text",
                     "paddleocr_vl_text", "hunyuan_vl_text", "qwen2_5_omni_text",
                     "qwen3_omni_moe_text"), MROPE),
    "glm4v_moe_text": {"rope_parameters": HALF},
    "qwen2_5_omni_thinker": STARTS,
    "qwen3_omni_moe_thinker": STARTS,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "granitemoehybrid": MAMBA | MIXED,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"intermediate_size": 96, "activation_sparsity_pattern": None,
                     "num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "xlnet": {"d_head": 16},
    "xlstm": {"num_blocks": 2, "hidden_size": 128, "embedding_dim": 128, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "marian": {"pad_token_id": 1, "decoder_start_token_id": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 8]},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1},
    "swin": {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24,
             "depths": [2, 2], "num_heads": [2, 4]},
    "swinv2": {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24,
               "depths": [2, 2], "num_heads": [2, 4]},
    "donut-swin": {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24,
                   "depths": [2, 2], "num_heads": [2, 4]},
    "levit": {"image_size": 64, "patch_size": 16},
    "kosmos-2": {"latent_query_num": 4},
    "step3p5": {"sliding_window": 16},
    "mobilebert": {"embedding_size": 64, "hidden_size": 64, "intra_bottleneck_size": 64,
                   "true_hidden_size": 64},
}  # fmt: skip
TASKS = {  # task -> the Auto class's table
    "vl": "IMAGE_TEXT_TO_TEXT",
    "lm": "CAUSAL_LM",
    "s2s": "SEQ_TO_SEQ_CAUSAL_LM",
    "image": "IMAGE_CLASSIFICATION",
    "mlm": "MASKED_LM",
}


class Unfit(Exception):
    """A sentence of ours."""


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's dictionary with small numbers."""
    small = {key: _small(str(key), value) for key, value in values.items() if key not in COMPUTED}
    if values.get("kv_lora_rank"):  # latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
        if "partial_rotary_factor" in (small.get("rope_parameters") or {}):
            small["rope_parameters"]["partial_rotary_factor"] = 1.0
    for name in KINDS:
        kinds = list(dict.fromkeys(values.get(name) or ()))
        if kinds:
            small[name] = (kinds * 2)[:2]
    if values.get("mrope_section"):  # of a quarter, or all, of 16 / 2 frequencies
        half = round(8 * (values.get("partial_rotary_factor") or 1))
        small["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return small


def _small(key: str, value: Any) -> Any:
    if value is None:
        return DEFAULTS.get(key)
    if isinstance(value, dict):
        return {**shrunk(value), **{k: value[k] for k in ("model_type",) if k in value}}
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, size in SIZES:
        if re.fullmatch(pattern, key):
            return min(size, value)
    if re.search(r"(token_id|token_index|_id)$", key) and value >= VOCABULARY:
        return 100 + value % 25
    return value


def tiny_config(model_type: str) -> Any:
    """The family's default configuration, made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[model_type]
    values = shrunk(kind().to_dict())
    for name, part in values.items():
        if isinstance(part, dict):
            part |= OWN.get(part.get("model_type", ""), {})
            values[name] = part
    return kind(**{**values, **OWN.get(model_type, {})})


def classes(task: str) -> dict[str, str]:
    """Model type -> class of the task, as transformers' Auto class has it."""
    from transformers.models.auto import modeling_auto

    table = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES")
    return {kind: name if isinstance(name, str) else name[0] for kind, name in table.items()}


def tiny_model(task: str, model_type: str) -> Any:
    """A random model of the family, float32.

    Raises:
        Unfit: one that stays large.
    """
    import transformers

    kind = getattr(transformers, classes(task)[model_type])
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LARGEST:
        raise Unfit(f"its smallest model here has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    return kind(config).float().eval()
