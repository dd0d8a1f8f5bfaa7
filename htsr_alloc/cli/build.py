"""``htsr build``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from htsr_alloc.cli import views
from htsr_alloc.cli.adapters import Push, base_of, hand_on
from htsr_alloc.cli.choices import SYSTEM
from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.options import LoraAlpha, LoraDropout, LoraR, Target
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError
from htsr_alloc.records.lora import Lora


def build(
    allocation: Annotated[Path, typer.Argument(help="An allocation file.")],
    model: Annotated[str, "Folder or hub id of the model; --dry-run reads only its config."],
    dry_run: Annotated[bool, "Only show what each layer would get."] = False,
    system: Annotated[str, "LoRA-MoE system to build.", SYSTEM] = "alphalora",
    target: Target = None,
    r: LoraR = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = Lora.lora_dropout,
    output: Annotated[Path | None, "Folder of the adapter to write."] = None,
    control: Annotated[
        Path | None, "Also write the configuration of plain LoRA of the same ranks, as JSON."
    ] = None,
    push: Push = None,
    *,
    hub: Hub,
    screen: Screen,
) -> None:
    """Put an allocation's experts on a model, and show what each layer got.

    Examples:
        htsr build model.allocation.json --model model --dry-run
        htsr build model.allocation.json --model model --target q_proj --target v_proj -o adapter
        htsr build model.allocation.json --model model --system goat --r 4 -o goat
    """
    from htsr_alloc import files
    from htsr_alloc.lora_moe.build import build as put_on
    from htsr_alloc.lora_moe.build import describe, empty_model, load, open_model, resolve_layers
    from htsr_alloc.lora_moe.linears import left_alone_in
    from htsr_alloc.lora_moe.plain import control as plain_lora
    from htsr_alloc.lora_moe.systems import DEFAULT
    from htsr_alloc.training.handing import whole_files
    from htsr_alloc.training.models import silence

    silence()
    loaded = load(allocation)
    if not dry_run and output is None:
        raise HtsrError("An adapter needs a folder.", "Give -o FOLDER, or --dry-run.")
    if not dry_run and output is not None and (output / "adapter_config.json").exists():
        raise typer.BadParameter(f"{output} holds an adapter already.", param_hint="-o")
    named = base_of(model, hub, weights=not dry_run)
    base = empty_model(named.folder) if dry_run else open_model(named.folder)
    prefixes = resolve_layers(base, loaded)
    lora = Lora.of(loaded, r, lora_alpha, lora_dropout)
    settings = {"r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout}
    text = None
    if control is not None:
        text = plain_lora(base, loaded, target_modules=target, **settings)  # type: ignore[arg-type]
    made = put_on(base, loaded, system=system, target_modules=target, **settings)
    left = left_alone_in(made.get_base_model(), prefixes) if target is None else []
    screen.show(views.build(made, describe(made, prefixes), left))
    counted, trainable = loaded.parameters, made.get_nb_trainable_parameters()[0]
    same = counted is not None and (system, target, lora.r) == (DEFAULT, None, counted.r)
    if same and counted is not None and counted.spent != trainable:
        screen.warn(
            f"The allocation counted {counted.spent:,} trainable parameters: transformers splits "
            "or joins matrices of this checkpoint (q, k and v; gate and up) when it loads it. "
            "htsr allocate --model counts what it makes of them."
        )
    if control is not None and text is not None:
        files.write_text(control, text)
        screen.note(f"wrote {control}")
    if not dry_run and output is not None:
        with whole_files(output) as folder:
            made.save_pretrained(str(folder))
        hand_on(screen, output, named, ["Not trained yet"], loaded, push, hub.token)
        screen.note(f"wrote {output}")
