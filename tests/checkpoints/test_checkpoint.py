import hashlib
import json
import math
import os
import pickle
import re
import time

import numpy as np
import pytest
import torch
from helpers.commands import llama, write_shards
from safetensors.torch import load_file, save_file

from htsr_alloc.checkpoints.listing import choose_files
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_raw(path, entries):
    """A safetensors file by the specification: entries are (name, dtype, shape, bytes)."""
    header, data = {}, b""
    for name, dtype, shape, raw in entries:
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(source):
    with pytest.raises(HtsrError) as caught:
        open_checkpoint(source)
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def by_name(checkpoint):
    return {ref.name: ref for ref in checkpoint.tensors}


def read_all(checkpoint):
    return {ref.name: as_bytes(checkpoint.read(ref)) for ref in checkpoint.tensors}


def digest(checkpoint, ref, index=None):
    found = hashlib.sha256()
    checkpoint.read(ref, index, found)
    return found.hexdigest()


def stored(*files):
    return {name: as_bytes(t) for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize("code", DTYPES)
def test_every_float_dtype_reads_back_bit_for_bit(tmp_path, code):
    bits = torch.randint(0, 256, (24 * 8,), dtype=torch.uint8)  # every pattern, NaNs included
    path = tmp_path / "any name.safetensors"
    save_file({"a.weight": bits.view(DTYPES[code]).reshape(3, -1)}, path)
    checkpoint = open_checkpoint(path)
    (ref,) = checkpoint.tensors
    tensor = checkpoint.read(ref)
    assert (ref.dtype, ref.nbytes, tensor.dtype) == (code, 192, DTYPES[code])
    assert tensor.shape == ref.shape == load_file(path)["a.weight"].shape
    assert as_bytes(tensor) == bits.numpy().tobytes() == stored(path)["a.weight"]


@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
def test_offsets_need_not_be_aligned(tmp_path, code):
    value = randn(5, 7).to(DTYPES[code])
    path = write_raw(
        tmp_path / "odd.safetensors",
        [("odd", "F8_E4M3", [3], b"\x01\x02\x03"), ("w", code, [5, 7], as_bytes(value))],
    )
    checkpoint = open_checkpoint(path)
    assert as_bytes(checkpoint.read(by_name(checkpoint)["w"])) == as_bytes(value)


def test_tensors_behind_the_first_page_and_scalars_and_empty_ones(tmp_path):
    tensors = {"big": randn(700, 13), "number": torch.tensor(2.5), "none": torch.empty(0, 4)}
    tensors["last"] = randn(3, 3, seed=1)
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert read_all(checkpoint) == stored(tmp_path / "model.safetensors")
    assert checkpoint.read(by_name(checkpoint)["none"]).shape == (0, 4)
    assert checkpoint.read(by_name(checkpoint)["number"]).shape == ()


def test_what_is_read_can_be_written_to_without_touching_the_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": randn(8, 8)}, path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    checkpoint.read(checkpoint.tensors[0]).zero_()
    assert path.read_bytes() == before
    assert checkpoint.read(checkpoint.tensors[0]).abs().sum() > 0


def test_slices_of_a_3d_tensor(tmp_path):
    value = randn(3, 5, 7).bfloat16()
    save_file({"pad": randn(3), "experts": value}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    ref = by_name(checkpoint)["experts"]
    for i in range(3):
        assert as_bytes(checkpoint.read(ref, i)) == as_bytes(value[i])
        assert checkpoint.read(ref, i).shape == (5, 7)
        assert digest(checkpoint, ref, i) == hashlib.sha256(as_bytes(value[i])).hexdigest()


def test_the_digest_is_the_hash_of_the_stored_bytes_and_of_the_scale(tmp_path):
    weight, scale = randn(4, 6).to(torch.float8_e4m3fn), randn(1, 1)
    save_file(
        {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": randn(4, 6).half()},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    refs = by_name(checkpoint)
    plain = hashlib.sha256(as_bytes(randn(4, 6).half())).hexdigest()
    both = hashlib.sha256(as_bytes(weight) + as_bytes(scale)).hexdigest()
    assert digest(checkpoint, refs["b.weight"]) == plain
    assert digest(checkpoint, refs["a.weight"]) == both


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_listed_in_number_order_and_tensors_in_file_order(tmp_path, index):
    parts = [{f"z{i}.weight": randn(2, 3, seed=i), f"a{i}": randn(2, seed=i)} for i in range(11)]
    write_shards(tmp_path, parts, index=index)
    checkpoint = open_checkpoint(tmp_path)
    names = [shard.name for shard in checkpoint.listing.shards]
    assert names == [f"model-{i:05}-of-00011.safetensors" for i in range(1, 12)]
    assert [ref.shard for ref in checkpoint.tensors] == sorted(2 * list(range(11)))
    assert read_all(checkpoint) == stored(*(tmp_path / name for name in names))
    assert [s.nbytes for s in checkpoint.listing.shards] == [
        (tmp_path / name).stat().st_size for name in names
    ]


def test_shards_without_padded_numbers_are_in_number_order(tmp_path):
    for i in (10, 9, 2):
        save_file({f"w{i}": randn(2, 2)}, tmp_path / f"part{i}.safetensors")
    assert [r.name for r in open_checkpoint(tmp_path).tensors] == ["w2", "w9", "w10"]


def test_a_folder_takes_model_safetensors_alone(tmp_path):
    save_file({"w": randn(2, 2)}, tmp_path / "model.safetensors")
    save_file({"w": randn(3, 3)}, tmp_path / "optimizer.safetensors")
    assert [r.shape for r in open_checkpoint(tmp_path).tensors] == [(2, 2)]


def test_the_index_decides_and_names_what_it_leaves_out(tmp_path):
    write_shards(tmp_path, [{"a": randn(2, 2), "extra": randn(2, 2)}, {"b": randn(2, 2)}])
    index = tmp_path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["extra"]
    index.write_text(json.dumps(data))
    save_file({"stale": randn(2, 2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert list(by_name(checkpoint)) == ["a", "b"]
    assert checkpoint.listing.unindexed == ("extra",)


def test_names_architecture_and_layer_count(tmp_path):
    folder = write_shards(
        tmp_path / "Llama-tiny",
        [llama(1)],
        config={"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 7},
    )
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.name, checkpoint.revision) == ("Llama-tiny", None)
    assert (checkpoint.architecture, checkpoint.num_hidden_layers) == ("LlamaForCausalLM", 7)
    assert open_checkpoint(folder / "model.safetensors").name == "model"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_layer": 12}, 12),
        ({"text_config": {"num_hidden_layers": 34}}, 34),
        ({"num_hidden_layers": "many"}, None),
        ({"num_hidden_layers": True}, None),
        ({"num_hidden_layers": -1, "text_config": []}, None),
        ({}, None),
    ],
)
def test_layer_count_from_odd_configurations(tmp_path, config, expected):
    write_shards(tmp_path, [{"w": randn(2, 2)}], config=config)
    assert open_checkpoint(tmp_path).num_hidden_layers == expected


# --- scales ---------------------------------------------------------------------------------


def scaled(weight, scale, b0, b1):
    """The definition: every element times the scale of its block."""
    out = np.empty(weight.shape, dtype=np.float32)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = np.float32(weight[i, j]) * np.float32(scale[i // b0, j // b1])
    return out


def fp8_file(folder, weight, scale, suffix="_scale_inv", block=None):
    config = {"quantization_config": {"weight_block_size": block}} if block else None
    write_shards(folder, [{"l.weight": weight, "l.weight" + suffix: scale}], config=config)
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(by_name(checkpoint)["l.weight"])


@pytest.mark.parametrize("shape", [(8, 8), (10, 7), (3, 9), (4, 1), (1, 5)])
@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_block_scales_with_ragged_edges(tmp_path, shape, suffix):
    weight = randn(*shape).to(torch.float8_e4m3fn)
    scale = randn(math.ceil(shape[0] / 4), math.ceil(shape[1] / 3), seed=1)
    found = fp8_file(tmp_path, weight, scale, suffix, [4, 3])
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), scaled(weight.float().numpy(), scale.numpy(), 4, 3))


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [((129, 300), (2, 3), (128, 128)), ((64, 257), (1, 3), (64, 128)), ((8, 12), (2, 4), (4, 3))],
)
def test_block_scales_without_a_configuration_are_128_or_even(tmp_path, shape, grid, block):
    weight, scale = randn(*shape).to(torch.float8_e4m3fn), randn(*grid, seed=1)
    found = fp8_file(tmp_path, weight, scale)
    assert np.array_equal(found.numpy(), scaled(weight.float().numpy(), scale.numpy(), *block))


def test_blocks_of_unknown_size_are_not_guessed(tmp_path):
    with pytest.raises(HtsrError, match="fits neither its rows nor blocks"):
        fp8_file(tmp_path, randn(10, 8).to(torch.float8_e4m3fn), randn(3, 2))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_for_the_whole_tensor(tmp_path, shape):
    weight = randn(4, 6).to(torch.float8_e5m2)
    save_file(
        {"l.weight": weight, "l.weight_scale": torch.full(shape, 0.375)},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.read(by_name(checkpoint)["l.weight"])
    assert np.array_equal(found.numpy(), weight.float().numpy() * np.float32(0.375))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_for_each_row(tmp_path, shape):
    weight = randn(6, 6).to(torch.float8_e4m3fn)  # square: rows and columns can be mixed up
    scale = randn(6, seed=2)
    save_file(
        {"l.weight": weight, "l.weight_scale": scale.reshape(shape)},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    found = checkpoint.read(by_name(checkpoint)["l.weight"])
    assert np.array_equal(found.numpy(), scaled(weight.float().numpy(), scale[:, None], 1, 99))


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (4, 8), (4, 8, 1), (4, 2, 3)])
def test_each_expert_of_a_3d_tensor_has_its_own_scale(tmp_path, shape):
    weight, scale = randn(4, 8, 12).to(torch.float8_e4m3fn), randn(*shape, seed=3)
    save_file(
        {"experts.weight": weight, "experts.weight_scale": scale}, tmp_path / "model.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path)
    own = scale.reshape(4, *(shape[1:] if len(shape) == 3 else (-1, 1)))
    b0, b1 = 8 // own.shape[1], 12 // own.shape[2]
    for i in range(4):
        found = checkpoint.read(by_name(checkpoint)["experts.weight"], i)
        assert np.array_equal(found.numpy(), scaled(weight[i].float().numpy(), own[i], b0, b1))


@pytest.mark.parametrize("shape", [(5,), (3, 3), (7, 7), (0,), (2, 2, 2)])
def test_a_scale_that_fits_nothing_is_refused(tmp_path, shape):
    save_file(
        {"l.weight": randn(8, 8).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(shape)},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [4, 4]}}')
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(HtsrError, match=r"scale of l\.weight"):
        checkpoint.read(by_name(checkpoint)["l.weight"])


@pytest.mark.parametrize("block", [[0, 0], [-4, 4], [4], "4", None, [True, True], [2.0, 2.0]])
def test_a_block_size_that_makes_no_sense_is_ignored(tmp_path, block):
    weight = randn(8, 8).to(torch.float8_e4m3fn)
    found = fp8_file(tmp_path, weight, randn(2, 2), block=block)
    assert np.array_equal(found.numpy(), scaled(weight.float().numpy(), randn(2, 2), 4, 4))


def test_a_scale_of_a_dtype_that_is_not_read_is_refused(tmp_path):
    weight = randn(4, 4).to(torch.float8_e4m3fn)
    write_raw(
        tmp_path / "model.safetensors",
        [
            ("l.weight", "F8_E4M3", [4, 4], as_bytes(weight)),
            ("l.weight_scale", "U8", [4, 1], bytes([127] * 4)),
        ],
    )
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(HtsrError, match=r"l\.weight_scale .*U8"):
        checkpoint.read(by_name(checkpoint)["l.weight"])


# --- what is refused ------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(path, flag):
    path.write_bytes(pickle.dumps(Bomb(flag)))
    pickle.loads(path.read_bytes())  # the bomb works ...
    assert flag.is_dir()
    flag.rmdir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "a.ckpt"])
def test_pickles_are_named_and_never_opened(tmp_path, name):
    folder = tmp_path / "pickled"
    folder.mkdir()
    plant(folder / name, tmp_path / "exploded")
    for source in (folder, folder / name):
        text = refusal(source)
        assert name in text
        assert "never opened" in text
    save_file({"w": randn(2, 2)}, folder / "model.safetensors")
    assert len(read_all(open_checkpoint(folder))) == 1
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_named_safetensors_is_never_unpickled(tmp_path):
    plant(tmp_path / "model.safetensors", tmp_path / "exploded")
    assert "not a whole safetensors file" in refusal(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("name", "label"), [("tf_model.h5", "Keras"), ("model.onnx", "ONNX")])
def test_other_formats_are_named(tmp_path, name, label):
    (tmp_path / name).write_bytes(b"GGUF")
    assert f"holds {label} weights and no safetensors" in refusal(tmp_path)
    assert f"holds {label} weights and no safetensors" in refusal(tmp_path / name)


def test_nothing_there(tmp_path):
    assert "holds no safetensors file" in refusal(tmp_path)
    assert "neither a file, a folder nor a hub id" in refusal(tmp_path / "absent" / "deep" / "x")
    assert "neither a file" in refusal("absent.safetensors")


def test_truncated_shards_at_any_length_are_refused(tmp_path):
    save_file({"a.weight": randn(9, 9)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in [*range(0, 16), 40, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        assert "not a whole safetensors file" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole + b"\0")
    assert "not a whole safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all.",
        b"[]",
        b"\xff\xfe\x00{}",
        b'{"w": 3}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "XX", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b"[" * 5000,
    ],
)
def test_corrupt_headers_are_refused(tmp_path, header):
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "not a whole safetensors file" in refusal(tmp_path)


def test_a_header_that_claims_exabytes_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}" * 20)
    assert "not a whole safetensors file" in refusal(tmp_path)


def with_map(folder, **changes):
    write_shards(folder, [{"a": randn(2, 2), "z": randn(2)}, {"b": randn(2, 2)}])
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] |= changes
    index.write_text(json.dumps(data))
    return folder


