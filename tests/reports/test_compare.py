"""Comparisons: differences, ranks, experts moved, and the exit status."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.records_made import deep_table, made_allocation, made_metrics, renamed
from hypothesis import given
from hypothesis import strategies as st

from htsr_alloc import Bounds, HtsrError
from htsr_alloc.allocation import allocate
from htsr_alloc.analysis.measure import summarise
from htsr_alloc.cli import views
from htsr_alloc.records import Allocation, Metrics, dumps, loads
from htsr_alloc.reports.compare import _correlation, compare

MINILM = ROOT / "data" / "minilm.metrics.json"
SMOLLM2 = ROOT / "data" / "smollm2.metrics.json"
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m"


def read(path, kind=Metrics):
    return loads(kind, path.read_bytes(), path.name)


def perturbed(metrics, tensor, by):
    """The metrics with one matrix's alpha changed, its layer's mean with it."""
    matrices = [
        dataclasses.replace(m, pl_alpha_hill=m.pl_alpha_hill + by) if m.tensor == tensor else m
        for m in metrics.matrices
    ]
    layers = summarise(matrices, [layer.prefix for layer in metrics.layers])
    return dataclasses.replace(metrics, matrices=tuple(matrices), layers=layers)


# --- ranks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "reason"),
    [([1.0], "fewer than 2 layers"), ([2.0, 2.0], "constant"), ([], "fewer than 2 layers")],
)
def test_no_rank_without_variation(values, reason):
    found = _correlation(np.array(values), np.array(values))
    assert (found.spearman, found.kendall) == (None, None)
    assert reason in found.reason


def test_rank_correlations_share_the_ranks_of_ties():
    """By hand: ranks 1.5, 1.5, 3, 4 and 1, 2, 3.5, 3.5; 4 pairs agree, 2 are tied."""
    found = _correlation(np.array([1.0, 1, 2, 3]), np.array([5.0, 6, 7, 7]))
    assert found.spearman == pytest.approx(8 / 9)
    assert found.kendall == pytest.approx(4 / 5)


# --- metrics --------------------------------------------------------------------------------


def test_a_file_with_itself():
    metrics = read(SMOLLM2)
    found = compare(metrics, metrics)
    assert found.same()
    assert {pair.difference for pair in (*found.layers, *found.roles, *found.matrices)} == {0}
    assert (len(found.layers), len(found.roles), len(found.matrices)) == (30, 7, 210)
    assert (found.mean_change, found.largest_change) == (0, 0)
    assert found.correlation.spearman == pytest.approx(1)
    assert found.correlation.kendall == pytest.approx(1)
    assert (found.unmatched, found.settings) == ((), ())


def test_one_perturbed_matrix_is_found_everywhere():
    metrics = read(MINILM)
    tensor = "encoder.layer.3.attention.self.query.weight"
    found = compare(metrics, perturbed(metrics, tensor, 0.6))
    assert not found.same()
    assert not found.same(0.59)
    assert found.same(0.61)
    changed = found.matrices[0]
    assert (changed.name, changed.difference) == (tensor, pytest.approx(0.6))
    assert [pair.difference for pair in found.matrices[1:]] == [0] * 35
    assert [pair.difference for pair in found.layers] == pytest.approx([0, 0, 0, 0.1, 0, 0])
    roles = {pair.name: pair.difference for pair in found.roles}
    assert roles.pop("query") == pytest.approx(0.1)
    assert set(roles.values()) == {0}
    assert found.largest_change == pytest.approx(0.1)
    assert found.mean_change == pytest.approx(0.1 / 6)


def test_readme_rank_correlations(tmp_path):
    """The README's: official with paper, median and ks on SmolLM2."""
    import shutil

    from htsr_alloc.analysis.outputs import RunFiles
    from htsr_alloc.analysis.refit import refit

    for file in (SMOLLM2, SMOLLM2.with_name("smollm2.spectra.safetensors")):
        shutil.copy2(file, tmp_path)
    source = tmp_path / SMOLLM2.name
    for estimator, rho in (("paper", 0.93), ("median", 0.64), ("ks", 0.41)):
        other = refit(source, RunFiles(tmp_path / f"{estimator}.metrics.json"), estimator)
        found = compare(read(source), other)
        assert found.correlation.spearman == pytest.approx(rho, abs=0.005)
        assert found.settings == (f"estimator: official, {estimator}",)


