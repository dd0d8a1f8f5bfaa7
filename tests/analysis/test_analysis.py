import base64
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from helpers import naive
from helpers.commands import (
    drop_the_right_to_ignore_permissions,
    environment,
    llama,
    write_shards,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file

from htsr_alloc.analysis.analyze import analyze, plan
from htsr_alloc.analysis.journal import read_journal
from htsr_alloc.analysis.outputs import RunFiles
from htsr_alloc.analysis.refit import refit
from htsr_alloc.checkpoints.open import open_checkpoint
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Farms, Metrics, Settings, loads


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings(estimator="official", **changes):
    return Settings(estimator=estimator, **changes)


def read_metrics(path):
    return loads(Metrics, path.read_bytes(), path.name)


def without_time(path):
    data = json.loads(path.read_text())
    del data["tool"]["created"]
    return data


def squared_singular_values(weight):
    return np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)


# --- the numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["official", "paper", "band", "median", "ks"])
def test_every_number_is_what_numpy_finds_with_loops(tmp_path, estimator):
    tensors = llama()
    write_shards(tmp_path / "tiny", [tensors])
    output = RunFiles(tmp_path / "out.metrics.json")
    metrics = analyze(open_checkpoint(tmp_path / "tiny"), settings(estimator), output)
    assert read_metrics(output.metrics) == metrics
    spectra = load_file(tmp_path / "out.spectra.safetensors")
    assert len(metrics.matrices) == len(spectra) == 14
    for matrix in metrics.matrices:
        weight = tensors[matrix.tensor]
        expected = squared_singular_values(weight)
        assert matrix.shape == tuple(weight.shape)
        assert spectra[matrix.tensor].dtype == np.float64
        np.testing.assert_allclose(spectra[matrix.tensor], expected, rtol=1e-9)
        assert (matrix.n_eigs, matrix.n_zero) == (64, 0)
        assert matrix.lambda_min == pytest.approx(expected[0], rel=1e-9)
        assert matrix.lambda_max == pytest.approx(expected[-1], rel=1e-9)
        rank = (weight.double() ** 2).sum() / expected[-1]
        assert matrix.stable_rank == pytest.approx(float(rank), rel=1e-9)
        alpha = naive.alpha(expected, estimator)
        assert matrix.pl_alpha_hill == pytest.approx(alpha, rel=1e-9)
        assert matrix.alpha_hat == pytest.approx(alpha * np.log10(expected[-1]), rel=1e-9)
        assert (matrix.status, matrix.reason, matrix.dtype) == ("ok", None, "F32")
    for layer in metrics.layers:
        own = [m for m in metrics.matrices if m.layer == layer.layer]
        assert (layer.matrices, layer.unfitted, layer.reason) == (7, 0, None)
        assert layer.prefix == f"model.layers.{layer.layer}"
        for metric in ("pl_alpha_hill", "alpha_hat", "stable_rank"):
            mean = sum(getattr(m, metric) for m in own) / 7
            assert getattr(layer, metric) == pytest.approx(mean, rel=1e-12)
    skipped = {s.tensor for s in metrics.skipped}
    assert skipped == set(tensors) - set(spectra)


def test_the_order_of_files_does_not_change_the_numbers(tmp_path):
    tensors = llama(3)
    names = list(tensors)
    write_shards(tmp_path / "one" / "m", [tensors])
    shards = [{n: tensors[n] for n in reversed(names) if hash_of(n) % 3 == i} for i in range(3)]
    write_shards(tmp_path / "three" / "m", shards)
    one = analyze(open_checkpoint(tmp_path / "one" / "m"), settings())
    three = analyze(open_checkpoint(tmp_path / "three" / "m"), settings())
    assert one.matrices == three.matrices
    assert one.layers == three.layers
    assert one.model == three.model


def hash_of(name):
    return hashlib.sha256(name.encode()).digest()[0]


def test_the_weights_hash_is_over_every_matrix_and_nothing_else(tmp_path):
    def hash_with(**changes):
        write_shards(tmp_path / "m", [llama() | changes])
        return analyze(open_checkpoint(tmp_path / "m"), settings()).model.weights_sha256

    tensors = llama()
    order = analyze(open_checkpoint(write_shards(tmp_path / "m", [tensors])), settings()).matrices
    digests = [hashlib.sha256(tensors[m.tensor].numpy().tobytes()).digest() for m in order]
    assert hash_with() == hashlib.sha256(b"".join(digests)).hexdigest()
    assert hash_with(**{"model.norm.weight": torch.zeros(64)}) == hash_with()
    name = "model.layers.1.mlp.up_proj.weight"
    assert hash_with(**{name: tensors[name].neg()}) != hash_with()  # the same spectrum


