"""Figures: what they show is what the records say, and they can be read."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers.commands import ROOT, environment
from helpers.records_made import ROLES, deep_table, made_allocation, made_metrics, renamed

from htsr_alloc import HtsrError, style
from htsr_alloc.allocation import mola_counts
from htsr_alloc.records import Allocation, Metrics, dumps, loads
from htsr_alloc.records.results import open_spectra
from htsr_alloc.reports import plots, report
from htsr_alloc.reports.plots.esd import choose
from htsr_alloc.reports.plots.layers import marked

DATA = ROOT / "data"
HOSTILE = "$\\frac{1}$ <b>&\x1b[2J\u202e\n名字$" + "x" * 300


def read(name, kind=Metrics):
    return loads(kind, (DATA / name).read_bytes(), name)


@pytest.fixture
def minilm(tmp_path):
    """MiniLM's metrics, spectra and allocation in the current folder of ``invoke``."""
    for file in DATA.glob("minilm.*"):
        shutil.copy2(file, tmp_path)
    return tmp_path / "minilm.metrics.json"


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


# --- values in the figures ------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["pl_alpha_hill", "alpha_hat", "stable_rank"])
def test_lines_are_the_matrices_and_the_bold_one_the_layers_means(metric):
    metrics = read("smollm2.metrics.json")
    found = lines(plots.plot(metrics, view="layers", metric=metric).axes[0])
    assert set(found) == {*(m.role for m in metrics.matrices), "mean"}
    for role in set(found) - {"mean"}:
        own = {m.layer: getattr(m, metric) for m in metrics.matrices if m.role == role}
        assert dict(zip(*found[role].get_data(), strict=True)) == own
        assert found[role].get_linewidth() < found["mean"].get_linewidth()
    means = [getattr(layer, metric) for layer in metrics.layers]
    np.testing.assert_array_equal(found["mean"].get_ydata(), means)


def test_lines_of_a_mixture_are_means_over_its_experts():
    metrics = made_metrics(np.array([[2.0, 3.0], [4.0, 6.0]]), roles=("w1", "w1b"))
    matrices = [
        dataclasses.replace(m, role="w1", expert=i % 2) for i, m in enumerate(metrics.matrices)
    ]
    metrics = dataclasses.replace(metrics, matrices=tuple(matrices))
    found = lines(plots.plot(metrics, view="layers").axes[0])
    np.testing.assert_allclose(found["w1"].get_ydata(), [2.5, 5.0])


def test_what_has_no_value_is_a_gap_and_a_part_mean_is_hollow():
    table = deep_table(8)
    table[2, 1], table[5] = np.nan, np.nan
    found = lines(plots.plot(made_metrics(table), view="layers").axes[0])
    assert np.isnan(found["k_proj"].get_ydata()[2])
    assert np.isnan(found["mean"].get_ydata()[5])
    part = found["mean, some unfitted"]
    assert part.get_xdata()[0] == 2
    assert part.get_ydata()[0] == pytest.approx(np.nanmean(table[2]))


def test_a_value_between_gaps_has_a_marker():
    values = np.array([1, np.nan, 2, np.nan, np.nan, 3, 4, np.nan, 5])
    assert marked(values, 6, 100) == [0, 2, 6, 8]
    assert marked(np.ones(7), 1, 3) == [1, 4]


def test_heat_map_cells_are_the_matrices():
    table = deep_table(10)
    table[4, 3] = np.nan
    figure = plots.plot(made_metrics(table), view="heatmap")
    (mesh,) = (c for c in figure.axes[0].collections if hasattr(c, "get_coordinates"))
    shown = np.ma.filled(mesh.get_array(), np.nan).reshape(len(ROLES), 10)
    np.testing.assert_array_equal(shown, table.T)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(ROLES)
    numbers = {t.get_text() for t in figure.axes[0].texts}
    assert f"{table[0, 0]:.2f}" in numbers
    assert figure.axes[0].patch.get_hatch()  # what shows through where there is no value


