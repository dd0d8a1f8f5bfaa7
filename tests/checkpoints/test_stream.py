"""Weights of a hub's repository: streamed, dropped, kept; through faults, to the same bytes."""

import itertools
import json
import subprocess
import sys
import textwrap
import time

import pytest
from helpers.hubs import (
    COMMIT,
    FILES,
    GAUNTLET,
    WAYS,
    client,
    client_environment,
    facts,
    sentence,
    serving,
)

SPECTRA = "tiny.spectra.safetensors"


@pytest.fixture
def hub(tiny_hub):
    tiny_hub.reset()
    return tiny_hub


@pytest.fixture(scope="module")
def local(tiny_hub, tmp_path_factory):
    """The folder with the files' own analysis."""
    from htsr_alloc import Settings, analyze, open_checkpoint
    from htsr_alloc.analysis.outputs import RunFiles

    folder = tmp_path_factory.mktemp("local")
    analyze(open_checkpoint(tiny_hub.folder), Settings("official"), RunFiles(folder / "tiny.json"))
    return folder


def go(hub, cwd, way, *args, **env):
    return client(hub.url, cwd, "analyze", "org/tiny", *WAYS[way], *args, **env)


def same(cwd, local):
    spectra = (cwd / SPECTRA).read_bytes() == (local / SPECTRA).read_bytes()
    return spectra and facts(cwd / "tiny.metrics.json") == facts(local / "tiny.json")


def test_streaming_gives_the_same_bytes_and_writes_nothing_else(hub, local, tmp_path):
    done = go(hub, tmp_path, "stream")
    assert done.rc == 0, done.stderr
    assert same(tmp_path, local)
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"tiny.metrics.json", SPECTRA}
    assert "on disk at a time: 0 B" in done.stderr


def test_streaming_asks_for_each_matrix_once_and_for_nothing_else(hub, tmp_path):
    assert go(hub, tmp_path, "stream", "-q").rc == 0
    found = json.loads((tmp_path / "tiny.metrics.json").read_text())
    store = [r for r in hub.requests if "/cdn/" in r["path"] and r["range"]]
    headers = [r for r in store if r["range"].startswith("bytes=0-")]
    assert len(headers) == 3
    assert len(store) - len(headers) == len(found["matrices"])
    wanted = sum(4 * m["shape"][0] * m["shape"][1] for m in found["matrices"])
    assert sum(r["sent"] for r in store if r not in headers) == wanted
    assert {r["path"].split("/")[2] for r in store} == {COMMIT}


def test_dropped_shards_leave_no_weights_and_the_same_bytes(hub, local, tmp_path):
    done = go(hub, tmp_path, "drop")
    assert done.rc == 0, done.stderr
    assert same(tmp_path, local)
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {SPECTRA}
    assert not list(tmp_path.rglob("shards"))
    sizes = [(hub.folder / name).stat().st_size for name in FILES]
    most = max(a + b for a, b in itertools.pairwise(sizes))
    assert f"on disk at a time: {most / 1000:.1f} kB" in done.stderr


def test_what_is_in_the_cache_already_is_used_and_stays(hub, local, tmp_path):
    assert go(hub, tmp_path, "keep", "-q").rc == 0
    before = sorted(path for path in (tmp_path / "hf").rglob("*.safetensors"))
    assert len(before) == 3
    hub.reset()
    assert go(hub, tmp_path, "drop", "-q").rc == 0
    assert hub.downloads() == []
    assert {r["range"].split("-")[0] for r in hub.requests if "/cdn/" in r["path"]} == {"bytes=0"}
    assert sorted(path for path in (tmp_path / "hf").rglob("*.safetensors")) == before
    assert same(tmp_path, local)


@pytest.mark.parametrize("way", WAYS)
def test_the_disk_is_told_beforehand(hub, tmp_path, way):
    sizes = [(hub.folder / name).stat().st_size for name in FILES]
    args = ["inspect", "org/tiny", "--json", *WAYS[way]]
    told = json.loads(client(hub.url, tmp_path, *args).stdout)
    disk = {"keep": sum(sizes), "stream": 0}
    disk["drop"] = max(a + b for a, b in itertools.pairwise(sizes))
    assert told["disk_bytes"] == disk[way]
    assert (told["download_bytes"] == sum(sizes)) == (way != "stream")
    assert 0 < told["download_bytes"] <= sum(sizes)


