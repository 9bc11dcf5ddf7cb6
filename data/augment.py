"""Crop, resize, bend and colour uint8 batches; each draw depends on (seed, step, sample) alone.

A crop is two products with banded weight matrices, out = Wy @ image @ Wx^T, with antialiased
bilinear weights; it equals torch's interpolate(crop, mode="bilinear", antialias=True). A crop that
is also turned or bent is read at points instead, bilinear: sharp from sources of up to twice its
size, and a third of the time. Colours are one 3x3 matrix with a bias.

The crop is torchvision's RandomResizedCrop (area, then log-uniform aspect, ten tries). The colour
change is brightness, contrast, saturation and hue in this fixed order, with one rounding at the end
(torchvision rounds and clips after each, in random order); hue turns RGB about the grey axis.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clipa_kernels import philox_uniform
from clipa_kernels.masking.philox import AUGMENT_STREAM, SHAPE_STREAM

_TRIES = 10  # as torchvision
_FIELD = 4  # knots a side of the field that bends an image
_COLOUR = 2 * _TRIES + 2  # first column of the colours' 16; before it sizes and places
_SHIFT = _COLOUR + 16
_DRAWS = _SHIFT + 4  # two shifts, turn, flip
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma

# Wide enough for every use that is known, narrow enough that a slip ends in a sentence.
_RANGES = {
    "scale": "(0, 4]",
    "ratio": "[0.01, 100]",
    "shift": "[0, 4]",
    "rotate": "[0, 360]",
    "warp": "[0, 4]",
    "outline": "[0, 1]",
    "brightness": "[0, 10]",
    "contrast": "[0, 10]",
    "saturation": "[0, 10]",
    "hue": "[0, 0.5]",
    "jitter": "[0, 1]",
    "mix": "[0, 10]",
    "grey": "[0, 1]",
    "blend": "[0, 1]",
    "invert": "[0, 1]",
    "flip": "[0, 1]",
    "fill": "[0, 255]",
}


@dataclass(frozen=True)
class Augmentation:
    """What training changes about an image; the defaults are CLIPA's crop and no more.

    CLIPA v1 L/16 adds brightness = contrast = saturation = 0.32, hue = 0.08, grey = 0.2. A blend
    needs the drawings of a whole data set: EmojiLoader does it, `augment` does not.

    Raises:
        ValueError: a field outside its range.
    """

    scale: tuple[float, float] = (0.4, 1.0)  # least and most area of a crop; above 1: with a margin
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # least and most width / height of a crop
    shift: float = 0.0  # most that a crop moves either way, in sides; beyond the edge too
    rotate: float = 0.0  # most rotation either way about the centre, in degrees
    warp: float = 0.0  # deviation, in half sides, of a smooth random field that bends the image
    outline: float = 0.0  # share of images whose edges are darkened, by up to twice their contrast
    brightness: float = 0.0  # most that the brightness changes either way, as a share of it
    contrast: float = 0.0  # most that the contrast about the mean grey changes, as a share of it
    saturation: float = 0.0  # most that the saturation changes, as a share of it
    hue: float = 0.0  # most that the hue turns either way, in turns of the colour circle
    jitter: float = 0.8  # share of images whose colours change by the four above
    mix: float = 0.0  # most of each colour channel that is added to each other one, either way
    grey: float = 0.0  # share of images that lose all colour
    blend: float = 0.0  # embedded set: share of images faded into their concept's other drawing
    invert: float = 0.0  # share of images turned into a negative
    flip: float = 0.0  # share of images flipped left to right (CLIPA has none)
    fill: int = 255  # grey level outside the image, 0 to 255

    def __post_init__(self) -> None:
        for name, interval in _RANGES.items():
            value, (low, high) = getattr(self, name), map(float, interval[1:-1].split(","))
            for number in value if isinstance(value, tuple | list) else (value,):
                if not low <= number <= high or (number == low and interval[0] == "("):
                    raise ValueError(f"augment: {name} must be in {interval}, got {value}")
        for name in ("scale", "ratio"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(f"augment: {name} must rise, got {(least, most)}")

    @property
    def changes_colour(self) -> bool:
        """Whether any colour may differ after."""
        jitters = max(self.brightness, self.contrast, self.saturation, self.hue) * self.jitter
        return max(jitters, self.mix, self.grey, self.invert) > 0

    @property
    def leaves_the_crop(self) -> bool:
        """Whether more than a flipped crop within the image may be asked for."""
        return max(self.shift, self.rotate, self.warp, self.outline, self.scale[1] - 1) > 0


def augment(
    images: Tensor,
    size: int,
    augmentation: Augmentation | None = None,
    *,
    seed: int,
    step: int,
    first_sample: int = 0,
) -> Tensor:
    """Random crop, resize and colour of a batch.

    Args:
        images: uint8 [B, H, W, 3], the images of samples first_sample, first_sample + 1, ...
        size: side of the result in pixels.
        augmentation: strengths; None is Augmentation().
        seed, step, first_sample: with the row they decide every draw, so any split of a batch over
            processes gives the same pixels.

    Returns:
        uint8 [B, size, size, 3].

    Raises:
        TypeError: images is not a uint8 tensor. ValueError: its shape or the size is off.

    >>> batch = torch.zeros(2, 72, 72, 3, dtype=torch.uint8)
    >>> augment(batch, 16, seed=0, step=0).shape
    torch.Size([2, 16, 16, 3])
    """
    _check_batch("augment", images, size)
    augmentation = augmentation or Augmentation()
    draws = sample_draws(len(images), seed=seed, step=step, first_sample=first_sample)
    shapes = shape_draws(len(images), augmentation, seed=seed, step=step, first_sample=first_sample)
    box = _boxes(*images.shape[1:3], draws, augmentation)
    planes = _cut(images, size, box, draws, shapes, augmentation)
    if augmentation.changes_colour:
        planes = _recolour(planes, draws, augmentation)
    return _to_uint8(planes)


def recolour(
    images: Tensor, augmentation: Augmentation, *, seed: int, step: int, first_sample: int = 0
) -> Tensor:
    """The colour part of `augment` alone, for cropped images: uint8 [B, H, W, 3] to the same.

    On any device, with the same draws; nothing waits for the device.
    """
    _check_batch("recolour", images, 1)
    if not augmentation.changes_colour:
        return images
    key = {"seed": seed, "step": step, "first_sample": first_sample}
    draws = sample_draws(len(images), **key, device=images.device)
    # What a core holds in its cache takes it half to a third of the time (64 to 224 pixels); on a
    # GPU floats of 200 MB at a time are enough.
    pixels = 2**18 if images.device.type == "cpu" else 2**24
    rows = max(1, pixels // (images.shape[1] * images.shape[2]))
    parts = zip(images.split(rows), draws.split(rows), strict=True)
    planes = ((part.permute(0, 3, 1, 2).float(), draw) for part, draw in parts)
    return torch.cat([_to_uint8(_recolour(*one, augmentation)) for one in planes])


def resize(images: Tensor, size: int) -> Tensor:
    """Direct resize to a square (no crop), antialiased bilinear: how images are evaluated.

    Args:
        images: uint8 [B, H, W, 3]. size: side of the result in pixels.

    Returns:
        uint8 [B, size, size, 3]; the images themselves where they have that size.

    Raises:
        TypeError: images is not a uint8 tensor. ValueError: its shape or the size is off.
    """
    _check_batch("resize", images, size)
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    zero = torch.zeros(1, dtype=torch.long)
    rows = _weights(zero, zero + height, size, height)
    columns = _weights(zero, zero + width, size, width)
    return _to_uint8(_apply(images, rows, columns, 0))


def sample_draws(
    count: int,
    *,
    seed: int,
    step: int,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The uniform numbers that decide an image's augmentation, float32 [count, 42]."""
    samples = torch.arange(first_sample, first_sample + count, device=device)
    return philox_uniform(seed, step, samples, _DRAWS, stream=AUGMENT_STREAM)


