"""watch: every spectrum against float64 svdvals of the dense matrix, and in a Trainer's logs."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from helpers import moe_tiny as tiny
from helpers.commands import environment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from htsr_alloc.errors import HtsrError
from htsr_alloc.spectra.estimators import fit
from htsr_alloc.watching import product_spectrum, watch

MOE = ["alphalora", "goat", "goat_plus", "mor", "hydra", "adamole"]


def dense(matrix) -> np.ndarray:
    """Ascending eigenvalues of W^T W that are not zero, by float64 svdvals."""
    values = torch.linalg.svdvals(matrix.detach().double()).numpy()[::-1]
    return values[values > max(matrix.shape) * np.finfo(float).eps * values[-1]] ** 2


def agrees(row, matrix):
    """Whether a watched row is what the dense matrix says."""
    values = dense(matrix)
    assert row.n_eigs == len(values)
    assert row.shape == tuple(matrix.shape)
    assert row.lambda_max == pytest.approx(values[-1], rel=1e-9)
    assert row.stable_rank == pytest.approx(values.sum() / values[-1], rel=1e-9)
    alpha = fit(values, "median").alpha
    assert row.pl_alpha_hill == pytest.approx(alpha, rel=1e-6)
    assert row.alpha_hat == pytest.approx(alpha * np.log10(values[-1]), rel=1e-6)


@settings(max_examples=150, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    r=st.integers(1, 30),
    scale=st.floats(-4, 4).filter(lambda s: abs(s) > 1e-3),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_a_products_spectrum_is_the_dense_matrixs(m, n, r, scale, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, n, generator=generator).to(dtype)
    b = torch.randn(m, r, generator=generator).to(dtype)
    found = product_spectrum(a, b, scale)
    expected = torch.linalg.svdvals(scale * b.double() @ a.double()).numpy()[::-1]
    expected = expected[-min(m, n, r) :]
    assert len(found.eigenvalues) + found.n_zero == min(m, n, r)
    size = len(found.eigenvalues)
    np.testing.assert_allclose(
        np.sqrt(found.eigenvalues), expected[-size:], rtol=1e-9, atol=1e-13 * expected[-1]
    )


def test_no_whole_matrix_is_made():
    """2^17 x 2^17 would take 128 GiB."""
    wide = 1 << 17
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, wide, generator=generator), torch.randn(wide, 4, generator=generator)
    found = product_spectrum(a, b)
    gram = (b.double().T @ b.double()) @ (a.double() @ a.double().T)
    expected = np.sort(np.linalg.eigvals(gram.numpy()).real)
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-8)


def test_products_without_a_spectrum_say_why():
    ones = torch.ones(2, 5)
    assert product_spectrum(ones, torch.zeros(7, 2)).reason == "the product is zero"
    assert "NaN" in str(product_spectrum(ones * torch.nan, torch.ones(7, 2)).reason)
    low = product_spectrum(ones, torch.ones(7, 2))  # rank 1
    assert (len(low.eigenvalues), low.n_zero) == (1, 1)


def test_a_plain_model_has_base_weights():
    model = tiny.llama()
    rows = watch(model, estimator="median")
    blocks = ((n, p) for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    weights = {name.removesuffix(".weight"): p for name, p in blocks}
    assert [row.module for row in rows] == list(weights)
    for row in rows:
        assert (row.kind, row.adapter, row.expert) == ("base", None, None)
        agrees(row, weights[row.module].detach())


peft = pytest.importorskip("peft", reason="needs the extra [train]")


def lora(model, **changes):
    targets = ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, **changes)
    made = peft.get_peft_model(model, config)
    tiny.move(made)
    return made


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora):
    model = lora(tiny.llama(dtype=torch.float64), use_rslora=rslora)
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = watch(model, kinds=["ba", "base", "merged"], estimator="median")
    assert [row.kind for row in rows] == ["base", "merged", "ba"] * 4
    for row in rows:
        layer = model.get_submodule(f"base_model.model.{row.module}")
        weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
        agrees(row, {"base": weight, "merged": weight.double() + delta, "ba": delta}[row.kind])
    assert {row.adapter for row in rows} == {None, "default"}
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [row.kind for row in watch(model)] == ["ba"] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_flat_spectrum_has_no_alpha(dtype):
    """As ``analyze`` has it: its alpha would be anything up to 1/eps."""
    model = nn.ModuleDict({"0": nn.Linear(64, 96, bias=False), "1": nn.Linear(64, 96, bias=False)})
    nn.init.orthogonal_(model.double()["0"].weight)
    flat, other = watch(model.to(dtype))
    assert (flat.status, flat.pl_alpha_hill, flat.alpha_hat) == ("failed", None, None)
    assert "equal within the rounding" in flat.reason
    assert flat.stable_rank == pytest.approx(64, rel=0.1)
    assert other.pl_alpha_hill is not None


def test_conv1d():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
        )
    tiny.move(model)
    for row in watch(model, kinds=["base", "merged", "ba"], estimator="median"):
        layer = model.get_submodule(f"base_model.model.{row.module}")
        weight = layer.base_layer.weight.T
        delta = layer.get_delta_weight("default").T
        agrees(row, {"base": weight, "merged": weight.double() + delta, "ba": delta}[row.kind])


@pytest.mark.parametrize("system", MOE)
def test_each_expert_of_a_mixture(system, monkeypatch):
    """Against the layer itself on the unit vectors, all weight on one expert."""
    from htsr_alloc.lora_moe.gates import Routing
    from htsr_alloc.lora_moe.systems import SYSTEMS

    model = tiny.adapted(
        system,
        model=tiny.llama(dtype=torch.float64),
        num_experts=3,
        r=4,
        expert_pattern={"layers.1": 1},
        target_modules=["up_proj", "down_proj"],
    ).eval()
    rows = watch(model, kinds=["merged", "ba"], estimator="median")
    assert len(rows) == 2 * 2 * (3 + 1)
    for row in rows:
        layer = model.get_submodule(f"base_model.model.{row.module}")
        weight = layer.base_layer.weight.detach()

        def one(layer, adapter, logits, x, chosen=row.expert):
            gate = torch.zeros_like(logits)
            gate[..., chosen] = 1
            return Routing(gate, logits, logits.masked_fill(gate == 0, -torch.inf))

        monkeypatch.setattr(SYSTEMS[system], "gate", one)
        with torch.no_grad():
            whole = layer(torch.eye(layer.in_features, dtype=torch.float64)).T
        residual = 0
        if "default" in layer.lora_moe_res_A:
            residual = layer.lora_moe_res_B["default"] @ layer.lora_moe_res_A["default"]
        agrees(row, whole if row.kind == "merged" else whole - weight + residual)


def test_an_untrained_adapter_is_zero_and_says_so():
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    rows = watch(model)
    assert {(row.status, row.reason) for row in rows} == {("failed", "the product is zero")}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"modules": ["*.w1"]}, r"No linear of the model is like '\*.w1'"),
        ({"modules": "*.q_proj"}, "a list of patterns"),
        ({"kinds": ["delta"]}, "kinds cannot be"),
        ({"kinds": []}, "kinds cannot be"),
        ({"modules": ["*.k_proj"], "kinds": ["ba"]}, "has an active adapter"),
        ({"estimator": "best"}, "no estimator"),
    ],
)
def test_what_cannot_be_watched(arguments, sentence):
    with pytest.raises(HtsrError, match=sentence):
        watch(lora(tiny.llama()), **arguments)


def test_merged_and_dora_are_refused():
    model = lora(tiny.llama())
    model.merge_adapter()
    with pytest.raises(HtsrError, match="has an adapter merged into it"):
        watch(model, kinds=["base"])
    model = lora(tiny.llama(), use_dora=True)
    assert watch(model, kinds=["ba"])
    with pytest.raises(HtsrError, match="DoRA"):
        watch(model, kinds=["merged"])


def test_patterns_choose_linears():
    rows = watch(lora(tiny.llama()), ["*.0.self_attn.*", "*.1.mlp.down_proj"], ["base"])
    assert [row.module for row in rows] == [
        *(f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"),
        "model.layers.1.mlp.down_proj",
    ]


# --- in a Trainer -------------------------------------------------------------------------------

pytest.importorskip("accelerate", reason="needs the extra [train]")


class Reporter:
    """What a reporting callback sees when it is called."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Seen(TrainerCallback):
            def __init__(self):
                self.logs = []

            def on_log(self, args, state, control, logs=None, **kwargs):
                self.logs.append(dict(logs))

        return Seen()


