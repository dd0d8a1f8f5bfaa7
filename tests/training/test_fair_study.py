"""A study compares like with like, and only what its plan asks for."""

from __future__ import annotations

import statistics

import pytest

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import studies
from helpers.studies import PLAN, lines, saved

from htsr_alloc.errors import HtsrError
from htsr_alloc.training.evaluate import NotNumbers
from htsr_alloc.training.study import chance, findings, running, summary, table
from htsr_alloc.training.study.cells import cells, chosen, fingerprint
from htsr_alloc.training.study.plan import check_rows, read_study
from htsr_alloc.training.study.store import Store

LOW, HIGH = RATES = [0.001, 0.03]
TASK = {"train": "train.jsonl", "test": "test.jsonl", "valid": "choices.jsonl", "test_rows": 20}
TUNED = {**PLAN, "tasks": {"words": TASK}, "learning_rates": RATES, "valid_rows": 10}
UNIFORM = {"name": "uniform", "main": True}
ALPHA = {"name": "alpha", "strategy": "alphalora"}


@pytest.fixture
def folder(tmp_path, invoke):
    return studies.files(tmp_path, invoke)


def random(name, draw, **more):
    return {"name": name, "strategy": "random", "draw": draw, **more}


def study_of(folder, *rows, **changes):
    return read_study(saved(folder, {**TUNED, **changes, "rows": list(rows)}))


def untuned(folder, *rows, **changes):
    plan = {k: v for k, v in TUNED.items() if k not in ("learning_rates", "valid_rows")}
    return read_study(saved(folder, {**plan, **changes, "rows": list(rows)}))


def result(loss, accuracy=0.5, valid=None, **more):
    return {
        "accuracy": accuracy,
        "hits": "10" * 20,
        "losses": [loss] * 40,
        "loss": loss,
        "n": 40,
        "trainable": 30,
        "diverged": None,
        "valid_loss": valid,
        **more,
    }


DIVERGED = result(None, None, diverged="NaN", n=None, losses=None, hits=None)


def ranked(study, done):
    return {own.row: own for own in chance.ranks(study, done)}


def test_seeds_that_a_row_does_not_run_with_are_left_out(folder):
    """They were those of another plan, whose settings nothing has compared."""
    study = untuned(folder, UNIFORM, ALPHA)
    done = {("words", name, 1, None): result(0.5) for name in ("uniform", "alpha")}
    done |= {("words", name, 2, None): result(0.1) for name in ("uniform", "alpha")}
    found = {line.row: line for line in summary.summarise(study, done)}
    assert (found["uniform"].seeds, found["alpha"].seeds) == (2, 1)
    assert found["alpha"].loss == 0.5


def test_a_line_without_a_rate_is_not_that_of_a_tuned_row(folder):
    study = study_of(folder, UNIFORM, ALPHA, random("r1", 1))
    losses = {"uniform": 0.5, "alpha": 0.9, "r1": 0.6}
    done = {
        ("words", name, 1, rate): result(loss, valid=rate)
        for name, loss in losses.items()
        for rate in RATES
    }
    done["words", "alpha", 1, None] = result(0.1)  # of an earlier plan
    found = ranked(study, done)["alpha"]
    assert (found.loss, found.rank) == (0.9, 2)
    gaps = {own.strategy: own.uniform for own in findings.findings(study, done, folder / "a.yaml")}
    assert gaps["alphalora"].mean == pytest.approx(0.4)
    fixed = study_of(folder, UNIFORM, {**ALPHA, "learning_rate": LOW}, random("r1", 1))
    done["words", "alpha", 1, LOW] = result(0.05)  # of a plan that tuned it
    done["words", "r1", 1, None] = result(0.6)
    assert "alpha" not in ranked(fixed, done)  # the random ones are tuned
    (gap,) = (x.uniform for x in findings.findings(fixed, done, folder / "a") if x.uniform)
    assert gap.mean == pytest.approx(0.1 - 0.5)


