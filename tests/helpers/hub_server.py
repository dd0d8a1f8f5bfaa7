"""A small model hub on the loopback interface: ``python hub_server.py FOLDER`` prints its URL.

Answers what huggingface_hub asks: model info, tree, paths-info, and resolve with ranges, HEAD and a
redirect to a store on another host, as large files have. Each sub-folder of FOLDER is a commit's
files; ``org/gated`` wants the token, ``org/broken`` answers 500, anything but ``org/tiny`` is not
there. ``POST /_control`` sets faults (below) and refs; ``GET /_requests`` lists what was asked.

A fault is ``{"path": regex, "do": what, ...}``. It applies to GET requests whose path matches,
after the first ``skip`` (0) of them, ``times`` (1) times:

    cut, short   the answer ends after ``after`` bytes; short says so beforehand
    slow         ``chunk`` bytes each ``wait`` seconds
    drip         a header comes a byte each ``wait`` seconds, and stops after ``bytes``
    status       ``status`` with ``headers``
    corrupt      a bit of byte ``at`` is flipped
    long         more bytes than were asked for
    whole        ranges are ignored
    commit       another commit is named
    size         the file is said to be ``bytes`` longer
    body         ``body`` (text) with ``headers`` is the whole answer
    change       these ``headers`` are added, and the listing is updated with ``listing``
    bomb         ``bytes`` zeros, compressed by gzip
    hang         nothing is sent for ``seconds``
    move         the branch main first moves on to ``to``
"""

import gzip
import hashlib
import json
import re
import sys
import threading
import time
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

TOKEN = "hf_canaryCANARYcanary0123456789"
SIGNATURE = "signedSIGNEDsigned"  # of the store's addresses: whoever has it may read
COMMITS = {"tiny": "0123456789abcdef0123456789abcdef01234567", "next": "e" * 40, "old": "f" * 40}
LARGE = (".safetensors", ".gguf")  # which come from the store
REFS = {"main": COMMITS["tiny"], "v0": COMMITS["old"]}


@lru_cache(maxsize=64)
def digest(path, mtime_ns):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sha256(path):
    return digest(path, path.stat().st_mtime_ns)


