"""EM-LoRA's activations: what they start at, by depth, and the figure of what they learnt."""

from __future__ import annotations

import json
import math

import pytest
import torch
from fixtures import make_activation
from helpers import moe_tiny as tiny
from helpers import naive_moe as naive

pytest.importorskip("peft", reason="needs the extra [train]")

from peft import PeftModel

from htsr_alloc.errors import HtsrError
from htsr_alloc.lora_moe import LoraMoeConfig, plot_activations
from htsr_alloc.lora_moe.model import STATE, layers_of
from htsr_alloc.lora_moe.systems.em_lora import activation

START = [
    torch.tensor(c, dtype=torch.float64) for c in (activation.NUMERATOR, activation.DENOMINATOR)
]


def gelu(x):
    return torch.tensor([naive.gelu(float(v)) for v in x], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("span", "error"), [((-3, 3), 8e-3), ((-12, 12), 2.3e-2)], ids=str)
def test_it_starts_at_gelu(span, error, dtype):
    x = torch.linspace(*span, 4001, dtype=dtype)
    assert (activation.rational(x, *START).double() - gelu(x)).abs().max() < error


@pytest.mark.parametrize("far", [50.0, 300.0, 1000.0])
def test_it_follows_gelu_far_outside(far):
    x = torch.tensor([-far, far], requires_grad=True)
    got = activation.rational(x, *START)
    assert (got.double() - gelu(x)).abs().max() < 2.3e-2
    assert torch.autograd.grad(got.sum(), x)[0].tolist() == [0, 1]


@pytest.mark.parametrize(("g", "limit"), [(activation.rational, 12), (activation.unlimited, 1e9)])
def test_it_is_the_rational_function(g, limit):
    """Eq. 6, on every x or up to ±12, with other coefficients than the start's."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (7, 5))
    for x in (-40.0, -12.0, -2.5, 0.0, 0.3, 7.0, 12.0, 40.0):
        at = min(max(x, -limit), limit)
        top = sum(float(a[j]) * at**j for j in range(7))
        bottom = 1 + abs(sum(float(b[i - 1]) * at**i for i in range(1, 6)))
        want = top / bottom + max(x - limit, 0)
        assert float(g(torch.tensor(x, dtype=torch.float64), a, b)) == pytest.approx(
            want, rel=1e-12
        )
    inside = torch.linspace(-11, 11, 8, dtype=torch.float64)
    inputs = [t.clone().requires_grad_() for t in (inside, a, b)]
    assert torch.autograd.gradcheck(g, inputs)


def test_the_coefficients_are_the_fit_s():
    pytest.importorskip("scipy")
    theta = torch.from_numpy(make_activation.fit())
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    again = activation.rational(x, theta[:7], theta[7:])
    assert (again - activation.rational(x, *START)).abs().max() < 2e-3
    assert make_activation.errors(torch.cat(START).numpy()) == pytest.approx(
        [7.6e-3, 2.23e-2], rel=0.01
    )


def logits_of_routers(model):
    state = getattr(model.get_base_model(), STATE)
    return [value.logits for value in state.current.decisions.values()]


@pytest.mark.parametrize(
    ("setting", "by_layer"),
    [
        ("gelu", ["gelu"] * 4),
        ("relu", ["relu"] * 4),
        ("gelu,relu", ["gelu", "gelu", "relu", "relu"]),
        ("relu, rational", ["relu", "relu", "rational", "rational"]),
    ],
)
def test_activations_by_depth(setting, by_layer):
    """The paper's table 4: EM-LoRA-3 to -5. Only a rational activation has parameters."""
    model = tiny.adapted(
        "em_lora", model=tiny.llama(layers=4), em_activation=setting, em_pooler="last"
    ).eval()
    seen = []
    for block in model.get_base_model().model.layers:
        block.register_forward_pre_hook(lambda m, args: seen.append(args[0][:, -1].double()))
    with torch.no_grad():
        model(tiny.tokens())
    hosts = [m for m in layers_of(model) if "default" in m.lora_moe_router]
    for pooled, host, name, logits in zip(
        seen, hosts, by_layer, logits_of_routers(model), strict=True
    ):
        flat = pooled.flatten()
        if name == "rational":
            own = (host.lora_moe_numerator["default"], host.lora_moe_denominator["default"])
            g = activation.rational(flat, *own)
        else:
            assert not host.lora_moe_numerator
            g = gelu(flat) if name == "gelu" else torch.tensor([max(float(v), 0.0) for v in flat])
        want = g.view_as(pooled).double() @ host.lora_moe_router["default"].double().T
        assert (logits - want).abs().max() < 1e-5 * want.abs().max()


def test_an_unknown_activation_is_refused():
    with pytest.raises(HtsrError, match="em_activation cannot be 'selu'"):
        LoraMoeConfig(system="em_lora", em_activation="gelu,selu")


def test_an_adapter_of_format_1_means_what_it_meant(tmp_path):
    """Eq. 6 beyond ±12 as well, and one linear a prompt whatever top_k says; so saved again."""
    tiny.adapted("em_lora", em_activation="rational_unlimited").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config.pop("em_activation") == "rational_unlimited"
    path.write_text(json.dumps({**config, "format_version": 1, "top_k": 2}))
    model = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    model.save_pretrained(tmp_path)
    again = json.loads(path.read_text())
    for found in (vars(model.peft_config["default"]), again):
        assert (found["em_activation"], found["top_k"]) == ("rational_unlimited", 1)
        assert found["format_version"] == 2
    assert LoraMoeConfig(system="em_lora").em_activation == "rational"
    assert LoraMoeConfig(system="hydra").format_version == 1


def test_the_figure_shows_each_layer_s_activation(tmp_path):
    model = tiny.adapted("em_lora", em_activation="rational,gelu")
    path = tmp_path / "activations.svg"
    figure = plot_activations(model, path)
    assert path.stat().st_size > 1000
    (axes,) = figure.axes[:1]
    lines = {line.get_label(): line for line in axes.lines}
    assert {"GeLU", "model.layers.0"} <= set(lines)
    x, y = lines["model.layers.0"].get_data()
    host = next(m for m in layers_of(model) if m.lora_moe_numerator)
    a, b = (
        host.lora_moe_numerator["default"].tolist(),
        host.lora_moe_denominator["default"].tolist(),
    )
    for i in (0, len(x) // 3, len(x) - 1):
        top = sum(c * x[i] ** j for j, c in enumerate(a))
        want = top / (1 + abs(sum(c * x[i] ** (j + 1) for j, c in enumerate(b))))
        assert math.isclose(y[i], want, rel_tol=1e-4, abs_tol=1e-4)
    with pytest.raises(HtsrError, match="no learnable activation"):
        plot_activations(tiny.adapted("em_lora", em_activation="gelu"))
