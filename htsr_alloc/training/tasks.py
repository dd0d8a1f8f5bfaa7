"""What a model is trained for and tested on: language, and classes of texts or images."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from htsr_alloc.errors import HtsrError, check_choice
from htsr_alloc.lora_moe.build import open_weights, refuse_drawn
from htsr_alloc.lora_moe.routing import evaluating
from htsr_alloc.training import evaluate, labelled, models, rows, tokens
from htsr_alloc.training.evaluate import Progress, Score, score_of
from htsr_alloc.training.heads import heads_of, outermost, saved_in, under
from htsr_alloc.training.labelled import Labelled
from htsr_alloc.training.positions import refuse_longer

LAYER = re.compile(r"\.\d+\.|^[^.]+$")  # a name in a layer, or of a parameter in no module


class Task:
    """A model's folder read for one kind of work.

    Attributes:
        task_type: PEFT's name of it, None where it has none.
        labels: the classes, in the order of the head's outputs; empty without a head.
        items: whether the model's loss is a mean over all tokens of an accumulated batch.
        processor: the tokenizer or the image processor.
        heads: modules of the model opened last that are trained and saved whole.
    """

    task_type: ClassVar[str | None] = None
    items: ClassVar[bool] = False
    processor: Any
    labels: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    def open_model(self, dtype: torch.dtype) -> Any:
        """The model, its weights in ``dtype``."""
        raise NotImplementedError

    def refuse_unread(self, model: Any) -> None:
        """Refuse adapters that no row of this task reaches."""

    def refuse_drawn(self, model: Any) -> None:
        """Refuse weights drawn at random, which neither checkpoint nor adapter holds."""

    def encode(self, given: Sequence[Any]) -> list[Any]:
        """Rows to examples; each has a ``length`` by which rows are batched."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """Examples to a batch."""
        raise NotImplementedError

    def evaluate(self, model: Any, given: Sequence[Any], **how: Any) -> Score:
        """Accuracy on rows."""
        raise NotImplementedError


class Language(Task):
    """The next token, learnt on answers only."""

    task_type = "CAUSAL_LM"
    items = True

    def __init__(self, folder: Path, max_length: int, chat: bool) -> None:
        self.folder, self.max_length, self.chat = folder, max_length, chat
        self.processor = tokens.open_tokenizer(folder)
        self.collate = tokens.Collator(tokens.pad_id(self.processor))  # type: ignore[method-assign]

    def open_model(self, dtype: torch.dtype) -> Any:
        """A causal language model."""
        return models.open_causal_lm(self.folder, dtype)

    def refuse_unread(self, model: Any) -> None:
        """Refuse those of a vision tower."""
        models.refuse_unread(model)

    def encode(self, given: Sequence[rows.Row]) -> list[tokens.Example]:
        """Prompts and answers to tokens."""
        given = tokens.as_chat(given) if self.chat else given
        return [tokens.encode(row, self.processor, self.max_length) for row in given]

    def evaluate(self, model: Any, given: Sequence[rows.Row], **how: Any) -> Score:
        """Choices by likelihood, the others by exact match."""
        given = tokens.as_chat(given) if self.chat else given
        return evaluate.evaluate(model, self.processor, given, **how)


@dataclass(frozen=True)
class Sample:
    """A row of a classification: token ids or an image's path, and the number of its class."""

    inputs: Mapping[str, list[int]] | Path
    label: int

    @property
    def length(self) -> int:
        """Tokens of a text; 1 for an image."""
        return 1 if isinstance(self.inputs, Path) else len(self.inputs["input_ids"])


class Classification(Task):
    """One of several classes, by a head that is trained and saved with the adapter."""

    auto: ClassVar[str]  # the transformers class
    drawn: tuple[str, ...] = ()  # modules that the checkpoint does not hold

    def __init__(self, folder: Path, labels: tuple[str, ...], max_length: int) -> None:
        self.folder, self.labels, self.max_length = folder, labels, max_length

    def open_model(self, dtype: torch.dtype) -> Any:
        """The model with a head of these classes, new where it has none; the head in float32.

        Another part that the checkpoint does not hold, as a pooler, is new too, and like the head.

        Raises:
            HtsrError: no such model, or one with a layer left out.
        """
        import transformers

        classes = dict(enumerate(self.labels))
        model, drawn = open_weights(
            getattr(transformers, self.auto),
            self.folder,
            dtype=dtype,
            id2label=classes,
            label2id={name: i for i, name in classes.items()},
            ignore_mismatched_sizes=True,
        )
        heads = heads_of(model)
        inside = [name for name in drawn if not under(name, heads)]
        refuse_drawn([name for name in inside if LAYER.search(name)], self.folder)
        self.drawn = tuple(dict.fromkeys(name.rpartition(".")[0] for name in drawn))
        self.heads = (*heads, *outermost(name for name in self.drawn if not under(name, heads)))
        for name in self.heads:
            model.get_submodule(name).float()
        return model

    def refuse_drawn(self, model: Any) -> None:
        """Refuse a head or a pooler drawn at random, which would answer at random."""
        saved = saved_in(model)
        left = [name for name in self.drawn if not under(name, saved)]
        if left:
            raise HtsrError(
                f"Neither {self.folder} nor an adapter holds {left[0]}, which would be drawn at "
                "random.",
                "Train an adapter with `task` classification.",
            )

    def evaluate(
        self,
        model: Any,
        given: Sequence[Labelled],
        *,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        progress: Progress = lambda done: None,
    ) -> Score:
        """The likeliest class of each row; the loss is its cross-entropy."""
        if max_new_tokens is not None:
            raise HtsrError("A classification generates no tokens.", "Remove `max_new_tokens`.")
        examples, hits, losses = self.encode(given), "", []
        refuse_longer(model, examples)
        weights = next(model.parameters())
        kind = weights.device.type
        half = torch.autocast(kind, torch.bfloat16, weights.dtype == torch.bfloat16)
        with evaluating(model), torch.inference_mode(), half:
            for start in range(0, len(examples), batch_size):
                batch = self.collate(examples[start : start + batch_size])
                labels = batch.pop("labels")
                given_to = {name: value.to(weights.device) for name, value in batch.items()}
                logs = model(**given_to).logits.float().log_softmax(-1).cpu()  # (B, classes)
                losses += (-logs.gather(-1, labels[:, None])).flatten().tolist()
                hits += "".join("1" if hit else "0" for hit in logs.argmax(-1) == labels)
                progress(len(hits))
        if any(map(math.isnan, losses)):
            raise HtsrError("The model's answers are not numbers: it gives NaN.", "Train it again.")
        return score_of(hits, losses)


