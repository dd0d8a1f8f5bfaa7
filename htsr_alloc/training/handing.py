"""What makes an adapter's folder complete: its base's name, the tokenizer and a model card."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htsr_alloc import files
from htsr_alloc.errors import HtsrError
from htsr_alloc.records import Allocation
from htsr_alloc.records.text import printable

if TYPE_CHECKING:
    from htsr_alloc.training.evaluate import Score

CONFIG = "adapter_config.json"
CARD = "README.md"
LOAD = """```python
{first}from peft import AutoPeftModelForCausalLM
from transformers import {reader}

model = AutoPeftModelForCausalLM.from_pretrained("FOLDER_OR_HUB_ID")
{made} = {reader}.from_pretrained("FOLDER_OR_HUB_ID")
```
"""
LOAD_CLASSIFIER = """```python
{first}from peft import PeftModel
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("{base}", num_labels={count}, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(model, "FOLDER_OR_HUB_ID")
{made} = {reader}.from_pretrained("FOLDER_OR_HUB_ID")
```
"""
TOKENIZER = ("tokenizer", "AutoTokenizer")
USE = "\n## Use\n"
RESULTS = (
    "## Evaluation",
    "",
    "| data | rows | accuracy | 95 % interval |",
    "|---|---|---|---|",
)
CLASSIFIERS = {  # PEFT's task_type -> the hub's name of the task, the transformers class, a reader
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification", TOKENIZER),
    None: (
        "image-classification",
        "AutoModelForImageClassification",
        ("processor", "AutoImageProcessor"),
    ),
}


@dataclass(frozen=True)
class Base:
    """The model under an adapter: its name (a hub id, or a folder), its folder here, its commit."""

    name: str
    folder: Path
    revision: str | None = None

    @property
    def on_hub(self) -> bool:
        """Whether the name is a hub id."""
        return self.revision is not None


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder whose files move to ``folder`` when the block ends without error.

    The configuration comes last: a folder that has one has the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as made:
        yield Path(made)
        for path in sorted(Path(made).iterdir(), key=lambda path: path.name == CONFIG):
            path.replace(folder / path.name)


def config_of(folder: Path) -> dict[str, Any]:
    """An adapter's configuration.

    Raises:
        HtsrError: there is none that can be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        model = (folder / "config.json").is_file()
        what = "is a model, not an adapter: it has" if model else "has"
        raise HtsrError(f"{folder} {what} no {CONFIG}.", "Give the folder of a saved adapter.")
    try:
        found = files.parse_json(files.read_bytes(path).decode("utf-8"))
        return dict(found)
    except (ValueError, TypeError):
        raise HtsrError(f"{path} is not an adapter's configuration.") from None


def finish(
    folder: Path,
    base: Base,
    facts: Sequence[str],
    allocation: Allocation | None,
    labels: Sequence[str] = (),
) -> None:
    """Add the base's tokenizer, if it has one, and a card to a saved adapter, and name its base.

    Args:
        facts: lines of the card: how it was made and what came of it.
        labels: the classes of a classifier, which has its tokenizer or image processor already.

    Raises:
        HtsrError: a folder without an adapter, or a file that cannot be written.
    """
    from htsr_alloc.training.tokens import has_tokenizer, open_tokenizer

    config = config_of(folder)
    config["base_model_name_or_path"] = base.name
    if base.on_hub:
        config["revision"] = base.revision
    with whole_files(folder) as made:
        if not labels and has_tokenizer(base.folder):
            open_tokenizer(base.folder).save_pretrained(str(made))
        files.write_text(made / CARD, card(config, base, facts, allocation, labels))
        files.write_text(made / CONFIG, json.dumps(config, indent=2) + "\n")


