"""What is known of an allocation: read from the file that a study writes."""

import dataclasses

import pytest
from helpers.commands import ROOT

from htsr_alloc import allocate
from htsr_alloc.allocation import known as of
from htsr_alloc.allocation import read_scores
from htsr_alloc.allocation.findings import FILE, Finding, Gap, read_findings, write_findings
from htsr_alloc.errors import HtsrError

METRICS = ROOT / "data" / "minilm.metrics.json"
FINDING = Finding(
    study="a.yaml",
    model="small",
    regime="each",
    tasks=("x", "y"),
    rows=400,
    unit="experts",
    targets=(
        "attention.output.dense",
        "intermediate.dense",
        "key",
        "output.dense",
        "query",
        "value",
    ),
    strategy="alphalora",
    metric="pl_alpha_hill",
    estimator="official",
    beta=2.5,
    uniform=Gap(0.02, -0.01, 0.05, 3),
    draws=5,
    draw_seeds=1,
    better=("y",),
    worse=(),
)
WHAT = "alphalora's experts (pl_alpha_hill, official, beta 2.5)"
PLACE = f"known of {WHAT} on small (x, y; 400 test rows each): "
UNIFORM = "loss +0.020 nats from uniform, 95 % interval -0.010 to +0.050 (3 seeds)"
RANDOM = (
    "among 5 random allocations it is the best on 1 of 2 tasks and the worst on 0, where chance "
    "gives 0.3 of each (1 seed)"
)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    write_findings(tmp_path / "known.json", "a.yaml", [FINDING])
    monkeypatch.setattr("htsr_alloc.allocation.findings.FILE", tmp_path / "known.json")


@pytest.fixture(autouse=True)
def fresh():
    from htsr_alloc.allocation.findings import _shipped

    _shipped.cache_clear()
    yield
    _shipped.cache_clear()


def test_the_shipped_file_holds_findings():
    for own in read_findings(FILE):
        assert set(own.better) | set(own.worse) <= set(own.tasks)


def test_a_finding_is_about_what_was_tried_and_nothing_else(tmp_path):
    made = allocate(METRICS, T=30)
    own = dataclasses.replace(FINDING, estimator=made.strategy.estimator)
    assert own.is_about(made)
    ranks = allocate(METRICS, adapter_kind="lora", rank=4)
    assert not own.is_about(ranks)
    assert dataclasses.replace(own, unit="ranks").is_about(ranks)
    few = allocate(METRICS, adapter_kind="lora", rank=4, targets=["query"])
    assert not dataclasses.replace(own, unit="ranks").is_about(few)
    for other in ({"beta": 2.0}, {"metric": "stable_rank"}, {"strategy": "uniform"}):
        assert not dataclasses.replace(own, **other).is_about(made)
    (tmp_path / "s.csv").write_text("layer,score\n" + "".join(f"{i},{i + 1}\n" for i in range(6)))
    scored = allocate(METRICS, T=30, scores=read_scores(tmp_path / "s.csv"))
    assert not own.is_about(scored)


def test_a_finding_of_mola_is_about_its_own_groups():
    own = dataclasses.replace(
        FINDING, strategy="mola", metric=None, estimator=None, beta=None, groups=(2, 4, 6)
    )
    assert own.is_about(allocate(METRICS, strategy="mola", groups=(2, 4, 6)))
    assert not own.is_about(allocate(METRICS, strategy="mola", groups=(6, 4, 2)))
    assert "mola's experts (2, 4, 6) on small" in own.sentence()


def test_a_finding_says_what_it_compared():
    assert FINDING.sentence() == f"{PLACE}{UNIFORM}; {RANDOM}"
    assert dataclasses.replace(FINDING, uniform=None).sentence() == PLACE + RANDOM
    other = PLACE.replace("on small", "on another model, small")
    assert FINDING.sentence("minilm") == f"{other}{UNIFORM}; {RANDOM}"
    assert FINDING.sentence("small") == f"{PLACE}{UNIFORM}; {RANDOM}"
    alone = dataclasses.replace(FINDING, draws=0, draw_seeds=0, better=(), regime="together")
    assert alone.sentence() == PLACE.replace("x, y", "x, y, learnt together") + UNIFORM


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"beta": 2}, WHAT.replace("2.5", "2")),
        ({"strategy": "uniform"}, "uniform's experts"),
        ({"per_module": True}, WHAT.replace("experts", "experts by linears")),
        (
            {"adapter_kind": "lora", "rank": 4, "targets": ["query"]},
            WHAT.replace("experts", "ranks").replace("2.5", "2.5, query"),
        ),
    ],
)
def test_what_no_study_has_tried_is_said_to_be_unknown(shipped, more, what):
    budget = {} if "rank" in more else {"T": 30}
    made = allocate(METRICS, **budget, **more)
    assert of(made) == [f"known of {what}: nothing, no tuned study has compared it"]


def test_the_command_says_it_in_one_line(shipped, invoke, tmp_path):
    done = invoke("allocate", METRICS, "--T", 30, "-o", tmp_path / "a.json")
    assert done.rc == 0
    assert FINDING.sentence("minilm") in done.stderr.splitlines()
    done = invoke("allocate", METRICS, "--T", 30, "-o", tmp_path / "a.json", "-q")
    assert "known of" not in done.stderr
    assert of(allocate(None, strategy="explicit", experts=(3, 2))) == []


def test_what_is_no_finding_is_one_sentence(tmp_path):
    path = tmp_path / "known.json"
    for text in ("{", "{}", '[{"study": "a"}]', '[{"study": 3}]'):
        path.write_text(text)
        with pytest.raises(HtsrError, match=r"^known\.json does not hold a study's findings: "):
            read_findings(path)
