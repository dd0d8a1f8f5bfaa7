"""A study that tunes: the chosen rate, two budgets, random allocations and what it could see."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import statistics
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import studies
from helpers.commands import ROOT
from helpers.studies import PLAN, lines, saved

from htsr_alloc.allocation.findings import Finding, Gap, read_findings, write_findings
from htsr_alloc.errors import HtsrError
from htsr_alloc.training.study import bootstrap, chance, summary, table
from htsr_alloc.training.study.budget import fitted
from htsr_alloc.training.study.cells import cells, chosen, fingerprint, outcomes, planned
from htsr_alloc.training.study.plan import RowSpec, Study, Task, check_rows, read_study
from htsr_alloc.training.study.store import Store

RATES = [0.001, 0.03]
TUNED = {
    **PLAN,
    "tasks": {
        "words": {
            "train": "train.jsonl",
            "test": "test.jsonl",
            "valid": "choices.jsonl",
            "test_rows": 20,
        }
    },
    "learning_rates": RATES,
    "valid_rows": 10,
}


@pytest.fixture
def folder(tmp_path, invoke):
    return studies.files(tmp_path, invoke)


@pytest.fixture
def tuned(folder):
    return saved(folder, TUNED)


def test_the_rate_of_the_least_validation_loss_is_tested_on_every_seed(tuned, invoke):
    done = invoke("study", tuned.name, "--device", "cpu")
    assert done.rc == 0, done.stderr
    study = read_study(tuned)
    held = Store(study.results).read()
    # Three rows at two rates, the untrained, and a second seed of the two main rows.
    assert len(held) == planned(study) == 3 * 2 + 1 + 2
    for row in study.rows:
        if row.system == "none":
            continue
        own = {rate: held["words", row.name, 1, rate] for rate in RATES}
        losses = {rate: line["valid_loss"] for rate, line in own.items()}
        best = min(losses, key=lambda rate: losses[rate])
        assert chosen(study, held, ["words"], row) == (best,)
        later = [key for key in held if key[1] == row.name and key[2] == 2]
        assert later == ([("words", row.name, 2, best)] if row.main else [])
        assert outcomes(study, held)["words", row.name, 1] is own[best]
    for line in held.values():
        assert len(line["losses"]) == line["n"] == 20
        assert line["loss"] == pytest.approx(statistics.mean(line["losses"]), abs=1e-4)
        assert (line["valid_loss"] is None) == (line["seed"] == 2 or line["row"] == "untrained")
        assert line["learning_rate"] == line["rate"]
    uniform = held["words", "uniform", 1, RATES[0]]
    assert uniform["step_s"] > 0
    assert 0 < uniform["active"] < uniform["trainable"]
    assert "of the right answer" in done.stdout
    assert f"{planned(study)} of {planned(study)} cells" in done.stdout
    again = invoke("study", tuned.name, "--device", "cpu")
    assert " left)" not in again.stderr  # nothing is trained twice


def test_a_validation_loss_is_that_of_the_first_rows(tuned, invoke):
    """Other valid rows are other cells, and the rows beyond ``valid_rows`` are not read."""
    path = tuned.parent / "choices.jsonl"
    assert invoke("study", tuned.name, "--device", "cpu", "--limit", 1).rc == 0
    first = lines(tuned.parent / "results.jsonl")[0]
    (tuned.parent / "results.jsonl").unlink()
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:10]))
    assert invoke("study", tuned.name, "--device", "cpu", "--limit", 1).rc == 0
    second = lines(tuned.parent / "results.jsonl")[0]
    assert second["valid_loss"] == pytest.approx(first["valid_loss"], abs=1e-9)
    assert second["fingerprint"] != first["fingerprint"]


def made(value, **more):
    return {"valid_loss": value, "diverged": None, **more}


def test_a_rate_is_chosen_when_the_whole_row_is_there_and_never_one_that_diverged(tuned):
    study = read_study(tuned)
    row = study.rows[1]
    found = {("words", row.name, 1, RATES[0]): made(0.5)}
    assert chosen(study, found, ["words"], row) == ()
    assert all(cell.seed == 1 for cell in cells(study, found))
    found["words", row.name, 1, RATES[1]] = made(0.4)
    assert chosen(study, found, ["words"], row) == (RATES[1],)
    assert [c.rate for c in cells(study, found) if c.seed == 2] == [RATES[1]]
    found["words", row.name, 1, RATES[1]] = made(None, diverged="NaN")
    assert chosen(study, found, ["words"], row) == (RATES[0],)
    assert chosen(study, found, ["words"], study.rows[0]) == (None,)  # untrained


def test_the_main_rows_of_every_task_are_tuned_before_the_others(folder):
    task = TUNED["tasks"]["words"]
    study = read_study(saved(folder, {**TUNED, "tasks": {"a": task, "b": task}}))
    order = [(cell.tasks[0], cell.row.name) for cell in cells(study)]
    main = ("uniform", "uniform", "LoRA", "LoRA")
    others = ("untrained", "MoLA", "MoLA")
    wanted = [("a", main), ("b", main), ("a", others), ("b", others)]
    assert order == [(task, row) for task, rows in wanted for row in rows]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rows": [*PLAN["rows"], {"name": "a", "learning_rates": [0.1]}]},
            "The row a: its grid has 1 learning rates, and the study's 2.",
        ),
        (
            {"tasks": {"words": {"train": "train.jsonl", "test": "test.jsonl"}}},
            "The task words has no validation rows.",
        ),
        (
            {"rows": [*PLAN["rows"], {"name": "a", "draw": 1}]},
            "The row a: the uniform strategy has no seed.",
        ),
        ({"learning_rates": [0.0]}, "learning_rates[0]: expected float > 0"),
        ({"rows": [*PLAN["rows"], {"name": "a", "match": "most"}]}, "rows[4].match: "),
    ],
)
def test_a_plan_that_cannot_be_tuned_is_refused(changes, said, folder):
    with pytest.raises(HtsrError) as caught:
        check_rows(read_study(saved(folder, {**TUNED, **changes})))
    assert said in caught.value.message


# --- two budgets --------------------------------------------------------------------------------


def test_a_mixture_has_the_active_parameters_of_lora_of_rank_k_r(folder):
    """Two of three experts of rank 4 on a layer: rank 8."""
    study = read_study(saved(folder, TUNED))
    mixture = fitted(study, RowSpec("uniform"))
    lora = fitted(study, RowSpec("LoRA", system="lora", match="active"))
    assert round(3 * lora.adapter.r) == 2 * study.r
    assert lora.size.total == lora.size.active == mixture.size.active
    config = json.loads((folder / "model" / "config.json").read_text())
    d, f, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = config["num_key_value_heads"] * d // config["num_attention_heads"]
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)]
    assert mixture.size.active == layers * sum(2 * 4 * (a + b) for a, b in shapes)
    assert mixture.size.total == layers * sum(3 * (4 * (a + b) + a) for a, b in shapes)
    total = fitted(study, RowSpec("LoRA", system="lora"))
    assert total.size.total == pytest.approx(mixture.size.total, rel=0.01)
    goat = fitted(study, RowSpec("GOAT", system="goat", match="active"))
    assert goat.size == mixture.size


def test_an_active_budget_that_cannot_be_met_names_the_row(folder):
    """MoR of rank 1 has more than one expert of rank 1 on each layer."""
    study = read_study(saved(folder, {**TUNED, "experts": 2, "r": 1, "lora_alpha": 2}))
    with pytest.raises(HtsrError, match=r"^MoR trains .* parameters a token, .* of the budget"):
        fitted(study, RowSpec("MoR", system="mor", match="active"))


# --- differences --------------------------------------------------------------------------------


def naive(own, base, stream):
    """Every draw with loops, from the same counts."""
    s, n = len(own), len(own[0])
    generators = [np.random.default_rng([20261129, kind, stream]) for kind in (0, 1)]
    seeds = generators[0].multinomial(s, [1 / s] * s, bootstrap.DRAWS)
    rows = generators[1].multinomial(n, [1 / n] * n, bootstrap.DRAWS)
    means = []
    for a, b in zip(seeds, rows, strict=True):
        total = 0.0
        for i, j in itertools.product(range(s), range(n)):
            total += a[i] * b[j] * (own[i][j] - base[i][j])
        means.append(total / (s * n))
    return means


def test_the_bootstrap_is_the_naive_one():
    draw = np.random.default_rng(1)
    own, base = draw.normal(size=(3, 8)).tolist(), draw.normal(size=(3, 8)).tolist()
    found, means = bootstrap.paired(own, base, 2, 2), naive(own, base, 2)
    assert found.draws == pytest.approx(means)
    made = found.difference
    assert made.mean == pytest.approx(np.mean(own) - np.mean(base))
    assert made.error == pytest.approx(statistics.stdev(means))
    assert (made.low, made.high) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    assert made.visible == pytest.approx(2.80 * made.error)


def test_one_seeds_interval_is_scipys_over_rows():
    from scipy import stats

    draw = np.random.default_rng(2)
    own, base = draw.normal(0.3, size=(1, 200)), np.zeros((1, 200))
    found = bootstrap.paired(own.tolist(), base.tolist(), 0).difference
    scipys = stats.bootstrap((own[0],), np.mean, n_resamples=4000, method="percentile", rng=3)
    assert found.error == pytest.approx(own[0].std() / 200**0.5, rel=0.05)
    assert (found.low, found.high) == pytest.approx(scipys.confidence_interval, abs=0.02)


def test_seeds_that_disagree_widen_the_interval():
    base = np.zeros((3, 100)).tolist()
    agree = [[0.1] * 100] * 3
    disagree = [[-0.2] * 100, [0.1] * 100, [0.4] * 100]
    assert bootstrap.paired(agree, base, 0).difference.error == pytest.approx(0)
    found = bootstrap.paired(disagree, base, 0).difference
    # The mean of three seeds drawn with replacement: variance 0.06 / 3.
    assert found.error == pytest.approx(0.02**0.5, rel=0.05)


def test_the_intervals_cover_what_they_say():
    """Rows and seeds drawn anew: the true difference lies inside at least 19 times in 20."""
    draw, inside = np.random.default_rng(4), 0
    for i in range(200):
        row, seed = draw.normal(size=(1, 60)), 0.1 * draw.normal(size=(5, 1))
        matrix = 0.5 + row + seed + draw.normal(size=(5, 60))
        found = bootstrap.paired(matrix.tolist(), np.zeros((5, 60)).tolist(), i).difference
        inside += found.low < 0.5 < found.high
    assert inside >= 183  # 0.95 × 200 less 2.3 deviations


def test_the_mean_over_tasks_draws_each_by_itself():
    draw = np.random.default_rng(5)
    parts = [
        bootstrap.paired(
            draw.normal(size=(2, 50)).tolist(), np.zeros((2, 50)).tolist(), stream, stream
        )
        for stream in range(4)
    ]
    found = bootstrap.averaged(parts).difference
    errors = [part.difference.error for part in parts]
    assert found.mean == pytest.approx(np.mean([part.difference.mean for part in parts]))
    assert found.error == pytest.approx(sum(e * e for e in errors) ** 0.5 / 4, rel=0.05)


def test_tasks_of_one_model_share_their_seeds():
    """Where the seeds alone differ, four tasks of one model say no more than one."""
    zeros, matrix = np.zeros((3, 50)).tolist(), np.outer([-0.3, 0.0, 0.3], np.ones(50)).tolist()
    errors = [
        bootstrap.averaged(
            [bootstrap.paired(matrix, zeros, i, 0 if shared else i) for i in range(4)]
        ).difference.error
        for shared in (True, False)
    ]
    assert errors[0] == pytest.approx(0.02**0.5, rel=0.05)
    assert errors[1] == pytest.approx(0.02**0.5 / 2, rel=0.05)


# --- several tasks in one model -----------------------------------------------------------------

REGIME = {
    **TUNED,
    "tasks": {
        "words": {**TUNED["tasks"]["words"], "steps": 4},
        "choices": {
            "train": "choices.jsonl",
            "test": "choices.jsonl",
            "valid": "test.jsonl",
            "test_rows": 15,
        },
    },
    "rows": [{"name": "uniform", "main": True}],
}


def test_one_model_of_all_tasks_is_tuned_on_their_mean_and_tested_on_each(folder, invoke):
    path = saved(folder, {**REGIME, "regime": "together"})
    done = invoke("study", path.name, "--device", "cpu")
    assert done.rc == 0, done.stderr
    study, held = read_study(path), Store(folder / "results.jsonl").read()
    assert planned(study) == 3  # two rates, and the second seed at the better one
    assert len(held) == 6
    means = [
        statistics.mean(held[t, "uniform", 1, r]["valid_loss"] for t in study.tasks) for r in RATES
    ]
    best = RATES[means.index(min(means))]
    assert {key[3] for key in held if key[2] == 2} == {best}
    own = held["words", "uniform", 1, best]
    assert own["fingerprint"] == held["choices", "uniform", 1, best]["fingerprint"]
    assert [own["n"], held["choices", "uniform", 1, best]["n"]] == [20, 15]
    assert "before_loss" not in own
    assert "3 of 3 cells" in done.stdout
    assert "One model has learnt the rows of all tasks together." in done.stdout
    assert " left)" not in invoke("study", path.name, "--device", "cpu").stderr


def test_two_seeds_that_tune_keep_a_rate_at_which_one_of_them_fails_from_the_third(folder):
    rows = [{"name": "uniform", "main": True}, {"name": "GOAT", "system": "goat"}]
    plan = {**TUNED, "rows": rows, "seeds": [1, 2, 3], "tuning_seeds": 2}
    study = read_study(saved(folder, plan))
    assert planned(study) == (2 * 2 + 1) + 2
    low, high = RATES
    done, order = {}, []
    loss = {(low, 1): 0.5, (high, 1): 0.3, (low, 2): 0.5, (high, 2): 0.9}  # seed 1 prefers high
    while todo := [cell for cell in cells(study, done) if not cell.is_in(done)]:
        cell = todo[0]
        order.append((cell.row.name, cell.seed, cell.rate))
        assert cell.tunes(study) == (cell.seed <= (2 if cell.row.main else 1))
        value = loss.get((cell.rate, cell.seed), 0.5)
        done[cell.keys[0]] = {"valid_loss": value, "diverged": None}
    tuning = [("uniform", seed, rate) for seed in (1, 2) for rate in RATES]
    others = [("GOAT", 1, rate) for rate in RATES]
    assert order == [*tuning, ("uniform", 3, low), *others]
    assert len(order) == planned(study)
    done["words", "uniform", 2, low]["diverged"] = "a reason"
    assert chosen(study, done, ["words"], study.rows[0]) == (high,)


def test_more_seeds_to_tune_with_than_there_are_is_refused(folder):
    study = read_study(saved(folder, {**TUNED, "tuning_seeds": 3}))
    with pytest.raises(HtsrError, match="tunes with 3 seeds and has 2"):
        check_rows(study)


def test_the_mix_holds_every_row_once_and_as_many_steps_as_the_tasks(folder, monkeypatch):
    from htsr_alloc.training.study import running

    seen = []

    def stop(model, train, folder, recipe, **how):
        seen.append((len(train), recipe.steps))
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "make_trainer", stop)
    for regime, want in (("together", (70, 7)), ("sequence", (40, 4)), ("each", (40, 4))):
        study = read_study(saved(folder, {**REGIME, "regime": regime}))
        with pytest.raises(KeyboardInterrupt):
            running.run_cell(study, cells(study)[0], running.torch.device("cpu"))
        assert seen.pop() == want


def test_a_sequence_says_what_the_first_task_has_lost(folder, invoke):
    path = saved(folder, {**REGIME, "regime": "sequence"})
    done = invoke("study", path.name, "--device", "cpu")
    assert done.rc == 0, done.stderr
    study, held = read_study(path), Store(folder / "results.jsonl").read()
    line = next(own for own in summary.summarise(study, held) if own.task == "words")
    own = [held[key] for key in held if key[0] == "words" and key[3] == line.rate]
    lost = statistics.mean(x["loss"] - x["before_loss"] for x in own)
    assert line.forgot_loss == pytest.approx(lost)
    assert "| lost accuracy | lost loss |" in done.stdout
    assert all("before_loss" not in x for x in held.values() if x["task"] == "choices")

    # What the model was after its own training is what a study of that task alone has.
    alone = {**REGIME, "tasks": {"words": REGIME["tasks"]["words"]}, "results": "alone.jsonl"}
    (folder / "alone.yaml").write_text(saved(folder, alone).read_text())
    assert invoke("study", "alone.yaml", "--device", "cpu").rc == 0
    for key, x in Store(folder / "alone.jsonl").read().items():
        if key in held:
            assert held[key]["before_loss"] == pytest.approx(x["loss"], abs=1e-6)


def test_regimes_are_other_cells_and_adalora_has_no_sequence(folder):
    made = [
        read_study(saved(folder, {**REGIME, "regime": regime}))
        for regime in ("each", "together", "sequence")
    ]
    assert len({fingerprint(study, cells(study)[0]) for study in made}) == 3
    rows = [*REGIME["rows"], {"name": "a", "system": "adalora"}]
    with pytest.raises(HtsrError, match="The row a: AdaLoRA plans one training"):
        check_rows(read_study(saved(folder, {**REGIME, "regime": "sequence", "rows": rows})))


# --- scores -------------------------------------------------------------------------------------


def test_a_row_can_allocate_by_the_scores_of_its_task(folder):
    """Each task's own file, with a spread; other scores are other cells, and other bytes not."""
    for task, scores in (("words", "2,1"), ("choices", "1,2")):
        first, second = scores.split(",")
        (folder / f"{task}.gain.csv").write_text(f"layer,score\n0,{first}\n1,{second}\n")
    row = {"name": "gain", "strategy": "alphalora", "scores": "{task}.gain.csv", "spread": 2}
    plan = {**REGIME, "rows": [*REGIME["rows"], row]}
    study = read_study(saved(folder, plan))
    check_rows(study)
    gain = study.rows[1]
    made = {task: study.allocation(gain, 6, task) for task in study.tasks}
    assert made["words"].experts == (4, 2)
    assert made["choices"].experts == (2, 4)
    assert made["words"].strategy.scores.file == "words.gain.csv"
    assert fitted(study, gain, "words").allocation.experts == (4, 2)
    own = {c.tasks: fingerprint(study, c) for c in cells(study) if c.row == gain}
    (folder / "words.gain.csv").write_text("layer,score\n0,2.0\n1,1.0\n")
    again = {c.tasks: fingerprint(study, c) for c in cells(study) if c.row == gain}
    assert again == own
    (folder / "words.gain.csv").write_text("layer,score\n0,2.5\n1,1.0\n")
    again = {c.tasks: fingerprint(study, c) for c in cells(study) if c.row == gain}
    assert again[("words",)] != own[("words",)]
    assert again[("choices",)] == own[("choices",)]
    with pytest.raises(HtsrError, match="The row gain: its scores are those of one task"):
        check_rows(read_study(saved(folder, {**plan, "regime": "together"})))


