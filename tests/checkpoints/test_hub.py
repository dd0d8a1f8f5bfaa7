"""The hub client against a real HTTP server on the loopback interface."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.commands import Result, llama
from helpers.hubs import (
    CANARY,
    COMMIT,
    FILES,
    NEXT_COMMIT,
    NOWHERE,
    OLD_COMMIT,
    client,
    client_environment,
    facts,
    model_files,
    sentence,
    serving,
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    model_files(folder / "tiny")
    model_files(folder / "next", seed=1)
    (folder / "tiny" / "pytorch_model.bin").write_bytes(b"never fetched")
    with serving(folder) as hub:
        yield hub


@pytest.fixture
def fresh(hub):
    hub.reset()
    return hub


class Run(NamedTuple):
    folder: Path
    result: Result
    requests: list
    downloads: list


@pytest.fixture(scope="module")
def analysed(hub, tmp_path_factory):
    """One analysis from the hub with a token, into a fresh cache."""
    folder = tmp_path_factory.mktemp("analysed")
    hub.reset()
    result = client(hub.url, folder, "analyze", "org/tiny", "--token", CANARY, "--workers", 2)
    return Run(folder, result, hub.requests, hub.downloads())


def load(path):
    return json.loads(path.read_text())


def test_analyze_from_the_hub_equals_the_local_folder(analysed, hub, tmp_path, invoke):
    assert analysed.result.rc == 0, analysed.result.stderr
    assert invoke("analyze", hub.folder).rc == 0
    there, here = analysed.folder / "tiny.metrics.json", tmp_path / "tiny.metrics.json"
    assert (load(there)["model"]["name"], load(here)["model"]["name"]) == ("org/tiny", "tiny")
    assert (load(there)["model"]["revision"], load(here)["model"]["revision"]) == (COMMIT, None)
    assert facts(there) == facts(here)
    spectra = "tiny.spectra.safetensors"
    assert (analysed.folder / spectra).read_bytes() == (tmp_path / spectra).read_bytes()


def test_headers_come_by_ranges_before_any_shard(analysed):
    asked = [r for r in analysed.requests if r["path"].endswith(".safetensors")]
    ranged = [r for r in asked if r["range"] and "/cdn/" in r["path"]]
    assert {r["path"].rpartition("/")[2] for r in ranged} == set(FILES)
    assert max(r["end"] for r in ranged) <= min(start for _, start, _ in analysed.downloads)


def test_shards_are_fetched_once_one_at_a_time_and_nothing_else(analysed):
    # Each of two workers asks for its matrix's shard: which of two neighbours comes first is open.
    assert sorted(name for name, _, _ in analysed.downloads) == FILES
    for (_, _, end), (_, start, _) in itertools.pairwise(analysed.downloads):
        assert end <= start
    assert not any(r["path"].endswith(".bin") for r in analysed.requests)


def test_every_request_after_the_first_names_the_commit(analysed):
    assert analysed.requests[0]["path"] == "/api/models/org/tiny"
    named = [r["path"].split("/") for r in analysed.requests if "/resolve/" in r["path"]]
    assert {parts[4] for parts in named} == {COMMIT}
    assert sum("/api/" in r["path"] for r in analysed.requests) == 1


def test_the_token_is_sent_and_never_shown(analysed):
    assert analysed.requests[0]["authorization"] == f"Bearer {CANARY}"
    store = {r["authorization"] for r in analysed.requests if "/cdn/" in r["path"]}
    assert store == {None}
    assert CANARY not in analysed.result.stdout + analysed.result.stderr
    for path in analysed.folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_offline_works_from_the_cache_with_the_server_gone(analysed, tmp_path):
    cache = str(analysed.folder / "hf")
    done = client(NOWHERE, tmp_path, "analyze", "org/tiny", "--offline", "-q", HF_HOME=cache)
    assert done.rc == 0, done.stderr
    there, here = load(analysed.folder / "tiny.metrics.json"), load(tmp_path / "tiny.metrics.json")
    assert here["model"] == there["model"]
    assert facts(analysed.folder / "tiny.metrics.json") == facts(tmp_path / "tiny.metrics.json")


# Fails on any attempt to resolve a name or to open an internet socket.
GUARD = """
import socket, sys
from htsr_alloc.cli.main import main