def test_bars_are_the_experts_and_the_baselines_have_the_same_budget():
    allocation = read("smollm2.allocation.json", Allocation)
    (axes,) = plots.plot(allocation).axes
    (bars,) = axes.containers
    assert tuple(bar.get_height() for bar in bars) == allocation.experts
    assert [bar.get_center()[0] for bar in bars] == pytest.approx(range(30))
    steps = {p.get_label(): p.get_data().values for p in axes.patches if hasattr(p, "get_data")}
    assert steps["uniform"] == pytest.approx([160 / 30] * 30)
    shares = np.array(mola_counts((2, 4, 6, 8), 30))
    assert steps["MoLA-2468"] == pytest.approx(shares / shares.sum() * 160)


def test_no_baseline_repeats_the_allocation_and_few_layers_have_no_mola():
    from htsr_alloc.allocation import allocate
    from htsr_alloc.reports.plots.allocation import baselines

    assert set(baselines(allocate(None, strategy="uniform", layers=8, budget=40))) == {"MoLA-2468"}
    mola = allocate(None, strategy="mola", groups=(2, 4, 6, 8), layers=8)
    assert set(baselines(mola)) == {"uniform"}
    assert set(baselines(allocate(None, strategy="explicit", experts=(1, 2, 3)))) == {"uniform"}


def test_the_tail_has_the_fits_slope_and_area():
    metrics = read("minilm.metrics.json")
    with open_spectra(metrics, DATA / "minilm.metrics.json") as spectra:
        for matrix in metrics.matrices[:6]:
            (axes,) = plots.plot(metrics, matrix=[matrix.tensor], spectra=spectra).axes
            tail, start = axes.lines
            x, y = tail.get_data()
            slope = np.diff(np.log(y)) / np.diff(np.log(x))
            assert slope == pytest.approx(-matrix.pl_alpha_hill)
            assert (x[0], x[1]) == (matrix.xmin, matrix.lambda_max)
            assert start.get_xdata()[0] == matrix.xmin
            # The density's integral from xmin on is the tail's share of the eigenvalues.
            area = y[0] * x[0] / (matrix.pl_alpha_hill - 1)
            assert area == pytest.approx(matrix.k / matrix.n_eigs)
            title = axes.get_title()
            assert f"α = {matrix.pl_alpha_hill:.2f}" in title
            assert f"D = {matrix.ks_distance:.3f}" in title
            (bars,) = axes.patches
            density, edges, _ = bars.get_data()
            assert (density * np.diff(edges)).sum() == pytest.approx(1)
            counts = density * np.diff(edges) * matrix.n_eigs
            logs = np.log10(spectra[matrix.tensor])
            expected, at = np.histogram(logs, bins=100)
            np.testing.assert_allclose(counts, expected, atol=1e-9)
            (peak,) = axes.collections
            ((where, _),) = peak.get_offsets()
            assert where == pytest.approx(10 ** at[expected.argmax()])


def test_a_grid_has_a_panel_for_each_matrix():
    figure = plots.plot(DATA / "smollm2.metrics.json", layer=[10])
    titles = [axes.get_title() for axes in figure.axes if axes.axison]
    assert [t.splitlines()[0] for t in titles] == [
        f"layer 10, {m.role}" for m in read("smollm2.metrics.json").matrices if m.layer == 10
    ]
    assert len([axes for axes in plots.plot(DATA / "smollm2.metrics.json", role=["q_proj"]).axes
                if axes.axison]) == 30  # fmt: skip


def test_farms_spectra_are_the_pooled_ones(model, invoke, tmp_path):
    assert invoke("analyze", model, "--farms", "--farms-rows", 20, "-q").rc == 0
    path = tmp_path / "tiny.metrics.json"
    metrics = read(path)
    with open_spectra(metrics, path) as spectra:
        matrix = metrics.matrices[0]
        assert len(spectra) == len(metrics.matrices)
        assert set(spectra) == {m.tensor for m in metrics.matrices}
        assert len(spectra[matrix.tensor]) > matrix.n_eigs
    (axes,) = plots.plot(path, matrix=[matrix.tensor]).axes
    x, y = axes.lines[0].get_data()
    assert np.diff(np.log(y)) / np.diff(np.log(x)) == pytest.approx(-matrix.pl_alpha_hill)
    assert "FARMS" in axes.figure.get_suptitle()


