from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.listing import FLOAT_DTYPES, TensorRef
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.checkpoints.rules import left_alone
from htsr_alloc.checkpoints.stacks import other_stacks
from htsr_alloc.errors import HtsrError


def refs(tensors, dtype="BF16"):
    """``{name: shape}`` or ``{name: (dtype, shape)}`` as a checkpoint would list them."""
    listed = []
    for name, value in tensors.items():
        code, shape = value if value and isinstance(value[0], str) else (dtype, value)
        listed.append(TensorRef(name, code, tuple(shape), 0))
    return listed


def place(tensors, **options):
    """The layer map, after the check of every model: each tensor is in it once."""
    listed = refs(tensors)
    found = map_layers(listed, **options)
    everywhere = [
        *{m.ref.name for m in found.matrices},
        *(name for name, _ in found.skipped),
        *found.quantised,
    ]
    assert sorted(everywhere) == sorted(tensors)
    assert all(reason for _, reason in found.skipped)
    keys = [(m.layer, m.role, m.expert) for m in found.matrices]
    assert len(set(keys)) == len(keys)
    assert all(0 <= m.layer < len(found.prefixes) for m in found.matrices)
    for m in found.matrices:
        assert m.name.startswith(found.prefixes[m.layer] + ".")
    return found


def roles(found, layer):
    return {m.role for m in found.matrices if m.layer == layer and m.expert is None}


def expert_roles(found, layer):
    return {m.role for m in found.matrices if m.layer == layer and m.expert is not None}


def reasons(found):
    return dict(found.skipped)


def under(prefixes, inner):
    return {f"{p}.{name}": shape for p in prefixes for name, shape in inner.items()}


def numbered(stack, count):
    return [f"{stack}.{i}" for i in range(count)]