def test_matrices_pair_by_place_not_by_name():
    table = deep_table(4)
    found = compare(made_metrics(table), made_metrics(table + 0.5, prefix="transformer.h"))
    assert [pair.difference for pair in found.matrices] == pytest.approx([0.5] * 28)
    assert found.unmatched == ()
    assert found.layers[0].name == "model.layers.0"


def test_matrices_alike_in_place_are_paired_in_order():
    metrics = made_metrics(np.array([[2.0, 3.0]]), roles=("a", "b"))
    alike = [dataclasses.replace(matrix, role="a") for matrix in metrics.matrices]
    metrics = dataclasses.replace(metrics, matrices=tuple(alike))
    assert len(compare(metrics, metrics).matrices) == 2
    assert compare(metrics, metrics).same()


def test_what_has_no_value_says_why_and_counts_as_different():
    table = deep_table(6)
    holes = table.copy()
    holes[2], holes[3, 0] = np.nan, np.nan
    whole, broken = made_metrics(table), made_metrics(holes)
    found = compare(whole, broken)
    pair = found.layers[2]
    assert (pair.other, pair.difference) == (None, None)
    assert pair.reference == pytest.approx(table[2].mean())
    assert pair.reason.startswith("no value in the other file: 7 of 7 matrices have no fit")
    assert found.correlation.n == 5
    nulls = [pair for pair in found.matrices if pair.difference is None]
    assert len(nulls) == 8
    assert all("all eigenvalues are equal" in pair.reason for pair in nulls)
    assert found.matrices[:8] == tuple(nulls)
    assert not found.same(1e9)
    assert compare(broken, broken).same()
    assert "no value in the reference" in compare(broken, whole).layers[2].reason


def test_matrices_of_one_file_only_are_listed_and_differ():
    metrics = made_metrics(deep_table(3))
    fewer = dataclasses.replace(metrics, matrices=metrics.matrices[1:])
    found = compare(metrics, fewer)
    assert found.unmatched == ("model.layers.0.q_proj.weight: only in the reference",)
    assert not found.same()
    found = compare(fewer, metrics)
    assert found.unmatched == ("model.layers.0.q_proj.weight: only in the other file",)


def test_other_depths_are_compared_by_relative_depth():
    shallow = made_metrics(np.linspace(2, 3, 5)[:, None] * np.ones(7))
    deep = made_metrics(np.linspace(2, 3, 9)[:, None] * np.ones(7))
    for pair in ((shallow, deep), (deep, shallow)):
        found = compare(*pair)
        assert found.by == "relative depth"
        assert [p.name for p in found.layers] == [f"depth {d:.2f}" for d in (0, 0.25, 0.5, 0.75, 1)]
        assert [p.difference for p in found.layers] == pytest.approx([0] * 5)
        assert (found.matrices, found.correlation.n) == ((), 5)
        assert not found.same(1e9)
    between = compare(shallow, made_metrics(np.linspace(2, 3, 8)[:, None] * np.ones(7)))
    assert [p.other for p in between.layers] == pytest.approx(np.linspace(2, 3, 5))


def test_a_gap_is_not_bridged_by_interpolation():
    table = deep_table(9)
    table[2] = np.nan
    found = compare(made_metrics(deep_table(5)), made_metrics(table))
    assert [pair.other is None for pair in found.layers] == [False, True, False, False, False]


# --- allocations ----------------------------------------------------------------------------


def explicit(*experts, top_k=2):
    return allocate(None, strategy="explicit", experts=experts, top_k=top_k)