class State:
    """The repository, the faults that are still to come, and every request so far."""

    def __init__(self, folder):
        self.folder, self.url, self.lock = folder, "", threading.Lock()
        self.refs, self.faults, self.requests = dict(REFS), [], []
        self.busy = 0  # answers that are being given

    def commit(self, revision):
        return self.refs.get(revision, revision if revision in COMMITS.values() else None)

    def files(self, commit):
        name = next(name for name, known in COMMITS.items() if known == commit)
        here = self.folder / name
        return here if here.is_dir() else self.folder / "tiny"

    def take_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if method == "GET" and re.search(fault["path"], path):
                    if fault.setdefault("skip", 0) > 0:
                        fault["skip"] -= 1
                    elif fault.setdefault("times", 1) > 0:
                        fault["times"] -= 1
                        return fault
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.counted()

    def do_GET(self):
        if self.path == "/_requests":
            deadline = time.monotonic() + 2
            while self.state.busy and time.monotonic() < deadline:
                time.sleep(0.005)
            self.reply(200, {}, json.dumps(self.state.requests).encode())
        else:
            self.counted()

    def counted(self, posted=None):
        with self.state.lock:
            self.state.busy += 1
        try:
            self.answer(posted)
        finally:
            with self.state.lock:
                self.state.busy -= 1

    def do_POST(self):
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/_control":
            for name, value in json.loads(text).items():
                setattr(self.state, name, value)
            self.reply(200, {}, b"{}")
        else:
            self.counted(json.loads(text or b"{}"))

    def answer(self, posted):
        start, path = time.monotonic(), self.path.partition("?")[0]
        fault = self.state.take_fault(self.command, path) or {"do": None}
        if fault["do"] == "move":
            self.state.refs["main"] = COMMITS[fault["to"]]
        if fault["do"] == "status":
            headers = {"Content-Type": "text/plain", **fault.get("headers", {})}
            status, body = fault["status"], b"no " + TOKEN.encode()
        else:
            status, headers, body = self.respond(unquote(path).strip("/").split("/"), posted)
        if fault["do"] == "hang":
            time.sleep(fault["seconds"])
        if fault["do"] == "body":
            status, headers, body = 200, fault.get("headers", {}), fault["body"].encode()
        if fault["do"] == "bomb":
            status, headers = 200, {"Content-Encoding": "gzip"}
            body = gzip.compress(bytes(1 << 20)) * (fault["bytes"] >> 20)  # made in no time
        if fault["do"] == "change":
            headers = {**headers, **fault.get("headers", {})}
            if "listing" in fault:
                body = json.dumps({**json.loads(body), **fault["listing"]}).encode()
        if fault["do"] == "commit":
            headers["X-Repo-Commit"] = "d" * 40
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and span and fault["do"] != "whole":
            first, last = int(span[1]), min(int(span[2] or len(body)), len(body) - 1)
            total = len(body) + (fault.get("bytes", 1) if fault["do"] == "size" else 0)
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
            status, body = 206, body[first : last + 1]
        sent = self.reply(status, headers, body, fault)
        entry = {"method": self.command, "path": path, "range": self.headers.get("Range")}
        entry |= {"authorization": self.headers.get("Authorization"), "sent": sent}
        entry |= {"status": status, "fault": fault["do"]}
        self.state.requests.append({**entry, "start": start, "end": time.monotonic()})

    def reply(self, status, headers, body, fault=None):
        """Send an answer changed by the fault; returns how many bytes of its body were sent."""
        fault = fault or {}
        kind = fault.get("do")
        if kind == "corrupt" and body:
            at = fault.get("at", len(body) // 2) % len(body)
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        if kind == "long":
            body += bytes(64)
        if kind == "short":
            body = body[: fault["after"]]
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        sent = 0
        try:
            if kind == "drip":
                self.flush_headers()
                for _ in range(fault["bytes"]):
                    self.wfile.write(b"x")
                    time.sleep(fault["wait"])
                self.close_connection = True
                return 0
            self.end_headers()
            if self.command == "HEAD":
                return 0
            if kind == "cut":
                sent = self.wfile.write(body[: fault["after"]])
                self.close_connection = True
            elif kind == "slow":
                for sent in range(0, len(body), fault["chunk"]):
                    self.wfile.write(body[sent : sent + fault["chunk"]])
                    time.sleep(fault["wait"])
            else:
                sent = self.wfile.write(body)
        except OSError:  # the client has disconnected
            self.close_connection = True
        return sent

    def respond(self, path, posted):
        state = self.state
        if path[0] == "cdn":
            whole = self.headers.get("Range") is None
            time.sleep(0.05 if whole else 0)
            file = state.files(path[1]).joinpath(*path[2:])
            return 200, {"ETag": f'"{sha256(file)}"', "Accept-Ranges": "bytes"}, file.read_bytes()
        repo = "/".join(path[2:4] if path[0] == "api" else path[:2])
        if repo == "org/broken":
            return 500, {}, b"oops " + TOKEN.encode()
        if repo == "org/gated" and self.headers.get("Authorization") != "Bearer " + TOKEN:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if repo not in ("org/tiny", "org/gated"):
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if path[0] != "api":
            return self.file(path[3], "/".join(path[4:]))
        commit = state.commit(path[5] if len(path) > 5 else "main")
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        folder = state.files(commit)
        whole = sorted(file for file in folder.rglob("*") if file.is_file())
        listed = [self.listing(file, folder) for file in whole]
        found = {"id": repo, "sha": commit, "private": False, "tags": [], "siblings": listed}
        if len(path) > 4 and path[4] in ("tree", "paths-info"):
            found = [{**one, "type": "file", "path": one["rfilename"]} for one in listed]
            if posted:
                found = [one for one in found if one["path"] in posted.get("paths", [])]
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def listing(self, file, folder):
        found, size = sha256(file), file.stat().st_size
        content = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {
            "rfilename": file.relative_to(folder).as_posix(),
            "blobId": blob,
            "oid": blob,
            "size": size,
        }
        if file.suffix in LARGE:
            entry["lfs"] = {"sha256": found, "oid": found, "size": size, "pointerSize": 134}
        return entry

    def file(self, revision, name):
        state, commit = self.state, self.state.commit(revision)
        if commit is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        file = state.files(commit) / name
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        etag = f'"{sha256(file)}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if file.suffix not in LARGE:
            return 200, headers, file.read_bytes()
        # Large files are redirected to a store, as LFS files are; to the client, another host.
        store = state.url.replace("127.0.0.1", "localhost")
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": file.stat().st_size}
        return (
            302,
            {**headers, "Location": f"{store}/cdn/{commit}/{quote(name)}?signature={SIGNATURE}"},
            b"",
        )


def main():
    state = State(Path(sys.argv[1]))
    handler = type("Bound", (Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    print(state.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