def test_an_index_that_names_a_missing_shard(tmp_path):
    with_map(tmp_path, c="model-00003-of-00003.safetensors")
    text = refusal(tmp_path)
    assert "model-00003-of-00003.safetensors" in text
    assert "1 of 3 shards missing" in text


def test_an_index_that_names_the_wrong_shard(tmp_path):
    with_map(tmp_path, a="model-00002-of-00002.safetensors")
    text = refusal(tmp_path)
    assert text.startswith("The index puts a into model-00002-of-00002.safetensors")
    assert "model-00001-of-00002.safetensors" in text


def test_an_index_that_names_a_missing_tensor(tmp_path):
    with_map(tmp_path, c="model-00002-of-00002.safetensors")
    assert "The index lists c, but model-00002-of-00002.safetensors does not hold it" in refusal(
        tmp_path
    )


@pytest.mark.parametrize(
    "file",
    ["../evil.safetensors", "..\\evil.safetensors", "sub/evil.safetensors", "C:x.safetensors"],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, file):
    save_file({"c": randn(2, 2)}, tmp_path / "evil.safetensors")
    folder = with_map(tmp_path / "model", c=file)
    assert "outside its own folder" in refusal(folder)


def test_an_index_with_an_absolute_path(tmp_path):
    save_file({"c": randn(2, 2)}, tmp_path / "evil.safetensors")
    folder = with_map(tmp_path / "model", c=str(tmp_path / "evil.safetensors"))
    assert "outside its own folder" in refusal(folder)


