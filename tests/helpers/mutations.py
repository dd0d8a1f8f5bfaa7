"""``make mutations``: each guard removed in turn, in a copy of the tree, must be caught by a test.

    PYTHONPATH=tests python -m helpers.mutations [WORD ...]

A row is (guard, file, what stands there, what stands there instead, tests that must fail). With
words only the guards are tried whose name has one of them. Exit code 1 when one survived, or when
what a row replaces does not stand in its file once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from helpers.commands import ROOT, environment

LONGEST = 500  # seconds of a row's tests


class Mutation(NamedTuple):
    """One guard, and where it is missed."""

    guard: str
    file: str
    old: str
    new: str
    tests: str


def tried(mutation: Mutation, tree: Path) -> str:
    """Whether its tests fail without it: "caught", "SURVIVED" or what is wrong with the row."""
    path = tree / "htsr_alloc" / mutation.file
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        return f"STALE: its text stands there {whole.count(mutation.old)} times"
    path.write_text(whole.replace(mutation.old, mutation.new))
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *mutation.tests.split()],
            cwd=tree,
            env=environment(PYTHONPATH=str(tree)),
            capture_output=True,
            encoding="utf-8",
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "caught (its tests do not end)"
    finally:
        path.write_text(whole)
    said = (done.stdout.strip().splitlines() or [""])[-1]
    # 1: a test failed. Anything else says nothing of the guard.
    return {0: "SURVIVED", 1: "caught"}.get(done.returncode, f"BROKEN: {said}")


def main() -> int:
    from helpers.mutations_parts import PARTS
    from helpers.mutations_table import TABLE

    words = sys.argv[1:] or [""]
    chosen = [m for m in (*TABLE, *PARTS) if any(word in m.guard for word in words)]
    found = []
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        skipped = shutil.ignore_patterns(".git", ".venv", ".cache", "build", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=skipped)
        for mutation in chosen:
            start = time.monotonic()
            found.append(tried(mutation, tree))
            seconds = time.monotonic() - start
            print(f"{mutation.guard:44} {found[-1]}  ({seconds:.0f} s)", flush=True)
    caught = sum(result.startswith("caught") for result in found)
    print(f"\n{caught} of {len(found)} guards are caught when they are removed")
    return int(caught < len(found))


if __name__ == "__main__":
    sys.exit(main())
