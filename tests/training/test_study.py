"""The study: equal budgets, cells that survive kill -9, and the numbers of its table."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import ROOT, environment

pytest.importorskip("peft", reason="needs the extra [train]")
pytest.importorskip("accelerate", reason="needs the extra [train]")

from helpers import studies
from helpers.studies import PLAN, ROWS, lines, saved

from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Metrics, dumps, loads
from htsr_alloc.training.study import summary, table
from htsr_alloc.training.study.budget import fitted
from htsr_alloc.training.study.cells import cells, fingerprint
from htsr_alloc.training.study.plan import RowSpec, check_rows, read_study
from htsr_alloc.training.study.store import Store


@pytest.fixture
def plan(tmp_path, invoke):
    """study.yaml beside a tiny model, its metrics and two tasks: 12 cells."""
    return saved(studies.files(tmp_path, invoke), PLAN)


def keys(path):
    if not path.exists():
        return []
    return [(x["task"], x["row"], x["seed"], x["rate"]) for x in lines(path)]


def start(plan):
    return subprocess.Popen(
        [sys.executable, "-m", "htsr_alloc", "study", plan.name, "--device", "cpu"],
        cwd=plan.parent,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def begun(stderr):
    """The cells that a process said it began: "words: LoRA, seed 1 (9 of 12 left)"."""
    said = [line for line in stderr.splitlines() if " left)" in line]
    parts = [line.rpartition(" (")[0].replace(", seed ", ": ").split(": ") for line in said]
    return [(task, row, int(seed), None) for task, row, seed in parts]


def test_killed_at_any_moment_no_cell_is_lost_or_run_twice(plan, invoke):
    results, draw = plan.parent / "results.jsonl", random.Random(0)
    planned = [key for cell in cells(read_study(plan)) for key in cell.keys]
    assert len(planned) == 12
    for workers in (2, 1):
        before, running = keys(results), [start(plan) for _ in range(workers)]
        while len(keys(results)) < len(before) + 2:
            assert any(process.poll() is None for process in running)
            time.sleep(0.02)
        time.sleep(draw.random())
        for process in running:
            process.send_signal(signal.SIGKILL)
        said = [cell for process in running for cell in begun(process.communicate()[1])]
        assert len(set(said)) == len(said)  # no cell by both
        assert not set(said) & set(before)  # nothing finished is run again
        assert keys(results)[: len(before)] == before
    done = invoke("study", plan.name, "--device", "cpu", "-q")
    assert done.rc == 0, done.stderr
    assert sorted(keys(results)) == sorted(planned)
    assert "12 of 12 cells" in done.stdout
    again = invoke("study", plan.name, "--device", "cpu")
    assert begun(again.stderr) == []

    cut = dict(zip(keys(results), lines(results), strict=True))
    results.unlink()
    assert invoke("study", plan.name, "--device", "cpu", "-q").rc == 0
    for line in lines(results):  # and the numbers are those of one quiet run
        other = cut[line["task"], line["row"], line["seed"], line["rate"]]
        assert line["hits"] == other["hits"]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_other_settings_are_refused(plan, invoke):
    assert invoke("study", plan.name, "--device", "cpu", "--limit", 1).rc == 0
    saved(plan.parent, {**PLAN, "recipe": {**PLAN["recipe"], "steps": 4}})
    done = invoke("study", plan.name, "--device", "cpu")
    assert done.rc == 1
    assert "results.jsonl has uniform on words with other settings" in done.stderr


def test_a_fingerprint_follows_the_data_and_not_the_name(plan):
    study = read_study(plan)
    first = cells(study)[0]
    before = fingerprint(study, first)
    assert before == fingerprint(read_study(plan), first)
    with open(plan.parent / "train.jsonl", "a") as file:
        file.write('{"prompt": "w9", "completion": " w8"}\n')
    assert before != fingerprint(study, first)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 3}, "study.yaml: unknown key 'budget'."),
        ({"rows": [{"name": "a", "sytem": "lora"}]}, "rows[0]: unknown key 'sytem'"),
        ({"tasks": {"a": {"train": "t.jsonl"}}}, "tasks.a: missing key 'test'"),
        ({"tasks": {"a": {"train": "t.jsonl", "test": 3}}}, "tasks.a.test: expected str, got int"),
        ({"seeds": 3}, "seeds: expected array, got int"),
        ({"seeds": []}, "seeds: expected array of length >= 1"),
        ({"seeds": [1, True]}, "seeds[1]: expected int, got bool"),
        ({"rows": None}, "rows: expected array, got null"),
        ({"rows": [*ROWS, {"name": "a", "beta": "2"}]}, "rows[4].beta: expected int | float, got"),
        ({"rows": [*ROWS, {"name": "a", "groups": 13}]}, "rows[4].groups: expected str | null"),
        ({"recipe": {"steps": "3"}}, "recipe.steps: expected int | null, got str"),
        ({"recipe": {"steps": 0}}, "recipe: steps must be at least 1"),
        ({"experts": 0}, "experts: expected int >= 1"),
        ({3: 4}, "expected keys of type str"),
        ({"rows": [*ROWS, ROWS[1]]}, "two rows called 'uniform'"),
        ({"baseline": "none"}, "has no row 'none', its baseline"),
        ({"tasks": {}}, "tasks: expected object of length >= 1"),
        ({"recipe": [1]}, "recipe: expected object, got array"),
    ],
)
def test_a_wrong_plan_is_one_sentence(changes, said, tmp_path):
    with pytest.raises(HtsrError) as caught:
        read_study(saved(tmp_path, {**PLAN, **changes}))
    assert said in caught.value.message


BOMB = ["a0: &a0 {x: 1}\n"]  # 9 to the power of 30 keys
BOMB += [f"a{i}: &a{i} {{<<: [{f'*a{i - 1}, ' * 9}]}}\n" for i in range(1, 31)]
LISTS = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "study.yaml: expected object, got null"),
        ("a: [1", "study.yaml, line 1: expected ',' or ']'"),
        ("seeds: [1]\nseeds: [2]", "line 2: duplicate key 'seeds'"),
        ("r: .nan", "line 1: .nan is not a finite number"),
        ("r: 1e999", "line 1: 1e999 is not a finite number"),
        ("model: !!python/name:os.system", "line 1: could not determine a constructor"),
        ("a: 2020-99-99", "is not YAML: month must be in 1..12"),
        ("a: !!int ''", "is not YAML"),
        ("[a]: 1", "found unhashable key"),
        ("{" * 5000, "nested too deeply"),
        ("\0", "is not YAML"),
        ("".join(BOMB), "line 2: the merge key << is not allowed"),
        (LISTS + "seeds: *a29", "unknown key 'a0'"),
        (LISTS.replace("a0: &a0", "seeds: &a0") + "rows: *a29", "seeds[0]: expected int, got str"),
        ("seeds: &a [*a]", "seeds[0]: expected int, got array"),
        (" " * (1 << 20) + "\n", "is larger than the 1 MiB"),
    ],
    ids=range(16),
)
def test_what_is_not_a_plan_is_one_sentence(text, said, tmp_path):
    (tmp_path / "study.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(HtsrError) as caught:
        read_study(tmp_path / "study.yaml")
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert time.monotonic() - began < 20


def test_a_number_is_read_as_it_is_written(tmp_path):
    path = saved(tmp_path, {**PLAN, "recipe": {}, "rows": [{"name": "uniform", "beta": 2}]})
    text = path.read_text()
    assert "recipe: {}" in text
    for written in ("3e-4", "0.3e-3", "+3.E-04", "3.0e-4", "0.0003"):
        path.write_text(text.replace("recipe: {}", f"recipe: {{learning_rate: {written}}}"))
        assert read_study(path).recipe.learning_rate == 3e-4
    path.write_text(text.replace("recipe: {}", "recipe: {epochs: 2}"))
    study = read_study(path)  # JSON in a fingerprint has 2 and 2.0 apart
    assert [type(n) for n in (study.recipe.epochs, study.rows[0].beta)] == [int, int]


# One hash over the 120 fingerprints of data/study/smollm2.yaml, as version 0.1.0 makes them where
# each of the files beside it that git does not have (.cache/) holds its own name.
FINGERPRINTS = "b7b2e525fec94c2ee00a406490ec9c68296212064217abd3f3605e01e7655301"


def test_the_published_study_keeps_its_fingerprints(tmp_path):
    (tmp_path / "data" / "study").mkdir(parents=True)
    for name in ("study/smollm2.yaml", "smollm2.metrics.json", "smollm2.paper.metrics.json"):
        (tmp_path / "data" / name).write_bytes((ROOT / "data" / name).read_bytes())
    tasks = ("sarcasm", "reviews", "quartz", "chain_sum")
    parts = [f"tasks/{task}/{part}.jsonl" for task in tasks for part in ("train", "valid", "test")]
    for name in ("smollm2-gguf/config.json", *parts):
        path = tmp_path / ".cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    study = read_study(tmp_path / "data" / "study" / "smollm2.yaml")
    planned = cells(study)
    found = "".join(fingerprint(study, cell) for cell in planned)
    assert hashlib.sha256(found.encode()).hexdigest() == FINGERPRINTS
    done = Store(ROOT / "data" / "study" / "smollm2.jsonl").read()
    assert sorted(done) == sorted(key for cell in planned for key in cell.keys)
    check_rows(study)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"system": "lorra"}, "The row a: there is no system 'lorra'"),
        ({"strategy": "explicit"}, "The row a: "),
        ({"strategy": "mola"}, "The row a: "),
        ({"strategy": "mola", "groups": "1x"}, "The row a: "),
        ({"strategy": "none"}, "The row a: There is no strategy 'none'"),
        ({"strategy": "alphalora", "metric": "alpha"}, "The row a: "),
        ({"strategy": "alphalora", "repair": "x"}, "The row a: "),
        ({"metrics": "none.json"}, "The row a: Cannot read"),
    ],
)
def test_a_row_that_cannot_run_is_refused_before_the_first_cell(row, said, plan, invoke):
    saved(plan.parent, {**PLAN, "rows": [*ROWS, {"name": "a", **row}]})
    done = invoke("study", plan.name, "--device", "cpu")
    assert done.rc == 1
    assert said in done.stderr
    assert " left)" not in done.stderr
    assert not (plan.parent / "results.jsonl").exists()


def test_a_torn_or_foreign_line_is_named(tmp_path):
    store = Store(tmp_path / "r.jsonl")
    store.add({"task": "a", "row": "b", "seed": 1})
    with open(tmp_path / "r.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(HtsrError, match="line 2: this is not a cell"):
        store.read()


LAYERS = 4
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 64,
}


def on_smollm2_shapes(folder, **changes):
    """A study of SmolLM2's first layers, from its config and metrics alone."""
    (folder / "config.json").write_text(json.dumps(SHAPE))
    path = ROOT / "data" / "smollm2.metrics.json"
    whole = loads(Metrics, path.read_bytes(), path.name)
    part = dataclasses.replace(
        whole,
        layers=whole.layers[:LAYERS],
        matrices=tuple(m for m in whole.matrices if m.layer < LAYERS),
    )
    (folder / "part.metrics.json").write_text(dumps(part))
    data = {**PLAN, "model": ".", "metrics": "part.metrics.json", "r": 8, "lora_alpha": 16}
    return read_study(saved(folder, {**data, "experts": 5 * LAYERS, **changes}))