# --- random allocations and the table -----------------------------------------------------------


def with_random(folder):
    rows = [
        {"name": "uniform", "main": True},
        {"name": "AlphaLoRA", "main": True, "strategy": "alphalora"},
        {"name": "LoRA", "system": "lora"},
        *({"name": f"random {i}", "strategy": "random", "draw": i} for i in range(1, 6)),
    ]
    return read_study(saved(folder, {**TUNED, "rows": rows}))


def result(loss, valid, **more):
    return {
        "accuracy": 0.5,
        "hits": "10" * 20,
        "losses": [loss] * 40,
        "loss": loss,
        "n": 40,
        "trainable": 30,
        "active": 20,
        "step_s": 0.25,
        "diverged": None,
        "valid_loss": valid,
        **more,
    }


def test_an_allocation_is_ranked_among_the_random_ones_of_its_system(folder):
    study = with_random(folder)
    losses = {f"random {i}": 0.40 + i / 100 for i in range(1, 6)}
    losses |= {"uniform": 0.425, "AlphaLoRA": 0.40, "LoRA": 0.1}
    done = {
        ("words", name, 1, rate): result(loss, rate) for name, loss in losses.items()
        for rate in RATES
    }  # fmt: skip
    done["words", "uniform", 2, RATES[0]] = result(9.0, None)  # no random one has this seed
    found = {own.row: own for own in chance.ranks(study, done)}
    assert set(found) == {"uniform", "AlphaLoRA"}
    assert (found["AlphaLoRA"].rank, found["AlphaLoRA"].outside) == (1, "better")
    assert (found["uniform"].rank, found["uniform"].outside) == (3, "")
    assert (found["uniform"].low, found["uniform"].high) == pytest.approx((0.41, 0.45))
    assert found["uniform"].chance == pytest.approx(1 / 6)
    text = chance.table(list(found.values()))
    assert "| words | AlphaLoRA | 0.400 | 0.410 to 0.450 | 1 of 6 | better |" in text
    assert "best one time in 6" in text
    assert "over 2 comparisons 0.3 better and as many worse by chance" in text
    assert "Here 1 are better and 0 worse" in text
    del done["words", "random 3", 1, RATES[1]]  # not tuned yet
    assert chance.ranks(study, done) == []