def test_a_row_is_not_compared_at_another_rate(folder):
    rows = UNIFORM, {**ALPHA, "learning_rate": 0.001}, random("r1", 1)
    done = {("words", name, 1, None): result(0.5) for name in ("uniform", "alpha", "r1")}
    recipe = {**PLAN.get("recipe", {}), "learning_rate": 3e-4}
    study = untuned(folder, *rows, recipe=recipe)
    assert set(ranked(study, done)) == {"uniform"}
    assert [x.strategy for x in findings.findings(study, done, folder / "a.yaml")] == ["uniform"]
    same = untuned(folder, *rows, recipe={**recipe, "learning_rate": 0.001})
    assert set(ranked(same, done)) == {"uniform", "alpha"}
    assert [x.uniform is not None for x in findings.findings(same, done, folder / "a")] == [
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rows": [UNIFORM, random("a", 1, learning_rate=LOW),
                      random("b", 2, learning_rate=HIGH)]},
            "The row a: the random rows of its system have several learning rates.",
        ),
        (
            {"rows": [UNIFORM, {"name": "a", "system": "full", "times": 3}]},
            "The row a: full fine-tuning trains every parameter, and not 3 times a budget.",
        ),
        (
            {"regime": "together", "tasks": {"a": {**TASK, "steps": 5}, "b": TASK},
             "recipe": {"epochs": 1}},
            "Some of the tasks that are learnt together have steps, and some epochs.",
        ),
    ],
)  # fmt: skip
def test_an_unequal_plan_is_refused(changes, said, folder):
    with pytest.raises(HtsrError) as caught:
        check_rows(read_study(saved(folder, {**TUNED, **changes})))
    assert said.lower() in caught.value.message.lower()


@pytest.mark.parametrize(("regime", "shared"), [("each", False), ("together", True)])
def test_the_deviation_over_tasks_is_that_of_the_seeds_that_they_share(folder, regime, shared):
    study = untuned(folder, UNIFORM, tasks={"a": TASK, "b": TASK}, regime=regime)
    done = {
        (task, "uniform", seed, None): result(0.5, accuracy)
        for task in ("a", "b")
        for seed, accuracy in ((1, 0.5), (2, 0.75))
    }
    line = summary.summarise(study, done)[-1]
    own = statistics.stdev([0.5, 0.75])
    assert line.deviation == pytest.approx(own if shared else own / 2**0.5)


def test_a_row_that_has_no_budget_is_equal_in_nothing(folder):
    study = untuned(folder, UNIFORM, {"name": "full", "system": "full"})
    done = {("words", name, 1, None): result(0.5) for name in ("uniform", "full")}
    text = table.markdown(study, summary.summarise(study, done), done)
    rows = {row.split(" | ")[1]: row.split(" | ")[2] for row in text.splitlines()[2:4]}
    assert rows == {"uniform": "total", "full": "-"}


def test_the_figure_leaves_out_the_untrained_row(folder):
    rows = [UNIFORM, ALPHA, {"name": "untrained", "system": "none"}]
    study = untuned(folder, *rows)
    losses = {"uniform": 0.5, "alpha": 0.4, "untrained": 9.0}
    done = {("words", name, 1, None): result(loss) for name, loss in losses.items()}
    (axes,) = table.plot(study, summary.summarise(study, done)).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["alpha"]


def test_chance_is_that_of_each_comparison(folder):
    """Two draws of one system and one of the other: 1/3 of a mixture's, 1/2 of LoRA's."""
    lora = {"system": "lora"}
    rows = [UNIFORM, random("r1", 1), random("r2", 2), {"name": "LoRA", **lora}]
    study = untuned(folder, *rows, random("r3", 3, **lora))
    done = {("words", row.name, 1, None): result(0.5) for row in study.rows}
    text = chance.table(chance.ranks(study, done))
    assert "Each allocation among 1 or 2 random ones" in text
    assert f"over 2 comparisons {1 / 3 + 1 / 2:.1f} better" in text


