"""What a tensor's name and shape say: no weight matrix, a router, an expert, or left alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from htsr_alloc.checkpoints.listing import SCALE_SUFFIXES, TensorRef

STACKED_2D = r"experts\.mlp\.[wv]\d"
# 3-d tensors that are one matrix, (d_model, heads, d_head): XLNet's, which are no linears.
HEADS_APART = r"rel_attn\.[qkvor]"
# Blocks that predict further tokens, as transformers leaves them out, and as GGUF names them.
PREDICTION = r"(mtp|mtp_layers|mtp_dspark|nextn)"
# Tensors that are not a weight matrix of a block, wherever they are.
SKIPPED_NAMES = (
    (PREDICTION, "multi-token prediction"),
    (
        r"(embed|embeddings?|wte|wpe|position_ids|relative_attention_bias|rel_pos|rel_pos_[hw]"
        r"|rel_pos_emb|rel_attn_embed|seg_embed|distance_embedding)",
        "embedding",
    ),
    (r"tid2eid", "table of the experts of each token"),
    (r"(inv_freq|masked_bias|cos_cached|sin_cached|relative_position_index)", "buffer"),
    (r"(input_scale|k_scale|v_scale|q_scale|activation_scale)", "scale of activations"),
    (STACKED_2D, "DBRX stacks its experts in a 2-d tensor, which is not split"),
)
# Tensors outside every block, with a more specific reason than that.
SKIPPED_OUTSIDE = (
    (r"(lm_head|embed_out|score|classifier|qa_outputs|proj_out|output_layer|head)", "output head"),
    (r"(embed\w*|shared|patch\w*)", "embedding"),
)
# What names the router of a mixture, in a block that has experts.
ROUTER_NAMES = r"(gate|router\w*|router\w*\.\w+|shared_expert_gate|wg)"

# Linears that are analysed, but adapted only where they are named, and why.
LEFT_ALONE = (
    (r"(^|\.)dt_proj$", "the model reads its weight without calling it"),
    (r"(^|\.)indexer\.", "what it picks has no gradient"),
    (r"(^|\.)(o_a_proj|wo_a)$", "each group of its inputs meets its own rows"),
    (rf"(^|\.){HEADS_APART}$", "its heads are a dimension of one tensor, not of a linear module"),
)
EXPERT = "one of the base's own experts"
# The last words of an expert's up matrix -> of its gate, which transformers joins with it.
GATE_OF = {"up_proj": "gate_proj", "w3": "w1"}
EXPERT_WORD = re.compile(r"expert|moe|\b(in|out)put_linear\b", re.IGNORECASE)  # the last: JetMoE
BLOCK = re.compile(r".*?\.[0-9]+(\.|$)")  # up to the first number, as in block_of of lora_moe
# Stacks of experts that may join gate and up, and the down beside each (GGUF, Granite, Aria).
STACKS = (
    ("gate_up_proj", "down_proj"),
    ("gate_up_proj.weight", "down_proj.weight"),
    ("input_linear.weight", "output_linear.weight"),
    ("fc1.weight", "fc2.weight"),
)
# Architectures whose stacks take a row of gate and one of up by turns, not one after the other.
INTERLEAVED = ("GptOss", "gpt_oss")
NUMBER = re.compile(r"[0-9]{1,9}")
EXPERT_NUMBER = re.compile(r"(?:expert_)?(0|[1-9][0-9]{0,8})")  # Switch, NLLB: experts.expert_3


def skip_reason(ref: TensorRef, place: tuple[str, int] | None, mixture: bool) -> str | None:
    """Why a tensor is not a weight matrix of a block; None when it is one (or an integer one)."""
    name = ref.name
    for suffix in SCALE_SUFFIXES:
        if name.endswith("weight" + suffix):
            return f"scale of {name.removesuffix(suffix)}"
    base = re.sub(r"[._]weight$", "", name)
    named = skipped_by_name(base)
    if named is not None:
        return named
    if place is None:
        for pattern, reason in SKIPPED_OUTSIDE:
            if has_words(pattern, base):
                return reason
        return "outside the blocks"
    dims = len(ref.shape)
    if dims < 2:
        return f"{dims}-d (norm, bias or scalar)"
    if dims > 3:
        return f"{dims}-d (no matrix)"
    if ref.dtype in ("BOOL", "C64"):
        return f"dtype {ref.dtype}"
    if not ref.is_float:
        return None
    if dims == 3 and has_words(HEADS_APART, base):
        return None
    if dims == 3 and not of_experts(name):
        return "3-d, and not a stack of experts (convolution?)"
    if dims == 3 and 0 in ref.shape:
        return "empty"
    if mixture and is_router(base):
        return "router"
    if dims == 2 and not name.endswith("weight"):
        return "2-d, but not named a weight"
    return None


def skipped_by_name(module: str) -> str | None:
    """Why a module of this full name has no weight matrix of a block, wherever it stands."""
    found = (reason for pattern, reason in SKIPPED_NAMES if has_words(pattern, module))
    return next(found, None)


def left_alone(module: str) -> str | None:
    """Why a linear of this full name is adapted only where it is named; None of most.

    A slice ``[i]`` of a tensor is an expert.
    """
    found = (reason for pattern, reason in LEFT_ALONE if re.search(pattern, module))
    return EXPERT if module.endswith("]") or is_numbered_expert(module) else next(found, None)


def is_mixture(name: str, dims: int) -> bool:
    """Whether a tensor of this full name and number of dimensions belongs to experts."""
    stacked = dims == 3 or is_numbered_expert(name) or has_words(STACKED_2D, name)
    return of_experts(name) and stacked


def of_experts(name: str) -> bool:
    """Whether a full name speaks of experts inside its block: a model's own name may too."""
    return EXPERT_WORD.search(name, _inside(name)) is not None


def _inside(name: str) -> int:
    """Where in a full name stands what is inside the block; 0 where no block is named."""
    block = BLOCK.match(name)
    return block.end() if block else 0


def inputs_first(gate_up: Sequence[int], down: Sequence[int]) -> bool | None:
    """Whether stacks of experts are (experts, d_in, d_out) and not (experts, d_out, d_in).

    By the sizes of a joined gate and up and of the down beside it, which never fit both. None where
    the first is no joined gate and up.
    """
    (p, q), (a, b) = gate_up[-2:], down[-2:]
    if (p, q) == (2 * b, a):
        return False
    return True if (p, q) == (b, 2 * a) else None


def is_router(module: str) -> bool:
    """Whether a module of a block that has experts is their router, or a gate, by its full name."""
    named = re.search(rf"\.{ROUTER_NAMES}$", module) is not None
    return named and "expert" not in module.split(".")[-2]


def is_numbered_expert(module: str) -> bool:
    """Whether a module is one of a mixture's experts, or a part of one, by its full name."""
    return expert_position(module) is not None


def has_words(pattern: str, base: str) -> bool:
    """Whether ``pattern`` matches whole words of a dotted name."""
    return re.search(rf"(^|\.){pattern}(\.|$)", base) is not None


def expert_position(name: str) -> int | None:
    """Where in the dotted name the expert's number stands: right after a word like experts."""
    parts = name.split(".")
    for i in range(name.count(".", 0, _inside(name)) + 1, len(parts)):
        if EXPERT_NUMBER.fullmatch(parts[i]) and EXPERT_WORD.search(parts[i - 1]):
            return i
    return None
