"""A request: its keywords, what it refuses, the registries, and errors that name arguments."""

from __future__ import annotations

import ast
import inspect
import pickle
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.records_made import metrics_with

from htsr_alloc.allocation import (
    REPAIRS,
    STRATEGIES,
    AlphaLora,
    Bounds,
    Experts,
    Explicit,
    Metric,
    Mola,
    Params,
    Request,
    Share,
    Stacks,
    Uniform,
    allocate,
    keywords_of,
)
from htsr_alloc.allocation.exports import EXPORTS
from htsr_alloc.allocation.settings import SETTINGS
from htsr_alloc.allocation.strategies import Plan, Strategy
from htsr_alloc.cli.allocate import allocate as command
from htsr_alloc.cli.choices import STRATEGY
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation, loads

WING = sorted((ROOT / "htsr_alloc" / "allocation").rglob("*.py"))
COMMANDS = [ROOT / "htsr_alloc" / "cli" / name for name in ("allocate.py", "export.py")]


@pytest.mark.parametrize(
    ("keywords", "request_"),
    [
        ({"T": 9}, Request(AlphaLora(), Experts(9), Metric("pl_alpha_hill"))),
        ({"budget": 9}, Request(budget=Experts(9))),
        ({"budget": Params(9, 2)}, Request(budget=Params(9, r=2))),
        ({"params": 9}, Request(budget=Params(9, r=8))),
        ({"T": {"text": 9, "vision": 4}}, Request(budget=Stacks((("text", 9), ("vision", 4))))),
        ({"stack": "text", "score_over": "adapted"}, Request(stack="text", score_over="adapted")),
        ({"target_share": 0.5, "r": 4}, Request(budget=Share(0.5, r=4))),
        ({"spread": 3}, Request(AlphaLora(spread=3))),
        ({"beta": 0.0}, Request(AlphaLora(beta=0.0))),
        ({"metric": "stable_rank"}, Request(scores=Metric("stable_rank"))),
        ({"per_module": True}, Request(pool="role")),
        ({"per_module": True, "pool": "all"}, Request(pool="all")),
        ({"strategy": "uniform", "beta": None, "groups": ()}, Request(Uniform())),
        ({"strategy": "mola", "groups": [2, 4]}, Request(Mola((2, 4)))),
        ({"strategy": "explicit", "experts": (1, 2)}, Request(Explicit((1, 2)))),
        ({"top_k": 3, "bounds": Bounds(0, 7)}, Request(top_k=3, bounds=Bounds(0, 7))),
    ],
)
def test_keywords_are_a_request(keywords, request_):
    assert Request.of(**keywords) == request_


def test_a_request_is_allocated_as_its_keywords_are():
    metrics = metrics_with([2.0, 3.0, 4.0])
    request = Request(AlphaLora(beta=1.0), Experts(12))
    assert allocate(metrics, request) == allocate(metrics, T=12, beta=1.0)
    with pytest.raises(TypeError, match="beta"):
        allocate(metrics, request, beta=2.0)
    with pytest.raises(TypeError, match="exponent"):
        allocate(metrics, T=12, exponent=2.0)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: Request(Uniform(), scores=Metric()), "uses no score, so that metric"),
        (lambda: Request(Uniform(), pool="role"), "uses no score, so that per_module"),
        (lambda: Request(Uniform(), repair="official"), "uses no score, so that repair"),
        (lambda: Request(budget=Params(9), repair="official"), "repairs a sum of experts"),
        (lambda: Request(targets=("q_proj",), budget=Experts(9)), "targets means nothing"),
        (lambda: Request(top_k=0), "^top_k must be at least 1, not 0"),
        (lambda: AlphaLora(beta=2.5, spread=3), "both cannot be given"),
        (lambda: Share(1.5), "at most 1, not 1.5"),
        (
            lambda: Request.of("uniform", T=9, beta=1.0),
            "beta belongs to the alphalora, common, random, shrunk strategy",
        ),
        (lambda: Request.of(T=9, r=4), "^r matters to params and target_share alone"),
        (lambda: Request.of(T=9, pool="role"), "^pool role is about per_module"),
    ],
)
def test_what_contradicts_itself_or_would_do_nothing_is_refused(made, sentence):
    with pytest.raises(HtsrError, match=sentence):
        made()


def test_bounds_of_given_counts_and_layers_of_metrics_are_not_ignored():
    with pytest.raises(HtsrError, match="so that low and high mean nothing"):
        allocate(None, Request(Explicit((1, 2)), bounds=Bounds(2)))
    with pytest.raises(HtsrError, match="layers 4 contradicts the 2 layers"):
        allocate(metrics_with([1.0, 2.0]), Request(Uniform(), Experts(9), layers=4))


# --- registries ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ramp(Strategy):
    """Layer i in proportion to first + i."""

    first: int = 1
    name: ClassVar[str] = "ramp"

    def plan(self, sharing):
        weights = [float(self.first + unit.layer) for unit in sharing.units]
        return Plan(sharing.record(self.name), *sharing.by(self.name, weights), "ramp: no score")


def test_a_new_strategy_is_a_class_and_a_row(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "ramp", Ramp)
    made = allocate(None, strategy="ramp", T=12, layers=3)
    assert (made.experts, made.strategy.name) == ((2, 4, 6), "ramp")
    assert allocate(None, strategy="ramp", first=3, T=12, layers=3).experts == (3, 4, 5)
    assert keywords_of("ramp") == {"first"}
    with pytest.raises(HtsrError, match="first belongs to the ramp strategy"):
        allocate(None, strategy="uniform", first=3, T=12, layers=3)