@pytest.mark.parametrize("system", ["lora", "alphalora"])
def test_trainer_logs(tmp_path, system):
    from helpers.moe_train import trainer

    from htsr_alloc.watching import WatchCallback

    targets = {"target_modules": ["q_proj", "up_proj"]}
    torch.manual_seed(0)
    if system == "lora":
        model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=3, **targets))
    else:
        model = tiny.adapted(system, trained=False, num_experts=2, r=3, **targets)
    seen = Reporter()
    run = trainer(model, tmp_path, steps=5, callbacks=[seen])
    WatchCallback(2, kinds=["base", "ba"], estimator="median").attach(run)
    run.train()
    history = [log for log in run.state.log_history if any(k.startswith("htsr/") for k in log)]
    assert [log["step"] for log in history] == [1, 2, 4]  # what it started from, then every second
    assert [any(k.startswith("htsr/") for k in log) for log in seen.logs][:5] == [
        True, True, False, True, False,
    ]  # fmt: skip
    last = history[-1]
    label = "model.layers.0.mlp.up_proj" + ("" if system == "lora" else ".expert_0")
    assert last[f"htsr/ba/stable_rank/{label}"] != history[1][f"htsr/ba/stable_rank/{label}"]
    assert f"htsr/ba/stable_rank/{label}" not in history[0]  # B is zero
    base = "htsr/base/pl_alpha_hill/model.layers.0.mlp.up_proj"
    assert len({log[base] for log in history}) == 1
    linears, experts = 4, 1 if system == "lora" else 2
    assert sum(k.startswith("htsr/") for k in last) == 3 * linears * (1 + experts)


