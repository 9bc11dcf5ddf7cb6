"""Augmentation: crops against torch's resize, colours by their definition, draws by sample."""

import dataclasses
import math

import pytest
import torch

from data.augment import Augmentation, augment, recolour, resize, sample_draws
from data.images import decode_square


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 9, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(72, 72), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


KEY = {"seed": 5, "step": 3}


def planes(image: torch.Tensor) -> torch.Tensor:
    return image.permute(2, 0, 1)[None].double()


@pytest.mark.parametrize("size", [16, 33, 72, 100])
def test_resize_is_torchs_antialiased_bilinear(pictures, size):
    expected = torch.nn.functional.interpolate(
        pictures.permute(0, 3, 1, 2).double(), size=(size, size), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    assert (resize(pictures, size).double() - expected).abs().max() <= 0.51


def test_resize_squashes_a_wide_image():
    image = torch.zeros(1, 10, 40, 3, dtype=torch.uint8)
    image[:, :, 20:] = 200
    small = resize(image, 10)
    assert small.shape == (1, 10, 10, 3)
    assert small[0, :, :4].max() == 0
    assert small[0, :, 6:].min() == 200


@pytest.mark.parametrize("size", [16, 24, 96])
def test_augment_is_a_crop_then_a_resize(pictures, size):
    from data.augment import _boxes

    how = Augmentation(scale=(0.2, 1.0))
    boxes = _boxes(72, 72, sample_draws(len(pictures), **KEY), how)
    found = augment(pictures, size, how, **KEY)
    for image, small, top, left, tall, wide in zip(pictures, found, *boxes, strict=True):
        crop = image[top : top + tall, left : left + wide]
        assert crop.shape == (tall, wide, 3)
        expected = torch.nn.functional.interpolate(
            planes(crop), size=(size, size), mode="bilinear", antialias=True
        )
        assert (planes(small) - expected).abs().max() <= 0.51


def test_crops_have_the_asked_areas_and_ratios():
    from data.augment import _boxes

    draws = sample_draws(4000, seed=0, step=0)
    top, left, tall, wide = _boxes(72, 72, draws, Augmentation())
    assert ((top >= 0) & (left >= 0) & (top + tall <= 72) & (left + wide <= 72)).all()
    area, ratio = (tall * wide).double() / 72**2, wide.double() / tall
    assert 0.38 < area.min() < 0.43
    assert 0.95 < area.max() <= 1.0
    assert 0.72 < ratio.min() < 0.79
    assert 1.27 < ratio.max() < 1.38
    assert abs(float((left == 0).double().mean() - (left + wide == 72).double().mean())) < 0.03
    # torchvision 0.29.2, RandomResizedCrop.get_params with these ranges, 30,000 draws: 0.646
    assert abs(area.mean() - 0.646) < 0.01


def test_shrinking_beyond_the_image_fills(pictures):
    how = Augmentation(scale=(2.0, 2.0), ratio=(1.0, 1.0), fill=77)
    found = augment(pictures, 36, how, **KEY)
    assert ((found == 77).all(-1).float().mean((1, 2)) > 0.4).all()
    black = augment(torch.zeros_like(pictures), 36, how, **KEY)
    share = (black < 38).all(-1).float().mean((1, 2))
    assert ((share > 0.42) & (share < 0.58)).all()


def test_shift_moves_beyond_the_edge(pictures):
    how = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), shift=0.25, fill=7)
    found = augment(pictures, 72, how, **KEY)
    offsets = set()
    for image, moved in zip(pictures, found, strict=True):
        inside = (moved != 7).any(-1)
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        top, left = int(rows[0]), int(columns[0])
        tall, wide = len(rows), len(columns)
        y, x = (72 - tall) * (top == 0), (72 - wide) * (left == 0)
        assert torch.equal(
            moved[top : top + tall, left : left + wide], image[y : y + tall, x : x + wide]
        )
        assert min(tall, wide) >= 54
        offsets.add((top - y, left - x))
    assert len(offsets) > 8