def test_a_matrix_without_a_fit_says_why(tmp_path):
    metrics = made_metrics(np.array([[np.nan, 3.0]]), roles=("a", "b"))
    spectra = {m.tensor: np.full(64, 2.0) for m in metrics.matrices}
    (axes,) = plots.plot(metrics, matrix=[metrics.matrices[0].tensor], spectra=spectra).axes
    assert "no fit: all eigenvalues are equal" in axes.get_title()
    assert len(axes.lines) == 0
    style.save(axes.figure, tmp_path / "equal.svg")


def test_several_models_are_one_line_each_by_depth():
    names = ("minilm", "smollm2")
    (axes,) = plots.plot(*(DATA / f"{name}.metrics.json" for name in names)).axes
    for line, name in zip(axes.lines, names, strict=True):
        values = [layer.pl_alpha_hill for layer in read(f"{name}.metrics.json").layers]
        np.testing.assert_array_equal(line.get_ydata(), values)
        assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0, 1)
    same = plots.plot(DATA / "minilm.metrics.json", DATA / "minilm.metrics.json").axes[0]
    np.testing.assert_array_equal(same.lines[1].get_xdata(), range(6))


def test_the_difference_is_the_second_file_minus_the_first():
    table = deep_table(5)
    changed = table + np.random.default_rng(1).normal(size=table.shape)
    changed[3, 2] = np.nan
    base, tuned = made_metrics(table), made_metrics(changed[:, ::-1], roles=ROLES[::-1])
    figure = plots.plot(base, tuned, view="difference")
    (mesh,) = (c for c in figure.axes[1].collections if hasattr(c, "get_coordinates"))
    shown = np.ma.filled(mesh.get_array(), np.nan).reshape(len(ROLES), 5)
    np.testing.assert_allclose(shown, (changed - table).T)
    low, high = mesh.get_clim()
    assert low == -high
    for line, own in zip(figure.axes[0].lines, (base, tuned), strict=True):
        means = [layer.pl_alpha_hill for layer in own.layers]
        np.testing.assert_array_equal(line.get_ydata(), means)


def test_the_difference_needs_two_models_of_equal_depth():
    short, deep = (made_metrics(deep_table(layers)) for layers in (3, 4))
    with pytest.raises(HtsrError, match="3 and 4 layers"):
        plots.plot(short, deep, view="difference")
    with pytest.raises(HtsrError, match="needs 2 metrics files"):
        plots.plot(short, view="difference")
    with pytest.raises(HtsrError, match="takes 2 metrics files"):
        plots.plot(short, short, short, view="difference")


def test_size_and_dots_are_the_pictures(minilm, invoke, tmp_path):
    image = pytest.importorskip("PIL.Image")
    done = invoke("plot", minilm, "--size", "6x4.5", "--dpi", 80, "-o", "out.png")
    assert done.rc == 0, done.stderr
    assert image.open(tmp_path / "out.png").size == (480, 360)


def test_published_values(golden):
    published = golden("llama2-7b")
    values, expected = np.array(published["pl_alpha_hill"]), published["layer_mean"]
    found = lines(plots.plot(made_metrics(values), view="layers").axes[0])
    np.testing.assert_allclose(found["mean"].get_ydata(), expected, atol=1e-8)
    np.testing.assert_array_equal(found["q_proj"].get_ydata(), values[:, 0])


# --- how they look --------------------------------------------------------------------------