def test_the_last_log_is_the_model_as_it_is(tmp_path):
    """Full fine-tuning: the base changes, and is measured each time."""
    from helpers.moe_train import trainer

    from htsr_alloc.watching import WatchCallback

    model = tiny.llama()
    callback = WatchCallback(3, ["*.0.mlp.up_proj"], estimator="median")
    run = trainer(model, tmp_path, steps=3, callbacks=[callback])
    run.train()
    logged = [
        log["htsr/base/pl_alpha_hill/model.layers.0.mlp.up_proj"]
        for log in run.state.log_history
        if "htsr/base/pl_alpha_hill/model.layers.0.mlp.up_proj" in log
    ]
    (now,) = watch(model, ["*.0.mlp.up_proj"], estimator="median")
    assert logged[-1] == now.pl_alpha_hill
    assert logged[0] != logged[-1]


def test_a_wrong_pattern_ends_training_before_it_starts(tmp_path):
    from helpers.moe_train import trainer

    from htsr_alloc.watching import WatchCallback

    with pytest.raises(HtsrError, match="No linear of the model"):
        trainer(tiny.llama(), tmp_path, callbacks=[WatchCallback(1, ["nothing"])]).train()
    with pytest.raises(HtsrError, match="every must be at least 1"):
        WatchCallback(0)


def test_the_function_needs_no_transformers():
    script = (
        "import sys, htsr_alloc.watching; "
        "print([n for n in ('transformers', 'peft') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, check=True
    )
    assert done.stdout == b"[]\n"