def test_rotation_turns_about_the_centre():
    image = torch.full((64, 40, 40, 3), 255, dtype=torch.uint8)
    image[:, 19:21, 4:36] = 0  # a lying bar
    how = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), rotate=90)
    found = (255 - augment(image, 40, how, **KEY)[..., 0].double()).clamp(min=0)
    ink = found.sum((1, 2))
    assert (ink / ink.mean() - 1).abs().max() < 0.08
    at = torch.arange(40).double() - 19.5
    assert ((found.sum(1) @ at) / ink).abs().max() < 0.6
    spread = (found.sum(1) @ at**2) / ink
    assert spread.min() < 12  # some stand upright
    assert spread.max() > 60  # some still lie


def test_flip_mirrors(pictures):
    plain = augment(pictures, 24, Augmentation(), **KEY)
    assert torch.equal(augment(pictures, 24, Augmentation(flip=1.0), **KEY), plain.flip(2))


@pytest.mark.parametrize("how", [Augmentation(rotate=1e-9), Augmentation(warp=1e-9)])
def test_a_bend_by_nothing_reads_the_crop_at_points(pictures, how):
    from data.augment import _boxes

    how = dataclasses.replace(how, scale=(0.7, 1.3), shift=0.1)
    found = augment(pictures, 36, how, **KEY).double()
    boxes = torch.stack(_boxes(72, 72, sample_draws(12, **KEY), how), 1).double()
    at = (torch.arange(36).double() + 0.5) / 36
    y, x = (boxes[:, i, None] + at * boxes[:, i + 2, None] - 0.5 for i in (0, 1))
    near = [(1 - (torch.arange(72) - p[..., None]).abs()).clamp(min=0) for p in (y, x)]
    wanted = torch.einsum("byi,bijc,bxj->byxc", near[0], pictures.double() - 255, near[1]) + 255
    assert (found - wanted).abs().max() <= 0.51
    mirrored = augment(pictures, 36, dataclasses.replace(how, flip=1.0), **KEY).double()
    assert (mirrored - wanted.flip(2)).abs().max() <= 0.51


def test_outlines_darken_edges_alone():
    flat = torch.full((8, 24, 24, 3), 200, dtype=torch.uint8)
    edge = flat.clone()
    edge[:, :, 12:] = 120
    how = Augmentation(scale=(1, 1), ratio=(1, 1), outline=1.0)
    assert torch.equal(augment(flat, 24, how, seed=0, step=0), flat)
    out = augment(edge, 24, how, seed=0, step=0).int()
    assert (out <= edge.int()).all()
    assert torch.equal(out[:, :, :11], edge.int()[:, :, :11])  # two columns touch the edge
    assert torch.equal(out[:, :, 13:], edge.int()[:, :, 13:])
    assert (out[:, :, 11:13] < edge.int()[:, :, 11:13]).flatten(1).any(1).sum() > 4
    one = torch.full((2, 1, 1, 3), 7, dtype=torch.uint8)
    assert torch.equal(augment(one, 1, how, seed=0, step=0), one)


def test_warps_move_pixels_and_keep_colours():
    ramp = torch.arange(24, dtype=torch.uint8).mul(10).view(1, 1, 24, 1).expand(16, 24, 24, 3)
    how = Augmentation(scale=(1, 1), ratio=(1, 1), warp=0.05)
    out = augment(ramp.contiguous(), 24, how, seed=0, step=0).int()
    moved = (out - ramp.int())[:, 4:-4, 4:-4].abs().float()
    assert 1 < moved.mean() < 20  # 10 grey levels a pixel: about half a pixel
    still = augment(ramp.contiguous(), 24, Augmentation((1, 1), (1, 1)), seed=0, step=0)
    assert torch.equal(still.int(), ramp.int())