def overlapping(texts, renderer):
    boxes = [t.get_window_extent(renderer) for t in texts if t.get_visible() and t.get_text()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


@pytest.mark.parametrize("layers", [1, 2, 6, 32, 80, 200])
def test_labels_neither_overlap_nor_leave_the_picture(layers):
    metrics = made_metrics(deep_table(layers))
    figure = plots.plot(metrics, made_allocation(metrics, 8 * layers))
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    width, height = figure.get_size_inches() * figure.dpi
    assert len(figure.axes) == 4
    for axes in [*figure.axes, *figure.axes[2].child_axes]:
        low, high = axes.get_xlim()
        shown = [t for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
        assert len(shown) >= min(layers, 2) or axes not in figure.axes  # the colour bar has none
        assert not overlapping(shown, renderer)
        assert all(re.fullmatch(r"\d+", t.get_text()) for t in shown)
        legend = axes.get_legend()
        if legend is not None:
            assert not overlapping(legend.get_texts(), renderer)
            assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))
        bottom, top = sorted(axes.get_ylim())
        beside = [t for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top]
        assert not overlapping(beside, renderer)
        for text in [axes.title, axes.xaxis.label, axes.yaxis.label, *beside]:
            if not text.get_text():
                continue
            box = text.get_window_extent(renderer)
            assert box.x0 >= 0
            assert box.x1 <= width
            assert box.y0 >= 0
            assert box.y1 <= height
    bars = figure.axes[-1].texts
    assert not overlapping(bars, renderer)
    assert bool(bars) == (layers <= 40)


@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_errors_of_each_role_have_their_own_panels(name):
    metrics = read(f"{name}.metrics.json")
    figure = plots.plot(metrics, view="errors")
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    roles = list(dict.fromkeys(m.role for m in metrics.matrices))
    assert len(figure.axes) == 2 * len(roles)
    for role, left, right in zip(roles, figure.axes[::2], figure.axes[1::2], strict=True):
        own = [m for m in metrics.matrices if m.role == role]
        points = left.collections[-1].get_offsets()
        np.testing.assert_allclose(points, [(m.layer, m.pl_alpha_hill) for m in own])
        hollow = [tuple(c[:3]) == (1, 1, 1) for c in left.collections[-1].get_facecolors()]
        assert hollow == [m.start_jumps for m in own]
        hill, whole = (c.get_segments() for c in left.collections[:2])
        for bars, error in ((hill, "alpha_hill_se"), (whole, "alpha_se")):
            half = [(bar[1][1] - bar[0][1]) / 2 for bar in bars]
            np.testing.assert_allclose(half, [getattr(m, error) for m in own])
        ranges = [c.get_segments()[0][:, 1].tolist() for c in right.collections]
        assert ranges == [[m.k_low, m.k_high] for m in own]
        assert [line.get_ydata()[0] for line in right.lines[:-1]] == [m.k for m in own]
    for axes in figure.axes:
        bottom, top = sorted(axes.get_ylim())
        shown = [t for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top]
        assert len(shown) >= 2
        assert not overlapping([*shown, axes.yaxis.label, axes.title], renderer)
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def test_errors_need_errors():
    metrics = made_metrics(deep_table(3))
    with pytest.raises(HtsrError, match="no standard errors"):
        plots.plot(metrics, view="errors")
    with pytest.raises(HtsrError, match="about pl_alpha_hill"):
        plots.plot(read("minilm.metrics.json"), view="errors", metric="stable_rank")


def test_tails_are_the_numbers_of_eigenvalues():
    metrics = read("smollm2.metrics.json")
    (axes,) = plots.plot(metrics, view="tails").axes
    found = lines(axes)
    for role in {m.role for m in metrics.matrices}:
        own = [m.k for m in metrics.matrices if m.role == role]
        np.testing.assert_array_equal(found[role].get_ydata(), own)
    assert set(found["short: k < 50"].get_ydata()) == {50}
    assert axes.get_yscale() == "log"