@pytest.mark.parametrize("file", ["model.bin", "", 3, None, ["x.safetensors"]])
def test_an_index_that_names_no_safetensors_file(tmp_path, file):
    assert "not a safetensors file" in refusal(with_map(tmp_path, c=file))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", 'has no "weight_map"'),
        ('{"weight_map": {}}', 'has no "weight_map"'),
        ('{"weight_map": [1]}', 'has no "weight_map"'),
        ("[" * 100_000, "is not JSON"),
        ("\ud800", "is not JSON"),
    ],
)
def test_a_broken_index(tmp_path, text, said):
    write_shards(tmp_path, [{"a": randn(2, 2)}, {"b": randn(2, 2)}])
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert said in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{,}", "config.json is not JSON"), ("[1]", "does not hold a JSON object"), ("", "not JSON")],
)
def test_a_broken_configuration(tmp_path, text, said):
    write_shards(tmp_path, [{"a": randn(2, 2)}])
    (tmp_path / "config.json").write_text(text)
    assert said in refusal(tmp_path)


def test_an_incomplete_set_without_index(tmp_path):
    write_shards(tmp_path, [{f"w{i}": randn(2, 2)} for i in range(3)], index=False)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "does not hold all the shards that" in refusal(tmp_path)


def test_a_tensor_in_two_files(tmp_path):
    write_shards(tmp_path, [{"a": randn(2, 2)}, {"a": randn(2, 2), "b": randn(2)}], index=False)
    text = refusal(tmp_path)
    assert re.match(r"a is both in model-00001\S+ and in model-00002", text)