def test_fp8_and_experts_and_transposed_weights(tmp_path):
    fp8 = randn(96, 64).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.5], [2.0]])
    experts = randn(2, 64, 80, seed=1)
    tensors = {
        "model.layers.0.mlp.w.weight": fp8,
        "model.layers.0.mlp.w.weight_scale_inv": scale,
        "model.layers.0.mlp.experts.down_proj": experts,
    }
    config = {"quantization_config": {"weight_block_size": [48, 64]}}
    write_shards(tmp_path / "m", [tensors], config=config)
    metrics = analyze(open_checkpoint(tmp_path / "m"), settings(), RunFiles(tmp_path / "m.json"))
    spectra = load_file(tmp_path / "m.spectra.safetensors")
    whole = fp8.float() * scale.repeat_interleave(48, 0)
    expected = squared_singular_values(whole)
    np.testing.assert_allclose(spectra["model.layers.0.mlp.w.weight"], expected, rtol=1e-9)
    for i in range(2):
        found = spectra[f"model.layers.0.mlp.experts.down_proj[{i}]"]
        np.testing.assert_allclose(found, squared_singular_values(experts[i]), rtol=1e-9)
    assert [m.expert for m in metrics.matrices] == [0, 1, None]
    assert metrics.layers[0].matrices == 3


# --- matrices without a fit -----------------------------------------------------------------

ODD = {
    "nan": (randn(64, 64).index_fill(0, torch.tensor([3]), float("nan")), "NaN"),
    "inf": (randn(64, 64).index_fill(1, torch.tensor([5]), float("-inf")), "Inf"),
    "zero": (torch.zeros(64, 64), "all weights are zero"),
    "empty": (torch.zeros(0, 64), "the matrix is empty"),
    "constant": (torch.ones(64, 64), "only 1 eigenvalues"),
    "identity": (torch.eye(64), "all eigenvalues are equal"),
    "narrow": (randn(2, 64), "only 2 eigenvalues"),
    "denormal": (torch.full((64, 64), 1e-310, dtype=torch.float64), "out of float64's range"),
}


def test_matrices_without_a_spectrum_are_marked_and_the_run_goes_on(tmp_path):
    good = {f"model.layers.{i}.good.weight": randn(64, 64, seed=i) for i in range(2)}
    odd = {f"model.layers.0.{name}.weight": weight for name, (weight, _) in ODD.items()}
    write_shards(tmp_path / "m", [good | odd])
    output = RunFiles(tmp_path / "m.metrics.json")
    metrics = analyze(open_checkpoint(tmp_path / "m"), settings(), output)
    matrices = {m.role: m for m in metrics.matrices if m.layer == 0}
    for name, (_, reason) in ODD.items():
        found = matrices[name]
        assert found.status == "failed"
        assert reason in found.reason
        assert found.pl_alpha_hill is found.alpha_hat is found.xmin is found.k is None
    good_one = matrices["good"]
    assert (good_one.status, good_one.reason) == ("ok", None)
    first, second = metrics.layers
    assert (first.matrices, first.unfitted) == (1 + len(ODD), len(ODD))
    assert first.pl_alpha_hill == good_one.pl_alpha_hill
    assert f"{len(ODD)} of {len(ODD) + 1} matrices have no fit" in first.reason
    assert second.reason is None
    assert "NaN" not in json.dumps(json.loads(output.metrics.read_text())["layers"])
    assert read_metrics(output.metrics) == metrics


def orthogonal(rows, columns, dtype, seed=0):
    return torch.linalg.qr(randn(rows, columns, seed=seed).to(dtype))[0]


FLAT = {
    "float64": orthogonal(256, 256, torch.float64),
    "float32": orthogonal(256, 256, torch.float32),
    "float32 tall": orthogonal(512, 128, torch.float32),
    "bfloat16": orthogonal(256, 256, torch.float32).bfloat16(),
    "float16 scaled": (1000 * orthogonal(200, 100, torch.float32)).half(),
    "float8": (8 * orthogonal(256, 256, torch.float32)).to(torch.float8_e4m3fn),
    "permutation": torch.eye(128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))],
}
SPREAD_OUT = {
    "float8 noise": randn(256, 256).to(torch.float8_e5m2),
    "float8 tall noise": randn(4096, 64).to(torch.float8_e5m2),
    "bfloat16 tall noise": randn(8192, 64).bfloat16(),
    "float32 nearly orthogonal": orthogonal(256, 256, torch.float32) + 1e-4 * randn(256, 256),
}


def test_a_spectrum_that_is_flat_within_rounding_has_no_alpha(tmp_path):
    tensors = {f"h.0.{name.replace(' ', '_')}.weight": w for name, w in (FLAT | SPREAD_OUT).items()}
    write_shards(tmp_path / "m", [{n: w.contiguous() for n, w in tensors.items()}])
    output = RunFiles(tmp_path / "m.metrics.json")
    metrics = analyze(open_checkpoint(tmp_path / "m"), settings(), output)
    found = {m.role.replace("_", " "): m for m in metrics.matrices}
    for name in FLAT:
        assert (found[name].status, found[name].pl_alpha_hill) == ("failed", None), name
        assert "equal" in found[name].reason
        assert found[name].stable_rank == pytest.approx(min(found[name].shape), rel=0.1)
    for name in SPREAD_OUT:
        assert (found[name].status, found[name].reason) == ("ok", None), name
    again = refit(output.metrics, RunFiles(tmp_path / "n.metrics.json"), "median")
    assert {m.role for m in again.matrices if m.status == "failed"} == {
        m.role for m in metrics.matrices if m.status == "failed"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["official", "median", "kde-mean"])
