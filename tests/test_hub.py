"""The hub client against a real HTTP server on the loopback interface."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Result, environment, llama, write_shards

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "f" * 40
CANARY = "hf_canaryCANARYcanary0123456789"


class Request(NamedTuple):
    method: str
    path: str
    range: str | None
    authorization: str | None
    start: float
    end: float
    sent: int


@dataclass
class Hub:
    """What the real hub answers, for one repository with two revisions and some that fail."""

    folder: Path
    url: str = ""
    requests: list[Request] = field(default_factory=list)

    def downloads(self):
        """Whole files, in the order they were asked for: [(name, start, end)]."""
        whole = [r for r in self.requests if r.method == "GET" and r.range is None and r.sent]
        return [(r.path.rpartition("/")[2], r.start, r.end) for r in whole if "/cdn/" in r.path]


def make_handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            start = time.monotonic()
            status, headers, body = self.respond()
            span = self.headers.get("Range")
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", span or "")
            if status == 200 and match:
                first, last = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                status, body = 206, body[first : last + 1]
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if with_body:
                self.wfile.write(body)
            hub.requests.append(
                Request(
                    self.command,
                    self.path.partition("?")[0],
                    span,
                    self.headers.get("Authorization"),
                    start,
                    time.monotonic(),
                    len(body) if with_body else 0,
                )
            )

        def respond(self):
            path = self.path.partition("?")[0].strip("/").split("/")
            if path[0] == "cdn":
                time.sleep(0.05 if self.headers.get("Range") is None else 0)
                body = (hub.folder / path[-1]).read_bytes()
                return 200, {"ETag": quoted_hash(body), "Accept-Ranges": "bytes"}, body
            repo = "/".join(path[2:4] if path[0] == "api" else path[:2])
            if repo == "org/broken":
                return 500, {}, b"oops " + CANARY.encode()
            if repo == "org/gated" and self.headers.get("Authorization") != "Bearer " + CANARY:
                return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
            if repo not in ("org/tiny", "org/gated"):
                return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
            if path[0] == "api":
                return self.info(repo, path[5] if len(path) > 5 else "main")
            return self.file(repo, path[3], path[4])

        def info(self, repo, revision):
            commit = {"main": COMMIT, COMMIT: COMMIT, "v0": OLD_COMMIT}.get(revision)
            if commit is None:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = []
            for file in sorted(hub.folder.iterdir()):
                digest = quoted_hash(file.read_bytes()).strip('"')
                blob = {"blobId": digest[:40], "size": file.stat().st_size}
                siblings.append({"rfilename": file.name, **blob})
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
            body = json.dumps({**info, "private": False, "tags": [], "downloads": 0, "likes": 0})
            return 200, {"Content-Type": "application/json"}, body.encode()

        def file(self, repo, revision, name):
            commit = {"main": COMMIT, COMMIT: COMMIT, "v0": OLD_COMMIT}.get(revision, OLD_COMMIT)
            if not (hub.folder / name).is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            body = (hub.folder / name).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": quoted_hash(body), "Accept-Ranges": "bytes"}
            if not name.endswith(".safetensors"):
                return 200, headers, body
            # Large files are redirected to a store, as LFS files are.
            headers |= {"X-Linked-Etag": quoted_hash(body), "X-Linked-Size": len(body)}
            store = hub.url.replace("127.0.0.1", "localhost")  # another host to the client
            return 302, {**headers, "Location": f"{store}/cdn/{repo}/{name}"}, b""

    return Handler


def quoted_hash(body):
    return f'"{hashlib.sha256(body).hexdigest()}"'


def serve(hub):
    server = ThreadingHTTPServer(("127.0.0.1", 0), make_handler(hub))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server


def client(hub, cwd, *args, **env):
    """The command in a process of its own, with this hub and an empty home."""
    values = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cwd / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-m", "htsr_alloc", *map(str, args)],
        cwd=cwd,
        env=environment(**values),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def sentence(result):
    """The one line a failure says, after checking that it is one."""
    assert result.rc == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].endswith(".")
    return errors[0]


def model_files(folder):
    parts = [{}, {}, {}]
    for name, tensor in llama(3).items():
        # The second shard has one matrix, so that two workers want two shards at the same time.
        shard = 2 if "layers.2" in name else int(name == "model.layers.1.mlp.up_proj.weight")
        parts[shard][name] = tensor
    return write_shards(
        folder,
        parts,
        config={"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3},
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = Hub(model_files(tmp_path_factory.mktemp("hub") / "tiny"))
    (hub.folder / "pytorch_model.bin").write_bytes(b"never fetched")
    server = serve(hub)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def fresh(hub):
    hub.requests.clear()
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
    hub.requests.clear()
    result = client(hub, folder, "analyze", "org/tiny", "--token", CANARY, "--workers", 2)
    return Run(folder, result, list(hub.requests), hub.downloads())


def load(path):
    return json.loads(path.read_text())


def test_analyze_from_the_hub_equals_the_local_folder(analysed, hub, tmp_path, invoke):
    assert analysed.result.rc == 0, analysed.result.stderr
    assert invoke("analyze", hub.folder).rc == 0
    there, here = load(analysed.folder / "tiny.metrics.json"), load(tmp_path / "tiny.metrics.json")
    assert there["model"].pop("name") == "org/tiny"
    assert here["model"].pop("name") == "tiny"
    assert there["model"].pop("revision") == COMMIT
    assert here["model"].pop("revision") is None
    assert there.pop("tool")["version"] == here.pop("tool")["version"]
    assert there == here
    spectra = "tiny.spectra.safetensors"
    assert (analysed.folder / spectra).read_bytes() == (tmp_path / spectra).read_bytes()


def test_headers_come_by_ranges_before_any_shard(analysed):
    shards = [r for r in analysed.requests if r.path.endswith(".safetensors") and r.method == "GET"]
    header_paths = {r.path.rpartition("/")[2] for r in shards if r.range and "/cdn/" in r.path}
    assert len(header_paths) == 3
    first_whole = min(start for name, start, _ in analysed.downloads)
    last_range = max(r.end for r in shards if r.range)
    assert last_range <= first_whole


def test_shards_are_fetched_once_one_at_a_time_and_nothing_else(analysed):
    names = [name for name, _, _ in analysed.downloads]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for (_, _, end), (_, start, _) in itertools.pairwise(analysed.downloads):
        assert end <= start
    assert not any(r.path.endswith(".bin") for r in analysed.requests)


def test_every_request_after_the_first_names_the_commit(analysed):
    assert analysed.requests[0].path == "/api/models/org/tiny"
    named = [r.path for r in analysed.requests if "/resolve/" in r.path]
    assert named
    assert {path.split("/")[4] for path in named} <= {COMMIT, "main"}
    weights = [path for path in named if path.endswith(".safetensors")]
    assert {path.split("/")[4] for path in weights} == {COMMIT}


def test_the_token_is_sent_and_never_shown(analysed):
    assert analysed.requests[0].authorization == f"Bearer {CANARY}"
    assert {r.authorization for r in analysed.requests if "/cdn/" in r.path} == {None}
    assert CANARY not in analysed.result.stdout + analysed.result.stderr
    for path in analysed.folder.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


def test_offline_works_from_the_cache_with_the_server_gone(analysed, tmp_path):
    away = Hub(tmp_path, "http://127.0.0.1:9")
    cache = analysed.folder / "hf"
    done = client(
        *(away, tmp_path, "analyze", "org/tiny", "--offline", "-q"),
        HF_HOME=str(cache),
    )
    assert done.rc == 0, done.stderr
    there, here = load(analysed.folder / "tiny.metrics.json"), load(tmp_path / "tiny.metrics.json")
    assert here["model"]["revision"] == COMMIT
    assert here["model"] == there["model"]
    assert here["matrices"] == there["matrices"]


def opened(url, cache, repo, offline="0", **arguments):
    """(revision, number of tensors) by the library in a process of its own; no torch."""
    script = (
        "import sys, htsr_alloc\n"
        f"found = htsr_alloc.open_checkpoint({repo!r}, **{arguments!r})\n"
        "print(found.revision, len(found.tensors))"
    )
    env = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(**env, HF_HUB_OFFLINE=offline, HF_TOKEN=CANARY),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert CANARY not in done.stdout + done.stderr
    return tuple(done.stdout.split())


def test_offline_by_commit_and_by_the_environment(analysed):
    cache = analysed.folder / "hf"
    found = opened("http://127.0.0.1:9", cache, "org/tiny", offline="1", revision=COMMIT)
    assert found == (COMMIT, str(len(llama(3))))


def test_only_the_shards_that_are_needed_are_fetched(fresh, tmp_path):
    done = client(
        *(fresh, tmp_path, "analyze", "org/tiny", "--revision", "v0", "-q"),
        *("--include", "*layers.2.*", "--cache-dir", tmp_path / "cache"),
    )
    assert done.rc == 0, done.stderr
    assert [name for name, _, _ in fresh.downloads()] == ["model-00003-of-00003.safetensors"]
    assert load(tmp_path / "tiny.metrics.json")["model"]["revision"] == OLD_COMMIT
    assert any((tmp_path / "cache").rglob("*.safetensors"))
    assert not any((tmp_path / "hf").rglob("*.safetensors"))
    # What is half there is said to be so.
    text = sentence(
        client(
            *(fresh, tmp_path, "inspect", "org/tiny", "--revision", "v0"),
            *("--offline", "--cache-dir", tmp_path / "cache"),
        )
    )
    assert "model-00001-of-00003.safetensors" in text or "not in the local cache" in text


def test_a_gated_repository_opens_with_a_token_from_the_environment(fresh, tmp_path):
    text = sentence(client(fresh, tmp_path, "inspect", "org/gated"))
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
    done = client(fresh, tmp_path, "analyze", *args, "--token", CANARY)
    assert said in sentence(done)
    assert CANARY not in done.stderr
    assert not list(tmp_path.glob("*.json"))
    if "--offline" in args:
        assert fresh.requests == []


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    away = Hub(tmp_path, "http://127.0.0.1:9")
    text = sentence(client(away, tmp_path, "inspect", "org/tiny"))
    assert "org/tiny" in text


def test_a_shard_that_is_no_safetensors_is_one_sentence(tmp_path):
    hub = Hub(model_files(tmp_path / "files"))
    shard = hub.folder / "model-00002-of-00003.safetensors"
    server = serve(hub)
    try:
        shard.write_bytes(b"\xff" * 64)
        assert "org/tiny" in sentence(client(hub, tmp_path, "inspect", "org/tiny"))
        (hub.folder / "model.safetensors.index.json").write_text("{")
        text = sentence(client(hub, tmp_path, "inspect", "org/tiny", "--cache-dir", "other"))
        assert "model.safetensors.index.json is not JSON" in text
    finally:
        server.shutdown()
        server.server_close()


def test_a_shard_whose_data_does_not_fit_its_header_is_refused_when_fetched(tmp_path):
    hub = Hub(tmp_path / "files")
    hub.folder.mkdir()
    entry = {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 64]}  # 4096 elements, 16 stored
    header = json.dumps({"h.0.a.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    (hub.folder / "model.safetensors").write_bytes(data)
    server = serve(hub)
    try:
        text = sentence(client(hub, tmp_path, "analyze", "org/tiny"))
    finally:
        server.shutdown()
        server.server_close()
    assert "is not a whole safetensors file" in text
