"""Training's pictures from JPEG files, on one core: ours and open_clip's.

    pytest bench/bench_data.py                   512 x 384 to 64, 112 and 224 pixels

Both decode a file, take a random crop and resize it, antialiased: open_clip bicubic and from nine
tenths of the picture on, in floats that are normalised; ours in bytes, as uint8 is what the model's
stem reads, by the dialects' bilinear or bicubic filter, from four tenths on, as CLIPA does. The
JPEGs are noise with the spectrum of photographs, and as large: 56 kB at quality 90, 4:2:0.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment import Augmentation, sample_draws
from data.images import decode_crop

FILES = 32
WAYS = ("bilinear", "bicubic", "open_clip")


def photo(seed: int) -> bytes:
    """A JPEG of 512 x 384: channels of 1/f noise that go mostly together, and rectangles."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(384)))
    frequency[0, 0] = 1
    noise = np.fft.fft2(random.normal(size=(3, 384, 512))) / frequency**1.4
    planes = np.fft.ifft2(noise).real
    planes /= planes.std((1, 2), keepdims=True)
    mix = np.array([[1, 0.15, 0.05], [1, 0, -0.1], [1, -0.15, 0.1]])
    pixels = 120 + 50 * np.einsum("cd,dyx->yxc", mix, planes)
    for _ in range(30):
        (x, y), side = random.integers(0, (512, 384)), random.integers(10, 120)
        part = pixels[y : y + side, x : x + side]
        part[:] = 0.4 * part + 0.6 * random.integers(0, 255, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def way(name: str, size: int, least: float | None = None):
    """Of files: uint8 [n, size, size, 3], or open_clip's floats. least: area of a crop."""
    if name != "open_clip":
        augmentation = Augmentation() if least is None else Augmentation(scale=(least, 1.0))
        draws = sample_draws(FILES, seed=0, step=0)

        def ours(files):
            rows = zip(files, draws, strict=True)
            return torch.stack([decode_crop(d, size, row, augmentation, name) for d, row in rows])

        return ours
    open_clip = pytest.importorskip("open_clip")
    crop = None if least is None else {"scale": (least, 1.0)}
    transform = open_clip.image_transform(size, is_train=True, aug_cfg=crop)
    return lambda files: torch.stack([transform(Image.open(io.BytesIO(data))) for data in files])


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [photo(seed) for seed in range(FILES)]


def check(files, name, size):
    """The whole picture is open_clip's, but for what the decoder's own shrinking changes."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    exact = way("open_clip", size, 1.0)(files).permute(0, 2, 3, 1)
    exact = 255 * (exact * torch.tensor(std) + torch.tensor(mean))
    found = way(name, size, 1.0)(files).float()
    assert (found - exact).abs().mean() < 4


@pytest.mark.parametrize("size", [64, 112, 224])
@pytest.mark.parametrize("name", WAYS)
def test_pictures(benchmark, files, name, size):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        check(files, "bicubic" if name == "open_clip" else name, size)
        benchmark.group = f"512 x 384 to {size}, one core"
        benchmark.pedantic(way(name, size), (files,), warmup_rounds=1, rounds=8)
    finally:
        torch.set_num_threads(threads)
    if benchmark.enabled:
        benchmark.extra_info |= {
            "images/s": FILES / benchmark.stats.stats.min,
            "kB a file": sum(map(len, files)) / FILES / 1e3,
        }
