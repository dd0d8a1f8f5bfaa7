"""``make faults``: every fault and every bad input, counted as they happen; 0 lost, 0 tracebacks.

    PYTHONPATH=tests python -m helpers.faults_table [--kills 1000] [--examples 20000] [--jobs 2]

Exit code 1 when anything was lost, ended in a traceback, or was not survived.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import bad_json  # noqa: F401 - adds to BAD
from helpers.bad_inputs import BAD
from helpers.bench import Bench
from helpers.commands import apart, environment
from helpers.fault_runs import FAULTS
from helpers.fuzz import LATE, SLOW, targets
from helpers.hubs import (
    GAUNTLET,
    HOSTILE,
    WAYS,
    client,
    facts,
    hostile_cases,
    listing_of,
    model_files,
    serving,
)
from helpers.odd_inputs import ODD
from htsr_alloc.errors import HtsrError


@dataclass
class Row:
    """One line: ``good`` is survived, or ended in a clear error or a valid object."""

    what: str
    tried: int = 0
    good: int = 0
    lost: int = 0
    tracebacks: int = 0

    def failed(self, what: str, why: object) -> None:
        print(f"FAILED: {what}: {str(why)[:2000]}", file=sys.stderr)


SHARES = {"analyze": 35, "fit": 25, "two ranks": 15, "train": 15, "study": 10}  # % of the kills


def kills(folder: Path, name: str, count: int) -> Row:
    row = Row(f"SIGKILL: {name}")
    (folder / name).mkdir()
    found = apart("kills", name, count, folder / name)
    row.tried, row.lost = found.get("killed", 0), found.get("lost", 0) + found.get("wrong", 0)
    row.tracebacks = found.get("tracebacks", 0)
    bad = row.lost + row.tracebacks + found.get("hangs", 0) + bool(found["failed"])
    row.good = row.tried - bad
    if bad or row.tried < count:
        row.good = min(row.good, row.tried - 1)
        row.failed(row.what, found)
    return row


def other_faults(folder: Path) -> Row:
    row = Row("other faults on this machine")
    for number, (name, run) in enumerate(FAULTS.items()):
        place = folder / str(number)
        place.mkdir()
        bench = Bench(place, seed=number)
        row.tried += 1
        try:
            run(bench)
            row.good += 1
        except AssertionError as error:
            row.failed(name, error)
        row.lost += bench.lost
        row.tracebacks += bench.tracebacks
    return row


def network_faults(folder: Path) -> Row:
    """Many network faults in a row, for each way to read weights, against the local result."""
    from htsr_alloc import Settings, analyze, open_checkpoint
    from htsr_alloc.analysis.outputs import RunFiles

    row = Row("faults of the network")
    model_files(folder / "tiny")
    whole = RunFiles(folder / "whole.metrics.json")
    analyze(open_checkpoint(folder / "tiny"), Settings("official"), whole)
    with serving(folder) as hub:
        for way, options in WAYS.items():
            cwd = folder / way
            cwd.mkdir()
            hub.reset(*GAUNTLET)
            done = client(hub.url, cwd, "analyze", "org/tiny", "-q", *options)
            met = sum(r["fault"] is not None for r in hub.requests)
            row.tried += met
            row.tracebacks += "Traceback" in done.stderr
            found = cwd / "tiny.metrics.json"
            if done.rc == 0 and facts(found) == facts(whole.metrics):
                row.good += met
            else:
                row.lost += 21
                row.failed(way, done.stderr)
    return row


def flipped_bits(folder: Path, count: int) -> Row:
    """Single bits of a journal, in process: lost is an entry that is wrong."""
    import numpy as np

    from htsr_alloc.analysis.journal import read_journal

    bench, row = Bench(folder), Row("a flipped bit in a journal")
    process = bench.start()
    bench.wait_for(12, process)
    process.kill()
    process.communicate()
    data = bench.journal.read_bytes()
    identity = json.loads(data.split(b"\n")[0].rpartition(b" ")[0])["identity"]
    whole, path = read_journal(bench.journal, identity), folder / "flipped.journal"
    for place in np.random.default_rng(0).integers(0, 8 * len(data), count):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = read_journal(path, identity)
        right = all(
            np.array_equal(entry.spectrum.eigenvalues, whole[name].spectrum.eigenvalues)
            for name, entry in found.items()
        )
        row.tried += 1
        row.good += right and len(found) >= len(whole) - 2
        row.lost += not right
    return row


def hostile_hubs(folder: Path) -> Row:
    """Hubs with wrong answers, by a command each, and invalid listings, in process."""
    row = Row("a hub that lies")
    model_files(folder / "tiny")
    (folder / "victim").write_text("mine")
    with serving(folder) as hub:
        for number, (name, (fault, args)) in enumerate(HOSTILE.items()):
            cwd = folder / "clients" / f"{number}"
            cwd.mkdir(parents=True)
            hub.reset(fault)
            done = client(hub.url, cwd, *args)
            code = 0 if fault.get("harmless") else 1
            clear = done.rc == code and done.stderr.count("error: ") == code
            row.tried += 1
            row.tracebacks += "Traceback" in done.stderr
            if clear and (folder / "victim").read_text() == "mine":
                row.good += 1
            else:
                row.failed(name, done.stderr)
    for text in hostile_cases():
        row.tried += 1
        try:
            listing_of(text)
        except HtsrError:
            row.good += 1
        except Exception as error:
            row.tracebacks += 1
            row.failed(repr(text[:80]), error)
    return row


def commands(folder: Path, builds: dict[str, Any], code: int, what: str) -> Row:
    """Each input by a command in a process of its own."""
    row = Row(what)

    def one(item: tuple[int, str]) -> tuple[str, int, str]:
        place = folder / f"{item[0]}" / "input"
        place.mkdir(parents=True)
        done = subprocess.run(
            [sys.executable, "-m", "htsr_alloc", *map(str, builds[item[1]](place))],
            cwd=place.parent,
            env=environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )
        return item[1], done.returncode, done.stderr

    with ThreadPoolExecutor(2) as pool:
        for name, found, text in pool.map(one, enumerate(builds)):
            row.tried += 1
            row.tracebacks += "Traceback" in text
            errors = sum(line.startswith("error: ") for line in text.splitlines())
            if (found, errors) == (code, code) and "\x1b" not in text:
                row.good += 1
            else:
                row.failed(name, text)
    return row


def fuzzing(name: str, examples: int) -> Row:
    row, found = Row(f"fuzzed: {name}"), apart("mutator", name, examples)
    row.tried = found.get("tried", 1)
    row.good = row.tried - bool(found["failed"])
    row.tracebacks = int(bool(found["failed"]))
    if found["failed"]:
        row.failed(row.what, found["failed"])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=20_000, help="of each fuzzed reader")
    parser.add_argument("--bits", type=int, default=20_000, help="flipped in a journal")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    asked, start = parser.parse_args(), time.monotonic()
    line = "{:34} {:>6} {:>9} {:>6} {:>11}"

    def show(row: Row) -> Row:
        print(line.format(row.what, row.tried, row.good, row.lost, row.tracebacks), flush=True)
        return row

    with tempfile.TemporaryDirectory() as place:
        folders = [
            Path(place) / name
            for name in ("kills", "faults", "network", "bad", "odd", "bits", "hub")
        ]
        for folder in folders:
            folder.mkdir()
        print(line.format("faults", "tried", "survived", "lost", "tracebacks"))
        work: list[tuple[bool, Future[Row]]] = []
        with ThreadPoolExecutor(asked.jobs) as pool:

            def plan(is_fault: bool, make: Callable[..., Row], *arguments: Any) -> None:
                work.append((is_fault, pool.submit(make, *arguments)))

            # The longest first, so that no core waits at the end.
            longest, *others = SHARES
            plan(True, kills, folders[0], longest, asked.kills * SHARES[longest] // 100)
            plan(True, flipped_bits, folders[5], asked.bits)
            for name in (*targets(), *LATE):
                plan(False, fuzzing, name, asked.examples // SLOW.get(name, 1))
            for name in others:
                plan(True, kills, folders[0], name, asked.kills * SHARES[name] // 100)
            plan(True, other_faults, folders[1])
            plan(True, network_faults, folders[2])
            plan(False, commands, folders[3], BAD, 1, "one sentence")
            plan(False, hostile_hubs, folders[6])
            odd = {name: build for name, (build, _) in ODD.items()}
            plan(False, commands, folders[4], odd, 0, "readable, marked")
            for future in as_completed([future for _, future in work]):
                show(future.result())
        faults = [future.result() for is_fault, future in work if is_fault]
        inputs = [future.result() for is_fault, future in work if not is_fault]
    rows = faults + inputs
    print(
        f"\n{sum(r.tried for r in faults)} faults tried, {sum(r.good for r in faults)} survived, "
        f"{sum(r.lost for r in rows)} results lost; {sum(r.tried for r in inputs)} bad inputs "
        f"tried, {sum(r.good for r in inputs)} clear ends; "
        f"{sum(r.tracebacks for r in rows)} tracebacks; {time.monotonic() - start:.0f} s"
    )
    return int(any(r.good < r.tried or r.lost or r.tracebacks for r in rows))


if __name__ == "__main__":
    sys.exit(main())
