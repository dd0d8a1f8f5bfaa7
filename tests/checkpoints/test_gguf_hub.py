"""GGUF files of a hub, against a real HTTP server on the loopback interface."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("gguf", reason="needs the extra [quantized]")

from gguf import GGMLQuantizationType
from helpers.ggufs import weights, write
from helpers.hubs import (
    COMMIT,
    NEXT_COMMIT,
    OLD_COMMIT,
    client,
    facts,
    listing_of,
    sentence,
    serving,
)

BIG = "tiny.F32.gguf"
SUB = "x/all F32"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Three models at main, one in a sub-folder; one at v0; one of two files at the next commit."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "old", "next"):
        (folder / name).mkdir()
    tensors = weights()
    write(folder / "tiny" / BIG, tensors)
    for name in ("tiny", "old"):
        write(folder / name / "tiny.Q8_0.gguf", tensors, default=GGMLQuantizationType.Q8_0)
    halves = list(tensors)[:9], list(tensors)[9:]
    (folder / "tiny" / SUB).mkdir(parents=True)
    for i, names in enumerate(halves):
        part = f"tiny-0000{i + 1}-of-00002.gguf"
        write(folder / "next" / part, {name: tensors[name] for name in names})
        write(folder / "tiny" / SUB / part, {name: tensors[name] for name in names})
    with serving(folder) as hub:
        yield hub


@pytest.fixture
def fresh(hub):
    hub.reset()
    return hub


def metrics(folder, name="tiny.F32"):
    return folder / f"{name}.metrics.json"


@pytest.mark.parametrize("way", [(), ("--stream",), ("--drop-shards",)])
def test_a_named_file_is_what_it_is_on_disk(fresh, way, tmp_path, invoke):
    there = tmp_path / "there"
    there.mkdir()
    done = client(fresh.url, there, "analyze", f"org/tiny/{BIG}", "--estimator", "median", *way)
    assert done.rc == 0, done.stderr
    assert invoke("analyze", fresh.folder / BIG, "--estimator", "median").rc == 0
    model = json.loads(metrics(there).read_text())["model"]
    assert (model["name"], model["revision"]) == ("org/tiny/tiny.F32", COMMIT)
    assert facts(metrics(there)) == facts(metrics(tmp_path))
    kept = [path for path in there.rglob("*") if path.is_file() and path.stat().st_size > 10**6]
    assert all("spectra" in path.name for path in kept) == (way != ())
    names = {name for name, *_ in fresh.downloads()}
    assert names == (set() if way == ("--stream",) else {BIG})


def test_offline_it_is_read_from_the_cache(fresh, tmp_path):
    source = f"org/tiny/{BIG}"
    assert client(fresh.url, tmp_path, "analyze", source, "-o", "a.metrics.json").rc == 0
    done = client(fresh.url, tmp_path, "analyze", source, "--offline", "-o", "b.metrics.json")
    assert done.rc == 0, done.stderr
    assert facts(metrics(tmp_path, "a")) == facts(metrics(tmp_path, "b"))


def test_nothing_but_the_header_is_read_to_plan(fresh, tmp_path):
    done = client(fresh.url, tmp_path, "inspect", f"org/tiny/{BIG}")
    assert done.rc == 0, done.stderr
    assert fresh.downloads() == []
    asked = [r for r in fresh.requests if r["path"].endswith(BIG)]
    assert 0 < sum(r["sent"] for r in asked) < (fresh.folder / BIG).stat().st_size / 5


def test_the_only_model_needs_no_name_and_one_of_several_does(fresh, tmp_path):
    done = client(fresh.url, tmp_path, "inspect", "org/tiny", "--revision", OLD_COMMIT, "--json")
    assert done.rc == 0, done.stderr
    assert "Q8_0" in done.stdout
    done = client(fresh.url, tmp_path, "inspect", "org/tiny")
    assert "org/tiny holds GGUF files and no safetensors" in sentence(done)
    assert f"Name one of them, as org/tiny/{BIG}" in done.stderr
    done = client(fresh.url, tmp_path, "inspect", "org/tiny/no.gguf")
    assert "no.gguf is not in org/tiny" in sentence(done)


def test_a_model_of_several_files(fresh, tmp_path):
    at = ("--revision", NEXT_COMMIT, "--estimator", "median")
    done = client(fresh.url, tmp_path, "analyze", "org/tiny", *at)
    assert done.rc == 0, done.stderr
    whole = client(
        fresh.url,
        tmp_path,
        "analyze",
        f"org/tiny/{BIG}",
        "--estimator",
        "median",
        "-o",
        "w.metrics.json",
    )
    assert whole.rc == 0, whole.stderr
    split, one = (json.loads(metrics(tmp_path, n).read_text()) for n in ("tiny", "w"))
    assert split["matrices"] == one["matrices"]


@pytest.mark.parametrize("way", [(), ("--stream",), ("--drop-shards",)])
def test_a_model_in_a_sub_folder(fresh, way, tmp_path, invoke):
    there = tmp_path / "there"
    there.mkdir()
    source = f"org/tiny/{SUB}/tiny-00001-of-00002.gguf"
    done = client(fresh.url, there, "analyze", source, "--estimator", "median", *way)
    assert done.rc == 0, done.stderr
    assert invoke("analyze", fresh.folder / BIG, "--estimator", "median", "-o", "w.json").rc == 0
    made, whole = (json.loads(p.read_text()) for p in (metrics(there, "tiny"), tmp_path / "w.json"))
    assert made["model"]["name"] == f"org/tiny/{SUB}/tiny"
    assert made["matrices"] == whole["matrices"]
    left = {path.name for path in there.rglob("*.gguf")}
    assert left == (set() if way else {f"tiny-0000{i}-of-00002.gguf" for i in (1, 2)})


def test_offline_a_sub_folder_is_read_from_the_cache(fresh, tmp_path):
    source = f"org/tiny/{SUB}/tiny-00001-of-00002.gguf"
    assert client(fresh.url, tmp_path, "analyze", source, "-o", "a.metrics.json").rc == 0
    (link,) = (tmp_path / "hf").rglob("*00001-of-00002.gguf")
    assert link.is_symlink()
    assert link.resolve().parent.name == "blobs"
    for i, at in enumerate([(), ("--revision", COMMIT)]):  # by what was listed, and without it
        for folder in tmp_path.glob("hf/hub/htsr") if at else ():
            shutil.rmtree(folder)
        out = tmp_path / f"{i}.metrics.json"
        done = client(fresh.url, tmp_path, "analyze", source, "--offline", *at, "-o", out)
        assert done.rc == 0, done.stderr
        assert facts(metrics(tmp_path, "a")) == facts(out)


@pytest.mark.parametrize(
    ("name", "listed"),
    [("x/y/m.gguf", True), ("m.gguf", True), ("x/m.safetensors", False), ("../m.gguf", False),
     ("x/../m.gguf", False), ("/m.gguf", False), ("x//m.gguf", False), ("x/./m.gguf", False),
     ("x\\y/m.gguf", False), ("x/m.gguf\n", False)],
)  # fmt: skip
def test_of_a_sub_folder_only_gguf_files_are_listed(name, listed):
    sibling = {"rfilename": name, "size": 8, "blobId": "a" * 40}
    text = json.dumps({"sha": COMMIT, "siblings": [sibling]}).encode()
    _, names, remote = listing_of(text)
    assert (names == [name], name in remote) == (listed, listed)


def test_a_damaged_download_is_refused(fresh, tmp_path):
    where = (fresh.folder / BIG).stat().st_size - 100
    fresh.reset({"path": f"/cdn/.*{BIG}", "do": "corrupt", "at": where, "skip": 1, "times": 1000})
    done = client(fresh.url, tmp_path, "analyze", f"org/tiny/{BIG}")
    assert "does not match the SHA-256" in sentence(done)