def test_colour_changes_by_their_definition(pictures):
    def change(**how) -> torch.Tensor:
        whole = Augmentation(jitter=1.0, **how)
        return recolour(pictures, whole, **KEY).double()

    plain = pictures.double()
    grey = plain @ torch.tensor([0.299, 0.587, 0.114]).double()
    assert (change(grey=1.0) - grey[..., None]).abs().max() <= 0.51
    assert torch.equal(change(invert=1.0), 255 - plain)
    turned = change(hue=0.1)
    unclipped = (turned > 0).all(-1) & (turned < 255).all(-1)
    assert (turned.mean(-1) - plain.mean(-1))[unclipped].abs().max() < 1
    assert (turned - plain).abs().mean() > 2
    bright = change(brightness=0.5)
    factor = (bright.flatten(1).sum(1) / plain.flatten(1).sum(1)).tolist()
    assert min(factor) > 0.45
    assert max(factor) < 1.55
    assert max(factor) - min(factor) > 0.3
    mixed = change(mix=0.2)
    assert (mixed - plain).abs().mean() > 2
    flat = torch.full_like(pictures, 90)
    assert torch.equal(recolour(flat, Augmentation(mix=0.2), **KEY), flat)
    contrast = change(contrast=0.5)
    assert (contrast.std((1, 2, 3)) - plain.std((1, 2, 3))).abs().max() > 5
    assert (contrast.mean((1, 2, 3)) - plain.mean((1, 2, 3))).abs().max() < 12
    assert torch.equal(recolour(pictures, Augmentation(), **KEY), pictures)
    never = Augmentation(jitter=0.0, brightness=0.5, hue=0.5)
    assert torch.equal(recolour(pictures, never, **KEY), pictures)


FULL = Augmentation(
    scale=(0.4, 1.3),
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grey=0.2,
    mix=0.1,
    rotate=10,
    shift=0.1,
    warp=0.05,
    outline=0.5,
)


def test_augmentation_does_not_depend_on_how_a_batch_is_split(pictures):
    whole = augment(pictures, 24, FULL, first_sample=8, **KEY)
    first = augment(pictures[:5], 24, FULL, first_sample=8, **KEY)
    rest = augment(pictures[5:], 24, FULL, first_sample=13, **KEY)
    assert torch.equal(torch.cat([first, rest]), whole)
    for other in ({"seed": 5, "step": 4}, {"seed": 6, "step": 3}):
        assert not torch.equal(augment(pictures, 24, FULL, first_sample=8, **other), whole)


def test_colours_do_not_depend_on_how_a_batch_is_split():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 400, 300, 3), generator=generator, dtype=torch.uint8)
    whole = recolour(images, FULL, first_sample=7, **KEY)
    each = [recolour(images[i : i + 1], FULL, first_sample=7 + i, **KEY) for i in range(5)]
    assert torch.equal(torch.cat(each), whole)


def test_empty_batch_of_images():
    none = torch.empty(0, 72, 72, 3, dtype=torch.uint8)
    assert augment(none, 16, FULL, **KEY).shape == (0, 16, 16, 3)
    assert recolour(none, FULL, **KEY).shape == none.shape
    assert resize(none, 16).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda x: augment(x.float(), 8, **KEY), TypeError, "augment: images must be a uint8"),
        (lambda x: augment(x.numpy(), 8, **KEY), TypeError, "augment: images must be a uint8"),
        (lambda x: augment(x[0], 8, **KEY), ValueError, "images must be .B, H, W, 3., got 72x72x3"),
        (lambda x: resize(x[..., :1], 8), ValueError, "resize: images must be .B, H, W, 3."),
        (lambda x: resize(x, 0), ValueError, "resize: size must be at least 1 pixel, got 0"),
        (lambda x: Augmentation(scale=(1.0, 0.4)), ValueError, "scale must rise, got .1.0, 0.4."),
        (lambda x: Augmentation(ratio=(0.0, 1.0)), ValueError, "ratio must be in .0.01, 100., got"),
        (lambda x: Augmentation(hue=0.6), ValueError, "augment: hue must be in .0, 0.5., got 0.6"),
        (lambda x: Augmentation(grey=1.5), ValueError, "grey must be in .0, 1., got 1.5"),
        (lambda x: Augmentation(contrast=-1), ValueError, "contrast must be in .0, 10., got -1"),
        (lambda x: Augmentation(scale=(0, 1)), ValueError, "scale must be in .0, 4., got .0, 1."),
        (
            lambda x: Augmentation(rotate=math.nan),
            ValueError,
            "rotate must be in .*, got nan",
        ),
        (lambda x: Augmentation(fill=300), ValueError, "fill must be in .0, 255., got 300"),
        (lambda x: decode_square(b"", 8, interpolation="x"), ValueError, "must be bilinear or bic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_images(pictures, call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(pictures)
