"""The HTML report: complete, safe with any names in the files, and without network access."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.records_made import deep_table, made_allocation, made_metrics, renamed

from htsr_alloc.records import Allocation, Dequantised, File, Metrics, dumps, loads
from htsr_alloc.records.results import read_result
from htsr_alloc.reports import report
from htsr_alloc.reports.cautions import cautions
from htsr_alloc.reports.citing import references

DATA = ROOT / "data"
PACKAGE = ROOT / "htsr_alloc" / "reports"
HOSTILE = (
    "\"'></title></style></td><script>fetch('http://evil')</script>"
    "<img src=http://evil/x onerror=alert(1)>{{7*7}}{% x %}\x1b[2J\u202e\n\ud800"
)
VOID = {"meta", "link", "img", "br", "hr", "input"}
MAY_LINK = {"a"}  # a link loads nothing until it is clicked


class Page(HTMLParser):
    """Elements with attributes, text by element, and whether all that opens closes in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.wrong = [], [], [], []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.wrong.append(f"<{tag}> repeats an attribute")
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else None, data))

    def said(self, *tags):
        return " ".join(data for tag, data in self.text if not tags or tag in tags)

    def all(self, tag):
        return [attrs for found, attrs in self.elements if found == tag]


def check_harmless(page):
    """Nothing runs but our script, and nothing loads."""
    assert page.wrong == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"iframe", "object", "embed", "form", "base", "svg", "video"}
    for tag, attrs in page.elements:
        assert not [name for name in attrs if name.startswith("on") or name == "style"]
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            link = attrs.get(name)
            if link is None:
                continue
            if tag in MAY_LINK:
                assert link.startswith("https://")
            else:
                assert link.startswith("data:")
    (style,) = (data for tag, data in page.text if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    (script,) = (data for tag, data in page.text if tag == "script")
    assert script == (PACKAGE / "page.js").read_text()
    assert page.all("script") == [{}]
    own, ours = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (style, script)
    )
    (policy,) = (x for x in page.all("meta") if x.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == (
        f"default-src 'none'; style-src 'sha256-{own}'; script-src 'sha256-{ours}'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    images = [attrs["src"] for attrs in page.all("img")]
    for image in images:
        head, _, body = image.partition(",")
        assert head == "data:image/svg+xml;base64"
        svg = base64.b64decode(body).decode()
        assert "<script" not in svg
        assert not re.search(r'href="(?!#|data:image/png)', svg)
    return images


@pytest.fixture
def hostile(tmp_path):
    """A metrics file and an allocation with an attack in every name."""
    table = deep_table(5)
    table[1, 2], table[3] = np.nan, np.nan
    metrics = renamed(made_metrics(table), HOSTILE)
    for matrix in metrics.matrices[:3]:
        assert HOSTILE in matrix.tensor
    path = tmp_path / "hostile.metrics.json"
    path.write_text(dumps(metrics))
    whole = renamed(made_metrics(deep_table(5)), HOSTILE)
    allocation = made_allocation(whole, 20)
    allocation = dataclasses.replace(
        allocation,
        metrics=File(HOSTILE.translate(str.maketrans("/\\:", "...")), HOSTILE),
        strategy=dataclasses.replace(allocation.strategy, name=HOSTILE, estimator=HOSTILE),
    )
    other = tmp_path / "hostile.allocation.json"
    other.write_text(dumps(allocation))
    return path, other


def test_nothing_in_a_file_becomes_markup(hostile):
    made = report(*hostile, notes=[HOSTILE])
    made.encode("utf-8")
    page = Page(made)
    assert check_harmless(page)
    assert "<script>fetch('http://evil')</script>" in page.said("td")
    assert "{{7*7}}" in page.said("h1")
    assert escape("<script>") in made
    for bad in ("\x1b", "\u202e", "\ud800"):
        assert bad not in made


@pytest.mark.parametrize("name", ["minilm", "mpnet", "smollm2"])
def test_a_real_models_report(name):
    source = DATA / f"{name}.metrics.json"
    metrics = loads(Metrics, source.read_bytes(), name)
    allocation_file = DATA / f"{name}.allocation.json"
    allocation = loads(Allocation, allocation_file.read_bytes(), name)
    made = report(source, allocation_file)
    page = Page(made)
    assert len(check_harmless(page)) == 5
    cells = page.said("td")
    for layer in metrics.layers:
        assert f"{layer.pl_alpha_hill:.3f}" in cells
        assert layer.prefix in cells
    for matrix in metrics.matrices:
        assert f"{matrix.tensor} " in cells + " "
    rows = re.findall(r"<tr><td>(\d+)</td>.*?</tr>", made, re.DOTALL)
    assert [int(row) for row in rows] == list(range(len(metrics.layers)))
    for file in (source, allocation_file, DATA / f"{name}.spectra.safetensors"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in made
    assert metrics.model.weights_sha256 in made
    assert f"{metrics.tool.name} {metrics.tool.version}" in made
    ties = sum(m.peak_gap == 0 for m in metrics.matrices)
    assert f"two fullest bins in the histogram: {ties} of {len(metrics.matrices)}." in page.said(
        "li"
    )
    assert all(item.tensor in page.said("li") for item in metrics.skipped)
    assert "10.18653" not in made
    assert "qing2024alphalora" in page.said("pre")
    counts = [f"<td>{experts}</td>" for experts in allocation.experts]
    assert all(count in made for count in counts)


def test_the_report_is_the_same_each_time(invoke, tmp_path):
    source = DATA / "minilm.metrics.json"
    done = invoke("report", source)
    assert (done.rc, done.stdout, done.stderr) == (0, "", "wrote minilm.report.html\n")
    text = (tmp_path / "minilm.report.html").read_text()
    done = invoke("report", source, "-o", "-", "-q")
    assert (done.rc, done.stdout, done.stderr) == (0, text, "")
    assert str(DATA) not in text


def cautions_of(tmp_path, metrics, *allocations):
    (tmp_path / "made.metrics.json").write_text(dumps(metrics))
    source = read_result(tmp_path / "made.metrics.json")
    found = cautions(source, source.record, [read_result(path) for path in allocations])
    return " ".join(line for caution in found for line in (caution.text, *caution.items))


def with_matrices(metrics, **changes):
    first = dataclasses.replace(metrics.matrices[0], **changes)
    return dataclasses.replace(metrics, matrices=(first, *metrics.matrices[1:]))


def by_kernel(metrics):
    """The same, as if fitted by the estimator for decisions."""
    settings = dataclasses.replace(metrics.settings, estimator="kde-mean")
    return dataclasses.replace(metrics, settings=settings)


def test_every_caution(tmp_path):
    metrics = made_metrics(deep_table(3))
    assert cautions_of(tmp_path, by_kernel(metrics)) == ""
    assert "The estimator official reproduces a paper." in cautions_of(tmp_path, metrics)
    short = with_matrices(by_kernel(metrics), k=20)
    assert "Tails of fewer than 50 eigenvalues: 1 of 21." in cautions_of(tmp_path, short)
    table = deep_table(3)
    table[0, 1], table[2] = np.nan, np.nan
    said = cautions_of(tmp_path, made_metrics(table))
    assert "Matrices without a fit: 8 of 21." in said
    assert "model.layers.0.k_proj.weight: all eigenvalues are equal" in said
    assert "Layers whose value is the mean of a part of their matrices: 1." in said
    assert "Layers without PL_Alpha_Hill: 1." in said
    assert "Fits to be read with care: 1 of 21." in cautions_of(
        tmp_path, with_matrices(metrics, status="marked", reason="only 12 eigenvalues")
    )
    assert "two fullest bins in the histogram: 1 of 21." in cautions_of(
        tmp_path, with_matrices(metrics, peak_gap=0)
    )
    assert "float32 was not certain to keep the histogram's peak: 1 of 21." in cautions_of(
        tmp_path, with_matrices(metrics, engine="float64 Gram, two stages (float32 not certain)")
    )
    assert "float32 accuracy (engine fast), unguarded: 1 of 21." in cautions_of(
        tmp_path, with_matrices(metrics, engine="float32 band")
    )
    assert "for estimators that look for no histogram's peak: 1 of 21." in cautions_of(
        tmp_path, with_matrices(metrics, engine="float32 band, no peak certified")
    )
    assert "The source is quantised (F8_E4M3)" in cautions_of(
        tmp_path, with_matrices(metrics, dtype="F8_E4M3")
    )
    packed = (Dequantised("gguf", "Q4_K", 21, "gguf 0.19.0"),)
    stored = dataclasses.replace(metrics.model, dequantised=packed)
    assert "The source is quantised (Q4_K)" in cautions_of(
        tmp_path, dataclasses.replace(metrics, model=stored)
    )
    settings = dataclasses.replace(metrics.settings, include=("*mlp*",))
    said = cautions_of(tmp_path, dataclasses.replace(metrics, settings=settings))
    assert "A part of the checkpoint was analysed." in said
    assert "only *mlp*" in said
    median = dataclasses.replace(metrics.settings, estimator="median")
    tied = dataclasses.replace(with_matrices(metrics, peak_gap=0), settings=median)
    assert "two fullest bins" not in cautions_of(tmp_path, tied)


def test_nothing_to_say_is_said(tmp_path):
    path = tmp_path / "made.metrics.json"
    path.write_text(dumps(by_kernel(made_metrics(deep_table(3)))))
    text = Page(report(path)).said("p")
    assert "Nothing in the files calls for caution." in text
    assert "There are no spectra beside the metrics file" in text


def test_an_allocation_of_other_metrics_is_told(tmp_path):
    metrics = made_metrics(deep_table(4))
    for name, layers, sha in (("old", 4, "0" * 64), ("short", 3, None)):
        allocation = made_allocation(made_metrics(deep_table(layers)), 16)
        if sha:
            allocation = dataclasses.replace(allocation, metrics=File("x.metrics.json", sha))
        (tmp_path / f"{name}.allocation.json").write_text(dumps(allocation))
    said = cautions_of(
        tmp_path, metrics, tmp_path / "old.allocation.json", tmp_path / "short.allocation.json"
    )
    assert "old.allocation.json was made from another metrics file than made.metrics.json" in said
    assert "short.allocation.json has 3 layers, the metrics 4." in said


def test_what_to_cite_follows_from_what_was_used():
    metrics = made_metrics(deep_table(4))
    allocation = made_allocation(metrics, 16)

    def keys(estimator, *allocations, **settings):
        used = dataclasses.replace(metrics.settings, estimator=estimator, **settings)
        return {reference.key for reference in references(used, allocations)}

    always = {"zhou2023tempbalance", "martin2021predicting"}
    assert keys("median") == always
    assert keys("ks") == always | {"clauset2009power"}
    assert keys("paper") == always | {"qing2024alphalora"}
    assert keys("official") == always | {"qing2024alphalora", "lu2024alphapruning"}
    assert keys("median", allocation) == always | {"qing2024alphalora", "gao2025mola"}
    from htsr_alloc.records import Farms

    assert keys("median", farms=Farms()) == always | {"hu2025farms"}
    every = references(dataclasses.replace(metrics.settings, farms=Farms()), [allocation])
    for reference in every:
        assert reference.bibtex.count("{") == reference.bibtex.count("}")
        assert reference.url.startswith("https://")
        assert "{" not in reference.line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["minilm.allocation.json"], "A report is about one metrics file, not 0."),
        (["minilm.metrics.json"] * 2, "A report is about one metrics file, not 2."),
        (["minilm.metrics.json", "-o", "no/x.html"], "Cannot write no/x.html: No such file"),
        (["missing.json"], "Cannot read missing.json"),
    ],
)
def test_errors_are_one_sentence(invoke, tmp_path, arguments, sentence):
    for file in DATA.glob("minilm.*"):
        shutil.copy2(file, tmp_path)
    done = invoke("report", *arguments)
    assert done.rc == 1
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) <= 2