def test_a_tail_of_equal_singular_values_has_no_alpha(dtype, estimator, tmp_path):
    """A few small ones, and above them a block that differs by rounding alone."""
    singular = torch.cat([torch.linspace(0.2, 0.8, 6), torch.ones(58)]).double()
    left, right = (torch.linalg.qr(randn(64, 64, seed=i).double())[0] for i in range(2))
    weight = (left * singular) @ right
    write_shards(tmp_path / "m", [{"h.0.w.weight": weight.to(dtype)}])
    found = analyze(open_checkpoint(tmp_path / "m"), settings(estimator=estimator)).matrices[0]
    assert (found.status, found.pl_alpha_hill) == ("failed", None)
    assert found.reason.startswith("the tail's eigenvalues are equal within the rounding of")
    singular[6:] += torch.linspace(0, 0.5, 58)
    write_shards(tmp_path / "n", [{"h.0.w.weight": ((left * singular) @ right).to(dtype)}])
    found = analyze(open_checkpoint(tmp_path / "n"), settings(estimator=estimator)).matrices[0]
    assert found.pl_alpha_hill is not None


def test_an_absurd_number_of_bins_is_refused(model):
    with pytest.raises(HtsrError, match="bins must be at most 1000000"):
        analyze(model, bins=1_000_000_000)


def test_low_rank_is_marked_and_its_zeros_are_counted(tmp_path):
    weight = randn(80, 60).double() @ randn(60, 70, seed=1).double()
    write_shards(tmp_path / "m", [{"h.0.w.weight": weight}])
    (matrix,) = analyze(open_checkpoint(tmp_path / "m"), settings()).matrices
    assert (matrix.n_eigs, matrix.n_zero, matrix.status) == (60, 10, "marked")
    assert "10 of 70 eigenvalues are zero" in matrix.reason


def test_few_eigenvalues_are_marked(tmp_path):
    write_shards(tmp_path / "m", [{"h.0.w.weight": randn(30, 70)}])
    (matrix,) = analyze(open_checkpoint(tmp_path / "m"), settings()).matrices
    assert (matrix.status, matrix.n_eigs) == ("marked", 30)
    assert "only 30 eigenvalues" in matrix.reason


def test_strict_exits_3_and_still_writes(tmp_path, invoke):
    tensors = {"h.0.a.weight": randn(64, 64), "h.0.b.weight": torch.zeros(64, 64)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert invoke("analyze", "m.safetensors", "-q").rc == 0
    (tmp_path / "m.metrics.json").unlink()
    done = invoke("analyze", "m.safetensors", "--strict", "-q")
    assert done.rc == 3
    assert "h.0.b.weight has no fit: all weights are zero" in done.stderr
    assert read_metrics(tmp_path / "m.metrics.json").layers[0].unfitted == 1
    selected = ["--exclude", "*b.weight", "-o", "x.json"]
    assert invoke("analyze", "m.safetensors", "--strict", *selected).rc == 0


@pytest.mark.parametrize("middle", ["lora_A.weight", "lora_B.weight", "lora_moe_A"])
def test_an_adapter_is_refused_in_place_of_a_model(tmp_path, invoke, middle):
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.model.layers.{i}.mlp.up_proj.{middle}": randn(8, 64)
               for i in range(2)}  # fmt: skip
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    done = invoke("analyze", "adapter")
    assert (done.rc, done.stdout) == (1, "")
    assert "adapter is an adapter, not a model: it holds " + next(iter(factors)) in done.stderr
    assert not list(tmp_path.glob("adapter.*"))
    save_file(llama(2) | factors, tmp_path / "both.safetensors")
    assert invoke("analyze", "both.safetensors", "-q").rc == int("moe" not in middle)
    assert invoke("analyze", "both.safetensors", "-q", "--force", "--exclude", "*lora_*").rc == 0


def test_quantised_weights_are_refused_unless_they_are_excluded(tmp_path, invoke):
    tensors = llama(1) | {"model.layers.0.x.qweight": torch.zeros(8, 8, dtype=torch.int32)}
    save_file(tensors, tmp_path / "m.safetensors")
    done = invoke("analyze", "m.safetensors")
    assert done.rc == 1
    assert "model.layers.0.x.qweight holds integers (I32): 1 weights" in done.stderr
    assert "--exclude" in done.stderr
    assert not list(tmp_path.glob("m.*json*"))
    assert invoke("analyze", "m.safetensors", "--exclude", "*.qweight").rc == 0
    assert len(read_metrics(tmp_path / "m.metrics.json").matrices) == 7


