"""Tiny random models of transformers' families, from a hub checkpoint to a trained adapter.

    python benchmarks/families.py [--tasks vl lm s2s image mlm] [--only NAME ...]

Each family's default configuration is made small by the names of its numbers, a random model of it
is saved as hub checkpoints look, and goes the whole way: analyze, allocate, build, a forward pass
with padding, backward, save, reload. One row a family says how far it came, and why no further.
"""

import argparse
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
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
    (r"n_group|topk_group", 1),
    (r"first_k_dense_replace|num_nextn_predict_layers", 0),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(target|source)_positions",
     POSITIONS),
    (r"image_size|input_size|img_size", 32),
    (r"patch_size|spatial_patch_size", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"sliding_window(_size)?|attention_window|window_size|rotary_dim", 16),
)  # fmt: skip
COMPUTED = {"layers_block_type", "moe_layers", "rope_scaling", "per_layer_config",
            "attention_layers",
            "model_type", "transformers_version", "dtype", "architectures",
            "_name_or_path", "out_features", "out_indices"}  # fmt: skip
KINDS = ("layer_types", "mlp_layer_types")  # of layers: two different ones, where there are
DEFAULTS = {"head_dim": 16, "num_key_value_heads": 4}  # where a configuration leaves them open
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
HALF = {**DEFAULT_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
MROPE = {"rope_parameters": {**DEFAULT_ROPE, "mrope_section": [2, 3, 3]}}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
MIXED = {"layer_types": ["mamba", "attention"]}
STARTS = {"vision_start_token_id": 101, "audio_start_token_id": 102}
# What the names do not say, by model type.
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text",
                     "paddleocr_vl_text", "qwen2_5_omni_text", "qwen3_omni_moe_text"), MROPE),
    "glm4v_moe_text": {"rope_parameters": HALF},
    "qwen2_5_omni_thinker": STARTS,
    "qwen3_omni_moe_thinker": STARTS,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "granitemoehybrid": MAMBA | MIXED,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma3n_text": {"intermediate_size": 96, "activation_sparsity_pattern": None,
                     "num_kv_shared_layers": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "xlnet": {"d_head": 16},
    "xlstm": {"num_blocks": 2, "hidden_size": 64, "embedding_dim": 64, "num_heads": 4},
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
    "mobilebert": {"embedding_size": 64, "hidden_size": 64, "intra_bottleneck_size": 64,
                   "true_hidden_size": 64},
}  # fmt: skip
# Families whose models want more than their task's inputs, or others.
SEES, WRITES = {"blip", "vision-encoder-decoder"}, {"t5gemma2", "vision-encoder-decoder"}
READS = {"imagegpt"}  # pixels as the numbers of their clusters
TASKS = {  # task -> the Auto class's table, and the inputs that its models take
    "vl": ("IMAGE_TEXT_TO_TEXT", ("text",)),
    "lm": ("CAUSAL_LM", ("text",)),
    "s2s": ("SEQ_TO_SEQ_CAUSAL_LM", ("text", "target")),
    "image": ("IMAGE_CLASSIFICATION", ("image",)),
    "mlm": ("MASKED_LM", ("text",)),
}


@dataclass
class Family:
    """How far one family came: ``done`` holds the steps, ``reason`` why there are no more."""

    task: str
    name: str
    done: list[str] = field(default_factory=list)
    matrices: int = 0
    asked: int = 0
    trainable: int = 0
    reason: str = ""

    @property
    def counted(self) -> bool:
        """Whether what allocate says is what became trainable."""
        return "built" in self.done and self.asked == self.trainable


STEPS = ("made", "analysed", "allocated", "built", "trained", "reloaded")


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's dictionary with small numbers."""
    small = {key: _small(str(key), value) for key, value in values.items() if key not in COMPUTED}
    if values.get("kv_lora_rank"):  # latent attention has as many keys as queries
        small["num_key_value_heads"] = small["num_attention_heads"]
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

    table = getattr(modeling_auto, f"MODEL_FOR_{TASKS[task][0]}_MAPPING_NAMES")
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


