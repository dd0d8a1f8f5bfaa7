"""``htsr evaluate``."""

from __future__ import annotations

from typing import Annotated

from htsr_alloc.cli import views
from htsr_alloc.cli.adapters import opened
from htsr_alloc.cli.choices import DTYPE
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Chat, Device
from htsr_alloc.cli.screen import Screen
from htsr_alloc.training import check_installed


def evaluate(
    model: Annotated[str, "Folder or hub id of the model."],
    data: Annotated[str, "Held-out rows: JSON lines, or a hub data set as org/name:split."],
    adapter: Annotated[
        str | None,
        "Folder or hub id of an adapter; without it the model alone is evaluated.",
    ] = None,
    limit: Annotated[int | None, "Number of rows to evaluate, from the first."] = None,
    batch_size: Annotated[int, "Rows of a batch."] = 32,
    max_new_tokens: Annotated[
        int | None,
        "Most tokens of a generated answer; default 2 more than the batch's longest right answer.",
    ] = None,
    chat: Chat = False,
    dtype: Annotated[
        str, "Number format; auto is bfloat16 where the device computes in it.", DTYPE
    ] = "auto",
    device: Device = "auto",
    *,
    hub: Hub,
    screen: Screen,
) -> None:
    """Measure accuracy on held-out rows, with its 95 % interval.

    Of a row with choices the model takes the one of the highest log-likelihood per character. Of
    any other row the first line that the model writes must equal the completion.

    Examples:
        htsr evaluate --model model --data test.jsonl --adapter adapter
        htsr evaluate --model model --data test.jsonl --limit 4 --json
    """
    check_installed()
    from htsr_alloc.training import models, tokens
    from htsr_alloc.training.evaluate import evaluate as scored
    from htsr_alloc.training.rows import read_rows, share_of

    models.silence()
    rows = share_of(read_rows(hub.rows(data)), limit)
    if adapter is not None:
        found = opened(adapter, model, hub, dtype, device)
        loaded, tokenizer = found.model, found.tokenizer
    else:
        where, folder = models.device_of(device), hub.folder(model)
        loaded = models.open_causal_lm(folder, models.dtype_of(dtype, where)).to(where)
        tokenizer = tokens.open_tokenizer(folder)
    with screen.counting(len(rows)) as count:
        score = scored(
            loaded,
            tokenizer,
            tokens.as_chat(rows) if chat else rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=count,
        )
    screen.show(views.score(score))
