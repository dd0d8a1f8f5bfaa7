"""What --help says: choices from the registries, and examples that work."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
from helpers import training_tiny
from helpers.commands import HEAVY, ROOT, environment

from htsr_alloc.cli import choices
from htsr_alloc.cli.main import app
from htsr_alloc.cli.options import flags
from htsr_alloc.training.settings import Recipe

GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
EXAMPLES = [(name, line) for name, own in COMMANDS.items() for line in own.epilog.splitlines()]
TORCHRUN = "torchrun --nproc-per-node 2 -m htsr_alloc"
CHOICES = {name: own for name, own in vars(choices).items() if isinstance(own, choices.Choice)}
MODEL_ID = "Qwen/Qwen3-0.6B"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with every file that the examples name."""
    from typer.testing import CliRunner

    folder = tmp_path_factory.mktemp("bench")
    training_tiny.folder(folder / "model")
    training_tiny.write(folder / "train.jsonl", training_tiny.learnable_rows(16))
    training_tiny.write(folder / "test.jsonl", training_tiny.learnable_rows(8, seed=1))
    (folder / "data").symlink_to(ROOT / "data")
    for path in (ROOT / "data").glob("smollm2.*"):
        if not path.match("smollm2.*.metrics.json"):
            shutil.copy(path, folder)
    made = folder / "model.allocation.json"
    for arguments in (
        ["allocate", "--strategy", "explicit", "--experts", "3,2", "-o", made],
        ["train", made, "--model", folder / "model", "--data", folder / "train.jsonl",
         "--steps", 1, "-o", folder / "adapter"],
    ):  # fmt: skip
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
    return folder


def test_every_command_has_two_or_three_examples_and_shows_them(invoke):
    for name, own in COMMANDS.items():
        lines = own.epilog.splitlines()
        assert 2 <= len(lines) <= 3, name
        shown = invoke(name, "--help").stdout
        assert shown.endswith("\n\nExamples:\n" + "".join(f"  {line}\n" for line in lines))
        for line in lines:
            assert line.removeprefix(TORCHRUN).removeprefix("htsr").split()[0] == name
        assert "Examples" not in own.help


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_runs(bench, invoke, tmp_path, name, line):
    shutil.copytree(bench, tmp_path, symlinks=True, dirs_exist_ok=True)
    words = shlex.split(line.replace(TORCHRUN, "htsr").replace(MODEL_ID, "model"))
    if name in ("build", "train"):
        shutil.rmtree(tmp_path / "adapter")  # of another run
    before = {path.name for path in tmp_path.iterdir()}
    done = invoke(*words[1:])
    assert done.rc == 0, done.stderr
    assert done.stdout or {path.name for path in tmp_path.iterdir()} > before


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_the_registry_s_names(name):
    own = CHOICES[name]
    real = []
    for registry in filter(None, (own.registry, own.more)):
        module, _, named = registry.partition(":")
        named = named.replace("modules", "NAMES")  # the files of a folder
        real += getattr(importlib.import_module(f"htsr_alloc.{module}"), named)
    assert own.names() == real
    assert len(real) > 1


@pytest.mark.parametrize(
    ("command", "option", "choice"),
    [
        ("fit", "estimator", "ESTIMATOR"),
        ("analyze", "engine", "ENGINE"),
        ("allocate", "strategy", "STRATEGY"),
        ("allocate", "repair", "REPAIR"),
        ("export", "to", "EXPORT"),
        ("plot", "view", "VIEW"),
        ("compare", "metric", "METRIC"),
        ("build", "system", "SYSTEM"),
        ("train", "dtype", "DTYPE"),
    ],
)
def test_choices_are_shown_and_completed(invoke, command, option, choice):
    said = " ".join(invoke(command, "--help").stdout.split())
    names = CHOICES[choice].names()
    assert f"Choose from {', '.join(names)}." in said
    own = next(p for p in COMMANDS[command].params if p.name == option)
    context = COMMANDS[command].make_context(command, [], resilient_parsing=True)
    assert [item.value for item in own.shell_complete(context, names[-1])] == [names[-1]]
    assert [item.value for item in own.shell_complete(context, "")] == names


@pytest.mark.parametrize(
    ("arguments", "sentence", "near"),
    [
        (["fit", "x.json", "--estimator", "kss"], "There is no estimator 'kss'.", "'ks'"),
        (["analyze", "x", "--engine", "exct"], "There is no engine 'exct'.", "'exact'"),
        (["allocate", "--strategy", "molla"], "There is no strategy 'molla'.", "'mola'"),
        (["export", "x", "--to", "peftrank"], "There is no export 'peftrank'.", "'peft-rank'"),
        (["compare", "x", "y", "--metric", "alpha"], "There is no metric 'alpha'.", None),
        (["plot", "x", "--view", ""], "There is no view ''.", None),
    ],
)
def test_an_unknown_name_is_wrong_usage_and_the_nearest_is_told(invoke, arguments, sentence, near):
    done = invoke(*arguments)
    assert (done.rc, done.stdout) == (2, "")
    first, hint = done.stderr.splitlines()
    assert first == f"error: {sentence}"
    assert re.search(r"Choose from \w[\w-]*, \w", hint)
    if near is not None:
        assert hint.startswith(f"hint: Did you mean {near}? ")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "allocate"])
def test_an_empty_path_is_wrong_usage(invoke, name):
    if not any(own.name == "output" for own in COMMANDS[name].params):
        pytest.skip("it writes no file")
    done = invoke(name, "--output", "")
    assert done.rc == 2
    assert "a path cannot be empty" in done.stderr


def test_the_recipe_s_options_are_its_fields():
    """Names, defaults and help: each is stated in the dataclass alone."""
    import dataclasses

    options = {own.name: own for own in COMMANDS["train"].params}
    for field in dataclasses.fields(Recipe):
        assert options[field.name].default == field.default
        assert flags(field.name)[0] in options[field.name].opts
    assert options["r"].default is None  # 8, or the rank that the allocation is of
    assert options["max_length"].default == 512


def test_help_texts_are_phrases():
    """Each is a phrase with a noun and a full stop."""
    for name, command in COMMANDS.items():
        for own in command.params:
            text = own.help or ""
            assert len(text.split()) >= 3, f"{name} --{own.name}: {text}"
            assert text.endswith("."), f"{name} --{own.name}: {text}"


@pytest.mark.parametrize("name", ["--help", "analyze", "plot", "build", "train", "allocate"])
def test_help_is_quick(name):
    """No help loads torch, matplotlib or transformers."""
    arguments = [name] if name == "--help" else [name, "--help"]
    code = (
        "import sys; sys.argv[0] = 'htsr'\n"
        "from htsr_alloc.cli.main import main\n"
        "try:\n    main()\n"
        f"finally:\n    print([n for n in {HEAVY} if n in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(), capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert done.stderr == "[]\n"
