"""Image files to uint8 pixels: decoded as small as they will be used, upright, cropped, resized.

The JPEG decoder shrinks a file by 2, 4 or 8 before any pixel is made; a crop is drawn from the
numbers that `augment` draws from. Every function here

    turns an image as its EXIF orientation says, so that training and evaluation see it upright;
    shows the first frame of an animation, and white where an image is transparent;
    takes whole numbers of more than 8 bits for 16 bits, and floats up to 1 for shares of 255;
    refuses a file of more than MAX_PIXELS by its header, before any pixel is decoded.

The papers' loaders turn nothing: open_clip and CLIPA v1 take Pillow's pixels as they lie in the
file, CLIPA v2's tf.io.decode_image ignores EXIF too, and so did img2dataset when it wrote LAION
again without EXIF. On its shards both ways are therefore the same; in others a picture is turned
here because people, who wrote its caption, saw it turned.
"""

import io
import math
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .augment import Augmentation, _cut, _to_uint8, one_box

MAX_PIXELS = 89_478_485  # Pillow warns of a file above it; decoded it holds 341 MiB
_PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TURNS = {  # by EXIF orientation; from 5 on height and width change places
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TooManyPixels(ValueError):
    """An image file has more pixels than are allowed."""


def decode_crop(
    data: bytes,
    size: int,
    draws: Tensor,
    augmentation: Augmentation,
    interpolation: str = "bilinear",
    shapes: Tensor | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """`augment`'s change of one image file, all but the colours (see `recolour`).

    Args:
        data: the file's bytes. size: side of the result in pixels.
        draws: float32 [42], the sample's row of `sample_draws`.
        augmentation: strengths. A crop within the image is resized by Pillow; one that reaches
            beyond it, is turned, bent or outlined goes through `augment`'s own code, which is
            bilinear.
        interpolation: "bilinear" or "bicubic", both antialiased.
        shapes: float32 [34], the sample's row of `shape_draws`; only warp and outline need it.
        max_pixels: a file of more is refused by its header; Pillow itself refuses twice MAX_PIXELS.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: the bytes are not a whole image (TooManyPixels: one that is too large), the
            interpolation has no such name, or shapes are missing.
    """
    _check_interpolation("decode_crop", interpolation)
    if shapes is None and (augmentation.warp or augmentation.outline):
        raise ValueError("decode_crop: shapes must be given for warp and outline, got None")
    numbers = draws.tolist()

    def crop(image: Image.Image) -> Tensor:
        image, (top, left, tall, wide) = _loaded_for(image, size, numbers, augmentation)
        if augmentation.leaves_the_crop:
            box = [torch.tensor([side]) for side in (top, left, tall, wide)]
            given = shapes if shapes is None else shapes[None]
            planes = _cut(_pixels(image)[None], size, box, draws[None], given, augmentation)
            return _to_uint8(planes)[0]
        box = (left, top, left + wide, top + tall)
        pixels = _pixels(image.resize((size, size), _PILLOW[interpolation], box=box))
        return pixels.flip(1) if numbers[-1] < augmentation.flip else pixels

    return _guarded("decode_crop", data, crop, max_pixels)


def decode_square(
    data: bytes, size: int, *, squash: bool = False, interpolation: str = "bilinear"
) -> Tensor:
    """One image file for evaluation: uint8 [size, size, 3].

    squash False scales the shortest side to `size` and crops the centre (CLIPA v1, open_clip); True
    resizes both sides directly (CLIPA v2).

    Raises:
        ValueError: the bytes are not a whole image, or the interpolation has no such name.
    """
    _check_interpolation("decode_square", interpolation)

    def square(image: Image.Image) -> Tensor:
        image = _load(image, (size, size))
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = None if squash else (left, top, left + side, top + side)
        return _pixels(image.resize((size, size), _PILLOW[interpolation], box=box))

    return _guarded("decode_square", data, square)


def shrunk(data: bytes, side: int, quality: int = 90) -> bytes | None:
    """An image file as a JPEG whose shorter side has `side` pixels, upright, its aspect kept.

    None where it is a JPEG that is no larger: as it is, it is better.

    Raises:
        ValueError: the bytes are not a whole image.
    """

    def work(image: Image.Image) -> bytes | None:
        before = _upright_size(image)
        if image.format == "JPEG" and min(before) <= side:
            return None
        small = image.format != "JPEG" and min(before) <= side
        scale = 1.0 if small else side / min(before)
        size = (round(before[0] * scale), round(before[1] * scale))
        image = _load(image, size)
        file = io.BytesIO()
        resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
        resized.save(file, "JPEG", quality=quality)
        return file.getvalue()

    return _guarded("shrunk", data, work)


def _loaded_for(
    image: Image.Image, size: int, numbers: list[float], augmentation: Augmentation
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """The image as small as its crop allows, and the crop in it: top, left, height, width."""
    before = _upright_size(image)
    top, left, tall, wide = one_box(before[1], before[0], numbers, augmentation)
    # Shrunk in the decoder only so far that the crop keeps `size` pixels a side.
    need = (math.ceil(before[0] * size / wide), math.ceil(before[1] * size / tall))
    image = _load(image, need)
    if augmentation.leaves_the_crop:
        # Read at points, which is sharp from up to twice the result's size.
        image = image.reduce(tuple(max(1, a // b) for a, b in zip(image.size, need, strict=True)))
    x, y = image.width / before[0], image.height / before[1]
    return image, (top * y, left * x, tall * y, wide * x)


def _orientation(image: Image.Image) -> int:
    """EXIF's number for how the pixels lie, 1 where it is missing or broken."""
    if image.format not in ("JPEG", "MPO"):
        image.load()  # a PNG's EXIF may lie behind the pixels, and Pillow turns a TIFF by itself
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what broken EXIF raises is no fault of the pixels
        return 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as seen."""
    return image.size[::-1] if _orientation(image) in (5, 6, 7, 8) else image.size


def _load(image: Image.Image, need: tuple[int, int]) -> Image.Image:
    """Decoded upright, by the JPEG decoder no smaller than `need` asks; RGB on white."""
    orientation = _orientation(image)
    if need[0] > 0 and need[1] > 0:
        image.draft("RGB", need[::-1] if orientation in (5, 6, 7, 8) else need)
    clear = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image, clear)
    elif "A" in image.getbands() or clear is not None:
        if isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits; Pillow keeps the upper 8
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image)
        image = ground
    image = image if image.mode == "RGB" else image.convert("RGB")  # it copies what is RGB
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _eight_bits(image: Image.Image, clear: int | None) -> Image.Image:
    """Grey of 16 or 32 bits or of floats; Pillow's own conversion cuts it off at 255."""
    values = np.asarray(image)
    top = values.max()
    if not top < 2**16:  # NaN too
        raise ValueError(f"its numbers must be below 65536, got {top}")
    if top <= 1 and values.dtype.kind == "f":
        grey = np.rint(values * 255)
    else:  # 257 times 255 is 65535
        grey = values if top < 256 else values // 257
    grey = grey.clip(0, 255).astype(np.uint8)
    if clear is not None:
        grey[values == clear] = 255
    return Image.fromarray(grey)


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))


def _guarded(function: str, data: bytes, work, max_pixels: int = MAX_PIXELS) -> Any:
    """Any complaint of the decoder as one ValueError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height <= max_pixels:
                return work(image)
            came = f"{image.width} x {image.height}"
    except Image.DecompressionBombError as error:  # at twice MAX_PIXELS Pillow looks no further
        came = str(error)
    except UnidentifiedImageError as error:  # its own words hold an address
        raise ValueError(
            f"{function}: data must be a whole image, got {len(data)} bytes of no known format"
        ) from error
    except Exception as error:  # Pillow's plugins raise whatever a broken file makes them
        raise ValueError(
            f"{function}: data must be a whole image, got {len(data)} bytes ({error})"
        ) from error
    raise TooManyPixels(f"{function}: an image must have at most {max_pixels} pixels, got {came}")


def _check_interpolation(function: str, interpolation: str) -> None:
    if interpolation not in _PILLOW:
        known = " or ".join(_PILLOW)
        raise ValueError(f"{function}: interpolation must be {known}, got {interpolation!r}")
