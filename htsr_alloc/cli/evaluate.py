"""``htsr evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from htsr_alloc.cli.options import AsJson, Device, Dtype, Quiet
from htsr_alloc.cli.screen import Screen


def evaluate(
    model: Annotated[Path, typer.Option(help="The model's folder.")],
    data: Annotated[Path, typer.Option(help="Held-out rows, JSON lines.")],
    adapter: Annotated[
        Optional[Path], typer.Option(help="A trained adapter's folder; without, the model alone.")
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="Only the first so many rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at once.")] = 32,
    max_new_tokens: Annotated[
        Optional[int], typer.Option(help="Of an answer; default the right ones' length and 2.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template for prompts.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Accuracy on held-out rows, with its 95 % interval.

    Rows with choices: the one of the highest log-likelihood per character. Other rows: the first
    line that the model writes must be the completion.
    """
    from htsr_alloc.training import models, tokens
    from htsr_alloc.training.evaluate import evaluate as scored
    from htsr_alloc.training.identity import check_base
    from htsr_alloc.training.rows import read_rows, share_of

    screen = Screen(as_json, quiet)
    models.silence()
    rows = share_of(read_rows(data), limit)
    if adapter is not None:
        check_base(adapter, model)
    where = models.device_of(device)
    loaded: Any = models.open_causal_lm(model, models.dtype_of(dtype, where)).to(where)
    if adapter is not None:
        loaded = models.open_adapter(loaded, adapter).to(where)
    tokenizer = tokens.open_tokenizer(model)
    with screen.counting(len(rows)) as count:
        score = scored(
            loaded,
            tokenizer,
            tokens.as_chat(rows) if chat else rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=count,
        )
    if as_json:
        screen.result(asdict(score))
        return
    interval = f"{score.low:.1%} to {score.high:.1%}"
    columns = ["rows", "right", "accuracy", "95 % interval", "loss"]
    screen.table(columns, [[score.n, score.correct, f"{score.accuracy:.1%}", interval, score.loss]])
