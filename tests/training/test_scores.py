"""``htsr score``: every score against numpy, and the files that ``allocate`` reads."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the extra [train]")

import torch
from helpers import training_tiny
from transformers import AutoModelForCausalLM

from htsr_alloc.allocation import read_scores
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, loads
from htsr_alloc.training import tokens
from htsr_alloc.training.rows import read_rows
from htsr_alloc.training.scoring.registry import SCORES
from htsr_alloc.training.scoring.run import score
from htsr_alloc.training.scoring.weights import signal_to_noise

ROLES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip


@pytest.fixture
def work(tmp_path, invoke):
    training_tiny.folder(tmp_path / "model")
    training_tiny.write(tmp_path / "train.jsonl", training_tiny.learnable_rows(12))
    done = invoke("analyze", "model", "-o", "tiny.metrics.json", "-q")
    assert done.rc == 0, done.stderr
    return tmp_path


def linears(model):
    count = model.config.num_hidden_layers
    modules = dict(model.named_modules())
    return {n: modules[n] for i in range(count) for r in ROLES if (n := f"model.layers.{i}.{r}")}


def watched(work, size, limit=12):
    """For every batch: each linear's inputs, the gradients of its outputs, the mask, the labels.

    The gradient of a weight is then Gᵀ X, in numpy.
    """
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32).eval()
    tokenizer = tokens.open_tokenizer(work / "model")
    rows = read_rows(work / "train.jsonl")[:limit]
    examples = [tokens.encode(row, tokenizer, 512) for row in rows]
    collate = tokens.Collator(tokens.pad_id(tokenizer))
    found = []
    for start in range(0, len(examples), size):
        inputs, outputs, handles = {}, {}, []
        for name, module in linears(model).items():

            def read(_, args, out, name=name, inputs=inputs, outputs=outputs):
                inputs[name], outputs[name] = args[0].detach(), out
                out.retain_grad()

            handles.append(module.register_forward_hook(read))
        batch = collate(examples[start : start + size])
        model(**batch, use_cache=False).loss.backward()
        for handle in handles:
            handle.remove()
        x = {name: value.double().numpy() for name, value in inputs.items()}
        g = {name: value.grad.double().numpy() for name, value in outputs.items()}
        found.append((x, g, batch["attention_mask"].bool().numpy(), batch["labels"].numpy()))
    return found


def gradient(x, g, name):
    return np.einsum("bso,bsi->oi", g[name], x[name])


def test_weight_norm(work):
    found = score("norm", model=work / "model").values
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    want = {
        name: np.sqrt((module.weight.detach().double().numpy() ** 2).sum())
        for name, module in linears(model).items()
    }
    assert found == pytest.approx(want, rel=1e-6)
    assert list(found) == list(want)


def test_snr_is_spectrums_from_the_kept_spectra(work):
    """As the released script computes it from the weights."""
    found = score("snr", metrics=work / "tiny.metrics.json").values
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    for name, module in linears(model).items():
        s = torch.linalg.svdvals(module.weight.detach().double())
        sigma = (torch.quantile(s, 0.75) - torch.quantile(s, 0.25)) / 1.349
        n, m = module.weight.shape
        beta = n / m if n < m else m / n
        threshold = sigma * np.sqrt((1 + np.sqrt(beta)) ** 2)
        signal, noise = s[s > threshold].sum(), s[s <= threshold].sum()
        noise = noise if noise else torch.tensor(1.0)
        assert found[name] == pytest.approx(float(signal / noise / s[0]), rel=1e-4)
    assert len(found) == len(linears(model))


def test_a_spectrum_by_hand():
    # Quartiles 1.75 and 3.25 apart by 1.5: an edge of 1.112 × 1.5 = 1.668 of a 1 by 4 shape.
    assert signal_to_noise(np.array([1.0, 2.0, 3.0, 4.0]), (4, 16)) == pytest.approx(9 / 1 / 4)
    assert signal_to_noise(np.array([2.0, 2.0, 2.0]), (3, 3)) == pytest.approx(6 / 1 / 2)


def test_gradient_variance_is_the_mean_of_each_rows_squared_gradient(work):
    found = score("fisher", model=work / "model", data=work / "train.jsonl", limit=5).values
    rows = watched(work, 1, limit=5)
    for name, value in found.items():
        squares = []
        for x, g, _, labels in rows:
            answered = (labels[:, 1:] != -100).sum()  # the loss is a mean over them
            squares.append((answered * gradient(x, g, name)) ** 2)
        assert value == pytest.approx(np.mean(squares), rel=1e-3)


def test_gain_is_the_sum_of_the_leading_singular_values_of_the_mean_gradient(work):
    asked = {"model": work / "model", "data": work / "train.jsonl"}
    found = score("gain", **asked, r=3, batch_size=5).values
    batches = watched(work, 5)
    assert len(batches) == 3
    for name, value in found.items():
        mean = np.mean([gradient(x, g, name) for x, g, _, _ in batches], axis=0)
        assert value == pytest.approx(np.linalg.svd(mean, compute_uv=False)[:3].sum(), rel=1e-3)
    whole = score("gain", **asked, r=64, batch_size=5).values
    assert all(whole[name] > value for name, value in found.items())


def test_a_step_of_that_rank_gains_it(work):
    """W − t U_r V_rᵀ lowers the loss by t times the score, to first order."""
    name = "model.layers.0.mlp.down_proj"
    asked = {"model": work / "model", "data": work / "train.jsonl"}
    want = score("gain", **asked, r=2, batch_size=12).values[name]
    ((x, g, _, _),) = watched(work, 12)
    u, _, vt = np.linalg.svd(gradient(x, g, name))
    model = AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float64).eval()
    tokenizer = tokens.open_tokenizer(work / "model")
    rows = [tokens.encode(row, tokenizer, 512) for row in read_rows(work / "train.jsonl")]
    batch = tokens.Collator(tokens.pad_id(tokenizer))(rows)
    step, losses = 1e-4, []
    weight = linears(model)[name].weight
    with torch.no_grad():
        losses.append(float(model(**batch).loss))
        weight -= step * torch.tensor(u[:, :2] @ vt[:2])
        losses.append(float(model(**batch).loss))
    assert (losses[0] - losses[1]) / step == pytest.approx(want, rel=0.02)


def test_explained_variance_is_that_of_each_batchs_inputs(work):
    asked = {"model": work / "model", "data": work / "train.jsonl"}
    found = score("eva", **asked, r=2, batch_size=5).values
    for name, value in found.items():
        shares = []
        for x, _, mask, _ in watched(work, 5):
            s = np.linalg.svd(x[name][mask], compute_uv=False) ** 2
            shares.append(s[:2].sum() / s.sum())
        assert value == pytest.approx(np.mean(shares), rel=1e-4)
    q, k = (found[f"model.layers.0.self_attn.{role}"] for role in ("q_proj", "k_proj"))
    assert q == k  # one input
    with pytest.raises(HtsrError, match="no more than r 500"):
        score("eva", **asked, r=500)


@pytest.mark.parametrize("method", SCORES)
def test_allocate_reads_what_score_writes(method, work, invoke):
    """By layers and by linears, as CSV and as JSON."""
    takes = SCORES[method].takes
    asked = ["score", method]
    asked += ["--model", "model"] if "model" in takes else ["--metrics", "tiny.metrics.json"]
    asked += ["--data", "train.jsonl"] if "data" in takes else []
    done = invoke(*asked, *(["--r", 2] if "r" in takes else []), "-o", "s.csv")
    assert done.rc == 0, done.stderr
    rows = list(csv.DictReader((work / "s.csv").open()))
    assert [row["prefix"] for row in rows] == ["model.layers.0", "model.layers.1"]
    shown = [float(line.split()[-1]) for line in done.stdout.splitlines()[-2:]]
    assert shown == pytest.approx([float(row["score"]) for row in rows], rel=1e-3)
    made = invoke("allocate", "--scores", "s.csv", "--T", 12, "--beta", 1, "-o", "a.json")
    assert made.rc == 0, made.stderr
    allocation = loads(Allocation, (work / "a.json").read_text(), "a")
    assert allocation.budget == 12
    more = float(rows[0]["score"]) > float(rows[1]["score"])
    assert (allocation.evidence[0].quota > allocation.evidence[1].quota) == more

    done = invoke(*asked, *(["--r", 2] if "r" in takes else []), "--per-module", "-o", "s.json")
    assert done.rc == 0, done.stderr
    each = json.loads((work / "s.json").read_text())
    own = [row["score"] for row in each if row["layer"] == 0]
    assert float(rows[0]["score"]) == pytest.approx(np.mean(own))
    made = invoke("allocate", "tiny.metrics.json", "--scores", "s.json", "--per-module",
                  "--T", 12, "-o", "b.json")  # fmt: skip
    assert made.rc == 0, made.stderr
    assert len(loads(Allocation, (work / "b.json").read_text(), "b").modules) == len(each) == 14
    assert read_scores(work / "s.json").key == "module"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gain", "--model", "model"], "first-order gain needs --data"),
        (["norm", "--model", "model", "--data", "train.jsonl"], "weight norm does not use --data"),
        (["snr", "--model", "model"], "hint: It needs --metrics."),
        (["snr"], "Spectrum's SNR needs --metrics"),
        (["snr", "--metrics", "tiny.metrics.json", "--device", "cpu"], "opens no model"),
        (["fisher", "--model", "model", "--data", "train.jsonl", "--r", "2"], "does not use --r"),
        (["gain", "--model", "model", "--data", "train.jsonl", "--r", "0"], "--r must be at least"),
        (["norm", "--model", "model", "-o", "s.txt"], "A score file ends in .csv or .json"),
        (["snr", "--metrics", "model/config.json"], "neither a metrics nor an allocation"),
    ],
)
def test_what_a_score_does_not_take_is_refused(arguments, said, work, invoke):
    done = invoke("score", *arguments)
    assert done.rc == 1
    assert said in done.stderr


def test_an_unknown_score_is_wrong_usage(work, invoke):
    done = invoke("score", "gian", "--model", "model")
    assert done.rc == 2
    assert "Did you mean 'gain'?" in done.stderr
    shown = " ".join(invoke("score", "--help").stdout.split())
    assert f"Choose from {', '.join(SCORES)}." in shown
