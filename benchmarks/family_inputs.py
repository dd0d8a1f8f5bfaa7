"""What a model's forward pass takes, by the names of its arguments."""

import inspect
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

ROWS, TOKENS, TARGETS, FRAMES = 2, 12, 6, 4
SIDE = 4  # patches of an image, where they are given as rows
TEXT, TARGET = ("input_ids", "attention_mask"), "decoder_input_ids"


def inputs_of(model: Any) -> dict[str, Tensor]:
    """The plainest inputs that the model takes: two rows of text, the second of them padded, or
    what stands in its place, with what its signature requires; or else all that are known here.

    Raises:
        Exception: what the model raises of all that are known.
    """
    arguments = inspect.signature(model.forward).parameters
    first = TEXT if "input_ids" in arguments else (model.main_input_name,)
    needed = [n for n, a in arguments.items() if a.default is a.empty]
    if getattr(model.config, "is_encoder_decoder", False):
        needed.append(TARGET)

    def given(names: Collection[str]) -> dict[str, Tensor]:
        taken = (n for n in MAKERS if n in arguments and n in names)
        return {n: MAKERS[n](model, arguments) for n in taken}

    with torch.no_grad():
        with suppress(Exception):
            plain = given((*first, *needed))
            outcome(model, plain)
            return plain
        whole = given(MAKERS)
        outcome(model, whole)
    return whole


def outcome(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The logits, or whatever tensor comes first; what the model draws is the same each time."""
    torch.manual_seed(0)
    found = model(**given)
    logits = getattr(found, "logits", None)
    return logits if isinstance(logits, Tensor) else found[0]


def _ids(length: int) -> Tensor:
    return torch.randint(10, 90, (ROWS, length), generator=torch.Generator().manual_seed(1))


def _normal(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))


def _vision(model: Any) -> Any:
    """The part of a configuration that is about images."""
    config = model.config
    for name in ("vlm_config", "vision_config", "encoder"):
        config = getattr(config, name, config)
    return config


def _image(model: Any) -> tuple[int, int, int]:
    """Channels, height and width."""
    vision = _vision(model)
    size = getattr(vision, "image_size", 64)
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(vision, "num_channels", 3), height, width


def _patch(model: Any) -> int:
    """The numbers in one patch."""
    vision = _vision(model)
    size = getattr(vision, "patch_embed_hidden_size", None)
    return size or getattr(vision, "num_channels", 3) * vision.patch_size**2


def _pixels(model: Any, arguments: Collection[str]) -> Tensor:
    """Images; as rows of patches, or several of a row, where the other arguments say so."""
    if "spatial_shapes" in arguments:
        return _normal(SIDE * SIDE, _patch(model))
    image = _image(model)
    if {"image_attention_mask", "pixel_attention_mask"} & set(arguments):
        return _normal(1, *image)
    return _normal(FRAMES, *image) if "video" in model.input_modalities else _normal(*image)


def _mask(model: Any, arguments: Collection[str]) -> Tensor:
    if "flattened_patches" in arguments:
        return torch.ones(ROWS, SIDE * SIDE)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[1, :4] = 0
    return mask


def _flattened(model: Any, arguments: Collection[str]) -> Tensor:
    """Patches with their row and column in front."""
    places = torch.cartesian_prod(*[torch.arange(1, SIDE + 1)] * 2)
    return torch.cat([places.expand(ROWS, -1, -1), _normal(SIDE * SIDE, _patch(model))], -1)


def _boxes(model: Any, arguments: Collection[str]) -> Tensor:
    corners = _normal(TOKENS, 2, 2).sigmoid()
    return torch.cat([corners.amin(2), corners.amax(2)], -1)


def _queries(model: Any, arguments: Collection[str]) -> Tensor:
    """Where the image's embeddings stand in the text."""
    return (torch.arange(TOKENS) < model.config.latent_query_num).expand(ROWS, -1)


def _seen(model: Any, arguments: Collection[str]) -> Tensor:
    """No patch, or no image, is padding."""
    return torch.ones(ROWS, SIDE * SIDE if "spatial_shapes" in arguments else 1, dtype=torch.bool)


MAKERS: dict[str, Callable[[Any, Collection[str]], Tensor]] = {
    "input_ids": lambda model, _: _ids(TOKENS),
    "attention_mask": _mask,
    TARGET: lambda model, _: _ids(TARGETS),
    "qformer_input_ids": lambda model, _: _ids(TOKENS),
    "pixel_values": _pixels,
    "pixel_attention_mask": _seen,
    "image_attention_mask": lambda model, _: torch.ones(ROWS, TOKENS, 1),
    "image_embeds_position_mask": _queries,
    "spatial_shapes": lambda model, _: torch.full((ROWS, 2), SIDE),
    "flattened_patches": _flattened,
    "bbox": _boxes,
    "input_features": lambda model, _: _normal(model.config.audio_config.num_mel_bins, 8 * TOKENS),
    "state": lambda model, _: _normal(model.config.max_state_dim),
}
