"""Image files of every depth, turn, frame and size: seen as they were meant, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import Augmentation, _boxes, augment, one_box, resize, sample_draws, shape_draws
from data.images import (
    MAX_PIXELS,
    TooManyPixels,
    _guarded,
    _load,
    _pixels,
    decode_crop,
    decode_square,
)

KEY = {"seed": 5, "step": 3}
ORIENTATION = 0x0112
RAMP = np.tile(np.arange(256, dtype=np.uint16) * 257, (256, 1))  # black to white in 16 bits


def encoded(image: Image.Image | torch.Tensor, kind: str, **options) -> bytes:
    image = Image.fromarray(image.numpy()) if isinstance(image, torch.Tensor) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data: bytes, size: int = 0) -> torch.Tensor:
    """The pixels of a file that decode_crop and decode_square start from."""
    return _guarded("decode", data, lambda image: _pixels(_load(image, (size, size))))


def png(
    width: int, height: int, depth: int, colour: int, pixels: bytes, clear: bytes = b""
) -> bytes:
    """A PNG file by its fields; Pillow writes no 16-bit colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", clear), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts if p[1] or p[0] == b"IEND")


@pytest.mark.parametrize(
    ("pixels", "kind"),
    [
        (RAMP, "PNG"),
        (RAMP, "TIFF"),
        (RAMP.astype(">u2"), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        (RAMP, "PPM"),
        ((RAMP // 257).astype(np.int32), "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
        ((RAMP / 257).astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
    ],
    ids=[
        "png",
        "tiff",
        "tiff-big-endian",
        "int32",
        "pgm",
        "int32-of-8",
        "share",
        "float",
        "float-16",
    ],
)
def test_grey_of_many_bits_keeps_its_tones(pixels, kind):
    seen = decode(encoded(Image.fromarray(pixels), kind))
    assert (seen == torch.arange(256)[None, :, None]).all()


def test_numbers_of_no_known_range_are_refused():
    for pixels in (np.full((4, 4), 2**20, np.int32), np.full((4, 4), np.nan, np.float32)):
        with pytest.raises(ValueError, match="its numbers must be below 65536"):
            decode(encoded(Image.fromarray(pixels), "TIFF"))


def test_colours_of_16_bits_keep_their_tones():
    row = b"\0" + b"".join(struct.pack(">HHH", 257 * i, 65535 - 257 * i, 0) for i in range(256))
    seen = decode(png(256, 1, 16, 2, row))
    assert seen[0, :, 0].tolist() == list(range(256))
    assert seen[0, :, 1].tolist() == list(range(255, -1, -1))
    seen = decode(png(2, 1, 16, 4, b"\0" + struct.pack(">HHHH", 0, 65535, 0, 0)))
    assert seen[0, :, 0].tolist() == [0, 255]  # black, and white where nothing is


@pytest.mark.parametrize(
    ("depth", "colour", "pixel"), [(1, 0, b"\xff"), (8, 0, b"\x4d"), (16, 0, b"\x75\x30"),
                                   (8, 2, b"\1\2\3"), (16, 2, b"\x75\x30" * 3)]
)  # fmt: skip
def test_a_colour_named_transparent_is_white(depth, colour, pixel):
    clear = (
        b"\0\1" if depth == 1 else pixel if depth == 16 else b"".join(b"\0%c" % i for i in pixel)
    )
    assert (decode(png(1, 1, depth, colour, b"\0" + pixel, clear)) == 255).all()
    if depth > 1:
        other = clear[:-1] + bytes([clear[-1] ^ 1])
        other = bytes([other[0] ^ (depth == 16)]) + other[1:]
        assert (decode(png(1, 1, depth, colour, b"\0" + pixel, other)) < 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "F"])
def test_modes_become_colour_on_white(mode):
    kinds = {"CMYK": "JPEG", "YCbCr": "JPEG", "F": "TIFF"}
    left, right = Image.new("L", (8, 8), 255), Image.new("L", (8, 8), 0)
    both = Image.new("L", (16, 8))
    both.paste(left, (0, 0))
    both.paste(right, (8, 0))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(both).astype(np.uint16) * 257)
    else:
        image = both.convert(mode)
    seen = decode(encoded(image, kinds.get(mode, "PNG"))).float()
    assert seen.shape == (8, 16, 3)
    assert seen[:, :7].min() > 240
    assert seen[:, 9:].max() < 15


def test_a_palette_with_clear_entries_is_on_white():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([9, 9, 9, 200, 10, 20])
    image.paste(0, (0, 0, 2, 2))
    seen = decode(encoded(image, "PNG", transparency=0))
    assert (seen[:, :2] == 255).all()
    assert seen[0, 3].tolist() == [200, 10, 20]


def test_half_clear_is_half_white():
    half = Image.new("LA", (4, 4), (55, 128))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([55, 55, 55])
    lossless = {"lossless": True}
    for data in (
        encoded(half, "PNG"),
        encoded(half, "TIFF"),
        encoded(half.convert("RGBA"), "PNG"),
        encoded(half.convert("RGBA"), "WEBP", **lossless),
        encoded(palette, "PNG", transparency=b"\x80"),
        png(1, 1, 16, 4, b"\0" + struct.pack(">HH", 55 * 257, 128 * 257)),
        png(1, 1, 16, 6, b"\0" + struct.pack(">HHHH", *[55 * 257] * 3, 128 * 257)),
    ):
        assert (decode(data).float() - 155).abs().max() <= 1  # 55 and 255 in halves


def test_a_clear_gif_is_on_white():
    image = Image.new("P", (4, 2), 1)
    image.putpalette([9, 9, 9, 200, 10, 20])
    image.paste(0, (0, 0, 2, 2))
    seen = decode(encoded(image, "GIF", transparency=0))
    assert (seen[:, :2] == 255).all() and seen[0, 3].tolist() == [200, 10, 20]


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_become_colours(kind):
    inks = {(255, 0, 0, 0): (0, 255, 255), (0, 255, 0, 0): (255, 0, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in inks.items():
        seen = decode(encoded(Image.new("CMYK", (8, 8), ink), kind))
        assert (seen.int() - torch.tensor(colour)).abs().max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_shows_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode(data)[4, 4].tolist() == [255, 0, 0]


# Orientation


@pytest.fixture(scope="module")
def upright() -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (5, 8, 3), dtype=np.uint8))
    return small.resize((160, 96), Image.Resampling.BICUBIC)


# How a camera that was held in each way stores what is upright.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def stored(upright: Image.Image, number: int, kind: str, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    turn = STORED[number]
    image = upright if turn is None else upright.transpose(turn)
    return encoded(image, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("number", STORED)
def test_every_orientation_is_seen_upright(upright, number, kind):
    data = stored(upright, number, kind, **({"lossless": True} if kind == "WEBP" else {}))
    plain = encoded(upright, "PNG")
    draws = sample_draws(3, **KEY)
    assert torch.equal(decode(data), decode(plain))
    for squash in (True, False):
        assert torch.equal(
            decode_square(data, 32, squash=squash), decode_square(plain, 32, squash=squash)
        )
    for how in (Augmentation(flip=0.5), Augmentation(shift=0.2, rotate=20)):
        for draw in draws:
            assert torch.equal(decode_crop(data, 24, draw, how), decode_crop(plain, 24, draw, how))


@pytest.mark.parametrize("number", STORED)
def test_every_orientation_of_a_jpeg_shrunk_in_the_decoder(upright, number):
    data = stored(upright, number, "JPEG", quality=97, subsampling=0)
    assert decode(data, 40).shape == (48, 80, 3)
    exact = torch.from_numpy(np.array(upright.resize((80, 48), Image.Resampling.BOX))).int()
    assert (decode(data, 40).int() - exact).abs().float().mean() < 3
    plain = encoded(upright, "PNG")
    for draw in sample_draws(3, **KEY):
        a, b = (decode_crop(d, 24, draw, Augmentation()).int() for d in (data, plain))
        assert (a - b).abs().float().mean() < 4


def test_broken_exif_turns_nothing(upright):
    plain = encoded(upright, "PNG")
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense" * 3):
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
            assert torch.equal(decode(encoded(upright, kind, exif=exif, **options)), decode(plain))
        near = decode(encoded(upright, "JPEG", quality=97, exif=exif)).int() - decode(plain).int()
        assert near.abs().float().mean() < 4
    strange = Image.Exif()
    strange[ORIENTATION] = 77
    assert torch.equal(decode(encoded(upright, "PNG", exif=strange)), decode(plain))


# Size


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_size_above_the_limit_is_refused_before_decoding(kind):
    if kind == "PNG":
        data = png(12000, 8000, 8, 2, b"\0")
    elif kind == "GIF":
        data = b"GIF89a" + struct.pack("<HHBBB", 12000, 8000, 0x80, 0, 0) + bytes(6)
        data += b"," + struct.pack("<HHHHB", 0, 0, 12000, 8000, 0) + b"\2\2\x4c\1\0;"
    elif kind == "JPEG":
        small = encoded(Image.new("RGB", (8, 8)), "JPEG")
        at = small.index(b"\xff\xc0") + 5
        data = small[:at] + struct.pack(">HH", 8000, 12000) + small[at + 4 :]
    else:
        small = encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)
        at = small.index(b"VP8L") + 9
        bits = int.from_bytes(small[at : at + 4], "little") >> 28 << 28
        size = (bits | (7999 << 14) | 11999).to_bytes(4, "little")
        data = small[:at] + size + small[at + 4 :]
    draw = sample_draws(1, **KEY)[0]
    for call in (
        lambda: decode(data),
        lambda: decode_crop(data, 32, draw, Augmentation()),
        lambda: decode_square(data, 32, squash=True),
    ):
        with pytest.raises(TooManyPixels, match=f"at most {MAX_PIXELS} pixels, got 12000 x 8000"):
            call()


def test_a_run_may_ask_for_fewer_or_more_pixels():
    data, draw = encoded(Image.new("RGB", (30, 20)), "PNG"), sample_draws(1, **KEY)[0]
    assert decode_crop(data, 8, draw, Augmentation(), max_pixels=600).shape == (8, 8, 3)
    with pytest.raises(TooManyPixels, match="must have at most 599 pixels, got 30 x 20"):
        decode_crop(data, 8, draw, Augmentation(), max_pixels=599)
    with pytest.raises(TooManyPixels, match=f"at most {2**40} pixels, got .*400000000 pixels"):
        decode_crop(png(20000, 20000, 1, 0, b"\0"), 8, draw, Augmentation(), max_pixels=2**40)


def test_a_size_that_pillow_refuses_is_named_too():
    data = png(20000, 20000, 1, 0, b"\0")
    with pytest.raises(TooManyPixels, match="an image must have at most"):
        decode(data)


# What a crop alone does not do


@pytest.mark.parametrize(
    "change",
    [{"shift": 0.3}, {"rotate": 45.0}, {"warp": 0.2}, {"outline": 1.0}, {"scale": (1.5, 2.0)}],
    ids=lambda change: next(iter(change)),
)
def test_a_file_is_bent_as_a_batch_is(upright, change):
    how = Augmentation(**{"scale": (0.6, 1.0), "flip": 0.5, **change})
    pixels = torch.from_numpy(np.array(upright)).expand(6, -1, -1, -1)
    expected = augment(pixels, 128, how, **KEY)
    draws, shapes = sample_draws(6, **KEY), shape_draws(6, how, **KEY)
    plain = encoded(upright, "PNG")
    for row, image in enumerate(expected):
        shape = None if shapes is None else shapes[row]
        found = decode_crop(plain, 128, draws[row], how, shapes=shape)
        assert (found.int() - image.int()).abs().max() <= 1
        bare = decode_crop(plain, 128, draws[row], Augmentation(scale=(0.6, 1.0), flip=0.5))
        assert not torch.equal(found, bare)


def test_a_large_file_is_bent_at_a_small_size(upright):
    how = Augmentation(scale=(0.6, 1.3), rotate=30, warp=0.1, outline=0.5)
    draws, shapes = sample_draws(6, **KEY), shape_draws(6, how, **KEY)
    large = upright.resize((960, 576), Image.Resampling.BICUBIC)
    files = encoded(large, "BMP"), encoded(large, "JPEG", quality=95)
    for draw, shape in zip(draws, shapes, strict=True):
        small = decode_crop(encoded(upright, "PNG"), 32, draw, how, shapes=shape).int()
        for data in files:
            found = decode_crop(data, 32, draw, how, shapes=shape).int()
            assert (found - small).abs().float().mean() < 12


def test_bends_without_their_draws_are_refused():
    data, draw = encoded(Image.new("RGB", (8, 8)), "PNG"), sample_draws(1, **KEY)[0]
    with pytest.raises(ValueError, match="decode_crop: shapes must be given for warp and outline"):
        decode_crop(data, 8, draw, Augmentation(warp=0.1))


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


@pytest.mark.parametrize(
    "how",
    [
        Augmentation(),
        Augmentation(scale=(0.9, 1.0), shift=0.2),
        Augmentation(scale=(0.05, 1.4), ratio=(0.2, 3.0)),
    ],
    ids=["crop", "shift", "wide"],
)
@pytest.mark.parametrize("size", [(384, 512), (72, 72), (1, 900), (900, 1), (1, 1), (2, 20000)])
def test_boxes_of_files_are_those_of_batches(size, how):
    draws = sample_draws(5000, **KEY)
    batch = torch.stack(_boxes(*size, draws, how), 1)
    each = torch.tensor([one_box(*size, row, how) for row in draws.tolist()])
    off = (batch - each).abs()
    assert off.max() <= 1 and (off > 0).any(1).sum() <= 5  # of 5,000: float32 against float64
    assert (each[:, 2:] >= 1).all()


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