def inputs_of(task: str, model: Any) -> dict[str, torch.Tensor]:
    """Two rows, the second of them padded; or two images."""
    needs = TASKS[task][1]
    if model.config.model_type in SEES:
        needs = (*needs, "image")
    if model.config.model_type in WRITES:
        needs = (*needs, "target")
    if model.config.model_type in READS:
        needs = ("text",)
    generator = torch.Generator().manual_seed(1)
    given: dict[str, torch.Tensor] = {}
    if "text" in needs:
        given["input_ids"] = torch.randint(10, 90, (2, 12), generator=generator)
        given["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
        given["attention_mask"][1, :4] = 0
    if "target" in needs:
        given["decoder_input_ids"] = torch.randint(10, 90, (2, 6), generator=generator)
    if "image" in needs:
        config = getattr(model.config, "vision_config", model.config)
        size = getattr(getattr(config, "encoder", config), "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        given["pixel_values"] = torch.randn(2, channels, height, width, generator=generator)
    return given


def outcome(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or whatever tensor comes first."""
    found = model(**given)
    logits = getattr(found, "logits", None)
    return logits if isinstance(logits, torch.Tensor) else found[0]


def go(task: str, model_type: str, folder: Path) -> Family:
    """One family, the whole way."""
    from htsr_alloc import HtsrError

    family = Family(task, model_type)
    steps = iter(STEPS)
    try:
        for _ in walk(family, folder):
            family.done.append(next(steps))
    except Exception as error:  # whatever a family raises is a row of the table
        own = isinstance(error, HtsrError | Unfit)
        who = "" if own else f"{FAILS[len(family.done)]}: "
        family.reason = f"{who}{first_line(error)}"
    return family


class Unfit(Exception):
    """A sentence of ours."""


# Who fails on the way to each of the STEPS, if we do not say so ourselves.
FAILS = (
    "transformers cannot make it of these small numbers",
    "htsr cannot analyse it",
    "htsr cannot allocate for it",
    "transformers cannot load what it saved",
    "its forward or backward pass refuses these inputs",
    "it cannot be saved and loaded again",
)


def first_line(error: Exception) -> str:
    """An exception's first line with its last sign, at most 160 signs of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = (lines or [type(error).__name__])[0]
    if text.endswith(":") and len(lines) > 1:
        text = f"{text} {lines[1]}"
    text = text.replace("|", "/").rstrip(".:!")
    return f"{text[:160].rstrip()}{'...' if len(text) > 160 else '.'}"


def walk(family: Family, folder: Path) -> Iterator[None]:
    """The steps, one after the other."""
    from peft import PeftModel

    from htsr_alloc import allocate, analyze
    from htsr_alloc.allocation import Bounds
    from htsr_alloc.lora_moe import build

    base = tiny_model(family.task, family.name)
    base.save_pretrained(folder / "base")
    yield
    metrics = analyze(folder / "base")
    assert metrics is not None
    family.matrices = len(metrics.matrices)
    yield
    params = 3 * uniform(metrics)
    allocation = allocate(metrics, params=params, r=R, bounds=Bounds(1))
    assert allocation.parameters is not None
    family.asked = allocation.parameters.spent
    yield
    kind = type(base)
    base = kind.from_pretrained(folder / "base", dtype=torch.float32).eval()
    model: Any = build(base, allocation, r=R, lora_dropout=0.0)
    family.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield
    given = inputs_of(family.task, base)
    move(model)
    loss = outcome(model, given).float().square().mean()
    if not math.isfinite(loss.item()):
        raise Unfit("its output is not finite")
    loss.backward()
    own = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not any(p.grad is not None and p.grad.abs().max() > 0 for _, p in own):
        raise Unfit("no adapter has a gradient")
    yield
    with torch.no_grad():
        want = outcome(model, given)
    model.save_pretrained(folder / "adapter")
    base = kind.from_pretrained(folder / "base", dtype=torch.float32).eval()
    again = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        got = outcome(again, given)
    if not torch.allclose(got, want, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise Unfit("a reloaded adapter gives another output")
    yield


def uniform(metrics: Any) -> int:
    """The parameters of one expert a layer, on every linear that is adapted."""
    from htsr_alloc.allocation.units import costed_layers

    return sum(unit.cost.of(1) for unit in costed_layers(metrics, (), R) if unit.cost is not None)


def move(model: Any) -> None:
    """Put every trainable parameter off its start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def run(tasks: list[str], only: list[str], show: Callable[[Family], None]) -> list[Family]:
    """Every family of the tasks; one that several tasks have goes with the first."""
    found: dict[str, Family] = {}
    for task in tasks:
        for name in classes(task):
            if name in found or (only and name not in only):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found[name] = go(task, name, Path(folder))
            show(found[name])
    return list(found.values())


def row(family: Family) -> str:
    """A line of the table."""
    marks = ["yes" if step in family.done else "" for step in STEPS[1:]]
    counts = f"{family.trainable:,}" if "built" in family.done else ""
    if counts and not family.counted:
        counts = f"{counts} of {family.asked:,}"
    cells = [family.name, family.task, str(family.matrices or ""), *marks, counts, family.reason]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    heads = ["family", "task", "matrices", *STEPS[1:], "trainable", "reason"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    start = time.perf_counter()
    families = run(arguments.tasks, arguments.only, lambda f: print(row(f), flush=True))
    made = [f for f in families if "made" in f.done]
    print(f"\n{len(families)} families, {len(made)} made", end="")
    for step in STEPS[1:]:
        count = sum(step in f.done for f in made)
        print(f", {count} {step} ({count / max(1, len(made)):.1%})", end="")
    equal = sum(f.counted for f in made)
    print(f", {equal} with the trainable parameters that allocate says;", end=" ")
    print(f"{time.perf_counter() - start:.0f} s; transformers {transformers.__version__}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
