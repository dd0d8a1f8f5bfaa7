"""What an analysis leaves alone: an earlier one of other settings or of another model."""

import shutil

import pytest
from helpers.commands import llama, write_shards

from htsr_alloc.analysis.analyze import analyze
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, loads

CONFIG = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}


def results(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("tiny.*")}


@pytest.fixture
def analysed(model, invoke, tmp_path):
    """The folder with a whole analysis, and no checkpoint whose weights could be read."""
    assert invoke("analyze", model, "-q").rc == 0
    return results(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--estimator", "median"],
            "is of another estimator (official; now median), which htsr fit computes",
        ),
        (["--bins", 50], "is of another bins (100; now 50)"),
        (["--include", "*q_proj*"], "is of another include (none; now *q_proj*)"),
        (["--engine", "portable"], "is of another engine (auto; now portable)"),
        (["--farms"], "is of another estimator (official; now median)."),
        (["--farms", "--estimator", "official"], "is of another farms (none; now"),
    ],
)
def test_other_settings_are_refused_before_the_work(
    analysed, model, invoke, tmp_path, monkeypatch, options, said
):
    with monkeypatch.context() as patched:
        patched.setattr("htsr_alloc.analysis.analyze.decompose_all", lambda *_: 1 / 0)
        done = invoke("analyze", model, "-q", *options)
    assert (done.rc, done.stdout) == (1, "")
    assert f"tiny.metrics.json is there and {said}" in done.stderr
    assert "Give --force to replace it, or another --output." in done.stderr
    assert results(tmp_path) == analysed  # no journal either


def test_force_replaces_it_and_another_output_needs_none(analysed, model, invoke, tmp_path):
    other = ["--estimator", "median", "--include", "*q_proj*"]
    assert invoke("analyze", model, "-q", *other, "-o", "q.metrics.json").rc == 0
    assert results(tmp_path) == analysed
    assert invoke("analyze", model, "-q", *other, "--force").rc == 0
    assert (tmp_path / "tiny.metrics.json").read_bytes() != analysed["tiny.metrics.json"]


def test_the_same_again_needs_no_force(analysed, model, invoke, tmp_path):
    assert invoke("analyze", model, "-q").rc == 0
    assert invoke("analyze", "./tiny/", "-q", "--strict", "--workers", 1, "--restart").rc == 0
    spectra = "tiny.spectra.safetensors"
    assert results(tmp_path)[spectra] == analysed[spectra]


def test_spectra_alone_are_of_a_run_that_was_killed(analysed, model, invoke, tmp_path):
    (tmp_path / "tiny.metrics.json").unlink()
    assert invoke("analyze", model, "-q", "--include", "*q_proj*").rc == 0


def test_another_model_of_the_name_is_refused_before_the_work(analysed, model, invoke, monkeypatch):
    shutil.rmtree(model)
    write_shards(model, [llama(3)], config=CONFIG | {"num_hidden_layers": 3})
    monkeypatch.setattr("htsr_alloc.analysis.analyze.decompose_all", lambda *_: 1 / 0)
    said = invoke("analyze", model, "-q").stderr
    assert "tiny.metrics.json is there and is of other matrices." in said


def test_other_weights_are_refused_once_they_are_read(analysed, model, invoke, tmp_path):
    write_shards(model, [{n: 2 * t for n, t in llama().items()}], config=CONFIG)
    done = invoke("analyze", model, "-q")
    assert done.rc == 1
    assert "is of other weights of the same names" in done.stderr
    assert {n: results(tmp_path)[n] for n in analysed} == analysed
    assert (tmp_path / "tiny.journal").is_file()
    assert invoke("analyze", model, "-q", "--force").rc == 0
    assert not (tmp_path / "tiny.journal").exists()


@pytest.mark.parametrize("text", ["notes of mine", "", '{"format": "htsr.allocation"}'])
def test_what_is_no_metrics_file_is_kept(model, invoke, tmp_path, text):
    path = tmp_path / "tiny.metrics.json"
    path.write_text(text)
    done = invoke("analyze", model, "-q")
    assert done.rc == 1
    assert "is there and is no htsr.metrics file that this version reads" in done.stderr
    assert path.read_text() == text


def test_from_python_too(model, tmp_path):
    path = tmp_path / "x.metrics.json"
    analyze(model, output=path)
    with pytest.raises(HtsrError, match="another estimator") as caught:
        analyze(model, output=path, estimator="median")
    assert caught.value.hint == "Give force to replace it, or another output."
    analyze(model, output=path, estimator="median", force=True)
    assert loads(Metrics, path.read_bytes(), path.name).settings.estimator == "median"