def test_draws_of_one_rate_are_compared_with_a_tuned_row_at_that_rate(folder):
    low, high = RATES
    fixed = {"strategy": "random", "learning_rate": high}
    rows = [
        {"name": "uniform", "main": True},
        {"name": "inverse", "strategy": "alphalora", "beta": -1, "learning_rate": high},
        {"name": "slow", "strategy": "alphalora", "learning_rate": low},
        {"name": "other grid", "strategy": "alphalora", "learning_rates": [low / 2, low]},
        *({"name": f"random {i}", "draw": i, **fixed} for i in range(1, 6)),
    ]
    study = read_study(saved(folder, {**TUNED, "rows": rows}))
    done = {("words", f"random {i}", 1, None): result(0.40 + i / 100, None) for i in range(1, 6)}
    done |= {("words", name, 1, None): result(0.5, None) for name in ("inverse", "slow")}
    # The best rate on validation rows is the other one.
    done |= {("words", "uniform", 1, rate): result(0.4 + rate, rate) for rate in RATES}
    done |= {("words", "other grid", 1, rate): result(0.4, rate) for rate in (low / 2, low)}
    found = {own.row: own for own in chance.ranks(study, done)}
    assert set(found) == {"uniform", "inverse"}
    assert found["uniform"].loss == 0.4 + high
    assert found["inverse"].outside == "worse"