def test_ranks_are_called_ranks(tmp_path, invoke):
    shutil.copy(DATA / "minilm.metrics.json", tmp_path)
    arguments = ["--for", "lora", "--rank", 16, "-o", "lora.json"]
    assert invoke("allocate", "minilm.metrics.json", *arguments).rc == 0
    (axes,) = plots.plot(tmp_path / "lora.json").axes
    assert axes.get_ylabel() == "ranks"
    assert axes.get_title(loc="left") == "lora: the parameters of rank 16, β = 2.5"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["uniform", "alphalora"]
    page = report(tmp_path / "minilm.metrics.json", tmp_path / "lora.json")
    assert "<th>ranks, lora.json</th>" in page
    assert "Ranks of each layer in lora.json" in page
    table = invoke("compare", "lora.json", "lora.json").stdout
    assert "ranks moved" in table
    assert "experts" not in page.split("<style>")[0] + table
    shutil.copy(DATA / "minilm.allocation.json", tmp_path)
    mixed = invoke("compare", "lora.json", "minilm.allocation.json")
    assert mixed.rc == 1
    assert "One allocation is of ranks, the other of experts." in mixed.stderr


def test_lines_differ_without_colour():
    roles = tuple(f"role{i}" for i in range(14))
    metrics = made_metrics(np.random.default_rng(0).uniform(2, 4, (5, 14)), roles=roles)
    drawn = [line for label, line in lines(plots.plot(metrics, view="layers").axes[0]).items()
             if label != "mean"]  # fmt: skip
    assert len({(line.get_marker(), line.get_linestyle()) for line in drawn}) == 14
    assert len({(line.get_color(), line.get_linestyle()) for line in drawn}) == 14


def test_the_heat_maps_lightness_only_grows():
    from matplotlib import colormaps

    red, green, blue = colormaps[style.COLOUR_MAP](np.linspace(0, 1, 64))[:, :3].T
    assert (np.diff(0.2126 * red + 0.7152 * green + 0.0722 * blue) > 0).all()


# --- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89")],
)
def test_each_format(minilm, invoke, tmp_path, suffix, start):
    done = invoke("plot", minilm, "minilm.allocation.json", "-o", f"out.{suffix}")
    assert done.rc == 0, done.stderr
    assert done.stderr == f"wrote out.{suffix}\n"
    assert done.stdout == ""
    assert (tmp_path / f"out.{suffix}").read_bytes().startswith(start)


def test_default_names(minilm, invoke, tmp_path):
    assert invoke("plot", minilm).rc == 0
    assert invoke("plot", "minilm.allocation.json").rc == 0
    assert (tmp_path / "minilm.metrics.png").exists()
    assert (tmp_path / "minilm.allocation.png").exists()


def test_the_same_figure_has_the_same_bytes_whatever_the_users_settings(minilm, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "matplotlibrc").write_text("font.size: 30\nsvg.hashsalt: other\n")
    for name, env in (("a", {}), ("b", {"MPLCONFIGDIR": str(tmp_path / "mine")})):
        done = run("plot", minilm, "minilm.allocation.json", "-o", f"{name}.svg", env=env)
        assert done.rc == 0, done.stderr
    made = (tmp_path / "a.svg").read_bytes()
    assert made == (tmp_path / "b.svg").read_bytes()
    assert b"<dc:date>" not in made


@pytest.mark.parametrize("suffix", ["pdf", "png"])
def test_no_date_in_other_formats(minilm, tmp_path, suffix):
    for name in ("a", "b"):
        plots.plot(minilm, view="layers", output=tmp_path / f"{name}.{suffix}")
    made = (tmp_path / f"a.{suffix}").read_bytes()
    assert made == (tmp_path / f"b.{suffix}").read_bytes()
    assert b"CreationDate" not in made