@pytest.mark.parametrize(
    "system",
    ["alphalora", "lora", "rslora", "dora", "pissa", "eva", "goat", "hydra", "mor", "em_lora"],
)
def test_every_system_meets_the_budget(system, tmp_path):
    study = on_smollm2_shapes(tmp_path)
    made = fitted(study, RowSpec(system, system=system))
    # q, k, v, o, gate, up, down: 5 experts of rank 8, and 5 rows of a router.
    sizes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    want = LAYERS * sum(5 * (8 * (a + b) + a) for a, b in sizes)
    assert made.size.total == pytest.approx(want, rel=0.01)
    assert made.adapter.lora_alpha / made.adapter.r == 2


def test_a_row_may_train_ten_times_the_budget(tmp_path):
    study = on_smollm2_shapes(tmp_path)
    one, ten = (fitted(study, RowSpec("LoRA", system="lora", times=n)) for n in (1, 10))
    assert ten.size.total == pytest.approx(10 * one.size.total, rel=0.02)
    assert ten.adapter.lora_alpha / ten.adapter.r == 2


def test_a_budget_that_cannot_be_met_is_refused(tmp_path):
    study = on_smollm2_shapes(tmp_path, experts=LAYERS, r=1, lora_alpha=2)
    with pytest.raises(HtsrError, match=r"MoR trains .* of the budget's"):
        fitted(study, RowSpec("MoR", system="mor"))


