"""What the commands that take an adapter do first, and those that write one do last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from htsr_alloc.cli.opening import Hub
from htsr_alloc.cli.screen import Screen
from htsr_alloc.errors import HtsrError

if TYPE_CHECKING:
    from htsr_alloc.records import Allocation
    from htsr_alloc.training.handing import Base

Push = Annotated[str | None, "Repository of the hub to upload the folder to, as org/name."]


@dataclass(frozen=True)
class Opened:
    """An adapter on its model, with the model's tokenizer, where it computes."""

    model: Any
    tokenizer: Any
    base: Base


def base_of(model: str, hub: Hub, weights: bool = True) -> Base:
    """A model that the user names; without its weights where only its shape is asked for."""
    from htsr_alloc.training.handing import Base

    folder = hub.folder(model, weights)
    at_home = Path(model).expanduser().exists() or str(folder) == str(Path(model).expanduser())
    return Base(model, folder, None if at_home else folder.name)


def located(adapter: str, model: str | None, hub: Hub) -> tuple[Path, Base]:
    """An adapter's folder, and the model that it names, or ``model``.

    Raises:
        HtsrError: no adapter, no name of a model, or one that does not fit.
    """
    from htsr_alloc.training.handing import config_of
    from htsr_alloc.training.identity import check_base

    # The revision is the model's: of an adapter the newest is taken.
    folder = Hub(None, hub.token, hub.cache_dir, hub.offline).folder(adapter)
    config = config_of(folder)
    named = model or config.get("base_model_name_or_path")
    if not named:
        raise HtsrError(f"{adapter} does not name its model.", "Give --model.")
    if hub.revision is None and model is None and config.get("revision"):
        hub = Hub(config["revision"], hub.token, hub.cache_dir, hub.offline)
    base = base_of(named, hub)
    if model is None and not base.folder.exists():
        raise HtsrError(f"The adapter's model, {named}, is not here.", "Give --model.")
    check_base(folder, base.folder)
    return folder, base


def opened(adapter: str, model: str | None, hub: Hub, dtype: str, device: str) -> Opened:
    """An adapter on its causal language model, which it names, or on ``model``.

    Raises:
        HtsrError: no adapter, no name of a model, or one that does not fit.
    """
    from htsr_alloc.training import models, tokens

    models.silence()
    folder, base = located(adapter, model, hub)
    where = models.device_of(device)
    loaded = models.open_causal_lm(base.folder, models.dtype_of(dtype, where))
    adapted = models.open_adapter(loaded, folder).to(where)
    return Opened(adapted, tokens.open_tokenizer(base.folder), base)


def hand_on(
    screen: Screen,
    folder: Path,
    base: Base,
    facts: Sequence[str],
    allocation: Allocation | None,
    push: str | None,
    token: str | None,
    labels: Sequence[str] = (),
) -> None:
    """Complete an adapter's folder, and upload it if that is asked for.

    Args:
        labels: the classes of a classifier.
    """
    from htsr_alloc.checkpoints.sentences import sentences
    from htsr_alloc.training import handing

    handing.finish(folder, base, facts, allocation, labels)
    if push is not None:
        with sentences(push, None):
            address = handing.push(folder, push, token)
        screen.note(f"uploaded to {address}")