def test_drawing_leaves_the_users_settings_and_pyplot_alone(minilm, tmp_path):
    script = (
        "import sys, matplotlib; matplotlib.rcParams['font.size'] = 17\n"
        "from htsr_alloc.reports import plots\n"
        "figure = plots.plot(sys.argv[1], output='out.svg')\n"
        "assert matplotlib.rcParams['font.size'] == 17\n"
        "assert matplotlib.rcParams['svg.hashsalt'] is None\n"
        "print([n for n in ('torch', 'matplotlib.pyplot', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(minilm)],
        cwd=tmp_path, env=environment(), capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_hostile_names_are_only_drawn(tmp_path, suffix):
    metrics = renamed(made_metrics(deep_table(5)), HOSTILE)
    allocation = made_allocation(metrics, 20)
    figure = plots.plot(metrics, allocation, output=tmp_path / f"out.{suffix}")
    assert figure.get_figwidth() < 12
    spectra = {m.tensor: np.geomspace(0.1, 10, 64) for m in metrics.matrices}
    plots.plot(metrics, layer=[0], spectra=spectra, output=tmp_path / f"esd.{suffix}")
    name = metrics.matrices[0].tensor
    plots.plot(metrics, matrix=[name], spectra=spectra, output=tmp_path / f"one.{suffix}")
    if suffix == "svg":
        import xml.etree.ElementTree as ElementTree

        for path in tmp_path.glob("*.svg"):
            nodes = list(ElementTree.parse(path).iter())
            assert not {n.tag.rpartition("}")[2] for n in nodes} & {
                "b",
                "script",
                "a",
                "foreignObject",
            }
            links = [v for n in nodes for k, v in n.attrib.items() if k.endswith("href")]
            assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)


def test_plain_names():
    assert style.plain("a\x1b\n\u202e$b$") == r"a???\$b\$"
    assert style.plain("x" * 100, 11) == "xxxxx…xxxxx"
    assert style.plain("\ud800") == "?"
    metrics = made_metrics(deep_table(2)[:, :2], roles=("_hidden", "b"))
    (axes,) = plots.plot(metrics, view="layers").axes
    assert [t.get_text().strip() for t in axes.get_legend().get_texts()] == ["_hidden", "b", "mean"]


# --- errors ---------------------------------------------------------------------------------


def spoil(name):
    def change(folder):
        data = json.loads((folder / "minilm.metrics.json").read_text())
        if name == "no spectra":
            (folder / "minilm.spectra.safetensors").unlink()
        elif name == "other spectra":
            (folder / "minilm.spectra.safetensors").write_bytes(b"other")
        elif name == "never kept":
            data["spectra"] = None
        elif name == "no bins":
            data["settings"]["bins"] = 10**12
        elif name == "no layers":
            data["layers"], data["matrices"] = [], []
        (folder / "minilm.metrics.json").write_text(json.dumps(data))

    return change


@pytest.mark.parametrize(
    ("before", "arguments", "sentence"),
    [
        ("no spectra", ["--layer", 0], "There is no minilm.spectra.safetensors beside"),
        ("other spectra", ["--layer", 0], "is not the file that minilm.metrics.json was written"),
        ("never kept", ["--layer", 0], "was written without spectra"),
        ("no bins", ["--layer", 0], "bins must be at most 1000000"),
        ("no layers", [], "The metrics hold no layers."),
        (None, ["--matrix", "encoder.layer.0.attention.self.quer"], "hold no matrix"),
        (None, ["--matrix", "*nothing*"], "The metrics hold no matrix '*nothing*'"),
        (None, ["--layer", 6], "There is no layer 6 among the 6 layers."),
        (None, ["--role", "q_proj"], "The metrics hold no role 'q_proj'."),
        (None, ["--matrix", "*layer.0*query*", "--layer", 1], "name, layer and role together"),
        (None, ["-o", "x.gif"], "A figure cannot be written as 'x.gif'."),
        (None, ["-o", "x"], "A figure cannot be written as 'x'."),
        (None, ["-o", "x.html"], "htsr report writes HTML"),
        (None, ["-o", "nowhere/x.png"], "Cannot write nowhere/x.png: No such file"),
        (None, ["--size", "1x1"], "A figure of 1 x 1 inches has no room for its panels."),
        (None, ["--size", "0x5"], "A figure cannot be 0 x 5 inches"),
        (None, ["--dpi", 9], "A figure cannot have 9 dots per inch"),
        (None, ["--dpi", 90, "-o", "x.svg"], "A svg has no dots per inch."),
        (None, ["--metric", "beta"], "There is no metric 'beta'."),
        (None, ["--view", "pie"], "There is no view 'pie'."),
        (None, ["--view", "allocation"], "needs an allocation file"),
        (None, ["--view", "layers", "--layer", 1], "The layers view shows all matrices"),
        (None, ["minilm.metrics.json", "--view", "heatmap"], "takes one metrics file"),
        (None, ["missing.json"], "Cannot read missing.json: No such file"),
        (None, ["minilm.spectra.safetensors"], "is neither a metrics nor an allocation file"),
    ],
)
def test_errors_are_one_sentence(minilm, invoke, tmp_path, before, arguments, sentence):
    spoil(before)(tmp_path)
    listed = sorted(tmp_path.iterdir())
    done = invoke("plot", "minilm.metrics.json", *arguments)
    assert done.rc == (
        2 if arguments[:1] in (["--metric"], ["--view"]) and "There is no" in sentence else 1
    )
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == listed