def test_a_file_is_a_strategy():
    files = {p.stem for p in (ROOT / "htsr_alloc/allocation/strategies").glob("*.py")}
    assert set(STRATEGIES) == files - {"base", "__init__"} == set(STRATEGY.names())


def test_every_setting_of_a_strategy_can_be_set(invoke, tmp_path):
    """An option of its own is not needed; what has one is the same setting."""
    metrics, made = ROOT / "data" / "minilm.metrics.json", tmp_path / "a.json"
    asked = ("allocate", metrics, "--T", 30, "-o", made)
    assert invoke(*asked, "--set", "spread=4").rc == 0
    assert loads(Allocation, made.read_text(), "a").strategy.spread == 4.0
    assert invoke(*asked, "--spread", 4).rc == 0  # a differing allocation would be refused
    assert {f.name for s in STRATEGIES.values() for f in fields(s)} == set(SETTINGS)
    shown = " ".join(invoke("allocate", "--help").stdout.split())
    assert f"Names: {', '.join(SETTINGS)}." in shown
    for given, sentence in (
        (("--set", "spread=4", "--spread", "4"), "--spread is given twice."),
        (("--set", "spread=wide"), "spread: expected float"),
        (("--set", "groups=24"), "--groups belongs to the mola strategy"),
        (("--set", "spred=4"), "There is no setting 'spred'."),
        (("--set", "spread"), "--set spread has no value."),
    ):
        done = invoke(*asked, *given)
        assert done.rc == 1
        assert sentence in done.stderr


def test_no_strategy_repair_or_export_is_asked_for_by_name():
    """``if name == "mola"``, anywhere in the wing or its commands."""
    names = {*STRATEGIES, *REPAIRS, *EXPORTS}
    for path in [*WING, *COMMANDS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                found = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not found & names, f"{path.name}, line {node.lineno}"
    assert all(strategy.name == name for name, strategy in STRATEGIES.items())


# --- errors that name arguments -----------------------------------------------------------------


def test_an_error_names_the_argument_or_its_option(invoke):
    with pytest.raises(HtsrError, match=r"^top_k must be at least 1, not 0\.$") as caught:
        Request(top_k=0)
    again = pickle.loads(pickle.dumps(caught.value))
    for error in (caught.value, again):
        assert error.renamed(str.upper).message == "TOP_K must be at least 1, not 0."
    metrics = ROOT / "data" / "minilm.metrics.json"
    for arguments, sentence in (
        (("--T", 9, "--top-k", 0), "error: --top-k must be at least 1, not 0.\n"),
        (("--T", 2), "hint: Use --T 6 or more, or --min 0.\n"),
        (("--T", 9, "--min", 3, "--max", 2), "error: There is no count within --min 3 and --max 2"),
        (("--T", 9, "--target", "query"), "so that --target means nothing"),
        (("--params", 9, "--r", 0), "error: --r must be at least 1, not 0.\n"),
    ):
        done = invoke("allocate", metrics, *arguments)
        assert done.rc == 1
        assert sentence in done.stderr


def test_every_argument_of_a_request_is_an_option():
    keywords = set(inspect.signature(Request.of).parameters) - {"budget", "bounds", "linears"}
    assert keywords | {"low", "high"} <= set(inspect.signature(command).parameters)


def test_a_request_can_be_changed():
    request = Request(AlphaLora(), Experts(12))
    with pytest.raises(HtsrError, match="uses no score, so that metric"):
        replace(request, strategy=Uniform())
    assert replace(request, strategy=Uniform(), scores=None) == Request(Uniform(), Experts(12))


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"params": 1e6}, "`params` is a whole number, not 1000000.0"),
        ({"T": True}, "`T` is a whole number, not True"),
        ({"T": "9"}, "`T` is a whole number, not '9'"),
        ({"T": {"model": 9.5}}, "`T` is a whole number, not 9.5"),
        ({"budget": 9.0}, "`budget` is a whole number, not 9.0"),
        ({"params": 10**6, "r": 8.0}, "`r` is a whole number, not 8.0"),
        ({"T": 9, "top_k": 2.0}, "`top_k` is a whole number, not 2.0"),
        ({"T": 9, "beta": "2.5"}, "`beta` is a number, not '2.5'"),
        ({"T": 9, "spread": [3]}, r"`spread` is a number, not \[3\]"),
        ({"strategy": "mola", "groups": "2468"}, "`groups` are whole numbers, not '2468'"),
        ({"strategy": "explicit", "experts": "123"}, "`experts` are whole numbers, not '123'"),
        ({"strategy": "explicit", "experts": [1.5]}, "`experts` is a whole number, not 1.5"),
    ],
)
def test_another_type_is_one_sentence(keywords, said):
    with pytest.raises(HtsrError, match=said.replace("`", "")):
        Request.of(**keywords)


def test_numbers_of_numpy_are_pythons():
    found = Request.of(T=np.int64(9), beta=np.float32(2.5), top_k=np.int8(1))
    assert found == Request.of(T=9, beta=2.5, top_k=1)
    assert type(found.budget.total) is int
    counts = Request.of(strategy="explicit", experts=np.array([1, 2]))
    assert counts == Request.of(strategy="explicit", experts=(1, 2))