def card(
    config: dict[str, Any],
    base: Base,
    facts: Sequence[str],
    allocation: Allocation | None,
    labels: Sequence[str] = (),
) -> str:
    """A model card in the hub's format."""
    mixture = config.get("peft_type") == "LORA_MOE"
    kind = f"LoRA mixture ({config.get('system')})" if mixture else "LoRA"
    tag, auto, (made, reader) = (
        CLASSIFIERS[config.get("task_type")] if labels else ("text-generation", "", TOKENIZER)
    )
    head = ["library_name: peft", f"pipeline_tag: {tag}"]
    if base.on_hub:
        head.insert(0, f"base_model: {base.name}")
    head += ["tags:", "- lora", *(["- lora-moe"] if mixture else []), "- htsr_alloc"]
    name = base.name.rstrip("/").rpartition("/")[2]
    text = ["---", *head, "---", "", f"# {kind} adapter of {name}", ""]
    text += [f"* Base: {base.name if base.on_hub else name}"]
    text += [f"* {fact}" for fact in facts]
    text += [f"* Classes, from 0: {', '.join(labels)}"] if labels else []
    if allocation is not None:
        text += ["", "## Allocation", "", *_allocation(allocation)]
    text += [USE]
    if mixture:
        text += [
            "PEFT does not know this kind of adapter by itself. Install the package that does, "
            "htsr_alloc, and import it first:",
            "",
            "```",
            install(),
            "```",
            "",
        ]
    first = "import htsr_alloc.lora_moe  # registers the adapter with PEFT\n" if mixture else ""
    load = LOAD_CLASSIFIER if labels else LOAD
    text.append(
        load.format(
            first=first,
            auto=auto,
            base=base.name if base.on_hub else name,
            count=len(labels),
            made=made,
            reader=reader,
        )
    )
    return "\n".join(text)


def install() -> str:
    """The command that installs this package with what training needs.

    The address is the package's own ``Repository``, where it has one; the package is on no index.
    """
    try:
        urls = metadata("htsr-alloc").get_all("Project-URL") or []
    except PackageNotFoundError:
        urls = []
    found = dict(url.split(", ", 1) for url in urls).get("Repository")
    if found is None:
        return "pip install '.[train]'    # in the folder of its source: it is not on PyPI yet"
    return f"pip install 'htsr-alloc[train] @ git+{found}'"


def _allocation(allocation: Allocation) -> Iterator[str]:
    what = "Ranks" if allocation.holds_ranks else "Experts"
    strategy = allocation.strategy
    if strategy is not None:
        given = {"metric": strategy.metric, "estimator": strategy.estimator, "beta": strategy.beta}
        said = [f"{key} {value}" for key, value in given.items() if value is not None]
        yield f"* Strategy: {', '.join([strategy.name, *said])}"
    yield f"* {what} of the layers, from the first: {', '.join(map(str, allocation.experts))}"
    yield f"* Sum: {allocation.budget}"
    if allocation.modules:
        yield "* These are rounded means: each linear has a count of its own."


def add_score(folder: Path, data: str, score: Score) -> bool:
    """Write an evaluation into the card of a saved adapter, in place of an earlier one on as many
    rows of the same data.

    Returns:
        Whether the folder has a card that ``finish`` wrote.

    Raises:
        HtsrError: the card cannot be read or written.
    """
    path = folder / CARD
    if not path.is_file():
        return False
    text = files.read_bytes(path).decode("utf-8", "replace")
    before, use, after = text.partition(USE)
    if not use or "\n- htsr_alloc\n" not in before:
        return False
    name = printable(Path(data).name if Path(data).exists() else data).replace("|", "\\|")
    start = f"| {name} | {score.n} |"
    kept = [line for line in before.rstrip("\n").split("\n") if not line.startswith(start)]
    if RESULTS[-1] not in kept:
        kept += ["", *RESULTS]
    kept.append(f"{start} {score.accuracy:.1%} | {score.low:.1%} to {score.high:.1%} |")
    files.write_text(path, "\n".join(kept) + "\n" + use + after)
    return True


def push(folder: Path, repo: str, token: str | None) -> str:
    """Upload an adapter's folder to a repository of the hub, made if it is not there.

    Checkpoints stay here. A new repository is private.

    Returns:
        Its address.

    Raises:
        HtsrError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    from htsr_alloc.training.saves import CHECKPOINTS

    api = huggingface_hub.HfApi(token=token)
    address = api.create_repo(repo, private=True, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        ignore_patterns=[f"{CHECKPOINTS}/**", ".*"],
        commit_message="Upload the adapter",
    )
    return str(address)
