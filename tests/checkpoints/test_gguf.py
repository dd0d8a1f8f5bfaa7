"""GGUF files: against the package gguf, against ggml's equations stated again, and hostile ones."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.ggufs import BLOCK, TYPES, random_blocks, weights, write

from htsr_alloc.analysis.analyze import analyze
from htsr_alloc.checkpoints.gguf import hub_names
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError

Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
Q4_K, Q6_K = gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K
LLAMA = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def only(path, name="model.layers.0.self_attn.q_proj.weight"):
    checkpoint = open_checkpoint(path)
    (ref,) = [ref for ref in checkpoint.tensors if ref.name == name]
    return checkpoint, ref


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_reads_as_gguf_dequantises_it(tmp_path, kind):
    columns = 2 * max(256, gguf.GGML_QUANT_SIZES[kind][0])
    raw = random_blocks(kind, 37, columns // gguf.GGML_QUANT_SIZES[kind][0])
    tensors = {"token_embd.weight": np.ones((3, 7), np.float32), "blk.0.attn_q.weight": (raw, kind)}
    checkpoint, ref = only(write(tmp_path / "m.gguf", tensors))
    found = checkpoint.read(ref).float()
    assert ref.shape == (37, columns)
    expected = gguf.quants.dequantize(raw, kind)
    assert np.array_equal(found.numpy(), expected, equal_nan=True)
    assert np.isfinite(expected).any()


def halves(raw):
    """The f16 of two bytes, as a float32."""
    return np.frombuffer(bytes(raw), "<f2").astype(np.float32)


def q4_k(block):
    """ggml's dequantize_row_q4_K of one block of 256."""
    (d,), (least,), scales, qs = halves(block[:2]), halves(block[2:4]), block[4:16], block[16:]
    out = np.empty(256, np.float32)
    for j in range(8):
        if j < 4:
            scale, low = scales[j] & 63, scales[j + 4] & 63
        else:
            scale = (scales[j + 4] & 15) | ((scales[j - 4] >> 6) << 4)
            low = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
        q = qs[32 * (j // 2) : 32 * (j // 2) + 32]
        q = q >> 4 if j % 2 else q & 15
        out[32 * j : 32 * j + 32] = d * scale * q - least * low
    return out


def q6_k(block):
    """ggml's dequantize_row_q6_K of one block of 256."""
    ql, qh = block[:128].astype(int), block[128:192].astype(int)
    scales, (d,) = block[192:208].view(np.int8), halves(block[208:])
    out = np.empty(256, np.float32)
    for n in range(2):
        for part in range(128):
            quarter, k = divmod(part, 32)
            low = ql[64 * n + k + 32 * (quarter % 2)]
            low = low >> 4 if quarter >= 2 else low & 15
            q = (low | (((qh[32 * n + k] >> (2 * quarter)) & 3) << 4)) - 32
            out[128 * n + part] = d * np.float32(int(scales[8 * n + k // 16 + 2 * quarter])) * q
    return out


@pytest.mark.parametrize(("kind", "restated"), [(Q4_K, q4_k), (Q6_K, q6_k)])
def test_k_quants_are_what_ggml_defines(tmp_path, kind, restated):
    raw = random_blocks(kind, 5, 2, seed=3)
    at = 208 if kind == Q6_K else 0  # the scales: small numbers, whose products are exact enough
    size = gguf.GGML_QUANT_SIZES[kind][1]
    for row in raw:
        for start in (0, size):
            row[start + at : start + at + 2] = np.frombuffer(np.float16(0.0123).tobytes(), "u1")
            if kind == Q4_K:
                row[start + 2 : start + 4] = np.frombuffer(np.float16(0.05).tobytes(), "u1")
    checkpoint, ref = only(write(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (raw, kind)}))
    expected = np.stack([np.concatenate([restated(b) for b in row.reshape(2, -1)]) for row in raw])
    np.testing.assert_allclose(checkpoint.read(ref).numpy(), expected, rtol=1e-6, atol=1e-7)


def test_layers_and_roles_are_those_of_the_float_checkpoint(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", weights(), default=Q8_0))
    found = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
    assert found.prefixes == ("model.layers.0", "model.layers.1")
    assert {m.name for m in found.matrices} == {
        f"model.layers.{i}.{inner}.weight" for i in range(2) for inner in LLAMA
    }
    assert {m.role for m in found.matrices} == {inner.split(".")[1] for inner in LLAMA}
    shapes = {m.role: m.shape for m in found.matrices}
    assert shapes["up_proj"] == BLOCK["ffn_up.weight"]
    assert shapes["k_proj"] == BLOCK["attn_k.weight"]
    assert not found.quantised


def test_a_stack_of_experts_is_read_expert_by_expert(tmp_path):
    value = np.random.default_rng(0).standard_normal((4, 64, 96)).astype(np.float32)
    tensors = {f"blk.{i}.ffn_up_exps.weight": value + i for i in range(2)}
    path = write(tmp_path / "m.gguf", tensors, default=Q4_0)
    checkpoint, ref = only(path, "model.layers.1.mlp.experts.up_proj.weight")
    found = map_layers(checkpoint.tensors)
    assert [m.expert for m in found.matrices] == [0, 1, 2, 3] * 2
    raw = gguf.quants.quantize(value + 1, Q4_0)
    for i in range(4):
        expected = gguf.quants.dequantize(raw[i], Q4_0)
        assert np.array_equal(checkpoint.read(ref, i).numpy(), expected)
    assert checkpoint.read(ref).shape == (4, 64, 96)


@pytest.mark.parametrize("said", [1, 0, None])
def test_a_block_that_predicts_further_tokens_is_no_layer(tmp_path, said):
    tensors = weights(3) | {"blk.2.nextn.eh_proj.weight": np.ones((256, 512), np.float32)}
    path = write(tmp_path / "m.gguf", tensors, blocks=3, architecture="glm4moe", predicting=said)
    checkpoint = open_checkpoint(path)
    found = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
    assert found.prefixes == ("model.layers.0", "model.layers.1")
    assert {m.layer for m in found.matrices} == {0, 1}
    why = "beyond the 2 layers of the configuration (multi-token prediction)"
    for inner in ("eh_proj", "mlp.up_proj", "self_attn.q_proj"):
        assert dict(found.skipped)[f"model.layers.2.{inner}.weight"] == why


@pytest.mark.parametrize(("said", "layers"), [(1, 2), (2, 1), (0, 3), (3, 3), (9, 3)])
def test_the_file_says_how_many_blocks_predict(tmp_path, said, layers):
    path = write(tmp_path / "m.gguf", weights(3), blocks=3, architecture="glm4moe", predicting=said)
    checkpoint = open_checkpoint(path)
    found = map_layers(checkpoint.tensors, num_hidden_layers=checkpoint.num_hidden_layers)
    assert checkpoint.num_hidden_layers == len(found.prefixes) == layers


# Families as transformers names them: GGUF's architecture, the class, what else its configuration
# takes. Each is made tiny, its names are put through gguf's own map, and ours must lead back.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {}),
    "gemma3": ("Gemma3TextConfig", {}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {}),
    "command-r": ("CohereConfig", {}),
    "falcon": ("FalconConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "gptneox": ("GPTNeoXConfig", {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_lead_back_to_those_of_transformers(family):
    transformers = pytest.importorskip("transformers", reason="needs the extra [train]")
    kind, more = FAMILIES[family]
    config = getattr(transformers, kind)(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, **more
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    forward, back = gguf.get_tensor_name_map(known[family], 2), hub_names(family, 2)
    checked = 0
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        own = forward.get_name(stem)
        if value.ndim == 2 and ".1." in name and own is not None:
            assert back[own] == stem
            checked += 1
    assert checked >= 4


def test_metrics_say_what_was_dequantised(tmp_path):
    tensors = weights() | {"blk.1.attn_q.weight": (random_blocks(Q6_K, 256, 1), Q6_K)}
    path = write(tmp_path / "m.gguf", tensors, default=Q8_0)
    found = analyze(path, exclude=["*1.self_attn.q_proj*"])
    assert found is not None
    (said,) = found.model.dequantised
    assert (said.format, said.dtype, said.matrices) == ("gguf", "Q8_0", 13)
    assert said.library is not None
    assert said.library.startswith("gguf 0.")
    assert {m.dtype for m in found.matrices} == {"Q8_0"}
    assert found.model.name == "m"
    assert found.model.architecture == "llama"


def test_the_spectrum_is_that_of_the_dequantised_matrix(tmp_path):
    tensors = weights()
    found = analyze(write(tmp_path / "m.gguf", tensors, default=Q4_0))
    assert found is not None
    by_name = {m.tensor: m for m in found.matrices}
    raw = gguf.quants.quantize(tensors["blk.1.ffn_up.weight"], Q4_0)
    values = np.linalg.svd(gguf.quants.dequantize(raw, Q4_0).astype(np.float64), compute_uv=False)
    own = by_name["model.layers.1.mlp.up_proj.weight"]
    assert own.lambda_max == pytest.approx(values[0] ** 2, rel=1e-10)
    assert own.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-10)


def test_a_model_in_several_files_is_read_as_one(tmp_path):
    tensors = weights()
    names = list(tensors)
    for i, part in enumerate((names[:9], names[9:])):
        write(tmp_path / f"m-0000{i + 1}-of-00002.gguf", {n: tensors[n] for n in part})
    for source in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        checkpoint = open_checkpoint(source)
        assert checkpoint.name == "m"
        assert len(checkpoint.tensors) == len(tensors)
        ref = next(ref for ref in checkpoint.tensors if ref.name.endswith("1.mlp.up_proj.weight"))
        assert np.array_equal(checkpoint.read(ref).numpy(), tensors["blk.1.ffn_up.weight"])
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(HtsrError, match="1 of 2 parts missing"):
        open_checkpoint(tmp_path)


def test_two_models_in_a_folder_are_not_chosen_from(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.gguf", weights())
    with pytest.raises(HtsrError, match="holds GGUF files and no safetensors") as told:
        open_checkpoint(tmp_path)
    assert str(told.value.hint) == f"Name one of them, as {tmp_path}/a.gguf."


# --- hostile files --------------------------------------------------------------------------


def header(tensors=0, keys=0, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, tensors, keys)


def text(value):
    return struct.pack("<Q", len(value)) + value


def info(name=b"blk.0.attn_q.weight", dims=(256, 4), kind=12, offset=0):
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


HOSTILE = {
    "empty": (b"", "does not begin with GGUF"),
    "short": (b"GGUF\3\0\0\0", "does not begin with GGUF"),
    "magic": (header(magic=b"GGJT"), "does not begin with GGUF"),
    "version 1": (header(version=1), "version is 1"),
    "big-endian": (header(version=3 << 24), "little-endian"),
    "tensors": (header(tensors=2**63), "would hold 9223372036854775808 tensors"),
    "keys": (header(keys=2**40), "and 1099511627776 keys"),
    "a key beyond the file": (header(keys=1) + struct.pack("<Q", 2**62), "does not end"),
    "a list beyond the file": (
        header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 4, 2**62),
        "does not end",
    ),
    "a list of lists": (header(keys=1) + text(b"k") + struct.pack("<IIQ", 9, 9, 1), "of lists"),
    "a kind": (header(keys=1) + text(b"k") + struct.pack("<I", 77), "unknown kind 77"),
    "a key twice": (header(keys=2) + 2 * (text(b"k") + b"\0\0\0\0\1"), "duplicate key 'k'"),
    "no Unicode": (header(keys=1) + text(b"\xff\xfe") + b"\0\0\0\0\1", "utf-8"),
    "alignment": (
        header(keys=1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
        "alignment is 0",
    ),
    "dimensions": (header(1) + text(b"x") + struct.pack("<I", 2**31), "2147483648 dimensions"),
    "a name twice": (header(2) + 2 * info(), "twice"),
    "a type": (header(1) + info(kind=999), "ggml's type 999"),
    "an odd row": (header(1) + info(dims=(255, 4)), "does not fit its type Q4_K"),
    "an offset between": (header(1) + info(offset=16) + bytes(2000), "a multiple of 32 bytes"),
    "a first gap": (header(1) + info(offset=32), "no tensor begins where its data does"),
    "an overlap": (
        header(2) + info() + info(b"b", offset=544),
        "'b' overlap others or leave a gap",
    ),
    "the same bytes": (header(2) + info() + info(b"b"), "overlap others"),
    "a gap": (header(2) + info() + info(b"b", offset=608), "'b' overlap others or leave a gap"),
    "bytes after the last": (header(1) + info(), "its tensors end at byte 672, the file at 2083"),
    "bytes of no tensor": (header(), "bytes of no tensor"),
    "bytes beyond the file": (header(1) + info(dims=(256, 1000)), "leaves the file"),
    "a huge shape": (header(1) + info(dims=(2**62, 2**62)), "leaves the file"),
    "an offset beyond the file": (header(2) + info() + info(b"b", offset=2**63), "leaves the file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_with_a_sentence(tmp_path, case):
    data, why = HOSTILE[case]
    (tmp_path / "m.gguf").write_bytes(data + bytes(0 if len(data) < 24 else 2000))
    if "beyond the file" in case and "key" in case:
        (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(HtsrError) as told:
        open_checkpoint(tmp_path / "m.gguf")
    assert why in told.value.message
    assert "m.gguf" in told.value.message


def test_a_well_formed_header_by_the_same_hand_is_read(tmp_path):
    """Two tensors of 4 * 144 bytes, which are a multiple of 32; the file may end at the last."""
    for rows, end in ((4, 0), (3, 0), (3, 16)):  # 3 * 144 = 432: 16 bytes to the next multiple
        data = header(2) + info(b"b", offset=576, dims=(256, rows)) + info()
        data += bytes(-len(data) % 32 + 576 + rows * 144 + end)
        (tmp_path / "m.gguf").write_bytes(data)
        found = {
            ref.name: (ref.dtype, ref.shape) for ref in open_checkpoint(tmp_path / "m.gguf").tensors
        }
        assert found["b"] == ("Q4_K", (rows, 256))
        assert len(found) == 2
    (tmp_path / "m.gguf").write_bytes(data + b"x")
    with pytest.raises(HtsrError, match="its tensors end at byte"):
        open_checkpoint(tmp_path / "m.gguf")


@pytest.mark.parametrize("alignment", [16, 256])
def test_the_alignment_is_the_file_s_own(tmp_path, alignment):
    said = text(b"general.alignment") + struct.pack("<II", 4, alignment)
    second = -(-576 // alignment) * alignment
    for place, whole in ((second, True), (second + alignment, False), (second + 8, False)):
        data = header(2, keys=1) + said + info() + info(b"b", offset=place)
        data += bytes(-len(data) % alignment + place + 576)
        (tmp_path / "m.gguf").write_bytes(data)
        if whole:
            assert len(open_checkpoint(tmp_path / "m.gguf").tensors) == 2
        else:
            with pytest.raises(HtsrError, match=r"leave a gap|a multiple of"):
                open_checkpoint(tmp_path / "m.gguf")


def test_flipped_and_cut_bytes_end_in_a_sentence_or_in_a_listing(tmp_path):
    whole = write(tmp_path / "m.gguf", weights(1), blocks=1, default=Q8_0).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 6000, 3):
            data[place] = rng.integers(256)
        data = data[: rng.integers(1, len(whole))] if rng.random() < 0.3 else data
        (tmp_path / "x.gguf").write_bytes(data)
        try:
            open_checkpoint(tmp_path / "x.gguf").tensors  # noqa: B018
        except HtsrError:
            refused += 1
    assert refused > 100


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", weights(), default=Q8_0)
    checkpoint, ref = only(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(HtsrError, match="changed while it was read"):
        checkpoint.read(ref)


def test_without_the_package_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", weights())
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(HtsrError, match="needs the package gguf") as told:
        open_checkpoint(path)
    assert told.value.hint == "pip install 'htsr-alloc[quantized]'"


@pytest.mark.checkpoints
def test_a_real_file_has_the_spectra_of_its_float_checkpoint(checkpoint):
    """SmolLM2: q and k are permuted rows in GGUF, which changes no eigenvalue."""
    folder: Path = checkpoint("smollm2")
    files = [*folder.glob("*.gguf"), *folder.parent.glob("smollm2-gguf/*.gguf")]
    files += list((Path(__file__).parents[2] / ".cache" / "smollm2-gguf").glob("*.gguf"))
    if not files:
        pytest.skip("run python data/checkpoints.py smollm2 --with-gguf --out .cache/smollm2-gguf")
    chosen = {"include": ["*layers.7.*"], "estimator": "kde-mean"}
    one, two = analyze(files[0], **chosen), analyze(folder, **chosen)
    assert one is not None
    assert two is not None
    assert [m.tensor for m in one.matrices] == [m.tensor for m in two.matrices]
    assert [m.role for m in one.matrices] == [m.role for m in two.matrices]
    for a, b in zip(one.matrices, two.matrices, strict=True):
        assert a.shape == b.shape
        assert a.stable_rank == pytest.approx(b.stable_rank, rel=1e-9)
        assert a.lambda_min == pytest.approx(b.lambda_min, rel=1e-9)
