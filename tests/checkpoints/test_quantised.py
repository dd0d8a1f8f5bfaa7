"""Quantised weights: each format against the library that owns it, or its rule stated again."""

import json

import pytest
import torch
from helpers.packed import (
    COMPRESSED,
    INT,
    MODULE,
    NAME,
    awq,
    compressed,
    compressed_config,
    gptq,
    randn,
    under,
)
from safetensors.torch import save_file

from htsr_alloc.checkpoints import quantised
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint


def saved(folder, tensors, config=None):
    """A checkpoint of these tensors."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "m.safetensors"
    )
    (folder / "config.json").write_text(json.dumps({"quantization_config": config or {}}))
    return open_checkpoint(folder)


def read(checkpoint, name, index=None):
    (ref,) = [ref for ref in checkpoint.tensors if ref.name == name]
    found = checkpoint.read(ref, index)
    assert found.dtype == torch.float32
    assert found.shape == (ref.shape if index is None else ref.shape[1:])
    return found


def one(folder, parts, config=None):
    """The matrix of a checkpoint that has nothing but these parts of one weight."""
    checkpoint = saved(folder, under(MODULE.format(0), parts), config)
    assert [ref.name for ref in checkpoint.tensors] == [NAME.format(0)]
    return read(checkpoint, NAME.format(0))


# --- GPTQ and AWQ -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [False, True])
def test_gptq_is_what_autogptq_packs(tmp_path, bits, version, order):
    parts, weight = gptq(96, 64, 32, bits, version=version, order=order)
    config = {"bits": bits, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    assert torch.equal(one(tmp_path, parts, config), weight)
    assert (weight != weight[0]).any()
    if not order:  # older files have no g_idx
        del parts["g_idx"]
        assert torch.equal(one(tmp_path / "b", parts, config), weight)


def test_the_two_versions_of_gptq_differ_by_one_step(tmp_path):
    parts, weight = gptq(64, 32, 32, 4)
    other = one(tmp_path, parts, {"bits": 4, "checkpoint_format": "gptq_v2"})
    assert not torch.equal(other, weight)


@pytest.mark.parametrize("size", [128, 512, -1])
def test_the_last_group_of_gptq_may_be_smaller(tmp_path, size):
    """576 inputs in groups of 128: four of them and one of 64, and not five of 116."""
    parts, weight = gptq(576, 32, 576 if size < 0 else size, 4)
    config = {"bits": 4, "group_size": size, "quant_method": "gptq"}
    assert torch.equal(one(tmp_path / "a", parts, config), weight)  # g_idx tells
    del parts["g_idx"]
    assert torch.equal(one(tmp_path / "b", parts, config), weight)


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ({"packing_format": "auto_round"}, 2),
        ({"packing_format": "auto_round:gptqmodel", "backend": "auto"}, 2),
        ({"packing_format": "auto_round:auto_gptq"}, 1),
        ({"packing_format": "auto_round:gptq"}, 1),
        ({"backend": "auto"}, 1),
    ],
)
def test_autoround_says_how_it_stores_zero_points(tmp_path, said, version):
    parts, weight = gptq(96, 64, 32, 4, version=version)
    del parts["g_idx"]
    config = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, **said}
    assert torch.equal(one(tmp_path, parts, config), weight)


def test_autoround_may_pack_as_awq_does(tmp_path):
    parts, weight = awq(96, 64, 32)
    config = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4}
    assert torch.equal(one(tmp_path, parts, config), weight)


def test_autoround_has_bits_and_groups_of_single_modules(tmp_path):
    parts, weight = gptq(96, 64, 48, 8, version=2)
    del parts["g_idx"]
    own = {MODULE.format(0): {"bits": 8, "group_size": 48}}
    config = {"quant_method": "auto-round", "packing_format": "auto_round", "bits": 4}
    assert torch.equal(
        one(tmp_path, parts, {**config, "group_size": 32, "extra_config": own}), weight
    )


def test_awq_is_what_autoawq_packs(tmp_path):
    parts, weight = awq(96, 64, 32)
    assert torch.equal(one(tmp_path, parts, {"quant_method": "awq"}), weight)


def test_many_rows_at_a_time_are_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised.base, "CHUNK", 1000)
    parts, weight = gptq(1024, 64, 128, 3, order=True)
    assert torch.equal(one(tmp_path, parts, {"bits": 3}), weight)
    parts, weight = awq(1024, 64, 128)
    assert torch.equal(one(tmp_path / "b", parts), weight)


# --- 4-bit floats -------------------------------------------------------------------------------


def fp4_blocks(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=made, dtype=torch.uint8)
    return codes, torch.randint(100, 140, shape[:-1], generator=made, dtype=torch.uint8)


def test_mxfp4_experts_are_what_transformers_makes_of_them(tmp_path):
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4", reason="needs the extra [train]")
    tensors, expected = {}, {}
    for i in range(2):
        stem = f"model.layers.{i}.mlp.experts.gate_up_proj"
        blocks, scales = fp4_blocks(3, 64, 2, 16, seed=i)
        tensors |= {f"{stem}_blocks": blocks, f"{stem}_scales": scales}
        expected[stem] = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    checkpoint = saved(tmp_path, tensors)
    layers = map_layers(checkpoint.tensors)
    assert [(m.layer, m.expert, m.role) for m in layers.matrices] == [
        (i, e, "gate_up_proj") for i in range(2) for e in range(3)
    ]
    for stem, weight in expected.items():
        assert weight.shape == (3, 64, 64)
        assert torch.equal(read(checkpoint, stem), weight)
        for e in range(3):
            assert torch.equal(read(checkpoint, stem, e), weight[e])


def test_deepseek_packs_fp4_in_int8(tmp_path):
    """All 256 bytes, low half first, by the definition of E2M1: (-1)^s 2^(e-1) (1 + m/2),
    subnormal where e is 0."""
    codes = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    scale = torch.tensor([[127, 128, 126, 127, 1, 200, 127, 127]] * 2, dtype=torch.uint8)
    parts = {"weight": codes.view(torch.int8), "scale": scale.view(torch.float8_e8m0fnu)}
    found = one(tmp_path, parts)
    for byte in range(256):
        for half in range(2):
            x = (byte >> (4 * half)) & 15
            exponent, mantissa = (x >> 1) & 3, x & 1
            size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
            row, column = divmod(2 * byte + half, 256)
            size *= 2.0 ** (int(scale[row, column // 32]) - 127)
            assert found[row, column] == (-size if x & 8 else size)


def test_modelopt_multiplies_by_the_scale_of_the_whole(tmp_path):
    codes, _ = fp4_blocks(8, 32)
    scale = (randn(8, 4).abs() + 0.5).to(torch.float8_e4m3fn)
    parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": torch.tensor(0.25)}
    plain = one(tmp_path, {"weight": codes, "weight_scale": scale})
    assert torch.equal(one(tmp_path / "b", parts), plain * 0.25)
    assert plain.abs().max() > 0


# --- compressed-tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_are_what_the_library_makes_of_them(tmp_path, kind):
    form, args = COMPRESSED[kind]
    weight = randn(96, 128)
    parts, expected = compressed(weight, form, args)
    found = one(tmp_path, parts, compressed_config(kind))
    exact = 2.0**-8 if expected.dtype == torch.bfloat16 else 2.0**-22  # the library rounds to bf16
    torch.testing.assert_close(found, expected.float(), rtol=exact, atol=0)
    assert (found - weight).abs().max() < 1.5
    assert torch.corrcoef(torch.stack([found.flatten(), weight.flatten()]))[0, 1] > 0.95


def test_each_group_of_the_configuration_has_its_own_bits(tmp_path):
    tensors, expected, groups = {}, {}, {}
    for i, bits in enumerate((4, 8)):
        args = INT | {"num_bits": bits}
        parts, expected[NAME.format(i)] = compressed(randn(64, 96, seed=i), "pack-quantized", args)
        tensors |= under(MODULE.format(i), parts)
        target = rf"re:.*layers\.{i}\..*" if i else "Linear"
        groups[f"group_{i}"] = {"targets": [target], "weights": args}
    config = {"format": "pack-quantized", "config_groups": groups}
    checkpoint = saved(tmp_path, tensors, config)
    for name, weight in expected.items():
        assert torch.allclose(read(checkpoint, name), weight, rtol=2**-22, atol=0)
    assert {ref.dtype for ref in checkpoint.tensors} == {"INT4", "INT8"}


def test_columns_that_were_ordered_by_activations_are_put_back(tmp_path):
    parts, expected = compressed(randn(64, 96), "pack-quantized", INT)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32

    values = unpack_from_int32(parts["weight_packed"], 4, torch.Size((64, 96)))
    back = torch.argsort(order)
    parts["weight_packed"] = pack_to_int32(values[:, back].contiguous(), 4)
    parts["weight_g_idx"] = (torch.arange(96) // 32)[back].int()
    groups = parts["weight_g_idx"].long()
    naive = values[:, back].float() * parts["weight_scale"][:, groups]
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": INT}}}
    assert torch.allclose(one(tmp_path, parts, config), naive, rtol=2**-22, atol=0)
    assert not torch.allclose(naive, expected)


# --- bitsandbytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(96, 128), (300, 257)])
def test_bitsandbytes_of_4_bits(tmp_path, kind, nested, shape):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is absent")
    weight, state = functional.quantize_4bit(
        randn(*shape), quant_type=kind, compress_statistics=nested
    )
    expected = functional.dequantize_4bit(weight, state)
    parts = {"weight": weight} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    torch.testing.assert_close(one(tmp_path, parts), expected, rtol=2**-21, atol=1e-7)


def nf4(weight, block=64):
    """NF4 restated (QLoRA, appendix E): the nearest of 16 quantiles times the block's largest."""
    normal = torch.distributions.Normal(0, 1)
    offset = 0.9677083
    up = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    table = torch.cat([up, torch.zeros(1), down]).sort().values
    table = table / table.max()
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1)
    pairs = codes.reshape(-1, 2)
    state = {"quant_type": "nf4", "blocksize": block, "shape": list(weight.shape), "dtype": "f"}
    return {
        "weight": (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)[:, None],
        "weight.absmax": absmax,
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }, (table[codes] * absmax[:, None]).reshape(weight.shape)


def test_nf4_is_a_table_times_the_largest_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(quantised.bnb, "CHUNK", 1000)
    parts, expected = nf4(randn(96, 130))
    assert torch.equal(one(tmp_path, parts), expected)


def test_bitsandbytes_of_8_bits(tmp_path):
    weight = randn(64, 96)
    largest = weight.abs().amax(1)
    stored = torch.round(weight * 127 / largest[:, None]).to(torch.int8)
    form = torch.tensor(0, dtype=torch.uint8)
    found = one(tmp_path, {"weight": stored, "SCB": largest, "weight_format": form})
    assert torch.allclose(found, stored.double().mul(largest[:, None] / 127).float(), rtol=1e-6)
    assert (found - weight).abs().max() < 0.02
