"""``htsr generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from htsr_alloc.cli.adapters import opened
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Chat, Device, Dtype, OfAdapter
from htsr_alloc.cli.screen import Screen
from htsr_alloc.training import check_installed


def generate(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a trained adapter.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: OfAdapter = None,
    max_new_tokens: Annotated[int, "Most tokens to write."] = 128,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    *,
    hub: Hub,
) -> None:
    """Continue a prompt with a model and its trained adapter, always by the likeliest token.

    Examples:
        htsr generate adapter "w20 w10" --max-new-tokens 8
        htsr generate adapter "w20 w10" --model model --chat
    """
    check_installed()
    from htsr_alloc.training.generate import generate as written

    found = opened(adapter, model, hub, dtype, device)
    text = written(found.model, found.tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat)
    Screen().text(text + "\n")
