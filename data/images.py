"""Image files to uint8 pixels: decoded as small as they will be used, cropped, resized.

The JPEG decoder shrinks a file by 2, 4 or 8 before any pixel is made; a crop is drawn from the
numbers that `augment` draws from.
"""

import io
import math
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .augment import Augmentation, _boxes

_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def decode(data: bytes, size: int = 0) -> Tensor:
    """Pixels of an image file, on white where it is transparent.

    Args:
        data: the file's bytes, any format of Pillow.
        size: a JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 of its size that leaves both
            sides at least this long, in pixels; 0 decodes all of it.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: the bytes are no whole image.
    """
    return _guarded("decode", data, lambda image: _pixels(_load(image, (size, size))))


def decode_crop(
    data: bytes, size: int, draws: Tensor, how: Augmentation, interpolation: str = "bilinear"
) -> Tensor:
    """`augment`'s random crop of one image file; colours stay (see `recolour`).

    Args:
        data: the file's bytes. size: side of the result in pixels.
        draws: float32 [42], the sample's row of `sample_draws`.
        how: its scale (up to 1), ratio and flip count.
        interpolation: "bilinear" or "bicubic", both antialiased.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: the bytes are no whole image, or the interpolation has no such name.
    """
    _check_interpolation("decode_crop", interpolation)

    def crop(image: Image.Image) -> Tensor:
        inner = replace(how, scale=(min(how.scale[0], 1.0), min(how.scale[1], 1.0)), shift=0.0)
        boxes = _boxes(image.height, image.width, draws[None], inner)
        top, left, tall, wide = (int(side) for side in boxes)
        before = image.size
        # Shrunk in the decoder only so far that the crop keeps `size` pixels a side.
        need = (math.ceil(before[0] * size / wide), math.ceil(before[1] * size / tall))
        image = _load(image, need)
        x, y = image.width / before[0], image.height / before[1]
        box = (left * x, top * y, (left + wide) * x, (top + tall) * y)
        image = image.resize((size, size), _PILLOW[interpolation], box=box)
        pixels = _pixels(image)
        return pixels.flip(1) if float(draws[-1]) < how.flip else pixels

    return _guarded("decode_crop", data, crop)


def decode_square(
    data: bytes, size: int, *, squash: bool = False, interpolation: str = "bilinear"
) -> Tensor:
    """One image file for evaluation: uint8 [size, size, 3].

    squash False scales the shortest side to `size` and crops the centre (CLIPA v1, open_clip); True
    resizes both sides directly (CLIPA v2).

    Raises:
        ValueError: the bytes are no whole image, or the interpolation has no such name.
    """
    _check_interpolation("decode_square", interpolation)

    def square(image: Image.Image) -> Tensor:
        image = _load(image, (size, size))
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = None if squash else (left, top, left + side, top + side)
        return _pixels(image.resize((size, size), _PILLOW[interpolation], box=box))

    return _guarded("decode_square", data, square)


def _load(image: Image.Image, need: tuple[int, int]) -> Image.Image:
    """Decode, shrunk by the JPEG decoder where at least `need` pixels stay; RGB on white."""
    if need[0] > 0 and need[1] > 0:
        image.draft("RGB", need)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    return image.convert("RGB")


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def _guarded(function: str, data: bytes, work) -> Tensor:
    """Any complaint of the decoder as one ValueError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return work(image)
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them
        raise ValueError(
            f"{function}: data must be a whole image, got {len(data)} bytes ({error})"
        ) from error


def _check_interpolation(function: str, interpolation: str) -> None:
    if interpolation not in _PILLOW:
        known = " or ".join(_PILLOW)
        raise ValueError(f"{function}: interpolation must be {known}, got {interpolation!r}")