def shape_draws(
    count: int, augmentation: Augmentation, *, seed: int, step: int, first_sample: int = 0
) -> Tensor | None:
    """What decides an image's outline and warp, float32 [count, 34]; None where it has neither."""
    if not (augmentation.warp or augmentation.outline):
        return None
    samples = torch.arange(first_sample, first_sample + count)
    return philox_uniform(seed, step, samples, 2 + 2 * _FIELD**2, stream=SHAPE_STREAM)


def _boxes(
    height: int, width: int, draws: Tensor, augmentation: Augmentation
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height, width int64 [B] of the crops; the first of ten tries that fits."""
    low, high = augmentation.scale
    room = math.sqrt(max(1.0, high))
    area = height * width * (low + (high - low) * draws[:, :_TRIES])
    logs = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    ratio = (logs[0] + (logs[1] - logs[0]) * draws[:, _TRIES : 2 * _TRIES]).exp()
    wide = (area * ratio).sqrt().round().long().clamp_(min=1)
    tall = (area / ratio).sqrt().round().long().clamp_(min=1)
    fits = (wide <= round(width * room)) & (tall <= round(height * room))
    first = fits.int().argmax(dim=1, keepdim=True)
    wide, tall, any_fits = wide.gather(1, first)[:, 0], tall.gather(1, first)[:, 0], fits.any(1)
    wide = torch.where(any_fits, wide, min(width, max(1, round(height * augmentation.ratio[1]))))
    tall = torch.where(any_fits, tall, min(height, max(1, round(width / augmentation.ratio[0]))))
    at = draws[:, 2 * _TRIES : _COLOUR]
    top = ((height - tall).float() * at[:, 0]).round().long()
    left = ((width - wide).float() * at[:, 1]).round().long()
    if augmentation.shift:
        moved = (2 * draws[:, _SHIFT : _SHIFT + 2] - 1) * augmentation.shift
        top = top + (moved[:, 0] * height).round().long()
        left = left + (moved[:, 1] * width).round().long()
    return top, left, tall, wide


def one_box(
    height: int, width: int, draws: list[float], augmentation: Augmentation
) -> tuple[int, int, int, int]:
    """`_boxes` of one image in plain numbers, at a thirtieth of the time of one row of tensors.

    It computes in float64 and they in float32, so one box in 30,000 differs by a pixel.
    """
    (low, high), (narrow, broad) = augmentation.scale, augmentation.ratio
    room = math.sqrt(max(1.0, high))
    most_wide, most_tall = round(width * room), round(height * room)
    first, span = math.log(narrow), math.log(broad) - math.log(narrow)
    for size, shape in zip(draws[:_TRIES], draws[_TRIES : 2 * _TRIES], strict=True):
        area = height * width * (low + (high - low) * size)
        ratio = math.exp(first + span * shape)
        wide = max(1, round(math.sqrt(area * ratio)))
        tall = max(1, round(math.sqrt(area / ratio)))
        if wide <= most_wide and tall <= most_tall:
            break
    else:
        wide = min(width, max(1, round(height * broad)))
        tall = min(height, max(1, round(width / narrow)))
    top = round((height - tall) * draws[2 * _TRIES])
    left = round((width - wide) * draws[2 * _TRIES + 1])
    if augmentation.shift:
        down, right = draws[_SHIFT : _SHIFT + 2]
        top += round((2 * down - 1) * augmentation.shift * height)
        left += round((2 * right - 1) * augmentation.shift * width)
    return top, left, tall, wide


def _cut(
    images: Tensor,
    size: int,
    box: tuple[Tensor, ...],
    draws: Tensor,
    shapes: Tensor | None,
    augmentation: Augmentation,
) -> Tensor:
    """Crops as drawn, outlined, turned, bent and flipped: float32 [B, 3, size, size]."""
    if augmentation.outline:
        images = _outlined(images, shapes[:, 0] < augmentation.outline, 2 * shapes[:, 1])
    flipped = draws[:, -1] < augmentation.flip
    if augmentation.rotate or augmentation.warp:
        angle = (2 * draws[:, -2] - 1) * math.radians(augmentation.rotate)
        field = (
            None if not augmentation.warp else augmentation.warp * 12**0.5 * (shapes[:, 2:] - 0.5)
        )
        planes = _bent(images, size, box, angle, field, flipped, augmentation.fill)
    else:
        planes = _cropped(images, size, box, flipped, augmentation)
    return planes.add_(augmentation.fill)


def _weights(start: Tensor, length: Tensor, size: int, source: int, outside: int = 0) -> Tensor:
    """Antialiased bilinear weights of pixels start to start + length: float32 [B, size, source].

    `outside` is how far a crop may reach beyond the image; a number of its own for each batch would
    change the order of a sum, and with it a pixel, by the batch's other rows.
    """
    pixel = torch.arange(-outside, source + outside) + 0.5
    per_pixel = (length / size)[:, None]
    centre = start[:, None] + (torch.arange(size) + 0.5) * per_pixel
    reach = per_pixel.clamp(min=1)[..., None]
    weights = (1 - (pixel - centre[..., None]).abs_().div_(reach)).clamp_(min=0)
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])
    weights *= inside[:, None]
    weights /= weights.sum(-1, keepdim=True)
    return weights[..., outside : outside + source]


def _apply(images: Tensor, rows: Tensor, columns: Tensor, fill: int) -> Tensor:
    """rows @ (image - fill) @ columns^T for each image and colour: float32 [B, 3, size, size]."""
    batch, height, width, _ = images.shape
    size = rows.shape[1]
    lines = rows @ images.reshape(batch, height, 3 * width).float().sub_(fill)
    planes = lines.view(batch, size, width, 3).permute(0, 3, 1, 2).reshape(batch, 3 * size, width)
    return (planes @ columns.transpose(1, 2)).view(batch, 3, size, size)


def _cropped(
    images: Tensor, size: int, box: tuple[Tensor, ...], flipped: Tensor, augmentation: Augmentation
) -> Tensor:
    """Crops less `augmentation.fill`, antialiased: float32 [B, 3, size, size]."""
    (height, width), (top, left, tall, wide) = images.shape[1:3], box
    beyond = math.sqrt(max(1.0, augmentation.scale[1])) - 1 + augmentation.shift
    rows = _weights(top, tall, size, height, math.ceil(beyond * height))
    columns = _weights(left, wide, size, width, math.ceil(beyond * width))
    if augmentation.flip:
        columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    return _apply(images, rows, columns, augmentation.fill)


def _bent(
    images: Tensor,
    size: int,
    box: tuple[Tensor, ...],
    angle: Tensor,
    field: Tensor | None,
    flipped: Tensor,
    fill: int,
) -> Tensor:
    """Crops less `fill`, turned about their centre and bent by _FIELD x _FIELD knots.

    A pixel of the result is read at a point, from the four pixels around it: [B, 3, size, size].
    """
    at = (torch.arange(size) + 0.5) * (2 / size) - 1
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = at[None, None, :], at[None, :, None]
    grid = torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
    if field is not None:
        bend = field.view(-1, _FIELD**2) @ _knots(size)
        grid += bend.view(-1, 2, size, size).permute(0, 2, 3, 1)
    (height, width), (top, left, tall, wide) = images.shape[1:3], box
    sign = 1 - 2 * flipped.float()
    scale = torch.stack([sign * wide / width, tall / height], dim=1)
    centre = torch.stack([(2 * left + wide) / width - 1, (2 * top + tall) / height - 1], dim=1)
    grid = torch.addcmul(centre[:, None, None], grid, scale[:, None, None])
    planes = images.permute(0, 3, 1, 2).float().sub_(fill)
    return F.grid_sample(planes, grid, align_corners=False)


@lru_cache(maxsize=4)
def _knots(size: int) -> Tensor:
    """Bicubic weights of each knot in each pixel: float32 [_FIELD**2, size**2]."""
    knots = torch.eye(_FIELD**2).view(1, -1, _FIELD, _FIELD)
    return F.interpolate(knots, (size, size), mode="bicubic").view(_FIELD**2, size**2)


def _outlined(images: Tensor, chosen: Tensor, strength: Tensor) -> Tensor:
    """Edges of the chosen images darkened by strength times the contrast of their 3x3 pixels."""
    at = chosen.nonzero()[:, 0]
    picked = images.index_select(0, at).float()
    grey = picked.mean(3)
    edge = _around(grey, torch.maximum).sub_(_around(grey, torch.minimum))
    darker = picked.sub_((strength[at, None, None] * edge)[..., None])
    return images.index_copy(0, at, darker.clamp_(0, 255).round_().to(torch.uint8))


def _around(planes: Tensor, take) -> Tensor:
    """The most or least of the 3x3 pixels around each of [B, H, W]."""
    for dim in (1, 2):
        last = planes.shape[dim] - 1
        first, final = planes.narrow(dim, 0, 1), planes.narrow(dim, last, 1)
        before = torch.cat([first, planes.narrow(dim, 0, last)], dim)
        after = torch.cat([planes.narrow(dim, 1, last), final], dim)
        planes = take(take(before, after), planes)
    return planes


def _recolour(planes: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """One 3x3 matrix and bias an image, on float32 [B, 3, H, W]."""
    draws = draws[:, _COLOUR:_SHIFT]
    grey_axis, to_grey, across, one = _matrices(draws.device)
    strengths = (
        augmentation.brightness,
        augmentation.contrast,
        augmentation.saturation,
        augmentation.hue,
    )
    strengths = _constant(strengths, draws.device) * (draws[:, :1] < augmentation.jitter)
    change = (2 * draws[:, 1:5] - 1) * strengths
    bright, contrast, saturation = (1 + change[:, :3]).clamp(min=0).unbind(1)
    saturation = saturation * (draws[:, 5] >= augmentation.grey)
    angle = 2 * math.pi * change[:, 3]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    hue = cos * one + (1 - cos) * grey_axis + sin * across  # Rodrigues' rotation
    kept = saturation[:, None, None]
    matrix = hue @ (kept * one + (1 - kept) * to_grey)
    # Rows of the mixing matrix keep their sum: grey stays grey.
    mixed = (2 * draws[:, 7:] - 1).view(-1, 3, 3) * augmentation.mix
    matrix = (one + mixed - mixed.mean(2, keepdim=True)) @ matrix
    mean = planes.mean((2, 3)) @ to_grey[0] * bright
    # Equal channels pass every matrix here unchanged, so the contrast's bias stays a grey level.
    bias = ((1 - contrast) * mean)[:, None].expand(-1, 3)
    matrix = matrix * (bright * contrast)[:, None, None]
    sign = 1 - 2 * (draws[:, 6] < augmentation.invert).float()
    bias = sign[:, None] * bias + 255 * (sign < 0)[:, None]
    flat = torch.baddbmm(bias[..., None], sign[:, None, None] * matrix, planes.flatten(2))
    return flat.view_as(planes)


@lru_cache(maxsize=16)
def _constant(values: tuple, device: torch.device) -> Tensor:
    """A tensor that is copied to its device once: a copy makes the host wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _matrices(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of the channels, luma, the turn about the grey axis, and none: 3x3 each."""
    across = _constant(((0.0, -1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 1.0, 0.0)), device)
    to_grey = _constant(_GREY, device).expand(3, 3)
    one = torch.eye(3, device=device)
    return torch.full((3, 3), 1 / 3, device=device), to_grey, across / math.sqrt(3), one


def _to_uint8(planes: Tensor) -> Tensor:
    return planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _check_batch(function: str, images: Tensor, size: int) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{function}: images must be a uint8 tensor, got {came}")
    if images.dim() != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise ValueError(
            f"{function}: images must be [B, H, W, 3], got {'x'.join(map(str, images.shape))}"
        )
    if size < 1:
        raise ValueError(f"{function}: size must be at least 1 pixel, got {size}")
