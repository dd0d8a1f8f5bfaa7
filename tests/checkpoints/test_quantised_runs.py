"""Quantised checkpoints through the whole program: one command, resumed runs, memory, refusals."""

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from helpers.commands import environment
from helpers.packed import (
    COMPRESSED,
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

from htsr_alloc.analysis.analyze import analyze, plan
from htsr_alloc.analysis.cost import peak_bytes
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.checkpoints import quantised
from htsr_alloc.checkpoints.layers import map_layers
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, Settings, loads

U8, I8, I32 = torch.uint8, torch.int8, torch.int32


def saved(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config or {}}))
    return folder


def layers_of(make, count=2):
    """(tensors, name -> the matrix) of ``count`` layers."""
    tensors, expected = {}, {}
    for i in range(count):
        parts, expected[NAME.format(i)] = make(i)
        tensors |= under(MODULE.format(i), parts)
    return tensors, expected


# --- one command --------------------------------------------------------------------------------


ONE = {  # kind -> how a layer is made, what config.json says, and what is said of the matrices
    "gptq": (lambda i: gptq(128, 96, 32, 4, seed=i), {"quant_method": "gptq", "bits": 4},
             ("gptq", "INT4", None)),
    "awq": (lambda i: awq(128, 96, 32, seed=i), {"quant_method": "awq", "bits": 4},
            ("awq", "INT4", None)),
    "int4": (lambda i: compressed(randn(96, 128, seed=i), *COMPRESSED["int4"]),
             compressed_config("int4"), ("compressed-tensors", "INT4", "compressed-tensors")),
    "mxfp4": (lambda i: compressed(randn(96, 128, seed=i), *COMPRESSED["mxfp4"]),
              compressed_config("mxfp4"), ("fp4", "MXFP4", None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ONE)
def test_one_command_analyses_what_the_weights_stand_for(tmp_path, invoke, kind):
    make, config, (form, dtype, library) = ONE[kind]
    tensors, expected = layers_of(make)
    saved(tmp_path / "m", tensors, config)
    plain = {k: v.float().contiguous() for k, v in expected.items()}
    save_file(plain, tmp_path / "float.safetensors")
    shown = invoke("inspect", "m")
    assert f"dequantised: 2 matrices of {dtype} ({form})" in shown.stderr
    assert invoke("analyze", "m").rc == 0
    assert invoke("analyze", "float.safetensors").rc == 0
    packed, plain = (
        loads(Metrics, (tmp_path / f"{name}.metrics.json").read_bytes(), name)
        for name in ("m", "float")
    )
    assert [m.tensor for m in packed.matrices] == [m.tensor for m in plain.matrices]
    for a, b in zip(packed.matrices, plain.matrices, strict=True):
        assert (a.shape, a.role, a.layer) == (b.shape, b.role, b.layer)
        assert a.pl_alpha_hill == pytest.approx(b.pl_alpha_hill, rel=1e-6)
        assert a.stable_rank == pytest.approx(b.stable_rank, rel=1e-6)
    (said,) = packed.model.dequantised
    assert (said.format, said.dtype, said.matrices) == (form, dtype, 2)
    assert (said.library or "").partition(" ")[0] == (library or "")
    assert packed.model.parameters == plain.model.parameters
    assert not plain.model.dequantised
    assert not packed.skipped
    assert invoke("compare", "float.metrics.json", "m.metrics.json").rc == 0


def test_the_settings_of_a_format_are_part_of_the_identity_and_of_the_hash(tmp_path):
    tensors, _ = layers_of(lambda i: gptq(128, 96, 32, 4, seed=i), 3)
    output, hashes = RunFiles(tmp_path / "m.json"), set()

    class StopError(Exception):
        pass

    def stop(stream, layer_map):
        for item in stream:
            yield item
            raise StopError

    for form in ("gptq", "gptq_v2"):
        folder = saved(tmp_path / "m", tensors, {"bits": 4, "checkpoint_format": form})
        found = analyze(folder)
        assert found is not None
        hashes.add(found.model.weights_sha256)
        if form == "gptq":
            with pytest.raises(StopError):
                analyze(folder, output=output, progress=stop)
        else:
            with pytest.raises(HtsrError, match="another"):
                analyze(folder, output=output)
    assert len(hashes) == 2


def test_fused_tables_of_scales_are_no_matrices(tmp_path):
    """DeepSeek's and Llama-4's fused fp8 experts: blocks of 128, and a number a column."""
    tensors, expected = {}, {}
    for i in range(2):
        stem = f"model.layers.{i}.mlp.experts"
        up = randn(3, 256, 130, seed=i).to(torch.float8_e4m3fn)
        down = randn(3, 64, 96, seed=i + 5).to(torch.float8_e4m3fn)
        blocks, columns = randn(3, 2, 2, seed=9).abs(), randn(3, 1, 96, seed=8).abs()
        tensors |= {f"{stem}.gate_up_proj": up, f"{stem}.gate_up_proj_scale_inv": blocks}
        tensors |= {f"{stem}.down_proj": down, f"{stem}.down_proj_scale": columns}
        every = blocks.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :, :130]
        expected[f"{stem}.gate_up_proj"] = up.float() * every
        expected[f"{stem}.down_proj"] = down.float() * columns
    checkpoint = open_checkpoint(saved(tmp_path / "m", tensors))
    found = map_layers(checkpoint.tensors)
    assert {m.role for m in found.matrices} == {"gate_up_proj", "down_proj"}
    assert len(found.matrices) == 12
    for matrix in found.matrices:
        weight = expected[matrix.ref.name][matrix.index]
        assert torch.equal(checkpoint.read(matrix.ref, matrix.index), weight)


# --- what is refused ----------------------------------------------------------------------------


def changed(parts, **values):
    return parts | values


GPTQ, AWQ = gptq(64, 64, 32, 4)[0], awq(64, 64, 32)[0]
NF4 = {
    "weight": torch.zeros(2048, 1, dtype=U8),
    "weight.absmax": torch.ones(64),
    "weight.quant_map": torch.linspace(-1, 1, 16),
}
STATE = "weight.quant_state.bitsandbytes__nf4"


def state(text):
    return {STATE: torch.tensor(list(text.encode()), dtype=U8)}


WHOLE = '{"blocksize": 64, "shape": [64, 64]}'
NO_INDEX = {name: value for name, value in gptq(576, 32, 128, 4)[0].items() if name != "g_idx"}
UNEVEN = awq(72, 64, 12)[0]
MISFITS = {
    "gptq, groups that do not divide": NO_INDEX,
    "awq, groups that do not divide": changed(
        UNEVEN, qzeros=UNEVEN["qzeros"][:5], scales=UNEVEN["scales"][:5]
    ),
    "gptq, zeros": changed(GPTQ, qzeros=GPTQ["qzeros"][:1]),
    "gptq, a group that is not there": changed(GPTQ, g_idx=GPTQ["g_idx"] + 1),
    "gptq, a negative group": changed(GPTQ, g_idx=GPTQ["g_idx"] - 1),
    "awq, zeros": changed(AWQ, qzeros=AWQ["qzeros"][:, :1]),
    "nf4, too few scales": changed(NF4 | state(WHOLE), **{"weight.absmax": torch.ones(63)}),
    "nf4, no table": {k: v for k, v in (NF4 | state(WHOLE)).items() if k != "weight.quant_map"},
    "nf4, nested without tables": changed(
        NF4 | state(WHOLE), **{"weight.absmax": torch.ones(64, dtype=U8)}
    ),
    "int8, scales": {"weight": torch.ones(64, 64, dtype=I8), "SCB": torch.ones(63)},
    "int8, a layout of the GPU": {
        "weight": torch.ones(64, 64, dtype=I8),
        "SCB": torch.ones(64),
        "weight_format": torch.tensor(2, dtype=U8),
    },
    "modelopt, two scales of the whole": {
        "weight": torch.zeros(64, 32, dtype=U8),
        "weight_scale": torch.ones(64, 4).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.ones(2),
    },
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_refused_with_a_sentence(tmp_path, case):
    folder = saved(tmp_path / "m", under(MODULE.format(0), MISFITS[case]))
    with pytest.raises(HtsrError) as told:
        analyze(folder)
    assert told.value.message.startswith(f"The parts of {NAME.format(0)} do not fit")


@pytest.mark.parametrize("size", [64, 96, 288, -1])
def test_groups_of_another_size_than_the_configuration_s_are_refused(tmp_path, size):
    config = {"quant_method": "gptq", "bits": 4, "group_size": size}
    folder = saved(tmp_path / "m", under(MODULE.format(0), NO_INDEX), config)
    with pytest.raises(HtsrError, match=f"576 inputs, 5 groups of {576 if size < 0 else size}"):
        analyze(folder)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"quant_method": "auto-round", "packing_format": "auto_round:new"}, "packing_format is"),
        ({"quant_method": "auto-round", "packing_format": ["auto_round"]}, "packing_format is"),
        ({"quant_method": "auto-round", "backend": "auto_round:exllamav2"}, "backend is 'auto_r"),
        ({"quant_method": "new"}, "quant_method is 'new'"),
        ({"quant_method": {"a": 1}}, "quant_method is"),
    ],
)
@pytest.mark.parametrize("parts", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_another_way_to_pack_is_refused(tmp_path, parts, said, told):
    folder = saved(tmp_path / "m", under(MODULE.format(0), parts), {"bits": 4, **said})
    with pytest.raises(HtsrError, match=f"packed is not known: the configuration's {told}"):
        open_checkpoint(folder).tensors  # noqa: B018


@pytest.mark.parametrize(
    ("parts", "packing"), [(GPTQ, "auto_round:auto_awq"), (AWQ, "auto_round:auto_gptq")]
)
def test_weights_of_another_layout_than_the_configuration_s_are_not_read(tmp_path, parts, packing):
    config = {"quant_method": "auto-round", "packing_format": packing, "bits": 4}
    folder = saved(tmp_path / "m", under(MODULE.format(0), parts), config)
    with pytest.raises(HtsrError, match="quantised in a format that is not read"):
        plan(open_checkpoint(folder), Settings("median"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "not JSON", "[" * 5000, " " * 20_000),
        '{"blocksize": 0, "shape": [64, 64]}',
        '{"blocksize": 64, "shape": [1e9, 1]}',
        '{"blocksize": 64, "shape": [-64, -64]}',
        '{"blocksize": 64, "shape": 7}',
        '{"blocksize": 64, "shape": [640, 64]}',
        '{"blocksize": 64, "shape": [64, 64], "nested_offset": []}',
    ],
)
def test_a_hostile_state_of_bitsandbytes_is_refused(tmp_path, text):
    parts = NF4 | (state(text) if text else {STATE: torch.zeros(0, dtype=U8)})
    folder = saved(tmp_path / "m", under(MODULE.format(0), parts))
    with pytest.raises(HtsrError, match=r"does not say how|do not fit"):
        open_checkpoint(folder).tensors  # noqa: B018