def test_results_without_a_validation_loss_cannot_tune(folder, invoke):
    """With more tuning seeds than they were made with."""
    study = study_of(folder, UNIFORM, tuning_seeds=2)
    store = Store(study.results)
    done = {}
    for cell in cells(study):
        valid = cell.rate if cell.seed == 1 else None
        own = {"task": "words", "row": "uniform", "seed": cell.seed, "rate": cell.rate}
        line = result(0.5, valid=valid, fingerprint=fingerprint(study, cell), **own)
        store.add(line)
        done[cell.keys[0]] = line
    with pytest.raises(HtsrError, match="without a loss on validation rows"):
        running.check(study, store)
    seed_one = {key: line for key, line in done.items() if key[2] == 1}
    assert chosen(study_of(folder, UNIFORM), seed_one, ["words"], study.rows[0]) == (LOW,)
    seed_one["words", "uniform", 1, LOW] = result(0.5, valid=float("nan"))
    assert chosen(study_of(folder, UNIFORM), seed_one, ["words"], study.rows[0]) == (HIGH,)


def test_more_parameters_are_no_allocation(folder):
    """A row of ten times the budget is not ranked among random ones of the budget."""
    lora = {"system": "lora"}
    rows = [{"name": "LoRA", **lora}, {"name": "ten", **lora, "times": 10}]
    study = untuned(folder, UNIFORM, *rows, random("r1", 1, **lora))
    done = {("words", row.name, 1, None): result(0.5) for row in study.rows}
    assert set(ranked(study, done)) == {"LoRA"}
    rows[1]["strategy"] = "alphalora"
    drawn = random("r2", 2, **lora, times=10)
    study = untuned(folder, UNIFORM, *rows, random("r1", 1, **lora), drawn)
    done = {("words", row.name, 1, None): result(0.5) for row in study.rows}
    assert set(ranked(study, done)) == {"LoRA", "ten"}
    found = findings.findings(study, done, folder / "a.yaml")
    assert [(own.unit, own.strategy) for own in found] == [("ranks", "uniform")]


def test_a_tuned_row_has_no_gap_from_one_that_is_not(folder):
    study = study_of(folder, {**UNIFORM, "learning_rate": LOW}, ALPHA)
    done = {("words", "alpha", 1, rate): result(0.4, valid=rate) for rate in RATES}
    done["words", "uniform", 1, None] = result(0.5)
    assert findings.findings(study, done, folder / "a.yaml") == []


def test_findings_count_no_run_that_diverged(folder):
    study = untuned(folder, UNIFORM, {**ALPHA, "main": True})
    done = {
        ("words", name, seed, None): result(0.5) for name in ("uniform", "alpha") for seed in (1, 2)
    }
    done["words", "alpha", 2, None] = DIVERGED
    (found,) = findings.findings(study, done, folder / "a.yaml")
    assert (found.rows, found.uniform.seeds) == (40, 1)


def test_a_model_that_gives_nan_has_diverged_and_the_study_goes_on(folder, invoke, monkeypatch):
    plan = saved(folder, {**TUNED, "rows": [UNIFORM, {"name": "untrained", "system": "none"}]})
    whole, calls = running.evaluate, []

    def once(*given, **more):
        calls.append(0)
        if len(calls) == 2:  # the first cell's test rows
            raise NotNumbers("The model's answers are not numbers: it gives NaN.")
        return whole(*given, **more)

    monkeypatch.setattr(running, "evaluate", once)
    done = invoke("study", plan.name, "--device", "cpu", "--limit", 2)
    assert done.rc == 0, done.stderr
    first, second = lines(folder / "results.jsonl")
    assert "NaN" in first["diverged"]
    assert (first["accuracy"], first["valid_loss"]) == (None, None)
    assert second["diverged"] is None
