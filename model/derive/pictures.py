"""A picture for a tiny model, so that its way into the text model's stream is watched and confirmed too.

There is no common way to hand over a picture; the commonest are tried, and a model that takes none of them
sees tokens alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]


def with_picture(model: PreTrainedModel, tokens: torch.Tensor) -> Inputs | None:
    """Put a random picture in the middle of the first row of `tokens` (row, position); None where the model
    takes none.
    """
    config: Any = model.config
    eyes: Any = model if hasattr(model, "get_image_features") else model.base_model
    vision = getattr(config, "vision_config", None) or config
    picture_token = getattr(config, "image_token_id", None)
    if picture_token is None:
        return None
    row = tokens[:1]
    text = row.masked_fill(row == picture_token, 0)
    half = text.shape[1] // 2
    forms = product(_pictures(vision), (False, True))
    for picture, typed in forms:
        try:
            with torch.no_grad():
                count = _features(eyes.get_image_features(**picture))
                places = torch.full((1, count), picture_token)
                before = text[:, :half]
                after = text[:, half:]
                words = torch.cat([before, places, after], dim=1)
                inputs = {"input_ids": words, **picture}
                if typed:
                    inputs["mm_token_type_ids"] = (words == picture_token).long()
                model(**inputs, use_cache=False)
            return inputs
        except Exception:  # the library's classes raise every kind
            continue
    return None


def _pictures(vision: Any) -> Iterator[Inputs]:
    """Yield a picture in the common forms.

    Pixels (picture, channel, row, column), patches of a grid (patch, channel * frame * row * column), patches
    alone.
    """
    numbers = torch.Generator().manual_seed(3)
    named = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None)
    channels: int = named or 3
    size = _side(getattr(vision, "image_size", None))
    patch = _side(getattr(vision, "patch_size", None))
    if size:
        shape = (1, channels, size, size)
        pixels = torch.randn(shape, generator=numbers, dtype=torch.float64)
        sizes = torch.tensor([[size, size]])
        yield {"pixel_values": pixels}
        yield {"pixel_values": pixels, "image_sizes": sizes}
        yield {"pixel_values": pixels[None]}
    if patch and (merged := getattr(vision, "spatial_merge_size", None)):
        side = 2 * int(merged)
        frames = int(getattr(vision, "temporal_patch_size", 1))
        entries = channels * frames * patch * patch
        count = side * side
        patches = torch.randn(count, entries, generator=numbers, dtype=torch.float64)
        grid = torch.tensor([[1, side, side]])
        yield {"pixel_values": patches, "image_grid_thw": grid}
    if patch:
        entries = channels * patch * patch
        patches = torch.randn(1, 4, entries, generator=numbers, dtype=torch.float64)
        yield {"pixel_values": patches}


def _side(size: object) -> int | None:
    """Return the side of a square whose size may be given as [side, side]."""
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) else None


def _features(output: Any) -> int:
    """Count the positions that a picture's features take."""
    names = ("pooler_output", "last_hidden_state")
    named = [getattr(output, name, None) for name in names]
    features = next((part for part in named if part is not None), output)
    is_list = isinstance(features, list | tuple)
    parts = features if is_list else [features]
    return sum(part.numel() // part.shape[-1] for part in parts)
