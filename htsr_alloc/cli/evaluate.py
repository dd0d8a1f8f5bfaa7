"""``htsr evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from htsr_alloc.cli import views
from htsr_alloc.cli.adapters import located
from htsr_alloc.cli.choices import TASK
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Chat, Device, Dtype
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError
from htsr_alloc.training import check_installed


def evaluate(
    model: Annotated[str, "Folder or hub id of the model."],
    data: Annotated[
        str,
        "Held-out rows: JSON lines, a hub data set as org/name:split, or a folder of images, one "
        "folder for each class.",
    ],
    adapter: Annotated[
        str | None,
        "Folder or hub id of an adapter; without it the model alone is evaluated.",
    ] = None,
    task: Annotated[str, "What to test.", TASK] = "causal-lm",
    limit: Annotated[int | None, "Number of rows to evaluate, from the first."] = None,
    batch_size: Annotated[int, "Rows of a batch."] = 32,
    max_new_tokens: Annotated[
        int | None,
        "Most tokens of a generated answer; default 2 more than the batch's longest right answer.",
    ] = None,
    max_length: Annotated[int, "Most tokens of a classified text; longer ones are cut."] = 512,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    *,
    hub: Hub,
    screen: Screen,
) -> None:
    """Measure accuracy on held-out rows, with its 95 % interval.

    Of a row with choices the model takes the one of the highest log-likelihood per character. Of
    any other row the first line that the model writes must equal the completion. With --task
    classification the likeliest class must be the row's label. An adapter's folder that has a model
    card of htsr train gets the result written into it.

    Examples:
        htsr evaluate --model model --data test.jsonl --adapter adapter
        htsr evaluate --model model --data test.jsonl --limit 4 --json
    """
    check_installed()
    from htsr_alloc.training import models
    from htsr_alloc.training.identity import classes_of
    from htsr_alloc.training.rows import share_of
    from htsr_alloc.training.tasks import readers_of

    models.silence()
    read, made = readers_of(task)
    rows = share_of(read(hub.rows(data)), limit)
    if adapter is None:
        trained, folder = None, hub.folder(model)
    else:
        trained, base = located(adapter, model, hub)
        folder = base.folder
    where = models.device_of(device)
    asked = made(folder, rows, classes_of(trained or folder), max_length, chat)
    loaded: Any = asked.open_model(models.dtype_of(dtype, where)).to(where)
    if trained is not None:
        loaded = models.open_adapter(loaded, trained).to(where)
    asked.refuse_drawn(loaded)
    with screen.counting(len(rows)) as count:
        score = asked.evaluate(
            loaded,
            rows,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=count,
        )
    screen.show(views.score(score))
    if trained is not None and trained == Path(adapter or ""):  # a folder of the user's
        from htsr_alloc.training.handing import add_score

        try:
            if add_score(trained, data, score):
                screen.note(f"added the result to {trained / 'README.md'}")
        except HtsrError as error:  # the result is known; a card is no reason to fail
            screen.warn(f"The adapter's card was not changed: {error.message}")