class Guard(socket.socket):
    def __init__(self, family=-1, *rest, **options):
        assert family == socket.AF_UNIX, "a socket was opened"
        super().__init__(family, *rest, **options)

def no_lookup(*_, **__):
    raise AssertionError("a name was looked up")

socket.socket, socket.getaddrinfo, socket.create_connection = Guard, no_lookup, no_lookup
sys.argv = ["htsr", *sys.argv[1:]]
main()
"""


def guarded(home, cwd, *args):
    return subprocess.run(
        [sys.executable, "-c", GUARD, *args],
        cwd=cwd,
        env=client_environment(NOWHERE, home),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_offline_opens_no_socket(analysed, tmp_path):
    done = guarded(analysed.folder, tmp_path, "analyze", "org/tiny", "--offline", "-q")
    assert done.returncode == 0, done.stderr
    online = guarded(analysed.folder, tmp_path, "inspect", "org/tiny")
    assert online.returncode != 0  # the guard works
    assert "AssertionError" in online.stderr


def opened(url, cache, repo, offline="0", **arguments):
    """(revision, number of tensors) by the library in a process of its own; no torch."""
    script = (
        "import sys, htsr_alloc\n"
        f"found = htsr_alloc.open_checkpoint({repo!r}, **{arguments!r})\n"
        "print(found.revision, len(found.tensors))"
    )
    env = client_environment(url, cache, HF_HOME=str(cache), HF_HUB_OFFLINE=offline)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**env, "HF_TOKEN": CANARY},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert CANARY not in done.stdout + done.stderr
    return tuple(done.stdout.split())


def test_offline_by_commit_and_by_the_environment(analysed):
    cache = analysed.folder / "hf"
    found = opened(NOWHERE, cache, "org/tiny", offline="1", revision=COMMIT)
    assert found == (COMMIT, str(len(llama(3))))


def test_only_the_shards_that_are_needed_are_fetched_and_suffice_offline(fresh, tmp_path):
    chosen = ["org/tiny", "--revision", "v0", "--include", "*layers.2.*"]
    cache = ["--cache-dir", tmp_path / "cache"]
    assert client(fresh.url, tmp_path, "analyze", *chosen, *cache, "-q").rc == 0
    assert [name for name, _, _ in fresh.downloads()] == FILES[2:]
    online = tmp_path / "tiny.metrics.json"
    assert load(online)["model"]["revision"] == OLD_COMMIT
    assert any((tmp_path / "cache").rglob("*.safetensors"))
    assert not any((tmp_path / "hf").rglob("*.safetensors"))
    offline = tmp_path / "offline.metrics.json"
    again = [*chosen, *cache, "--offline", "-q", "-o", offline]
    assert client(NOWHERE, tmp_path, "analyze", *again).rc == 0
    assert facts(offline) == facts(online)
    # What is not there is named, before any work.
    whole = ["org/tiny", "--revision", "v0", *cache, "--offline", "-o", tmp_path / "x.json"]
    text = sentence(client(NOWHERE, tmp_path, "analyze", *whole))
    assert FILES[0] in text
    assert "not in the local cache" in text
    assert not (tmp_path / "x.journal").exists()


def test_a_repository_without_a_configuration_is_found_offline_by_its_branch(fresh, tmp_path):
    (fresh.folder / "config.json").rename(fresh.folder.parent / "config.json")
    try:
        assert client(fresh.url, tmp_path, "analyze", "org/tiny", "-q").rc == 0
    finally:
        (fresh.folder.parent / "config.json").rename(fresh.folder / "config.json")
    done = client(NOWHERE, tmp_path, "analyze", "org/tiny", "--offline", "-q", "-o", "x.json")
    assert done.rc == 0, done.stderr


def test_a_cache_that_another_tool_filled_is_read_offline(fresh, tmp_path):
    script = "import huggingface_hub; huggingface_hub.snapshot_download('org/tiny')"
    env = client_environment(fresh.url, tmp_path)
    subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True)
    done = client(NOWHERE, tmp_path, "inspect", "org/tiny", "--offline", "--json")
    assert done.rc == 0, done.stderr
    assert json.loads(done.stdout)["revision"] == COMMIT


def test_a_branch_that_moves_while_it_is_read_changes_nothing(fresh, analysed, tmp_path):
    fresh.reset({"path": "/resolve/.*config.json", "do": "move", "to": "next"})
    assert client(fresh.url, tmp_path, "analyze", "org/tiny", "-q").rc == 0
    found = tmp_path / "tiny.metrics.json"
    assert facts(found) == facts(analysed.folder / "tiny.metrics.json")
    assert load(found)["model"]["revision"] == COMMIT
    assert client(fresh.url, tmp_path, "analyze", "org/tiny", "-q", "-o", "next.json").rc == 0
    assert load(tmp_path / "next.json")["model"]["revision"] == NEXT_COMMIT


def test_a_gated_repository_opens_with_a_token_from_the_environment(fresh, tmp_path):
    text = sentence(client(fresh.url, tmp_path, "inspect", "org/gated"))
    assert "org/gated is gated" in text
    found = opened(fresh.url, tmp_path / "hf", "org/gated")
    assert found == (COMMIT, str(len(llama(3))))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["org/absent"], "There is no repository org/absent, or it is private."),
        (["org/tiny", "--revision", "v9"], "org/tiny has no revision v9."),
        (["org/broken"], "The hub's answer for org/broken cannot be used"),
        (["org/tiny", "--offline"], "org/tiny is not in the local cache"),
        (["org/tiny--x..y"], "not a valid hub id"),
    ],
)
def test_failures_are_one_sentence(fresh, tmp_path, args, said):
    done = client(fresh.url, tmp_path, "analyze", *args, "--token", CANARY)
    assert said in sentence(done)
    assert CANARY not in done.stderr
    assert not list(tmp_path.glob("*.json"))
    if "--offline" in args:
        assert fresh.requests == []


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    done = client(NOWHERE, tmp_path, "inspect", "org/tiny")
    assert "The hub cannot be reached for org/tiny: " in sentence(done)
    assert "Check the network, or give a file or folder on this machine." in done.stderr


@pytest.fixture
def own_hub(tmp_path):
    """A hub with files that a test may damage."""
    model_files(tmp_path / "files" / "tiny")
    with serving(tmp_path / "files") as hub:
        yield hub


def test_a_shard_that_is_no_safetensors_is_one_sentence(own_hub, tmp_path):
    (own_hub.folder / FILES[1]).write_bytes(b"\xff" * 64)
    assert "org/tiny" in sentence(client(own_hub.url, tmp_path, "inspect", "org/tiny"))
    (own_hub.folder / "model.safetensors.index.json").write_text("{")
    text = sentence(client(own_hub.url, tmp_path, "inspect", "org/tiny", "--cache-dir", "other"))
    assert "model.safetensors.index.json is not JSON" in text


def test_a_shard_whose_data_does_not_fit_its_header_is_refused(own_hub, tmp_path):
    entry = {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 64]}  # 4096 elements, 16 stored
    header = json.dumps({"h.0.a.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    for file in own_hub.folder.iterdir():
        file.unlink()
    (own_hub.folder / "model.safetensors").write_bytes(data)
    text = sentence(client(own_hub.url, tmp_path, "analyze", "org/tiny"))
    assert "is not a whole safetensors file" in text
    assert own_hub.downloads() == []


def test_a_shard_that_is_damaged_in_the_cache_is_refetched_online_and_kept_offline(fresh, tmp_path):
    assert client(fresh.url, tmp_path, "analyze", "org/tiny", "-q").rc == 0
    (snapshot,) = (tmp_path / "hf").rglob(FILES[2])
    blob = snapshot.resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1])
    offline = ["analyze", "org/tiny", "--offline", "-q", "-o", "x.json"]
    assert "in the local cache" in sentence(client(NOWHERE, tmp_path, *offline))
    assert blob.exists()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    online = ["analyze", "org/tiny", "-q", "-o", "x.json", "--restart"]
    assert "SHA-256" in sentence(client(fresh.url, tmp_path, *online))
    assert client(fresh.url, tmp_path, *online).rc == 0
    assert blob.read_bytes() == data