@pytest.mark.parametrize(
    "parts",
    [
        {"qweight": torch.zeros(8, 64, dtype=I32)},
        changed(GPTQ, scales=torch.ones(2, 63)),
        {"weight_packed": torch.zeros(64, 8, dtype=I32), "weight_scale": torch.ones(64, 1)},
        {"weight": torch.ones(64, 64, dtype=I8), "weight_scale": torch.ones(64, 1)},
    ],
)
def test_integers_of_no_known_format_are_refused_unread(tmp_path, parts):
    """Nothing says with how many bits, or a part is missing."""
    folder = saved(tmp_path / "m", under(MODULE.format(0), parts))
    with pytest.raises(HtsrError, match="quantised in a format that is not read"):
        plan(open_checkpoint(folder), Settings("median"))


CT = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
FORMS = {
    "gptq": (GPTQ, {"bits": 4}),
    "awq": (AWQ, {}),
    "nf4": (NF4 | state(WHOLE), {}),
    "fp4": ({"weight": torch.zeros(64, 32, dtype=U8), "weight_scale": torch.ones(64, 2)}, {}),
    "fp8": (
        {"weight": randn(64, 64).to(torch.float8_e4m3fn), "weight_scale": torch.ones(2, 2)},
        {},
    ),
    "compressed-tensors": (
        {
            "weight_packed": torch.zeros(64, 8, dtype=I32),
            "weight_scale": torch.ones(64, 2),
            "weight_zero_point": torch.zeros(8, 2, dtype=I32),
            "weight_g_idx": torch.arange(64, dtype=I32) // 32,
            "weight_shape": torch.tensor([64, 64]),
        },
        {"config_groups": {"g": {"targets": ["Linear"], "weights": CT}}},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_any_shape_and_dtype_end_in_a_sentence_or_a_matrix(tmp_path, form):
    if form == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="needs the extra [quantized]")
    whole, config = FORMS[form]
    made = np.random.default_rng(0)
    dtypes = [torch.float32, torch.float16, torch.uint8, torch.int8, torch.int32, torch.int64]
    sizes = [0, 1, 2, 3, 8, 32, 63, 64, 65]
    read = refused = 0
    for trial in range(60):
        parts = dict(whole)
        if trial:
            name = made.choice(list(whole))
            shape = [int(n) for n in made.choice(sizes, made.integers(0, 4))]
            parts[name] = torch.ones(shape).to(dtypes[made.integers(len(dtypes))])
        folder = saved(tmp_path / "m", under(MODULE.format(0), parts), config)
        try:
            checkpoint = open_checkpoint(folder)
            for ref in checkpoint.tensors:
                if ref.packed is not None:
                    assert checkpoint.read(ref).shape == ref.shape
                    read += 1
        except HtsrError:
            refused += 1
    assert read
    assert refused


def test_a_library_that_is_absent_is_named_before_the_work(tmp_path, monkeypatch):
    parts = {"weight_packed": torch.zeros(64, 8, dtype=I32), "weight_scale": torch.ones(64, 2)}
    said = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": said}}}
    folder = saved(tmp_path / "m", under(MODULE.format(0), parts), config)
    assert open_checkpoint(folder).tensors[0].dtype == "INT4"  # inspect needs no library
    monkeypatch.setattr(quantised.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HtsrError, match="needs the package compressed-tensors") as told:
        plan(open_checkpoint(folder), Settings("median"))
    assert told.value.hint == "pip install 'htsr-alloc[quantized]'"


def test_a_distributed_checkpoint_is_refused_with_the_command_that_converts(tmp_path):
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(HtsrError, match="holds a distributed checkpoint") as told:
        open_checkpoint(tmp_path)
    assert "accelerate merge-weights" in str(told.value.hint)


# --- memory -------------------------------------------------------------------------------------

MEASURE = """
    import re, sys
    from htsr_alloc.cli.main import app
    app(sys.argv[1:], standalone_mode=False)
    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gptq", "fp8"])
def test_memory_stays_within_what_inspect_tells(tmp_path, kind):
    made = np.random.default_rng(0)
    tensors = {}
    for i in range(2):
        if kind == "gptq":
            words = made.integers(-(2**31), 2**31, (512, 2048), dtype=np.int32)
            zeros = made.integers(-(2**31), 2**31, (32, 256), dtype=np.int32)
            parts = {
                "qweight": torch.from_numpy(words),
                "qzeros": torch.from_numpy(zeros),
                "scales": torch.rand(32, 2048).half(),
                "g_idx": (torch.arange(4096) // 128).int(),
            }
        else:
            parts = {
                "weight": torch.randn(4096, 2048).to(torch.float8_e4m3fn),
                "weight_scale_inv": torch.rand(32, 16),
            }
        tensors |= under(MODULE.format(i), parts)
    folder = saved(tmp_path / "m", tensors, {"bits": 4})
    layer_map = map_layers(open_checkpoint(folder).tensors)
    told = peak_bytes(layer_map.matrices, 1)
    arguments = ["analyze", folder, "-q", "--workers", 1, "--max-memory", f"{told // 10**6 + 1}MB"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, arguments)],
        env=environment(OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    found = int(re.findall(r"\d+", done.stdout)[-1]) << 10
    assert found < told
    assert told < 2 * found