LLAMA_ATTENTION = {
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (16, 64),
    "self_attn.v_proj.weight": (16, 64),
    "self_attn.o_proj.weight": (64, 64),
}
LLAMA_MLP = {
    "mlp.gate_proj.weight": (96, 64),
    "mlp.up_proj.weight": (96, 64),
    "mlp.down_proj.weight": (64, 96),
}
NORMS = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
LLAMA_ROLES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
OUTSIDE = {
    "model.embed_tokens.weight": (128, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (128, 64),
}


def test_llama_in_the_order_a_file_has_it():
    prefixes = [f"model.layers.{i}" for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
    inner = LLAMA_ATTENTION | LLAMA_MLP | NORMS | {"self_attn.rotary_emb.inv_freq": (8,)}
    found = place(OUTSIDE | under(prefixes, inner), num_hidden_layers=12)
    assert found.prefixes == tuple(numbered("model.layers", 12))  # 2 before 10
    assert [m.layer for m in found.matrices] == sorted(7 * list(range(12)))
    for layer in range(12):
        assert roles(found, layer) == LLAMA_ROLES
    assert {m.expert for m in found.matrices} == {None}
    assert reasons(found)["lm_head.weight"] == "output head"
    assert reasons(found)["model.embed_tokens.weight"] == "embedding"
    assert reasons(found)["model.norm.weight"] == "outside the blocks"
    assert reasons(found)["model.layers.3.self_attn.rotary_emb.inv_freq"] == "buffer"
    assert reasons(found)["model.layers.3.input_layernorm.weight"].startswith("1-d")
    by_name = {m.name: m for m in found.matrices}
    k = by_name["model.layers.10.self_attn.k_proj.weight"]
    assert (k.layer, k.role, k.shape) == (10, "k_proj", (16, 64))
    assert k.module == "model.layers.10.self_attn.k_proj"


def test_qwen_and_mistral_with_biases_and_head_norms():
    extra = {
        "self_attn.q_proj.bias": (64,),
        "self_attn.q_norm.weight": (16,),
        "self_attn.k_norm.weight": (16,),
    }
    inner = LLAMA_ATTENTION | LLAMA_MLP | NORMS | extra
    found = place(OUTSIDE | under(numbered("model.layers", 3), inner), num_hidden_layers=3)
    assert [roles(found, i) for i in range(3)] == [LLAMA_ROLES] * 3
    assert reasons(found)["model.layers.0.self_attn.q_proj.bias"].startswith("1-d")


def test_gemma3_with_a_vision_tower():
    text = LLAMA_ATTENTION | LLAMA_MLP | NORMS | {"pre_feedforward_layernorm.weight": (64,)}
    vision = {
        "layer_norm1.weight": (32,),
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.q_proj.bias": (32,),
        "self_attn.out_proj.weight": (32, 32),
        "mlp.fc1.weight": (48, 32),
        "mlp.fc2.weight": (32, 48),
    }
    eyes = "vision_tower.vision_model"
    found = place(
        under(numbered("language_model.model.layers", 4), text)
        | under(numbered(f"{eyes}.encoder.layers", 6), vision)
        | {
            "language_model.model.embed_tokens.weight": (128, 64),
            f"{eyes}.embeddings.patch_embedding.weight": (32, 3, 14, 14),
            f"{eyes}.embeddings.position_embedding.weight": (64, 32),
            "multi_modal_projector.mm_input_projection_weight": (32, 64),
        },
        num_hidden_layers=4,  # of the text model; must not cut the tower's six
    )
    assert found.prefixes == (
        *numbered("language_model.model.layers", 4),
        *numbered(f"{eyes}.encoder.layers", 6),
    )
    assert roles(found, 0) == LLAMA_ROLES
    assert roles(found, 9) == {"q_proj", "out_proj", "fc1", "fc2"}
    assert reasons(found)[f"{eyes}.embeddings.position_embedding.weight"] == "embedding"
    projector = "multi_modal_projector.mm_input_projection_weight"
    assert reasons(found)[projector] == "outside the blocks"


def test_phi3_with_fused_projections():
    inner = {
        "self_attn.qkv_proj.weight": (192, 64),
        "self_attn.o_proj.weight": (64, 64),
        "mlp.gate_up_proj.weight": (192, 64),
        "mlp.down_proj.weight": (64, 96),
    }
    found = place(OUTSIDE | under(numbered("model.layers", 2), inner | NORMS))
    assert roles(found, 1) == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("stack", ["h", "transformer.h"])
def test_gpt2_with_its_conv1d_as_stored(stack):
    inner = {
        "attn.bias": (1, 1, 64, 64),
        "attn.masked_bias": (),
        "attn.c_attn.weight": (64, 192),
        "attn.c_attn.bias": (192,),
        "attn.c_proj.weight": (64, 64),
        "mlp.c_fc.weight": (64, 256),
        "mlp.c_proj.weight": (256, 64),
        "ln_1.weight": (64,),
    }
    top = stack.removesuffix("h")
    outer = {f"{top}wte.weight": (99, 64), f"{top}wpe.weight": (64, 64), f"{top}ln_f.bias": (64,)}
    found = place(under(numbered(stack, 3), inner) | outer, num_hidden_layers=3)
    assert found.prefixes == tuple(numbered(stack, 3))
    assert roles(found, 2) == {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}
    shapes = {m.role: m.shape for m in found.matrices if m.layer == 0}
    assert shapes["c_fc"] == (64, 256)
    assert reasons(found)[f"{stack}.0.attn.bias"] == "4-d (no matrix)"
    assert reasons(found)[f"{stack}.0.attn.masked_bias"] == "buffer"
    assert reasons(found)[f"{top}wte.weight"] == reasons(found)[f"{top}wpe.weight"] == "embedding"


def test_gpt_neox():
    inner = {
        "attention.query_key_value.weight": (192, 64),
        "attention.dense.weight": (64, 64),
        "attention.dense.bias": (64,),
        "attention.bias": ("BOOL", (1, 1, 64, 64)),
        "attention.masked_bias": (),
        "attention.rotary_emb.inv_freq": ("F32", (8,)),
        "mlp.dense_h_to_4h.weight": (256, 64),
        "mlp.dense_4h_to_h.weight": (64, 256),
    }
    outer = {"gpt_neox.embed_in.weight": (99, 64), "embed_out.weight": (99, 64)}
    found = place(under(numbered("gpt_neox.layers", 2), inner) | outer)
    assert roles(found, 0) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert reasons(found)["embed_out.weight"] == "output head"
    assert reasons(found)["gpt_neox.embed_in.weight"] == "embedding"
    assert not found.quantised


def test_opt():
    inner = {
        **{f"self_attn.{n}.weight": (64, 64) for n in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "self_attn_layer_norm.weight": (64,),
        "fc1.weight": (256, 64),
        "fc2.weight": (64, 256),
    }
    outer = {
        "model.decoder.embed_tokens.weight": (99, 64),
        "model.decoder.embed_positions.weight": (99, 64),
        "model.decoder.project_in.weight": (64, 32),
    }
    found = place(under(numbered("model.decoder.layers", 2), inner) | outer)
    assert roles(found, 0) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert reasons(found)["model.decoder.project_in.weight"] == "outside the blocks"


BERT = {
    "attention.self.query.weight": (64, 64),
    "attention.self.key.weight": (64, 64),
    "attention.self.value.weight": (64, 64),
    "attention.output.dense.weight": (64, 64),
    "attention.output.LayerNorm.weight": (64,),
    "intermediate.dense.weight": (96, 64),
    "output.dense.weight": (64, 96),
    "output.dense.bias": (64,),
}
BERT_ROLES = {
    *("query", "key", "value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
}


@pytest.mark.parametrize("top", ["bert.", "roberta.", "", "0.auto_model."])
def test_bert_roberta_and_sentence_transformers(top):
    outer = {
        f"{top}embeddings.word_embeddings.weight": (99, 64),
        f"{top}embeddings.position_ids": ("I64", (1, 64)),
        f"{top}pooler.dense.weight": (64, 64),
        "classifier.out_proj.weight": (2, 64),
        "cls.predictions.decoder.weight": (99, 64),
    }
    found = place(under(numbered(f"{top}encoder.layer", 2), BERT) | outer, num_hidden_layers=2)
    assert found.prefixes == tuple(numbered(f"{top}encoder.layer", 2))
    assert roles(found, 0) == roles(found, 1) == BERT_ROLES
    # "output.dense" must not also stand for the attention's.
    shapes = {m.role: m.shape for m in found.matrices if m.layer == 0}
    assert shapes["output.dense"] == (64, 96)
    assert shapes["attention.output.dense"] == (64, 64)
    assert reasons(found)[f"{top}embeddings.position_ids"] == "embedding"
    assert reasons(found)[f"{top}pooler.dense.weight"] == "outside the blocks"
    assert reasons(found)["classifier.out_proj.weight"] == "output head"


def test_mpnet():
    inner = {
        **{f"attention.attn.{name}.weight": (64, 64) for name in "qkvo"},
        "intermediate.dense.weight": (96, 64),
        "output.dense.weight": (64, 96),
    }
    outer = {"encoder.relative_attention_bias.weight": (32, 12), "pooler.dense.weight": (64, 64)}
    found = place(under(numbered("encoder.layer", 2), inner) | outer)
    assert roles(found, 1) == {"q", "k", "v", "o", "intermediate.dense", "output.dense"}
    assert reasons(found)["encoder.relative_attention_bias.weight"] == "embedding"


def test_t5_encoder_before_decoder():
    def attention(place, name):
        return {f"layer.{place}.{name}.{w}.weight": (64, 64) for w in "qkvo"}

    def feed_forward(place):
        return {
            f"layer.{place}.DenseReluDense.wi_0.weight": (96, 64),
            f"layer.{place}.DenseReluDense.wi_1.weight": (96, 64),
            f"layer.{place}.DenseReluDense.wo.weight": (64, 96),
            f"layer.{place}.layer_norm.weight": (64,),
        }

    encoder = attention(0, "SelfAttention") | feed_forward(1)
    decoder = attention(0, "SelfAttention") | attention(1, "EncDecAttention") | feed_forward(2)
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found = place(
        under(numbered("decoder.block", 3), decoder)
        | under(numbered("encoder.block", 2), encoder)
        | {"shared.weight": (99, 64), f"encoder.{bias}": (32, 4), f"decoder.{bias}": (32, 4)}
        | {"decoder.final_layer_norm.weight": (64,), "lm_head.weight": (99, 64)},
        num_hidden_layers=2,
    )
    assert found.prefixes == (*numbered("encoder.block", 2), *numbered("decoder.block", 3))
    own = {f"SelfAttention.{w}" for w in "qkvo"} | {"wi_0", "wi_1", "wo"}
    cross = {f"EncDecAttention.{w}" for w in "qkvo"}
    assert roles(found, 0) == own
    assert roles(found, 4) == own | cross
    assert reasons(found)[f"encoder.{bias}"] == "embedding"
    assert reasons(found)["shared.weight"] == "embedding"


def test_whisper():
    def attention(name):
        return {f"{name}.{w}_proj.weight": (64, 64) for w in ("q", "k", "v", "out")}

    dense = {"fc1.weight": (96, 64), "fc2.weight": (64, 96), "final_layer_norm.weight": (64,)}
    found = place(
        under(numbered("model.encoder.layers", 2), attention("self_attn") | dense)
        | under(
            numbered("model.decoder.layers", 2),
            attention("self_attn") | attention("encoder_attn") | dense,
        )
        | {
            "model.encoder.conv1.weight": (64, 80, 3),
            "model.encoder.embed_positions.weight": (1500, 64),
            "proj_out.weight": (99, 64),
        },
        num_hidden_layers=2,
    )
    assert found.prefixes == (
        *numbered("model.encoder.layers", 2),
        *numbered("model.decoder.layers", 2),
    )
    assert len(roles(found, 0)) == 6
    assert len(roles(found, 2)) == 10
    assert {"self_attn.q_proj", "encoder_attn.q_proj", "fc1"} < roles(found, 3)
    assert reasons(found)["model.encoder.conv1.weight"] == "outside the blocks"
    assert reasons(found)["proj_out.weight"] == "output head"


def test_vit_of_transformers():
    inner = {
        **{f"attention.attention.{w}.weight": (64, 64) for w in ("query", "key", "value")},
        "attention.output.dense.weight": (64, 64),
        "intermediate.dense.weight": (96, 64),
        "output.dense.weight": (64, 96),
        "layernorm_before.weight": (64,),
    }
    outer = {
        "vit.embeddings.cls_token": (1, 1, 64),
        "vit.embeddings.patch_embeddings.projection.weight": (64, 3, 16, 16),
        "classifier.weight": (10, 64),
    }
    found = place(under(numbered("vit.encoder.layer", 2), inner) | outer, num_hidden_layers=2)
    assert roles(found, 0) == BERT_ROLES
    assert reasons(found)["vit.embeddings.patch_embeddings.projection.weight"] == "embedding"
    assert reasons(found)["classifier.weight"] == "output head"


def test_vit_of_timm():
    inner = {
        "attn.qkv.weight": (192, 64),
        "attn.proj.weight": (64, 64),
        "mlp.fc1.weight": (96, 64),
        "mlp.fc2.weight": (64, 96),
        "ls1.gamma": (64,),
    }
    outer = {
        "cls_token": (1, 1, 64),
        "pos_embed": (1, 197, 64),
        "patch_embed.proj.weight": (64, 3, 16, 16),
        "head.weight": (10, 64),
    }
    found = place(under(numbered("blocks", 12), inner) | outer)
    assert found.prefixes == tuple(numbered("blocks", 12))
    assert roles(found, 11) == {"qkv", "proj", "fc1", "fc2"}
    assert reasons(found)["patch_embed.proj.weight"] == "embedding"
    assert reasons(found)["pos_embed"].startswith(("embedding", "outside"))


# --- mixtures -------------------------------------------------------------------------------


def test_mixtral():
    experts = {
        f"block_sparse_moe.experts.{e}.{w}.weight": shape
        for e in range(11)
        for w, shape in {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}.items()
    }
    inner = LLAMA_ATTENTION | NORMS | experts | {"block_sparse_moe.gate.weight": (11, 64)}
    found = place(OUTSIDE | under(numbered("model.layers", 2), inner), num_hidden_layers=2)
    assert roles(found, 0) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    w2 = [m for m in found.matrices if m.layer == 1 and m.role == "w2"]
    assert [m.expert for m in w2] == list(range(11))
    assert w2[10].name == "model.layers.1.block_sparse_moe.experts.10.w2.weight"
    assert w2[10].index is None
    assert reasons(found)["model.layers.1.block_sparse_moe.gate.weight"] == "router"


def test_qwen2_moe_with_a_shared_expert():
    experts = {f"mlp.experts.{e}.{n[4:]}": s for e in range(4) for n, s in LLAMA_MLP.items()}
    shared = {f"mlp.shared_expert.{n[4:]}": s for n, s in LLAMA_MLP.items()}
    gates = {"mlp.gate.weight": (4, 64), "mlp.shared_expert_gate.weight": (1, 64)}
    inner = LLAMA_ATTENTION | NORMS | experts | shared | gates
    found = place(OUTSIDE | under(numbered("model.layers", 2), inner))
    assert expert_roles(found, 0) == {
        "experts.gate_proj",
        "experts.up_proj",
        "experts.down_proj",
    }
    assert {"shared_expert.gate_proj", "shared_expert.down_proj", "q_proj"} < roles(found, 0)
    assert reasons(found)["model.layers.0.mlp.gate.weight"] == "router"
    assert reasons(found)["model.layers.0.mlp.shared_expert_gate.weight"] == "router"
    gate = "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert next(m for m in found.matrices if m.name == gate).expert == 3


def deepseek_v3(layers=6, dense=3):
    """Its real names: MLA, dense first layers, fp8 block scales, and the MTP layer at the end."""
    tensors = dict(OUTSIDE)

    def linear(name, rows, columns):
        tensors[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        tensors[f"{name}.weight_scale_inv"] = ("F32", (-(-rows // 128), -(-columns // 128)))

    for i in range(layers + 1):
        block = f"model.layers.{i}"
        linear(f"{block}.self_attn.q_a_proj", 32, 64)
        linear(f"{block}.self_attn.q_b_proj", 96, 32)
        linear(f"{block}.self_attn.kv_a_proj_with_mqa", 48, 64)
        linear(f"{block}.self_attn.kv_b_proj", 96, 32)
        linear(f"{block}.self_attn.o_proj", 64, 64)
        tensors[f"{block}.self_attn.q_a_layernorm.weight"] = (32,)
        places = [""]
        if i >= dense:
            places = ["experts.0.", "experts.1.", "shared_experts."]
            tensors[f"{block}.mlp.gate.weight"] = (2, 64)
            tensors[f"{block}.mlp.gate.e_score_correction_bias"] = ("F32", (2,))
        for inside in places:
            linear(f"{block}.mlp.{inside}gate_proj", 96, 64)
            linear(f"{block}.mlp.{inside}up_proj", 96, 64)
            linear(f"{block}.mlp.{inside}down_proj", 64, 96)
    last = f"model.layers.{layers}"
    return tensors | {
        f"{last}.embed_tokens.weight": (128, 64),
        f"{last}.enorm.weight": (64,),
        f"{last}.eh_proj.weight": (64, 128),
        f"{last}.shared_head.head.weight": (128, 64),
    }


def test_deepseek_v3():
    found = place(deepseek_v3(), num_hidden_layers=6)
    assert found.prefixes == tuple(numbered("model.layers", 6))
    attention = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    words = ("gate_proj", "up_proj", "down_proj")
    assert roles(found, 0) == attention | {f"mlp.{w}" for w in words}
    assert roles(found, 3) == attention | {f"shared_experts.{w}" for w in words}
    assert expert_roles(found, 3) == {f"experts.{w}" for w in words}
    assert {m.expert for m in found.matrices if m.layer == 5} == {None, 0, 1}
    why = reasons(found)
    name = "model.layers.4.mlp.experts.0.up_proj.weight"
    assert why[name + "_scale_inv"] == f"scale of {name}"
    assert why["model.layers.3.mlp.gate.weight"] == "router"
    assert "multi-token prediction" in why["model.layers.6.eh_proj.weight"]
    assert "multi-token prediction" in why["model.layers.6.self_attn.o_proj.weight"]
    assert not found.quantised


def test_without_a_configuration_the_prediction_layer_is_a_layer():
    found = place(deepseek_v3())
    assert len(found.prefixes) == 7
    assert "eh_proj" in roles(found, 6)


@pytest.mark.parametrize(
    "stack", ["mtp.layers", "model.mtp.layers", "mtp", "model.mtp_layers", "model.layers.2.nextn"]
)
def test_prediction_beside_the_model_is_no_stack(stack):
    """Qwen3-Next and NemotronH, LongCat-Flash, DeepSeek-V4, and what GGUF has no other name for."""
    inner = LLAMA_ATTENTION | LLAMA_MLP | NORMS
    beside = under(numbered(stack, 2), inner) | {"mtp.fc.weight": (64, 128)}
    last = under(["model.layers.3"], inner)  # and the count of the configuration still holds
    tensors = OUTSIDE | under(numbered("model.layers", 3), inner) | last | beside
    found = place(tensors, num_hidden_layers=3)
    assert found.prefixes == tuple(numbered("model.layers", 3))
    assert len(found.matrices) == 3 * 7
    assert {reasons(found)[name] for name in beside} == {"multi-token prediction"}
    assert "beyond the 3 layers" in reasons(found)["model.layers.3.mlp.up_proj.weight"]
    assert len(place(under(numbered("smtp.layers", 2), inner)).prefixes) == 2  # a whole word only


def test_integers_of_a_prediction_are_not_asked_for():
    tensors = under(numbered("model.layers", 2), LLAMA_MLP)
    found = place(tensors | {"mtp.layers.0.mlp.up_proj.qweight": ("I32", (8, 96))})
    assert not found.quantised
    assert len(found.prefixes) == 2


def test_llama4_with_fused_experts():
    top = "language_model.model.layers"
    moe = {
        "feed_forward.experts.gate_up_proj": (3, 64, 192),
        "feed_forward.experts.down_proj": (3, 96, 64),
        "feed_forward.router.weight": (3, 64),
        **{f"feed_forward.shared_expert.{n[4:]}": s for n, s in LLAMA_MLP.items()},
    }
    dense = {f"feed_forward.{n[4:]}": s for n, s in LLAMA_MLP.items()}
    found = place(
        under([f"{top}.0", f"{top}.2"], LLAMA_ATTENTION | dense)
        | under([f"{top}.1", f"{top}.3"], LLAMA_ATTENTION | moe)
    )
    assert found.prefixes == tuple(numbered(top, 4))
    assert expert_roles(found, 1) == {f"experts.{n}_proj" for n in ("gate", "up", "down")}
    slices = [m for m in found.matrices if m.layer == 3 and m.role == "experts.up_proj"]
    assert [(m.index, m.expert, m.shape) for m in slices] == [(i, i, (96, 64)) for i in range(3)]
    assert slices[2].name == f"{top}.3.feed_forward.experts.gate_up_proj[2,up_proj]"
    assert slices[2].module == f"{top}.3.feed_forward.experts.gate_up_proj"
    down = [m for m in found.matrices if m.layer == 3 and m.role == "experts.down_proj"]
    assert (down[1].name, down[1].shape) == (f"{top}.3.feed_forward.experts.down_proj[1]", (96, 64))
    assert reasons(found)[f"{top}.1.feed_forward.router.weight"] == "router"


def test_gpt_oss_in_bf16():
    inner = LLAMA_ATTENTION | {
        "self_attn.sinks": (8,),
        "mlp.router.weight": (4, 64),
        "mlp.router.bias": (4,),
        "mlp.experts.gate_up_proj": (4, 64, 128),
        "mlp.experts.gate_up_proj_bias": (4, 128),
        "mlp.experts.down_proj": (4, 64, 64),
        "mlp.experts.down_proj_bias": (4, 64),
    }
    whole = OUTSIDE | under(numbered("model.layers", 2), inner)
    found = place(whole)  # how gate and up are joined is not known then
    assert expert_roles(found, 0) == {"gate_up_proj", "down_proj"}
    assert sum(m.layer == 0 for m in found.matrices) == 4 + 8
    apart = place(whole, architecture="GptOssForCausalLM")
    assert expert_roles(apart, 0) == {"gate_proj", "up_proj", "down_proj"}
    assert sum(m.layer == 0 for m in apart.matrices) == 4 + 12
    bias = "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert reasons(found)[bias] == "2-d, but not named a weight"
    assert reasons(found)["model.layers.0.mlp.router.weight"] == "router"


def test_a_gate_without_experts_is_a_weight_like_others():
    inner = {"mlp.gate.weight": (64, 64), "mlp.out.weight": (64, 64)}
    assert roles(place(under(numbered("model.layers", 2), inner)), 0) == {"gate", "out"}


@pytest.mark.parametrize("top", ["moe_model.layers", "my_expert_model.encoder.layers", "net.moe"])
def test_a_model_that_is_called_after_experts_has_none(top):
    inner = {
        "mlp.gate.weight": (64, 64),
        "mlp.out.weight": (64, 64),
        "mixer.conv1d.weight": (64, 1, 4),
    }
    found = place(under(numbered(top, 2), inner))
    assert found.prefixes == tuple(numbered(top, 2))
    assert roles(found, 0) == {"gate", "out"}
    assert reasons(found)[f"{top}.1.mixer.conv1d.weight"].startswith("3-d, and not a stack")
    assert left_alone(f"{top}.0.mlp.out") is None
    experts = {"moe.experts.up_proj": (4, 64, 64), **inner}
    mixed = place(under(numbered(top, 2), experts))
    assert expert_roles(mixed, 1) == {"up_proj"}
    assert reasons(mixed)[f"{top}.0.mlp.gate.weight"] == "router"


# --- adapters, quantised, unknown -----------------------------------------------------------


def test_a_peft_lora_adapter():
    inner = {
        f"self_attn.{n}.lora_{ab}.weight": shape
        for n in ("q_proj", "v_proj")
        for ab, shape in {"A": (8, 64), "B": (64, 8)}.items()
    }
    found = place(under(numbered("base_model.model.model.layers", 2), inner))
    assert found.prefixes == tuple(numbered("base_model.model.model.layers", 2))
    assert roles(found, 1) == {f"{n}.lora_{ab}" for n in ("q_proj", "v_proj") for ab in "AB"}


QUANTISED = {
    "gptq": {
        "qweight": ("I32", (8, 64)),
        "qzeros": ("I32", (1, 8)),
        "scales": ("F16", (1, 64)),
        "g_idx": ("I32", (64,)),
    },
    "awq": {
        "qweight": ("I32", (64, 8)),
        "qzeros": ("I32", (1, 8)),
        "scales": ("F16", (1, 64)),
    },
    "bnb 4 bit": {
        "weight": ("U8", (2048, 1)),
        "weight.absmax": ("U8", (64,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    },
    "bnb 8 bit": {
        "weight": ("I8", (64, 64)),
        "SCB": ("F32", (64,)),
        "weight_format": ("U8", ()),
    },
    "compressed tensors": {
        "weight_packed": ("I32", (64, 8)),
        "weight_scale": ("BF16", (64, 1)),
        "weight_shape": ("I64", (2,)),
    },
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_integer_weights_are_told_from_the_rest(kind):
    inner = {f"self_attn.q_proj.{n}": value for n, value in QUANTISED[kind].items()}
    inner |= {"mlp.up_proj.weight": ("BF16", (96, 64))}
    found = place(under(numbered("model.layers", 2), inner))
    first = next(iter(QUANTISED[kind]))
    assert f"model.layers.0.self_attn.q_proj.{first}" in found.quantised
    assert {m.role for m in found.matrices} == {"up_proj"}


def test_mxfp4_experts_are_quantised():
    inner = LLAMA_ATTENTION | {
        "mlp.router.weight": (4, 64),
        "mlp.experts.gate_up_proj_blocks": ("U8", (4, 128, 2, 16)),
        "mlp.experts.gate_up_proj_scales": ("U8", (4, 128, 2)),
    }
    found = place(under(numbered("model.layers", 2), inner))
    assert "model.layers.1.mlp.experts.gate_up_proj_scales" in found.quantised
    assert not any("experts" in m.name for m in found.matrices)


def test_scales_of_activations_are_no_weights():
    inner = {
        "q_proj.weight": ("F8_E4M3", (64, 64)),
        "q_proj.weight_scale": ("F32", ()),
        "q_proj.input_scale": ("F32", (1, 1)),
        "k_scale": ("F32", ()),
    }
    found = place(under(numbered("model.layers", 2), inner))
    assert roles(found, 0) == {"q_proj"}
    assert reasons(found)["model.layers.0.q_proj.input_scale"] == "scale of activations"


def test_an_architecture_that_nobody_has_listed():
    inner = {"mixer.in_w.weight": (64, 96), "mixer.out_w.weight": (96, 64), "gain": (64,)}
    outer = {"stem.0.weight": (64, 3), "to_logits.weight": (99, 64), "stem.2.weight": (64, 64, 2)}
    found = place(under([f"net.stages.{i}" for i in (0, 2, 10, 1)], inner) | outer)
    assert found.prefixes == tuple(numbered("net.stages", 11))
    assert {m.layer for m in found.matrices} == {0, 1, 2, 10}
    assert roles(found, 10) == {"in_w", "out_w"}
    assert reasons(found)["stem.0.weight"] == "outside the blocks"
    assert reasons(found)["net.stages.2.gain"].startswith("1-d")


def test_numbers_inside_a_block_tell_weights_apart_when_nothing_else_does():
    inner = {"mlp.0.weight": (64, 64), "mlp.2.weight": (64, 64), "att.0.out.weight": (64, 64)}
    found = place(under(numbered("model.layers", 2), inner))
    assert roles(found, 0) == {"mlp.0", "mlp.2", "out"}


# --- selection, odd names -------------------------------------------------------------------


def test_include_and_exclude_keep_the_layer_numbers():
    tensors = OUTSIDE | under(numbered("model.layers", 3), LLAMA_ATTENTION | LLAMA_MLP | NORMS)
    only = place(tensors, include=["*.2.self_attn*", "*lm_head*"])
    assert only.prefixes == tuple(numbered("model.layers", 3))
    assert {m.layer for m in only.matrices} == {2}
    assert roles(only, 2) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert reasons(only)["model.layers.0.mlp.up_proj.weight"] == "not matched by include"
    assert reasons(only)["lm_head.weight"] == "output head"  # the better reason stays
    without = place(tensors, exclude=["*k_proj*", "model.layers.0.*"])
    assert {m.layer for m in without.matrices} == {1, 2}
    assert "k_proj" not in roles(without, 1)
    assert reasons(without)["model.layers.0.mlp.up_proj.weight"] == "matched by exclude"
    both = place(tensors, include=["*mlp*"], exclude=["*down*"])
    assert roles(both, 1) == {"gate_proj", "up_proj"}


def test_patterns_mind_case_and_match_the_whole_name():
    tensors = under(numbered("model.layers", 2), LLAMA_MLP)
    assert len(place(tensors, include=["*UP_PROJ*"]).matrices) == 0
    assert len(place(tensors, include=["up_proj"]).matrices) == 0
    assert len(place(tensors, include=["*up_proj.weight"]).matrices) == 2


def test_excluded_integers_are_not_quantised():
    tensors = under(
        numbered("model.layers", 2),
        {"a.qweight": ("I32", (8, 8)), "b.weight": ("BF16", (64, 64))},
    )
    found = place(tensors, exclude=["*qweight*"])
    assert not found.quantised
    assert len(found.matrices) == 2


@pytest.mark.parametrize("number", ["10000", "99999999"])
def test_an_absurd_block_number_is_refused(number):
    with pytest.raises(HtsrError, match=f"{number}: no model has that many blocks"):
        map_layers(refs({f"model.layers.{number}.a.weight": (4, 4)}))


@pytest.mark.parametrize("stack", ["model.layers", "net.stages", "encoder.layers.1.blocks"])
def test_a_number_that_begins_with_0_is_refused_and_not_passed_by(stack):
    """Of layers.00 to layers.11 only the last two would be a model."""
    inner = {"mlp.a.weight": (8, 8), "mlp.b.weight": (8, 8)}
    for blocks in (
        [f"{stack}.{i:02}" for i in range(12)],
        [f"{stack}.0", f"{stack}.1", f"{stack}.01"],
    ):
        with pytest.raises(
            HtsrError, match=r"0\d\.mlp\.a\.weight: the number of its block begins with 0"
        ):
            map_layers(refs(under(blocks, inner)))
    assert place(under(numbered("model.layers", 2), inner) | {"head.01.weight": (8, 8)}).prefixes


@pytest.mark.parametrize("number", ["9" * 5000, "\u00b2", "\u0663", "1e3", "-1", "", "0x1"])
def test_what_is_no_block_number_is_skipped_with_a_reason(number):
    name = f"model.layers.{number}.a.weight"
    found = place({name: (4, 4), "model.layers.0.a.weight": (4, 4)})
    assert found.prefixes == ("model.layers.0",)
    assert reasons(found)[name] == "outside the blocks"


WORDS = ["model", "layers", "layer", "h", "block", "experts", "moe", "0", "1", "2", "10", "07"]
WORDS += ["q_proj", "mlp", "gate", "router", "weight", "bias", "weight_scale", "lm_head", ""]
WORDS += ["encoder", "decoder", "embed", "\u00b2", "\u0663", "\x1b[2J", "a.b", "9" * 12]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.one_of(
            st.lists(st.sampled_from(WORDS), min_size=1, max_size=7).map(".".join),
            st.text(max_size=12),
        ),
        st.tuples(
            st.sampled_from([*FLOAT_DTYPES, "I32", "U8", "BOOL", "C64", "F8_E8M0"]),
            st.lists(st.integers(0, 3), max_size=4),
        ),
        max_size=14,
    ),
    st.lists(st.sampled_from(["*", "*q_proj*", "model*", "[", ""]), max_size=2),
    st.one_of(st.none(), st.integers(1, 3)),
)
def test_every_tensor_of_any_checkpoint_is_accounted_for(tensors, exclude, limit):
    listed = refs(tensors)
    try:
        found = map_layers(listed, num_hidden_layers=limit, exclude=exclude)
    except HtsrError as error:
        said = ("no model has that many blocks", "its block begins with 0")
        assert any(words in str(error) for words in said)  # noqa: PT017
        return
    names = {m.ref.name for m in found.matrices}
    skipped = {name for name, reason in found.skipped if reason}
    quantised = set(found.quantised)
    assert names | skipped | quantised == set(tensors)
    assert not names & skipped
    assert not names & quantised
    assert not skipped & quantised
    assert len(found.skipped) == len(skipped)
    assert len({m.name for m in found.matrices}) == len(found.matrices)
    for m in found.matrices:
        assert m.ref.dtype in FLOAT_DTYPES
        assert 0 <= m.layer < len(found.prefixes)
        assert m.role
        assert not any(fnmatchcase(m.ref.name, pattern) for pattern in exclude)
    assert [m.layer for m in found.matrices] == sorted(m.layer for m in found.matrices)


def test_a_stack_of_no_experts_is_skipped():
    found = place({"model.layers.0.experts.w": (0, 4, 4), "model.layers.0.a.weight": (4, 4)})
    assert [m.role for m in found.matrices] == ["a"]
    assert reasons(found) == {"model.layers.0.experts.w": "empty"}


def test_the_linears_of_a_projector_are_no_layers():
    inner = {"attn.qkv.weight": (64, 64), "mlp.fc1.weight": (64, 64)}
    projector = {f"visual.merger.mlp.{i}.weight": (64, 64) for i in (0, 2)}
    found = place(under(numbered("visual.blocks", 2), inner) | projector)
    assert found.prefixes == tuple(numbered("visual.blocks", 2))
    assert reasons(found)["visual.merger.mlp.0.weight"] == "outside the blocks"


def test_a_plain_stack_of_linears_is_still_a_model():
    found = place({f"net.{i}.weight": (64, 64) for i in (0, 2, 4)} | {"net.0.bias": (64,)})
    assert [m.layer for m in found.matrices] == [0, 2, 4]


@pytest.mark.checkpoints
@pytest.mark.parametrize(
    ("name", "layers", "found_roles"),
    [
        ("minilm", 6, BERT_ROLES),
        ("mpnet", 12, {"q", "k", "v", "o", "intermediate.dense", "output.dense"}),
        ("smollm2", 30, LLAMA_ROLES),
    ],
)
def test_real_checkpoints(checkpoint, name, layers, found_roles):
    opened = open_checkpoint(checkpoint(name))
    found = map_layers(opened.tensors, num_hidden_layers=opened.num_hidden_layers)
    assert len(found.prefixes) == layers == opened.num_hidden_layers
    assert [roles(found, i) for i in range(layers)] == [found_roles] * layers
    assert len(found.matrices) == layers * len(found_roles)
    assert len(found.matrices) + len(found.skipped) == len(opened.tensors)


def test_a_stack_that_is_left_out_vanishes():
    inner = {"attn.q_proj.weight": (64, 64)}
    text, vision = numbered("language_model.layers", 3), numbered("visual.blocks", 2)
    tensors = under([*text, *vision], inner)
    whole = place(tensors)
    assert whole.prefixes == (*text, *vision)
    found = place(tensors, exclude=other_stacks(whole.prefixes, "visual"))
    assert found.prefixes == tuple(vision)
    assert [m.layer for m in found.matrices] == [0, 1]
    found = place(tensors, exclude=other_stacks(whole.prefixes, "language_model"))
    assert found.prefixes == tuple(text)
    kept = place(tensors, exclude=["*layers.1.*"])  # a layer of a stack that stays is still one
    assert kept.prefixes == (*text, *vision)


def test_experts_with_a_word_before_their_number():
    """Switch and NLLB: mlp.experts.expert_3.wi."""
    stem = "encoder.block.1.layer.1.mlp"
    tensors = {
        **{
            f"{stem}.experts.expert_{i}.{w}.weight": (16, 8) for i in range(3) for w in ("wi", "wo")
        },
        f"{stem}.router.classifier.weight": (3, 8),
        "encoder.block.1.layer.0.SelfAttention.q.weight": (8, 8),
    }
    found = place(tensors)
    assert {(m.role, m.expert) for m in found.matrices if m.expert is not None} == {
        (role, i) for i in range(3) for role in ("wi", "wo")
    }
    assert roles(found, 1) == {"q"}
    assert reasons(found) == {f"{stem}.router.classifier.weight": "router"}


@pytest.mark.parametrize(
    ("stack", "block"), [("swin.encoder.layers", "{}.blocks.{}"), ("encoder.block", "{}.{}")]
)
def test_blocks_of_stages_are_the_layers(stack, block):
    """Swin and SegFormer: four stages of several blocks each, whose widths differ."""
    inner = {"attention.self.query.weight", "mlp.fc1.weight"}
    depths = (2, 1, 3)
    prefixes = [f"{stack}.{block.format(i, j)}" for i, n in enumerate(depths) for j in range(n)]
    tensors = {f"{p}.{name}": (64, 32) for p in prefixes for name in inner}
    beside = f"{stack}.0.downsample.reduction.weight"
    found = place({**tensors, beside: (64, 128)})
    assert found.prefixes == tuple(prefixes)
    assert [m.layer for m in found.matrices] == sorted(2 * list(range(sum(depths))))
    assert roles(found, 0) == {"query", "fc1"}
    assert reasons(found) == {beside: "outside the blocks"}


def test_convolutions_make_no_stage():
    """MobileViT: linears in ``transformer.layer`` of a numbered layer, beside convolutions."""
    stack = "encoder.layer"
    inner = "transformer.layer.{}.attention.attention.query.weight"
    tensors = {f"{stack}.{i}.{inner.format(j)}": (32, 32) for i in (0, 1) for j in (0, 1)}
    convolutions = {f"{stack}.0.layer.{j}.conv.convolution.weight": (8, 8, 3, 3) for j in (0, 1)}
    found = place({**tensors, **convolutions})
    assert found.prefixes == (f"{stack}.0", f"{stack}.1")
    assert len(found.matrices) == 4


def test_experts_of_jetmoe_and_heads_of_xlnet():
    block = "model.layers.0"
    jetmoe = {
        f"{block}.mlp.input_linear.weight": (4, 192, 64),
        f"{block}.mlp.router.layer.weight": (4, 64),
        f"{block}.self_attention.experts.output_linear.weight": (4, 64, 32),
        f"{block}.self_attention.experts.router.layer.weight": (4, 64),
        f"{block}.self_attention.kv_proj.weight": (64, 64),
    }
    found = place(jetmoe)
    assert len(expert_roles(found, 0)) == 2
    assert sum(m.expert is not None for m in found.matrices) == 8
    assert set(reasons(found).values()) == {"router"}
    block = "transformer.layer.0"
    xlnet = {f"{block}.rel_attn.{w}": (64, 4, 16) for w in "qkvor"}
    found = place({**xlnet, f"{block}.rel_attn.seg_embed": (2, 4, 16)})
    assert [(m.shape, m.expert) for m in found.matrices] == [((64, 64), None)] * 5
    assert all(left_alone(m.module) for m in found.matrices)


@pytest.mark.parametrize(
    "name",
    ["attention.self.distance_embedding.weight", "attn.rel_pos_emb.weight",
     "attention.self.rel_attn_embed.weight", "ffn.gate.tid2eid"],
)  # fmt: skip
def test_tables_of_positions_and_of_tokens_are_no_matrices(name):
    tensors = {f"encoder.layer.0.{name}": (64, 32), "encoder.layer.0.mlp.fc1.weight": (64, 32)}
    assert set(reasons(place(tensors))) == {f"encoder.layer.0.{name}"}