def test_a_report_writes_its_findings_in_place_of_earlier_ones(folder, invoke):
    study = with_random(folder)
    losses = {f"random {i}": 0.40 + i / 100 for i in range(1, 6)}
    losses |= {"uniform": 0.425, "AlphaLoRA": 0.40}
    store = Store(study.results)
    for cell in cells(study):
        if cell.row.name in losses:
            line = result(losses[cell.row.name], cell.rate, fingerprint=fingerprint(study, cell))
            own = {"task": "words", "row": cell.row.name, "seed": 1, "rate": cell.rate}
            store.add(own | line)
    other = Finding(
        *("other.yaml", "m", "each", ("a",), 9, "ranks", ("q",), "uniform", *[None] * 4, 5, 1),
        *((), ("a",)),
    )
    write_findings(folder / "known.json", "other.yaml", [other])
    for _ in range(2):
        done = invoke("study", "study.yaml", "--report", "--evidence", "known.json")
        assert done.rc == 0, done.stderr
    found = read_findings(folder / "known.json")
    assert [own.study for own in found] == ["other.yaml", "study.yaml", "study.yaml"]
    assert found[0] == other
    assert [(own.unit, own.strategy, own.better, own.worse) for own in found[1:]] == [
        ("experts", "uniform", (), ()),
        ("experts", "alphalora", ("words",), ()),
    ]
    assert (found[2].metric, found[2].beta, found[2].rows, found[2].draws) == (
        *("pl_alpha_hill", 2.5, 40, 5),
    )
    assert found[1].uniform is None
    assert found[2].uniform == Gap(-0.025, -0.025, -0.025, 1)


