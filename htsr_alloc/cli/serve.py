"""``htsr serve``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli.adapters import located
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError


def serve(
    adapters: Annotated[
        list[str], typer.Argument(help="Folders or hub ids of trained mixtures or plain LoRA.")
    ],
    model: Annotated[
        str | None, "Folder or hub id of the model; default the one that the first adapter names."
    ] = None,
    dtype: Annotated[str, "Number format of the model, as vLLM names it."] = "auto",
    host: Annotated[str, "Address to listen on."] = "127.0.0.1",
    port: Annotated[int, "Port to listen on."] = 8000,
    slots: Annotated[int | None, "Most adapters in one batch; default all of them."] = None,
    dry_run: Annotated[bool, "Print vLLM's command and start nothing."] = False,
    *,
    hub: Hub,
) -> None:
    """Serve a model and its adapters by vLLM, with an OpenAI-compatible interface.

    The base and every adapter answer in the same batch, each by its folder's name. EM-LoRA, which
    chooses by the whole prompt, is refused.

    Examples:
        htsr serve adapter --dry-run
        htsr serve adapter --model model --port 8001 --dry-run
    """
    from htsr_alloc.training import check_installed

    check_installed()
    import torch

    from htsr_alloc.serving.launch import launch, vllm_version
    from htsr_alloc.training.tokens import TOKENIZER_FILES

    version = "" if dry_run else vllm_version()
    found: dict[str, Path] = {}
    for adapter in adapters:
        folder, base = located(adapter, model, hub)
        model = model or str(base.folder)
        own = folder.name.strip(".") or folder.resolve().name  # as it was typed, be it a link
        if found.setdefault(own, folder) != folder:
            raise HtsrError(f"Two adapters are called {own}.", "Rename one's folder.")
    folders = (base.folder, *found.values())
    named = [f for f in folders if any((f / name).is_file() for name in TOKENIZER_FILES)]
    made = launch(
        base.folder,
        found,
        name=base.name,
        on_cpu=not torch.cuda.is_available(),
        dtype=dtype,
        host=host,
        port=port,
        slots=slots,
        tokenizer=None if base.folder in named else next(iter(named), None),
    )
    screen = Screen()
    if dry_run:
        words = [*(f"{key}={value}" for key, value in made.environment.items()), *made.command]
        screen.text(shlex.join(words) + "\n")
        return
    screen.note(f"vLLM {version} serves {base.name} and {', '.join(found)} on {host}:{port}")
    made.run()