def test_a_dangling_link_is_a_sentence(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "model.safetensors" in refusal(tmp_path)


# --- a file that changes under our hands ----------------------------------------------------


def change_nothing_but_content(path):
    save_file({"a.weight": randn(4, 4, seed=9)}, path)


def change_shape(path):
    save_file({"a.weight": randn(4, 5)}, path)


def change_name(path):
    save_file({"b.weight": randn(4, 4)}, path)


def change_to_rubbish(path):
    path.write_bytes(b"rubbish")


def change_to_half(path):
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    "change",
    [
        change_nothing_but_content,
        change_shape,
        change_name,
        change_to_rubbish,
        change_to_half,
        os.unlink,
    ],
)
def test_a_file_that_changes_between_listing_and_reading(tmp_path, change):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": randn(4, 4)}, path)
    checkpoint = open_checkpoint(path)
    checkpoint.read(checkpoint.tensors[0])
    change(path)
    if path.exists():
        os.utime(path, ns=(1, 1))
    with pytest.raises(HtsrError, match=r"model\.safetensors"):
        checkpoint.read(checkpoint.tensors[0])


def test_a_file_that_is_replaced_by_one_of_equal_size_and_time(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    save_file({"a.weight": randn(4, 4)}, path)
    save_file({"a.weight": randn(4, 4, seed=9)}, other)
    status = path.stat()
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    checkpoint = open_checkpoint(path)
    checkpoint.read(checkpoint.tensors[0])
    other.replace(path)  # both were there, so that it has another inode
    assert path.stat().st_size == status.st_size
    with pytest.raises(HtsrError, match="changed while it was read"):
        checkpoint.read(checkpoint.tensors[0])


@pytest.mark.checkpoints
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_real_checkpoints_read_as_safetensors_reads_them(checkpoint, name):
    from safetensors import safe_open

    opened = open_checkpoint(checkpoint(name))
    floats = [ref for ref in opened.tensors if ref.dtype == "F32"]
    sample = floats[:: len(floats) // 7]
    for ref in sample:
        file = opened.listing.shards[ref.shard].name
        with safe_open(checkpoint(name) / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(ref.name), opened.read(ref))


def test_eight_thousand_shards_are_chosen_in_linear_time():
    names = [f"model-{i:05}-of-08000.safetensors" for i in range(1, 8001)]
    start = time.perf_counter()
    assert len(choose_files(names, bytes, "here")[0]) == 8000
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    both = [*names, "model.safetensors.index.json"]
    assert len(choose_files(both, lambda _: index, "here")[0]) == 8000
    assert time.perf_counter() - start < 3