def test_all_tasks_hold_the_rows_that_every_task_has(plan):
    study = read_study(plan)
    first, *_, last = study.tasks
    made = {
        (task, row, 1, None): {"accuracy": 0.5, "hits": "10", "loss": 1.0, "n": 2, "trainable": 3}
        for task in study.tasks
        for row in ("uniform", "LoRA", "untrained")
    }
    del made[last, "LoRA", 1, None]
    assert first != last
    found = [line.row for line in summary.summarise(study, made) if line.task == summary.ALL]
    assert found == ["untrained", "uniform"]
    made[last, "LoRA", 2, None] = made[first, "LoRA", 1, None]  # as many seeds, and not the same
    found = [line.row for line in summary.summarise(study, made) if line.task == summary.ALL]
    assert found == ["untrained", "uniform"]


def test_the_main_rows_of_every_task_come_first(plan):
    study = read_study(plan)
    planned = [key for cell in cells(study) for key in cell.keys]
    main = {row.name for row in study.rows if row.main}
    assert len(set(planned)) == len(planned)
    count = len(main) * len(study.seeds) * len(study.tasks)
    assert all(row in main for _, row, *_ in planned[:count])
    assert all(row not in main and seed == 1 for _, row, seed, _ in planned[count:])


def test_the_table_and_the_figure_come_from_the_results(plan, invoke, tmp_path):
    study = read_study(plan)
    store = Store(study.results)
    hits = {("uniform", 1): "1100", ("uniform", 2): "1000", ("LoRA", 1): "1111",
            ("LoRA", 2): "1110", ("untrained", 1): "0000"}  # fmt: skip
    for cell in cells(study):
        if cell.tasks == ("words",) and (cell.row.name, cell.seed) in hits:
            own = hits[cell.row.name, cell.seed]
            store.add(
                {
                    "task": "words",
                    "row": cell.row.name,
                    "seed": cell.seed,
                    "n": 4,
                    "accuracy": own.count("1") / 4,
                    "hits": own,
                    "loss": 0.5,
                    "trainable": 1234,
                    "fingerprint": fingerprint(study, cell),
                }
            )
    other = "<!-- other: begin -->\nanother study's\n<!-- other: end -->\n"
    begin, end = (mark.format(plan.stem) for mark in table.MARKS)
    (tmp_path / "doc.md").write_text(f"{other}{begin}\nold\n{end}\nafter\n")
    done = invoke("study", plan.name, "--report", "--into", "doc.md", "--figure", "figure.png")
    assert done.rc == 0, done.stderr
    shown = done.stdout.splitlines()
    assert shown[2].startswith("| words | untrained | - | 1 | 1,234 | 0.0% | - | -50.0% [")
    assert shown[3] == "|  | uniform | total | 2 | 1,234 | 37.5% | 17.7% | - | 0.500 |"
    assert shown[4].startswith("|  | LoRA | total | 2 | 1,234 | 87.5% | 17.7% | +50.0% [")
    assert "5 of 12 cells; n = 4 test rows a task" in done.stdout
    again = invoke("study", plan.name, "--report", "--baseline", "LoRA").stdout.splitlines()
    assert "difference from LoRA" in again[-1]
    assert again[3].startswith("|  | uniform | total | 2 | 1,234 | 37.5% | 17.7% | -50.0% [")
    wrong = invoke("study", plan.name, "--report", "--baseline", "lora")
    assert (wrong.rc, "has no row 'lora'" in wrong.stderr) == (1, True)
    text = (tmp_path / "doc.md").read_text()
    assert text.startswith(other)
    assert text.endswith("after\n")
    assert done.stdout in text
    assert "old" not in text
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_a_cell_hangs_on_the_scores_and_not_on_the_metrics_files_other_bytes(plan):
    study = read_study(plan)
    cell, path = cells(study)[0], plan.parent / "tiny.metrics.json"
    first, metrics = fingerprint(study, cell), json.loads(path.read_text())
    metrics["tool"]["created"] = "2001-01-01T00:00:00Z"
    path.write_text(json.dumps(metrics))
    assert fingerprint(study, cell) == first
    metrics["layers"][0]["pl_alpha_hill"] *= 1.01
    path.write_text(json.dumps(metrics))
    assert fingerprint(study, cell) != first


def test_reading_results_writes_nothing(plan):
    before = set(plan.parent.iterdir())
    assert Store(plan.parent / "results.jsonl").read() == {}
    assert set(plan.parent.iterdir()) == before


def test_a_file_that_is_not_there_stops_a_run_and_not_a_report(plan, invoke):
    assert invoke("study", plan, "--limit", 1, "--device", "cpu").rc == 0
    gone = read_study(plan).tasks["words"].test
    gone.unlink()
    before = (plan.parent / "results.jsonl").read_bytes()
    done = invoke("study", plan, "--device", "cpu")
    assert done.rc == 1
    assert f"error: {gone} is not there." in done.stderr
    done = invoke("study", plan, "--report")
    assert done.rc == 0
    assert f"{gone} is not here, so the lines' settings are not compared" in done.stderr
    assert "1 of 12 cells" in done.stdout
    assert (plan.parent / "results.jsonl").read_bytes() == before