def test_the_nearest_name_is_proposed(minilm, invoke):
    done = invoke("plot", minilm, "--matrix", "encoder.layer.0.attention.self.quer.weight")
    assert "Did you mean encoder.layer.0.attention.self.query.weight?" in done.stderr


def test_views_that_need_metrics(minilm, invoke):
    done = invoke("plot", "minilm.allocation.json", "--view", "esd")
    assert done.rc == 1
    assert "The esd view needs a metrics file." in done.stderr


def test_too_many_spectra(tmp_path):
    metrics = made_metrics(deep_table(20))
    spectra = {m.tensor: np.geomspace(0.1, 10, 64) for m in metrics.matrices}
    with pytest.raises(HtsrError, match="140 spectra do not fit one picture"):
        plots.plot(metrics, view="esd", spectra=spectra)
    with pytest.raises(HtsrError, match="A record alone has no spectra"):
        plots.plot(metrics, layer=[0])
    with pytest.raises(HtsrError, match=r"lack that of model\.layers\.0\.q_proj"):
        plots.plot(metrics, layer=[0], spectra={})
    with pytest.raises(HtsrError, match="nothing to draw"):
        plots.plot()


def test_slices_of_a_stack_are_found_by_name():
    metrics = made_metrics(np.array([[2.0, 3.0]]), roles=("a", "b"))
    matrices = [
        dataclasses.replace(m, tensor=f"experts.w[{i}]") for i, m in enumerate(metrics.matrices)
    ]
    metrics = dataclasses.replace(metrics, matrices=tuple(matrices))
    assert [m.tensor for m in choose(metrics, ["experts.w[1]"])] == ["experts.w[1]"]
    assert len(choose(metrics, ["experts.*"])) == 2


def test_a_spectrum_must_be_one(minilm, invoke, tmp_path):
    from safetensors.numpy import load_file, save_file

    from htsr_alloc.files import sha256

    spectra = tmp_path / "minilm.spectra.safetensors"
    values = load_file(spectra)
    name = "encoder.layer.0.attention.self.query.weight"
    for wrong in (values[name].astype(np.float32), values[name].reshape(2, -1)):
        save_file({**values, name: wrong}, spectra)
        data = json.loads(minilm.read_text())
        data["spectra"]["sha256"] = sha256(spectra)
        minilm.write_text(json.dumps(data))
        done = invoke("plot", minilm, "--matrix", name)
        assert done.rc == 1
        assert "is not a spectrum" in done.stderr


def test_figures_survive_a_round_trip_of_the_record(minilm):
    metrics = read(minilm)
    assert loads(Metrics, dumps(metrics), "again") == metrics
    assert plots.plot(metrics, view="layers").axes[0].lines