@pytest.mark.parametrize("way", WAYS)
def test_faults_of_the_network_change_nothing(hub, local, tmp_path, way):
    hub.reset(*GAUNTLET)
    done = go(hub, tmp_path, way, "-q")
    assert done.rc == 0, done.stderr
    assert same(tmp_path, local)
    assert sum(r["status"] >= 429 for r in hub.requests) == 3
    assert sum(r["fault"] is not None for r in hub.requests) >= len(GAUNTLET)


@pytest.mark.parametrize("way", ["drop", "keep"])
def test_a_shard_that_arrives_damaged_is_noticed_by_its_hash(hub, local, tmp_path, way):
    hub.reset({"path": "/cdn/.*00003-of", "do": "corrupt", "at": 70_000, "skip": 1})
    text = sentence(go(hub, tmp_path, way, "-q"))
    assert "SHA-256" in text
    assert not (tmp_path / "tiny.metrics.json").exists()
    assert (tmp_path / "tiny.journal").exists()
    assert go(hub, tmp_path, way, "-q").rc == 0
    assert same(tmp_path, local)


@pytest.mark.parametrize("fault", ["whole", "long", "size", "commit"])
def test_an_answer_of_another_kind_is_one_sentence(hub, tmp_path, fault):
    path = "/resolve/.*00002-of" if fault == "commit" else "/cdn/.*00002-of"
    hub.reset({"path": path, "do": fault, "skip": 1, "times": 100})
    assert FILES[1] in sentence(go(hub, tmp_path, "stream", "-q"))


def test_the_network_that_stays_away_keeps_what_was_done(hub, local, tmp_path):
    hub.reset({"path": "/cdn/", "do": "status", "status": 503, "skip": 8, "times": 1000})
    text = sentence(go(hub, tmp_path, "stream", "-q", "--workers", 1))
    assert "org/tiny" in text
    lines = (tmp_path / "tiny.journal").read_bytes().splitlines()
    assert len(lines) == 1 + 8 - 3  # one request a matrix, after three headers
    hub.reset()
    assert go(hub, tmp_path, "stream", "-q").rc == 0
    assert same(tmp_path, local)
    fetched = [r for r in hub.requests if "/cdn/" in r["path"]]
    assert len(fetched) == 3 + 21 - (len(lines) - 1)  # headers, and the matrices that were missing


def test_a_killed_download_goes_on_inside_its_shard(hub, local, tmp_path):
    hub.reset({"path": "/cdn/.*00001-of", "do": "slow", "chunk": 10_000, "wait": 0.1, "skip": 3})
    small_pieces = (
        "import sys; from htsr_alloc.checkpoints import cache; cache.PIECE = 50_000; "
        "from htsr_alloc.cli.main import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", small_pieces, "analyze", "org/tiny", "--drop-shards", "-q"],
        cwd=tmp_path,
        env=client_environment(hub.url, tmp_path),
    )
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.rglob("*.partial")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    (partial,) = tmp_path.rglob("*.partial")
    there = partial.stat().st_size
    hub.reset()
    assert go(hub, tmp_path, "drop", "-q").rc == 0
    assert same(tmp_path, local)
    ranges = [r["range"] for r in hub.requests if "/cdn/" in r["path"] and FILES[0] in r["path"]]
    assert f"bytes={there}-" in ranges[1]


def test_streaming_a_local_folder_or_offline_is_refused(hub, tmp_path, invoke):
    assert "nothing to stream" in sentence(invoke("analyze", hub.folder, "--stream"))
    assert "no shards to drop" in sentence(invoke("analyze", "org/t", "--stream", "--drop-shards"))
    assert "--offline excludes" in sentence(go(hub, tmp_path, "stream", "--offline"))


MEASURE = """
    import re, sys
    from htsr_alloc.cli.main import app
    app(sys.argv[1:], standalone_mode=False)
    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_streaming_holds_no_more_than_reading(tmp_path):
    """The same peak for 10 and for 60 matrices of 2 MiB: 100 MiB more pass through."""
    import torch
    from helpers.commands import write_shards

    peaks = {}
    for count in (10, 60):
        weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
        parts = {f"h.{i}.mlp.w.weight": weight.roll(i, 0).contiguous() for i in range(count)}
        write_shards(tmp_path / str(count) / "tiny", [parts])
        arguments = ["analyze", "org/tiny", "-q", "--stream", "--workers", "2"]
        with serving(tmp_path / str(count)) as hub:
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(MEASURE), *arguments],
                env=client_environment(hub.url, tmp_path),
                cwd=tmp_path / str(count),
                capture_output=True,
                encoding="utf-8",
                check=True,
            )
        peaks[count] = int(done.stdout.splitlines()[-1]) << 10
    assert peaks[60] - peaks[10] < 48 << 20  # malloc settles at 17 to 27 MiB