def test_experts_moved():
    found = compare(explicit(5, 5, 5), explicit(3, 5, 7))
    assert [pair.difference for pair in found.layers] == [-2, 0, 2]
    assert found.moved == 2
    assert found.same(2)
    assert not found.same(1)
    assert found.correlation.spearman is None
    assert found.correlation.reason == "one side is constant"
    assert compare(explicit(1, 2, 3), explicit(1, 2, 3)).same()


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=30))
def test_moved_is_what_one_side_gives_to_another(pairs):
    a, b = (tuple(side) for side in zip(*pairs, strict=True))
    found = compare(explicit(*a), explicit(*b))
    gained = sum(max(y - x, 0) for x, y in pairs)
    lost = sum(max(x - y, 0) for x, y in pairs)
    assert found.moved == min(gained, lost)
    if sum(a) == sum(b):
        assert found.moved == sum(abs(x - y) for x, y in pairs) / 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_allocate_says_how_many_are_moved_from_uniform_as_compare_does(counts):
    if total := sum(counts):
        bounds = Bounds(low=0)
        uniform = allocate(
            None, strategy="uniform", layers=len(counts), T=total, bounds=bounds, top_k=1
        )
        moved = compare(uniform, explicit(*counts)).moved
    else:
        moved = 0
    notes = views.allocation(explicit(*counts)).notes
    assert f" over {len(counts)} layers, {moved} moved from uniform" in notes[0]


def test_top_k_counts_too():
    found = compare(explicit(3, 3), explicit(3, 3, top_k=1))
    assert found.top_k == (0, 1)
    assert not found.same(10)


def test_published_mistral_vectors(golden):
    rows = golden("mistral-7b")["rows"]
    assert len(rows) > 1
    first = rows[0]["experts"]
    for row in rows[1:]:
        found = compare(explicit(*first), explicit(*row["experts"]))
        assert 2 * found.moved == np.abs(np.array(first) - row["experts"]).sum()


def test_refusals():
    metrics = made_metrics(deep_table(4))
    allocation = made_allocation(metrics, 20)
    with pytest.raises(HtsrError, match="cannot be compared with each other"):
        compare(metrics, allocation)
    with pytest.raises(HtsrError, match="have 4 and 2 layers"):
        compare(allocation, explicit(1, 2))
    with pytest.raises(HtsrError, match="There is no metric 'beta'"):
        compare(metrics, metrics, "beta")


# --- the command ----------------------------------------------------------------------------


def test_the_same_file_is_the_same(invoke):
    done = invoke("compare", MINILM, MINILM, "--check")
    assert done.rc == 0
    assert "data/minilm and data/minilm#2: the same" in done.stderr


def test_check_exits_4_and_without_it_0(invoke, tmp_path):
    metrics = read(MINILM)
    other = perturbed(metrics, metrics.matrices[7].tensor, 1e-3)
    (tmp_path / "tuned.metrics.json").write_text(dumps(other))
    done = invoke("compare", MINILM, "tuned.metrics.json")
    assert done.rc == 0
    assert "minilm and tuned: different" in done.stderr
    assert invoke("compare", MINILM, "tuned.metrics.json", "--check").rc == 4
    assert invoke("compare", MINILM, "tuned.metrics.json", "--check", "--tolerance", 0.01).rc == 0
    assert invoke("compare", MINILM, MINILM, "tuned.metrics.json", "--check").rc == 4
    lines = [line for line in done.stdout.splitlines() if line.startswith("tuned ")]
    assert metrics.matrices[7].tensor in lines[1]
    assert len(lines) == 2  # the summary, and the one matrix that changed


def test_json_says_all(invoke, tmp_path):
    metrics = read(MINILM)
    (tmp_path / "tuned.metrics.json").write_text(
        dumps(perturbed(metrics, metrics.matrices[0].tensor, 1))
    )
    done = invoke("compare", MINILM, "tuned.metrics.json", MINILM, "--json", "--top", 2)
    data = json.loads(done.stdout)
    assert [file["label"] for file in data["files"]][1] != data["reference"]
    assert [len(c["matrices"]) for c in data["comparisons"]] == [2, 2]
    assert [c["same"] for c in data["comparisons"]] == [False, True]
    assert data["comparisons"][0]["matrices"][0]["difference"] == pytest.approx(1)
    assert data["comparisons"][0]["correlation"]["n"] == 6
    done = invoke("compare", *[ROOT / "data" / "smollm2.allocation.json"] * 2, "--json", "-q")
    assert json.loads(done.stdout)["comparisons"][0]["moved"] == 0
    assert done.stderr == ""