# --- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium():
    names = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium-headless-shell")
    return found


QUIET = (  # the browser's own requests: updates, accounts, experiments
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-quic",
    "--disable-sync",
    "--no-default-browser-check",
    "--no-first-run",
)


def browse(chromium, page, folder):
    """What the console said, and every URL that the page asked for on a network.

    The net log marks a request of the browser's own (updates, accounts, the time) by an initiator
    that is "not an origin"; a page's requests, navigation included, have the page as initiator.
    """
    log = folder / "net.json"
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--disable-gpu",
            "--hide-scrollbars",
            *(["--no-sandbox"] if os.getuid() == 0 else []),
            f"--user-data-dir={folder / 'profile'}",
            *QUIET,
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            "--window-size=1150,3000",
            f"--screenshot={folder / 'page.png'}",
            page.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert (folder / "page.png").exists(), done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    started = [e["params"] for e in events if "initiator" in e.get("params", {})]
    asked = {e["url"] for e in started if e["initiator"] != "not an origin"}
    return console, sorted(url for url in asked if url.startswith(("http", "ws", "ftp")))


@pytest.mark.slow
def test_a_browser_has_nothing_to_say_and_asks_for_nothing(chromium, hostile, tmp_path):
    real = tmp_path / "real.html"
    real.write_text(report(DATA / "smollm2.metrics.json", DATA / "smollm2.allocation.json"))
    attacked = tmp_path / "attacked.html"
    attacked.write_text(report(*hostile, notes=[HOSTILE]))
    for page in (real, attacked):
        folder = tmp_path / page.stem
        folder.mkdir()
        assert browse(chromium, page, folder) == ([], [])