def test_nothing_to_analyse_is_a_sentence(tmp_path):
    save_file({"w": randn(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(HtsrError, match="no weight matrix in numbered blocks"):
        plan(open_checkpoint(tmp_path / "m.safetensors"), settings())


def test_wrong_settings_are_refused_before_anything_is_written(model, tmp_path):
    output = RunFiles(tmp_path / "m.metrics.json")
    for wrong in (settings("nope"), settings(bins=0), settings(engine="nope")):
        with pytest.raises(HtsrError):
            analyze(open_checkpoint(model), wrong, output)
    assert not output.metrics.exists()


# --- FARMS and refitting --------------------------------------------------------------------


def test_farms_keeps_both_spectra_and_refits_from_the_windows(model, tmp_path):
    farms = Farms(rows=16, ratio=2.0, windows=3)
    output = RunFiles(tmp_path / "f.metrics.json")
    analyze(open_checkpoint(model), settings("median", farms=farms), output)
    spectra = load_file(output.spectra)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = llama()[name]
    starts = itertools.product((0, 24, 48), (0, 16, 32))
    windows = [squared_singular_values(weight[i : i + 16, j : j + 32]) for i, j in starts]
    pooled = np.sort(np.concatenate(windows))
    np.testing.assert_allclose(spectra[name + "#farms"], pooled, rtol=1e-8)
    np.testing.assert_allclose(spectra[name], squared_singular_values(weight), rtol=1e-8)
    for estimator in ("median", "official"):
        again = refit(output.metrics, RunFiles(tmp_path / f"{estimator}.metrics.json"), estimator)
        found = next(m for m in again.matrices if m.tensor == name)
        assert found.pl_alpha_hill == pytest.approx(naive.alpha(pooled, estimator), rel=1e-6)
        assert found.lambda_max == pytest.approx(spectra[name][-1])


def test_refitting_equals_a_fresh_analysis(model, tmp_path):
    first = RunFiles(tmp_path / "a.metrics.json")
    analyze(open_checkpoint(model), settings("official"), first)
    fresh = analyze(open_checkpoint(model), settings("median"), RunFiles(tmp_path / "b.json"))
    again = refit(first.metrics, RunFiles(tmp_path / "c.metrics.json"), "median")
    assert again.matrices == fresh.matrices
    assert again.layers == fresh.layers
    assert again.settings == fresh.settings
    assert again.spectra == read_metrics(first.metrics).spectra


# --- resuming -------------------------------------------------------------------------------


def record_of(line):
    """A journal's line without its hash, parsed."""
    return json.loads(line.rpartition(b" ")[0])


def hashed(text, header=b""):
    """A line as the journal has it: the hash is over the header, too."""
    return text + b" " + hashlib.sha256(header + text).hexdigest().encode()


class KilledError(Exception):
    pass


def small_run(tmp_path, matrices=9, **changes):
    """A run of 14 matrices that is killed after some; each finished one must be saved by then."""
    folder = tmp_path / "tiny"
    if not folder.exists():
        write_shards(folder, [llama()])
    output = RunFiles(tmp_path / "m.metrics.json")

    def stop(stream, layer_map):
        for number, (matrix, resumed) in enumerate(stream, 1):
            lines = output.journal.read_bytes().splitlines()
            assert resumed or record_of(lines[-1])["name"] == matrix.name
            yield matrix, resumed
            if number == matrices:
                raise KilledError

    with contextlib.suppress(KilledError):
        analyze(open_checkpoint(folder), settings(**changes), output, progress=stop)
    assert lines_of(output.journal) == 1 + matrices
    assert not output.metrics.exists()
    return folder, output


def resumed_flags(folder, output, **options):
    seen = []

    def watch(stream, layer_map):
        for matrix, resumed in stream:
            seen.append(resumed)
            yield matrix

    found = analyze(open_checkpoint(folder), settings(), output, progress=watch, **options)
    return sum(seen), found


def test_a_resumed_run_takes_what_is_finished_and_ends_in_the_same_bytes(tmp_path):
    folder, output = small_run(tmp_path)
    count, found = resumed_flags(folder, output)
    assert count == 9
    assert not output.journal.exists()
    whole = RunFiles(tmp_path / "whole" / "m.metrics.json")
    whole.metrics.parent.mkdir()
    expected = analyze(open_checkpoint(folder), settings(), whole)
    assert dataclasses.replace(found, tool=None) == dataclasses.replace(expected, tool=None)
    assert output.spectra.read_bytes() == whole.spectra.read_bytes()


def test_the_journal_is_really_used(tmp_path):
    folder, output = small_run(tmp_path)
    lines = output.journal.read_bytes().splitlines()
    header = lines[0].rpartition(b" ")[0]
    record, other = record_of(lines[1]), record_of(lines[2])
    record["eigenvalues"] = other["eigenvalues"]
    lines[1] = hashed(json.dumps(record).encode(), header)
    output.journal.write_bytes(b"\n".join(lines) + b"\n")
    _, found = resumed_flags(folder, output)
    by_name = {m.tensor: m for m in found.matrices}
    assert by_name[record["name"]].lambda_max == by_name[other["name"]].lambda_max


@pytest.mark.parametrize("keep", [1, 40, 400])
def test_a_torn_last_line_is_dropped(tmp_path, keep):
    folder, output = small_run(tmp_path)
    lines = output.journal.read_bytes().splitlines(keepends=True)
    output.journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    count, found = resumed_flags(folder, output)
    assert count == 8
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


def test_a_run_that_is_torn_resumed_and_killed_again_resumes_once_more(tmp_path):
    folder, output = small_run(tmp_path)
    output.journal.write_bytes(output.journal.read_bytes()[:-7])
    small_run(tmp_path, matrices=11)
    count, found = resumed_flags(folder, output)
    assert count == 11
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


@pytest.mark.parametrize("keep", [0, 1, 30])
def test_a_journal_of_a_torn_first_line_starts_over(tmp_path, keep):
    folder, output = small_run(tmp_path)
    output.journal.write_bytes(output.journal.read_bytes()[:keep])
    assert resumed_flags(folder, output)[0] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: b"garbage",
        lambda line: line.replace(b'"eigenvalues": "', b'"eigenvalues": "!'),
        lambda line: line.replace(b'"n_zero": 0', b'"n_zero": 1'),
        lambda line: line.replace(b'"sha256": "', b'"sha256": "xy'),
        lambda line: line.rpartition(b" ")[0],
        lambda line: hashed(line.rpartition(b" ")[0]),  # of a run with another first line
        lambda line: b"\xff\xfe",
        lambda line: b"[" * 100_000,
    ],
)
def test_a_damaged_record_is_computed_again_and_the_rest_kept(tmp_path, damage):
    folder, output = small_run(tmp_path)
    lines = output.journal.read_bytes().splitlines()
    lines[4] = damage(lines[4])
    output.journal.write_bytes(b"\n".join(lines) + b"\n")
    count, found = resumed_flags(folder, output)
    assert count == 8
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


@pytest.mark.parametrize(
    "change",
    [
        {"eigenvalues": np.arange(64, 0, -1.0)},
        {"eigenvalues": np.full(64, np.nan)},
        {"eigenvalues": np.arange(64.0)},
        {"eigenvalues": np.arange(1, 64.0)},
        {"n_zero": 1},
        {"reason": "all weights are zero"},
    ],
)
def test_what_cannot_be_a_spectrum_is_computed_again_whatever_its_hash(tmp_path, change):
    folder, output = small_run(tmp_path)
    lines = output.journal.read_bytes().splitlines()
    record = record_of(lines[4])
    if "eigenvalues" in change:
        change = {"eigenvalues": base64.b64encode(change["eigenvalues"].tobytes()).decode()}
    lines[4] = hashed(json.dumps(record | change).encode(), lines[0].rpartition(b" ")[0])
    output.journal.write_bytes(b"\n".join(lines) + b"\n")
    count, found = resumed_flags(folder, output)
    assert count == 8
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


@pytest.mark.parametrize("first", [b"{}", b"[1]", b"[" * 100_000])
def test_records_outlive_their_first_line(tmp_path, first):
    folder, output = small_run(tmp_path)
    lines = output.journal.read_bytes().splitlines()
    output.journal.write_bytes(b"\n".join([first, *lines[1:]]) + b"\n")
    count, found = resumed_flags(folder, output)
    assert count == 9
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


def test_no_flipped_bit_changes_a_result(tmp_path):
    """A bit of the journal, at random places: every entry that is read is right."""
    _, output = small_run(tmp_path)
    whole = read_journal(output.journal, header_of(output.journal))
    data, other = output.journal.read_bytes(), tmp_path / "flipped.journal"
    places = np.random.default_rng(0).integers(0, 8 * len(data), 1000)
    kept = []
    for place in places:
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        other.write_bytes(flipped)
        found = read_journal(other, header_of(output.journal))
        for name, entry in found.items():
            assert entry.sha256 == whole[name].sha256
            assert np.array_equal(entry.spectrum.eigenvalues, whole[name].spectrum.eigenvalues)
        kept.append(len(found))
    assert min(kept) >= len(whole) - 2  # a newline parts two
    assert np.mean(kept) < len(whole)


def header_of(journal):
    """The identity in the first line."""
    return record_of(journal.read_bytes().splitlines()[0])["identity"]


def test_a_journal_without_hashes_is_refused_and_restart_helps(tmp_path):
    folder, output = small_run(tmp_path)
    lines = [line.rpartition(b" ")[0] for line in output.journal.read_bytes().splitlines()]
    lines[0] = lines[0].replace(b'"version": 2, ', b"")
    output.journal.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(HtsrError, match=r"htsr 0\.1\.0, without checksums") as caught:
        resumed_flags(folder, output)
    assert "restart" in caught.value.hint
    count, found = resumed_flags(folder, output, restart=True)
    assert count == 0
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_of_somebody_else_is_not_taken_for_a_journal(tmp_path, restart):
    folder = write_shards(tmp_path / "tiny", [llama()])
    output = RunFiles(tmp_path / "m.metrics.json")
    for text in ("Dear diary, no newline", "Dear diary\nline\n"):
        output.journal.write_text(text)
        with pytest.raises(HtsrError, match="not a journal of htsr"):
            resumed_flags(folder, output, restart=restart)
        assert output.journal.read_text() == text


def test_a_journal_of_more_than_a_gibibyte_is_read(tmp_path):
    _, output = small_run(tmp_path)
    identity = header_of(output.journal)
    first, rest = output.journal.read_bytes().split(b"\n", 1)
    with open(output.journal, "wb") as file:  # a hole that takes no disk, then the records
        file.write(first + b"\n")
        file.seek(9 << 27)
        file.write(b"\n" + rest)
    assert len(read_journal(output.journal, identity)) == 9


def test_a_file_system_without_locks_is_told_from_another_run(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "tiny", [llama()])

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(HtsrError, match=r"Cannot lock .*No locks available"):
        analyze(open_checkpoint(folder), settings(), tmp_path / "m.json")


def test_another_estimator_may_finish_the_run(tmp_path):
    folder, output = small_run(tmp_path, estimator="ks")
    count, found = resumed_flags(folder, output)
    assert count == 9
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"engine": "portable"}, "another engine"),
        ({"farms": Farms(rows=8)}, "another farms"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changes, named):
    folder, output = small_run(tmp_path)
    before = output.journal.read_bytes()
    with pytest.raises(HtsrError, match=named):
        analyze(open_checkpoint(folder), settings(**changes), output)
    assert output.journal.read_bytes() == before
    analyze(open_checkpoint(folder), settings(**changes), output, restart=True)
    assert output.metrics.exists()