def test_allocations_on_the_screen(invoke, tmp_path):
    (tmp_path / "a.allocation.json").write_text(dumps(explicit(5, 5, 5)))
    (tmp_path / "b.allocation.json").write_text(dumps(explicit(3, 5, 7)))
    done = invoke("compare", "a.allocation.json", "b.allocation.json", "--check")
    assert done.rc == 4
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["layer", "0", "5", "3", "-2"] in rows
    assert any(row[:4] == ["b", "2", "15", "15"] for row in rows)


def test_other_depths_say_so(invoke):
    done = invoke("compare", MINILM, SMOLLM2)
    assert done.rc == 0
    assert "compared by relative depth" in done.stderr
    assert "no value in the other file" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([MINILM], "A comparison takes two files or more."),
        ([MINILM, "missing.json"], "Cannot read missing.json: No such file"),
        ([MINILM, ROOT / "data" / "minilm.allocation.json"], "cannot be compared"),
        ([MINILM, MINILM, "--metric", "beta"], "There is no metric 'beta'."),
        ([MINILM, MINILM, "--tolerance", "nan"], "must not be negative"),
        ([MINILM, ROOT / "pyproject.toml"], "is neither a metrics nor an allocation file"),
    ],
)
def test_errors_are_one_sentence(invoke, arguments, sentence):
    done = invoke("compare", *arguments, "--check")
    assert done.rc == (2 if "--metric" in arguments else 1)
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_names_never_drive_the_terminal(invoke, tmp_path):
    metrics = renamed(made_metrics(deep_table(3)), EVIL)
    (tmp_path / "a.json").write_text(dumps(metrics))
    (tmp_path / "b.json").write_text(
        dumps(dataclasses.replace(metrics, matrices=metrics.matrices[2:]))
    )
    done = invoke("compare", "a.json", "b.json")
    assert done.rc == 0
    for bad in ("\x07", "\x1b", "\x9b"):
        assert bad not in done.stdout + done.stderr


def test_compare_needs_no_torch(tmp_path):
    import subprocess
    import sys

    script = (
        "import sys; from htsr_alloc.cli.main import app\n"
        f"app(['compare', {str(MINILM)!r}, {str(SMOLLM2)!r}, '-q'], standalone_mode=False)\n"
        "print([n for n in ('torch', 'matplotlib') if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_allocation_kind_is_told_apart(tmp_path):
    from htsr_alloc.records.results import read_result

    result = read_result(ROOT / "data" / "minilm.allocation.json")
    assert isinstance(result.record, Allocation)
    assert result.stem == "minilm"
    assert read_result(str(MINILM)).stem == "minilm"
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(HtsrError, match=r"deep\.json is neither"):
        read_result(tmp_path / "deep.json")


def test_counts_by_linears_are_compared(invoke, tmp_path):
    made = allocate(MINILM, T=30, per_module=True)
    first, second = (
        made.modules[0],
        next(m for m in made.modules if m.experts != made.modules[0].experts),
    )
    swapped = {
        first.name: dataclasses.replace(first, experts=second.experts, top_k=second.top_k),
        second.name: dataclasses.replace(second, experts=first.experts, top_k=first.top_k),
    }
    other = dataclasses.replace(made, modules=tuple(swapped.get(m.name, m) for m in made.modules))
    found = compare(made, other)
    assert [p.name for p in found.modules if p.difference] == [first.name, second.name]
    assert not found.same()
    assert compare(made, made).same()
    assert not compare(made, allocate(MINILM, T=30)).same()
    for name, record in (("a.json", made), ("b.json", other)):
        (tmp_path / name).write_text(dumps(record))
    done = invoke("compare", tmp_path / "a.json", tmp_path / "b.json", "--check")
    assert done.rc == 4
    assert "linears differ" in done.stdout


def test_layers_are_paired_by_their_blocks():
    made = allocate(MINILM, T=30)
    turned = dataclasses.replace(
        made,
        experts=made.experts[::-1],
        top_k=made.top_k[::-1],
        evidence=made.evidence[::-1],
    )
    found = compare(made, turned)
    assert (found.moved, found.correlation.spearman) == (0, pytest.approx(1.0))
    assert found.same()
