"""``htsr collapse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.adapters import Push, hand_on, opened
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import Chat, Device, Dtype, OfAdapter
from htsr_alloc.cli.screen import Screen
from htsr_alloc.training import check_installed


def collapse(
    adapter: Annotated[str, typer.Argument(help="Folder or hub id of a trained mixture.")],
    data: Annotated[str, "Calibration rows: JSON lines, or a hub data set as org/name:split."],
    output: Annotated[Path, "Folder of the plain LoRA."],
    model: OfAdapter = None,
    limit: Annotated[int, "Number of calibration rows, from the first."] = 64,
    batch_size: Annotated[int, "Rows of a batch."] = 8,
    max_length: Annotated[int, "Most tokens of a row; longer prompts are cut."] = 512,
    chat: Chat = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    push: Push = None,
    *,
    hub: Hub,
    screen: Screen,
) -> None:
    """Turn a mixture into a plain LoRA that PEFT loads without htsr_alloc, and measure the error.

    Each gate becomes its mean over the calibration rows. The error is relative, of the logits.

    Examples:
        htsr collapse adapter --data train.jsonl -o plain
        htsr collapse adapter --model model --data train.jsonl --limit 8 -o plain --json
    """
    check_installed()
    from htsr_alloc.lora_moe.collapse import collapse as collapsed
    from htsr_alloc.training import tokens
    from htsr_alloc.training.handing import whole_files
    from htsr_alloc.training.positions import refuse_longer
    from htsr_alloc.training.rows import read_rows, share_of

    if (output / "adapter_config.json").exists():
        raise typer.BadParameter(f"{output} holds an adapter already.", param_hint="-o")
    rows = share_of(read_rows(hub.rows(data)), limit)
    found = opened(adapter, model, hub, dtype, device)
    rows = tokens.as_chat(rows) if chat else rows
    encoded = [tokens.encode(row, found.tokenizer, max_length) for row in rows]
    refuse_longer(found.model, encoded)
    collate = tokens.Collator(tokens.pad_id(found.tokenizer))
    batches = [
        {name: value.to(found.model.device) for name, value in batch.items()}
        for i in range(0, len(encoded), batch_size)
        for batch in [collate(encoded[i : i + batch_size])]
    ]
    made = collapsed(found.model, batches)
    with whole_files(output) as folder:
        made.save(folder)
    how = "exact up to rounding" if made.exact else "approximate: each gate is its mean"
    facts = [
        f"Collapsed from the mixture {Path(adapter).name}, {how}",
        f"Relative error of the logits: {made.error:.3g} ({len(rows)} rows of {Path(data).name})",
    ]
    hand_on(screen, output, found.base, facts, None, push, hub.token)
    screen.show(views.collapsed(made, len(rows)))
    screen.note(f"wrote {output}")