class Texts(Classification):
    """Texts and pairs of texts; a pair that is too long loses the end of its longer part."""

    task_type = "SEQ_CLS"
    auto = "AutoModelForSequenceClassification"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.processor = tokens.open_tokenizer(self.folder)

    def open_model(self, dtype: torch.dtype) -> Any:
        """A decoder's head reads the last token that is not padding, so it must know padding."""
        model = super().open_model(dtype)
        text = model.config.get_text_config()
        if text.pad_token_id is None:
            text.pad_token_id = tokens.pad_id(self.processor)
        return model

    def encode(self, given: Sequence[Labelled]) -> list[Sample]:
        """Token ids, cut to ``max_length``."""
        return [
            Sample(
                dict(self.processor(r.text, r.pair, truncation=True, max_length=self.max_length)),
                labelled.class_of(r, self.labels),
            )
            for r in given
        ]

    def collate(self, examples: Sequence[Sample]) -> dict[str, Tensor]:
        """The tokenizer's tensors, (B, S), padded at the end; labels (B,)."""
        inputs: Any = [example.inputs for example in examples]
        longest = max(example.length for example in examples)
        batch: dict[str, Tensor] = {}
        for name in inputs[0]:
            fill = tokens.pad_id(self.processor) if name == "input_ids" else 0
            rows = [own[name] + [fill] * (longest - len(own[name])) for own in inputs]
            batch[name] = torch.tensor(rows)
        return {**batch, "labels": torch.tensor([example.label for example in examples])}


class Images(Classification):
    """Images, opened and resized when they are used, by Pillow and the model's own processor."""

    auto = "AutoModelForImageClassification"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        from transformers import AutoImageProcessor

        try:
            self.processor = AutoImageProcessor.from_pretrained(
                self.folder, backend="pil", trust_remote_code=False, local_files_only=True
            )
        except (ValueError, OSError, ImportError, KeyError) as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise HtsrError(
                f"{self.folder} has no image processor that works with Pillow alone: {reason}",
                "Processors that need torchvision cannot be used here.",
            ) from None

    def encode(self, given: Sequence[Labelled]) -> list[Sample]:
        """Paths and classes."""
        made = []
        for row in given:
            assert row.image is not None
            made.append(Sample(row.image, labelled.class_of(row, self.labels)))
        return made

    def collate(self, examples: Sequence[Sample]) -> dict[str, Tensor]:
        """pixel_values (B, 3, H, W) and labels (B,)."""
        from PIL import Image

        opened = []
        for example in examples:
            try:
                with Image.open(example.inputs) as image:  # type: ignore[arg-type]
                    opened.append(image.convert("RGB"))
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                raise HtsrError(f"{example.inputs} is not an image: {error}.") from None
        batch = dict(self.processor(images=opened, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([example.label for example in examples])}


def _classification(
    folder: Path, given: Sequence[Labelled], labels: Sequence[str] | None, max_length: int, _: bool
) -> Task:
    if labels is None:
        labels = labelled.labels_of(given, models.head_labels(folder))
    kind = Texts if given[0].image is None else Images
    return kind(folder, tuple(labels), max_length)


Made = Callable[[Path, Sequence[Any], "Sequence[str] | None", int, bool], Task]

# How rows are read, and the task made of a model's folder, the rows, the classes that are known
# already, the most tokens and whether prompts are chat.
TASKS: dict[str, tuple[Callable[[Path], list[Any]], Made]] = {
    "causal-lm": (
        rows.read_rows,
        lambda folder, _, labels, max_length, chat: Language(folder, max_length, chat),
    ),
    "classification": (labelled.read_labelled, _classification),
}


def readers_of(name: str) -> tuple[Callable[[Path], list[Any]], Made]:
    """How a task's rows are read, and how it is made.

    Raises:
        HtsrError: there is no such task.
    """
    check_choice("task", name, TASKS)
    return TASKS[name]
