"""Options: a command's parameters, and the fields of the dataclasses that it fills."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from htsr_alloc.cli.choices import DTYPE, Choice, filled
from htsr_alloc.errors import HtsrError

FLAGS = {  # parameter -> its options, where they are not --its-name
    "adapter_kind": ["--for"],
    "T": ["--T"],
    "as_json": ["--json"],
    "high": ["--max"],
    "keep_shards": ["--keep-shards/--drop-shards"],
    "low": ["--min"],
    "output": ["--output", "-o"],
    "quiet": ["--quiet", "-q"],
    "r": ["--r", "--lora-r"],
    "settings": ["--set"],
    "target_modules": ["--target"],
    "targets": ["--target"],
}


def flags(name: str) -> list[str]:
    """The options of a parameter or field: ``top_k`` is ``--top-k``."""
    return FLAGS.get(name, [f"--{name.replace('_', '-')}"])


def _path(text: str | Path) -> Path:
    if not str(text):
        raise typer.BadParameter("a path cannot be empty.")
    return Path(text)


def _whole(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"it must be a whole number, not {text!r}.") from None


def _number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"it must be a number, not {text!r}.") from None


PARSERS: dict[Any, dict[str, Any]] = {  # of what typer would say in words of its own
    Path: {"parser": _path, "metavar": "<path>"},
    int: {"parser": _whole, "metavar": "<int>"},
    float: {"parser": _number, "metavar": "<float>"},
}


OutFile = Annotated[Optional[Path], "File to write; - is stdout."]
Source = Annotated[
    str,
    typer.Argument(help="A .safetensors or .gguf file, a folder, a hub id, or org/name/FILE.gguf."),
]
Quiet = Annotated[bool, "Print the result only, without notes and progress."]
Strict = Annotated[bool, "Exit with code 3 when a matrix could not be fitted."]
LoraR = Annotated[Optional[int], "Rank r of one expert; default 8. Under torchrun write --lora-r."]
LoraAlpha = Annotated[Optional[float], "LoRA's alpha, whose scale is alpha / r; default 16."]
LoraAlphaOrRanks = Annotated[
    Optional[float],
    "LoRA's alpha, whose scale is alpha / r; default 16. Of ranks r is the uniform rank, and the "
    "default twice that.",
]
LoraDropout = Annotated[float, "Dropout probability on the experts' input."]
Target = Annotated[
    list[str] | None,
    "Name of the linear modules to adapt, such as q_proj; plain LoRA also takes experts, a "
    "mixture's own. Repeatable.",
]
OfAdapter = Annotated[
    str | None, "Folder or hub id of the model; default the one that the adapter names."
]
Dtype = Annotated[str, "Number format; auto is bfloat16 where the device computes in it.", DTYPE]
Chat = Annotated[bool, "Write prompts in the tokenizer's chat template."]
Device = Annotated[str, "Where to compute: auto, cpu, cuda, cuda:N or mps."]


def pairs(given: Sequence[str]) -> dict[str, str]:
    """What ``--set NAME=VALUE`` gives, by name."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise HtsrError(f"--set {text} has no value.", "Write --set NAME=VALUE.")
        if name in found:
            raise HtsrError(f"--set {name} is given twice.")
        found[name] = value
    return found


def declared(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it.

    A string in a parameter's ``Annotated`` is its help. A dataclass as a parameter's type stands
    for one option a field whose annotation has help, with the field's default; the command gets
    the dataclass. A ``Choice`` is completed, shown in the help and checked.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    choices: dict[str, tuple[Choice, Any]] = {}  # with its default, which needs no check
    for own in inspect.signature(command).parameters.values():
        kind = hints[own.name]
        if dataclasses.is_dataclass(kind):
            groups[own.name] = kind
            parameters += _fields(kind)
        else:
            parameters.append(own.replace(annotation=kind, kind=own.KEYWORD_ONLY))
    for i, own in enumerate(parameters):
        choice = next((x for x in get_args(own.annotation) if isinstance(x, Choice)), None)
        if choice is not None:
            choices[own.name] = choice, own.default
        parameters[i] = own.replace(annotation=_typed(own, choice))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, (choice, default) in choices.items():
            if given[name] not in (None, default):
                choice.check(given[name])
        for name, kind in groups.items():
            values = {own.name: given.pop(own.name) for own in _fields(kind)}
            lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
            given[name] = kind(**values | lists)
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {own.name: own.annotation for own in parameters}
    return run


@functools.cache
def _fields(kind: Any) -> tuple[inspect.Parameter, ...]:
    """A dataclass's fields with help, as parameters of a command."""
    hints = get_type_hints(kind, include_extras=True)
    only = inspect.Parameter.KEYWORD_ONLY
    return tuple(
        inspect.Parameter(own.name, only, default=own.default, annotation=hints[own.name])
        for own in dataclasses.fields(kind)
        if get_origin(hints[own.name]) is Annotated
    )


def _typed(own: inspect.Parameter, choice: Choice | None) -> Any:
    """The annotation with typer's declaration in it."""
    if get_origin(own.annotation) is not Annotated:
        return own.annotation
    kind, *said = get_args(own.annotation)
    if kind == tuple[str, ...]:
        kind = list[str]
    text = next((x for x in said if isinstance(x, str)), None)
    if text is None:
        return own.annotation
    more: dict[str, Any] = {}
    if choice is not None:
        text = f"{text} Choose from {choice.mark}."
        more = {"autocompletion": choice.complete}
    else:
        plain = next((x for x in PARSERS if kind in (x, Optional[x])), None)
        more = PARSERS.get(plain, {})
    return Annotated[kind, typer.Option(*flags(own.name), help=text, **more)]


class Command(TyperCommand):
    """A command whose help has the names of the registries, and its examples last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """An unknown option's nearest is the one that is written alike: --T for --t."""
        try:
            return super().parse_args(ctx, args)
        except Exception as caught:
            error: Any = caught  # typer's click does not export its kind
            wrong = str(getattr(error, "option_name", ""))
            known = [name for own in self.params for name in own.opts]
            alike = [name for name in known if wrong and name.lower() == wrong.lower()]
            if alike and hasattr(error, "possibilities"):
                error.possibilities = alike
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for own in self.params:
            text = getattr(own, "help", None)
            if text:
                own.help = filled(text)  # type: ignore[attr-defined]
        super().format_options(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Line by line: an example that is wrapped cannot be copied."""
        if self.epilog:
            formatter.write("\nExamples:\n")
            formatter.write("".join(f"  {line}\n" for line in self.epilog.splitlines()))


def split_examples(command: Callable[..., None]) -> tuple[str, str]:
    """A command's docstring without its examples, and these, one a line."""
    text, _, examples = inspect.cleandoc(command.__doc__ or "").partition("\n\nExamples:\n")
    return text, "\n".join(line.strip() for line in examples.splitlines())
