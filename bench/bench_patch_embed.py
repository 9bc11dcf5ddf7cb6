"""The stem, forward and backward: ours against open_clip's and timm's way.

    pytest bench/bench_patch_embed.py            224 px at patch 16 and 14, a quarter and half kept

uint8 images in, kept tokens with their positions out; the same kept patches for all. open_clip and
timm convert and normalise all pixels, embed all patches (a convolution), add all positions, and
gather; the two differ in how they gather. GB/s counts kept pixels twice, tokens and their gradient.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.measure import DEVICE, DTYPES, check_and_time, clock
from clipa_kernels import patch_embed, random_patches

BATCH = 1024 if DEVICE == "cuda" else 16
WIDTHS = {"B/16": (768, 16), "H/14": (1280, 14)}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RIVALS = ("ours", "torch", "open_clip", "timm", "open_clip compiled")
pytestmark = pytest.mark.benchmark(timer=clock)


def all_patches(images, weight, positions, mean, std):
    pixels = (images.to(weight.dtype) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    x = F.conv2d(pixels, weight, stride=weight.shape[-1])
    return x.flatten(2).transpose(1, 2) + positions


def open_clip_way(images, keep, weight, positions, mean, std):
    """As open_clip.transformer.PatchDropout: an index of rows and columns."""
    x = all_patches(images, weight, positions, mean, std)
    return x[torch.arange(len(x), device=x.device)[:, None], keep].flatten(0, 1)


def timm_way(images, keep, weight, positions, mean, std):
    """As timm.layers.PatchDropout: gather along the tokens."""
    x = all_patches(images, weight, positions, mean, std)
    return x.gather(1, keep.unsqueeze(-1).expand(-1, -1, x.shape[-1])).flatten(0, 1)


def rival(name):
    if name in ("ours", "torch"):
        impl = "auto" if name == "ours" else name

        def ours(images, keep, weight, positions, mean, std):
            where = dict(mean=mean, std=std, impl=impl)
            return patch_embed(images, keep, weight, None, positions, **where).tokens

        return ours
    way = timm_way if name == "timm" else open_clip_way
    return torch.compile(way) if name.endswith("compiled") else way


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("drop", [0.5, 0.75])
@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("name", RIVALS)
def test_stem(benchmark, name, size, drop, dtype):
    width, side = WIDTHS[size]
    grid = (224 // side,) * 2
    torch.manual_seed(0)
    images = torch.randint(256, (BATCH, 224, 224, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    keep = random_patches(BATCH, grid, drop, seed=0, step=0, device=DEVICE)
    weight = torch.randn(width, 3, side, side) / side
    parameters = [weight, torch.randn(grid[0] * grid[1], width)]
    parameters = [p.to(DEVICE, DTYPES[dtype]).requires_grad_() for p in parameters]
    norm = [torch.tensor(v, device=DEVICE, dtype=DTYPES[dtype]) for v in (MEAN, STD)]
    leaves = [images.to(DEVICE), keep, *parameters, *norm]  # all lie there before the clock starts
    benchmark.group = f"{size} {BATCH} images drop {drop} {dtype} {DEVICE}"
    least = 2 * keep.numel() * (3 * side**2 + width * DTYPES[dtype].itemsize)
    limit = 1e-4 if dtype == "fp32" else 0.05
    check_and_time(benchmark, rival(name), open_clip_way, leaves, least, limit)