def test_another_checkpoint_is_refused_by_name(tmp_path):
    folder, output = small_run(tmp_path)
    changed = llama() | {"model.layers.1.mlp.up_proj.weight": randn(96, 64)}
    save_file(changed, folder / "model.safetensors")
    with pytest.raises(HtsrError, match="another checkpoint"):
        resumed_flags(folder, output)
    assert resumed_flags(folder, output, restart=True)[0] == 0


@pytest.mark.parametrize("way", ["replaced", "written to"])
def test_a_checkpoint_of_equal_size_and_time_is_told_by_its_content(tmp_path, way):
    folder, output = small_run(tmp_path)
    file = folder / "model.safetensors"
    status, data = file.stat(), file.read_bytes()

    def put(content):
        if way == "replaced":
            file.unlink()
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    save_file(llama(seed=1), tmp_path / "other.safetensors")
    put((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(HtsrError, match=r"another checkpoint .other weights in model"):
        resumed_flags(folder, output)
    put(data)  # a copy of what was analysed is taken for what it is
    count, found = resumed_flags(folder, output)
    assert count == 9
    assert found.matrices == analyze(open_checkpoint(folder), settings()).matrices


def test_the_size_of_blocks_is_part_of_the_identity_and_of_the_hash(tmp_path):
    tensors = {}
    for i in range(3):
        name = f"model.layers.{i}.w.weight"
        tensors[name] = randn(96, 64, seed=i).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.tensor([[0.5], [2.0]])
    output, hashes = RunFiles(tmp_path / "m.json"), set()

    def stop(stream, layer_map):
        for item in stream:
            yield item
            raise KilledError

    for rows in (48, 95):
        config = {"quantization_config": {"weight_block_size": [rows, 64]}}
        opened = open_checkpoint(write_shards(tmp_path / "m", [tensors], config=config))
        hashes.add(analyze(opened, settings()).model.weights_sha256)
        if rows == 48:
            with pytest.raises(KilledError):
                analyze(opened, settings(), output, progress=stop)
        else:
            with pytest.raises(HtsrError, match="another"):
                analyze(opened, settings(), output)
    assert len(hashes) == 2


def test_more_matrices_can_be_selected_when_resuming(tmp_path):
    folder, output = small_run(tmp_path, exclude=("*layers.0.self_attn*",))
    assert resumed_flags(folder, output)[0] == 9


# --- killed for real ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A checkpoint that keeps a process busy for some seconds."""
    folder = tmp_path_factory.mktemp("busy") / "busy"
    tensors = {f"h.{i}.mlp.w.weight": randn(512, 448, seed=i).bfloat16() for i in range(60)}
    return write_shards(folder, [tensors])


def start(cwd, *args):
    return subprocess.Popen(
        [sys.executable, "-m", "htsr_alloc", *map(str, args)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def lines_of(journal):
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def wait_for_lines(process, journal, count):
    deadline = time.monotonic() + 60
    while lines_of(journal) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_interrupted_stopped_killed_and_run_again(busy, tmp_path, invoke):
    journal = tmp_path / "busy.journal"

    process = start(tmp_path, "analyze", busy)
    wait_for_lines(process, journal, 4)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stdout == ""
    assert "interrupted; the same command goes on" in stderr
    assert "Traceback" not in stderr
    first = lines_of(journal)
    assert 4 <= first < 61

    process = start(tmp_path, "analyze", busy)
    wait_for_lines(process, journal, first + 3)
    process.send_signal(signal.SIGSTOP)  # it holds the journal, and cannot finish meanwhile
    second_run = invoke("analyze", busy)
    assert second_run.rc == 1
    assert "Another run is writing busy.journal" in second_run.stderr
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    second = lines_of(journal)
    assert first < second < 61
    assert sorted(p.name for p in tmp_path.iterdir()) == ["busy.journal"]

    assert invoke("analyze", busy, "-q").rc == 0
    assert not journal.exists()
    whole = tmp_path / "whole"
    whole.mkdir()
    assert invoke("analyze", busy, "-q", "-o", whole / "busy.metrics.json").rc == 0
    for name in ("busy.metrics.json", "busy.spectra.safetensors"):
        if name.endswith("json"):
            assert without_time(tmp_path / name) == without_time(whole / name)
        else:
            assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in whole.iterdir()) == [
        "busy.metrics.json",
        "busy.spectra.safetensors",
    ]


# --- memory ---------------------------------------------------------------------------------

MEASURE = r"""
    import re, sys
    from htsr_alloc.cli.main import app
    app(sys.argv[1:], standalone_mode=False)
    # Not ru_maxrss, which starts at what this test's own process holds.
    print(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(folder, side, count, workers):
    weight = randn(side, side).bfloat16()
    tensors = {f"h.{i}.mlp.w.weight": weight.roll(i, 0).contiguous() for i in range(count)}
    write_shards(folder, [tensors])
    arguments = ["analyze", folder, "-q", "--workers", workers, "-o", folder / "m.metrics.json"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), *map(str, arguments)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    (folder / "model.safetensors").unlink()
    return int(done.stdout.splitlines()[-1]) << 10


def test_memory_does_not_grow_with_the_number_of_matrices(tmp_path):
    few, many = (peak_memory(tmp_path / str(count), 512, count, 2) for count in (10, 110))
    # 100 more matrices are 50 MiB as stored and 200 MiB in float64; malloc settles within 16.
    assert many - few < 24 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "count",
    [
        12,
        pytest.param(
            100,
            marks=pytest.mark.skipif("HTSR_FULL" not in os.environ, reason="minutes: HTSR_FULL"),
        ),
    ],
)
def test_memory_does_not_grow_with_the_number_of_2048_matrices(tmp_path, count):
    few, many = (peak_memory(tmp_path / str(n), 2048, n, 1) for n in (4, count))
    # 8 more matrices are 64 MiB as stored and 256 MiB as Gram matrices.
    assert many - few < 32 << 20


# --- where it cannot write ------------------------------------------------------------------


def test_a_read_only_folder_is_a_sentence(model, tmp_path, run):
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.metrics.json").write_text("old")
    out.chmod(0o555)
    try:
        done = run(
            *("analyze", model, "-q", "-o", out / "m.metrics.json"),
            preexec_fn=drop_the_right_to_ignore_permissions,
        )
    finally:
        out.chmod(0o755)
    assert done.rc == 1
    assert "Permission denied" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in out.iterdir()] == ["m.metrics.json"]
    assert (out / "m.metrics.json").read_text() == "old"


def test_a_reader_of_the_old_file_never_sees_half_of_the_new_one(model, tmp_path, invoke):
    path = tmp_path / "tiny.metrics.json"
    path.write_text("old")
    with open(path) as reader:
        assert invoke("analyze", model, "-q", "--force").rc == 0
        assert reader.read() == "old"
    assert len(read_metrics(path).matrices) == 14


def test_a_missing_folder_is_a_sentence(model, invoke):
    done = invoke("analyze", model, "-o", "no/such/folder/m.json")
    assert done.rc == 1
    assert "no/such/folder" in done.stderr
    assert "No such file or directory" in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few pages, and how to enlarge it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("-o", "size=16k"):
        pytest.skip("tmpfs cannot be mounted here")
    yield folder, lambda: mount("-o", "remount,size=4m")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_the_run_goes_on_when_there_is_room(
    model, small_disk, invoke
):
    disk, enlarge = small_disk
    old = disk / "m.metrics.json"
    old.write_text("old")
    done = invoke("analyze", model, "-q", "--force", "-o", old)
    assert done.rc == 1
    assert "No space left on device" in done.stderr
    assert old.read_text() == "old"
    kept = lines_of(disk / "m.journal")
    assert 2 <= kept < 15
    assert enlarge()
    assert invoke("analyze", model, "-q", "--force", "-o", old).rc == 0
    assert len(read_metrics(old).matrices) == 14
    assert sorted(p.name for p in disk.iterdir()) == ["m.metrics.json", "m.spectra.safetensors"]


def test_a_file_size_limit_is_a_sentence_too(model, run, tmp_path):
    import resource

    (tmp_path / "tiny.metrics.json").write_text("old")
    done = run(
        *("analyze", model, "-q", "--force"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.rc == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "tiny.metrics.json").read_text() == "old"


BAD_NAMES = ["a:b.json", "a\\b.json", "a" * 240 + ".json", "a\ud800.json"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_would_fail_at_the_end_fails_before_the_work(model, tmp_path, name):
    started = []
    with pytest.raises(HtsrError):
        analyze(model, output=tmp_path / name, progress=lambda *_: started.append(1) or [])
    assert not started
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_with_a_colon_is_a_sentence_before_the_work(tmp_path, invoke):
    write_shards(tmp_path / "llama:7b", [llama()])
    done = invoke("analyze", "llama:7b")
    assert done.rc == 1
    assert "must be a bare file name" in done.stderr
    assert "-o" in done.stderr
    assert not list(tmp_path.glob("*.j*"))


def test_an_architecture_or_folder_that_is_not_unicode_is_written_readably(tmp_path):
    config = {"architectures": ["a\ud800"]}
    folder = write_shards(tmp_path / os.fsdecode(b"m\xff"), [llama()], config=config)
    output = tmp_path / "m.json"
    analyze(folder, output=output)
    assert (read_metrics(output).model.name, read_metrics(output).model.architecture) == (
        "m?",
        "a?",
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "link", "model.json"])
def test_what_is_read_is_never_overwritten(model, name):
    (model / "link").hardlink_to(model / "model.safetensors")
    if name == "model.json":  # whose spectra have the name of the weights
        (model / "model.safetensors").rename(model / "model.spectra.safetensors")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(HtsrError, match="would be overwritten"):
        analyze(model, output=model / name)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_spectra_of_a_metrics_file_of_a_like_name_are_not_overwritten(model, tmp_path):
    analyze(model, output=tmp_path / "x.metrics.json")
    with pytest.raises(HtsrError, match=r"belongs to x\.metrics\.json"):
        analyze(model, settings(exclude=("*layers.0*",)), tmp_path / "x.json")
    analyze(model, output=tmp_path / "x.metrics.json")
    (tmp_path / "y.json").write_text("{}")  # something else
    analyze(model, output=tmp_path / "y.metrics.json")
    assert (tmp_path / "y.json").read_text() == "{}"


def test_a_run_leaves_the_journal_of_a_run_whose_name_begins_with_its_own(model, tmp_path):
    other = tmp_path / "x.rank16.journal"
    other.write_bytes(b'{"format": "htsr.journal", "identity": {}} 0\n')
    analyze(model, output=tmp_path / "x.metrics.json")
    assert other.exists()


def test_a_fit_does_not_overwrite_what_it_reads(model, tmp_path):
    path = tmp_path / "x.metrics.json"
    analyze(model, output=path)
    for name in (path.name, "x.spectra.safetensors"):
        with pytest.raises(HtsrError, match="would be overwritten"):
            refit(path, RunFiles(tmp_path / name), "median")


def test_a_fit_of_other_settings_or_spectra_is_kept_unless_force_is_given(model, tmp_path, invoke):
    path = tmp_path / "x.metrics.json"
    analyze(model, output=path)
    ask = ("fit", "x.metrics.json", "-q", "--estimator")
    assert invoke(*ask, "median").rc == 0
    made = (tmp_path / "x.median.metrics.json").read_bytes()
    assert invoke(*ask, "median").rc == 0  # the same again
    for more, said in (("ks", "of other settings"), ("median", "is no htsr.metrics file")):
        done = invoke(*ask, more, "-o", "x.median.metrics.json")
        assert done.rc == 1
        assert said in done.stderr
        assert "--force" in done.stderr
        if more == "ks":
            assert (tmp_path / "x.median.metrics.json").read_bytes() == made
            (tmp_path / "x.median.metrics.json").write_text("{}")
    assert invoke(*ask, "ks", "-o", "x.median.metrics.json", "--force").rc == 0
    again = json.loads((tmp_path / "x.median.metrics.json").read_text())
    assert again["settings"]["estimator"] == "ks"
    again["spectra"]["sha256"] = "0" * 64
    (tmp_path / "x.ks.metrics.json").write_text(json.dumps(again))
    assert "of other spectra" in invoke(*ask, "ks").stderr


def test_an_output_that_is_a_folder_is_a_sentence(model, tmp_path, invoke):
    (tmp_path / "m.metrics.json").mkdir()
    done = invoke("analyze", model, "-q", "-o", "m.metrics.json")
    assert done.rc == 1
    assert "Is a directory" in done.stderr
    assert not list(tmp_path.glob(".*tmp"))


def test_a_pipe_is_written_to_and_not_replaced(model, tmp_path, invoke):
    assert invoke("analyze", model, "-q").rc == 0
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE)
    try:
        assert invoke("allocate", "--T", 4, "-q", "-o", pipe).rc == 0
        written, _ = reader.communicate(timeout=10)
    finally:
        reader.kill()
    assert json.loads(written)["budget"] == 4
    assert pipe.is_fifo()


# --- the real thing -------------------------------------------------------------------------


@pytest.mark.checkpoints
def test_a_layer_of_a_real_checkpoint(checkpoint):
    folder = checkpoint("minilm")
    opened = open_checkpoint(folder)
    include = ("encoder.layer.3.attention*",)
    metrics = analyze(opened, settings(include=include))
    assert len(metrics.matrices) == 4
    assert len(metrics.layers) == 6
    for matrix in metrics.matrices:
        ref = next(r for r in opened.tensors if r.name == matrix.tensor)
        expected = squared_singular_values(opened.read(ref))
        assert matrix.n_eigs == 384
        assert matrix.lambda_max == pytest.approx(expected[-1], rel=1e-9)
        alpha = naive.alpha(expected, "official")
        assert matrix.pl_alpha_hill == pytest.approx(alpha, rel=1e-6)
    assert metrics.layers[0].reason == "no matrix of this layer was analysed"
    assert str(folder.parent) not in json.dumps(dataclasses.asdict(metrics))  # no path is written