@pytest.mark.slow
def test_the_browser_would_have_told(chromium, tmp_path):
    """The same check on a page that does what a report must not do."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<img src='http://127.0.0.1:9/x.png'><link rel=stylesheet href='http://127.0.0.1:9/s.css'>"
        "<script>console.error('bad'); fetch('http://127.0.0.1:9/f')</script>"
    )
    console, asked = browse(chromium, page, tmp_path)
    assert any("bad" in line for line in console)
    assert asked == [f"http://127.0.0.1:9/{name}" for name in ("f", "s.css", "x.png")]


@pytest.mark.slow
def test_the_tables_sort_and_filter(chromium, tmp_path):
    """A driver appended to the page clicks and types, and writes what it sees into the title."""
    made = report(DATA / "smollm2.metrics.json", DATA / "smollm2.allocation.json")
    driver = (
        "const t = document.querySelectorAll('table.data'); const see = (n, c) =>"
        "[...t[n].tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[c].textContent);"
        "const head = t[0].tHead.rows[0].cells[3], out = {};"
        "head.firstChild.click(); out.up = see(0, 3);"
        "head.firstChild.click(); out.down = see(0, 3);"
        "const box = document.querySelectorAll('div.tools input')[2];"
        "box.value = 'layers.10. V_proj';"
        "box.dispatchEvent(new Event('input')); out.kept = see(2, 0);"
        "out.sort = head.getAttribute('aria-sort');"
        "document.title = JSON.stringify(out);"
    )
    digest = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
    made = made.replace("script-src ", f"script-src 'sha256-{digest}' ")
    page = tmp_path / "page.html"
    page.write_text(made.replace("</body>", f"<script>{driver}</script></body>"))
    done = subprocess.run(
        [
            chromium, "--headless", "--disable-gpu", *QUIET, "--dump-dom",
            *(["--no-sandbox"] if os.getuid() == 0 else []),
            f"--user-data-dir={tmp_path / 'profile'}", page.as_uri(),
        ],
        capture_output=True, encoding="utf-8", timeout=120, check=True,
    )  # fmt: skip
    seen = json.loads(re.search("<title>(.*?)</title>", done.stdout)[1])
    metrics = loads(Metrics, (DATA / "smollm2.metrics.json").read_bytes(), "smollm2")
    values = sorted(layer.pl_alpha_hill for layer in metrics.layers)
    assert seen["up"] == [f"{value:.3f}" for value in values]
    assert seen["down"] == seen["up"][::-1]
    assert seen["sort"] == "descending"
    assert seen["kept"] == [
        m.tensor for m in metrics.matrices if m.layer == 10 and m.role == "v_proj"
    ]


@pytest.mark.slow
def test_the_figures_are_seen(chromium, tmp_path):
    """The policy lets the images through: their colours are on the screen."""
    image = pytest.importorskip("PIL.Image")
    page = tmp_path / "page.html"
    page.write_text(report(DATA / "minilm.metrics.json", DATA / "minilm.allocation.json"))
    browse(chromium, page, tmp_path)
    colours = image.open(tmp_path / "page.png").convert("RGB").getcolors(1 << 24)
    count = {colour: number for number, colour in colours}
    assert count.get((0xB5, 0xDC, 0xF4), 0) > 2000  # bars of the allocation
    assert count.get((0xFE, 0xE8, 0x38), 0) > 200  # the heat map's brightest
    assert count.get((0xFF, 0xF6, 0xE0), 0) > 2000  # the cautions' box, by the page's own style