def test_the_table_says_rate_edge_sizes_and_what_could_be_seen(folder):
    study = with_random(folder)
    done = {}
    draw = np.random.default_rng(6)
    for name in ("uniform", "AlphaLoRA", "LoRA"):
        for rate in RATES:
            noise = draw.normal(0.4, 0.1, size=40).tolist()
            done["words", name, 1, rate] = result(0.4, rate, losses=noise)
    done["words", "LoRA", 1, RATES[0]] = result(None, None, diverged="NaN", accuracy=None)
    own = summary.summarise(study, done)
    text = table.markdown(study, own, done)
    uniform, alphalora, lora = text.splitlines()[2:5]
    assert (
        uniform
        == "| words | uniform | total | 0.001* | 1 | 30 | 20 | 0.25 | 50.0% | - | 0.400 | - |"
    )
    assert alphalora.startswith(
        "|  | AlphaLoRA | total | 0.001* | 1 | 30 | 20 | 0.25 | 50.0% | +0.0% ["
    )
    assert lora.startswith("|  | LoRA | total | 0.03* |")
    assert "* is at an end of its grid" in text
    visible = [line.loss_difference.visible for line in own if line.losses]
    assert f"{min(visible):.3f} to {max(visible):.3f} nats" in text
    assert "80 % power" in text


@pytest.mark.parametrize("name", ["second", "together", "sequence"])
def test_the_published_plans_can_run(name):
    study = read_study(ROOT / "data" / "study" / f"{name}.yaml")
    check_rows(study)
    drawn = Counter(row.system for row in study.rows if row.draw is not None)
    assert drawn == ({"alphalora": 5, "lora": 5} if name == "second" else {})
    for row in study.rows:
        if row.draw is not None:  # it stands against rows that ran at the same rate
            assert row.learning_rate in study.learning_rates


def test_the_plan_in_the_documentation_can_be_read_and_has_as_many_cells_as_it_says(tmp_path):
    page = (ROOT / "docs" / "own_study.md").read_text()
    path = tmp_path / "plan.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    study = read_study(path)
    assert f"# {planned(study)} cells;" in page
    assert study.tuning_seeds == 2
    keys = set(re.findall(r"`(\w+)", page))
    fields = [own.name for kind in (Study, RowSpec, Task) for own in dataclasses.fields(kind)]
    assert [name for name in fields if name not in keys] == []
