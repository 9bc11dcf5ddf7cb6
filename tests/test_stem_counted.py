"""What the patch stem asks of a GPU, counted without one: bytes, operations, new tensors, code."""

import re

import pytest
import torch
from machine_code import OWN_CORES, check_rows, cores, machine_code, spills_nothing

from bench.meters.counted import counted
from clipa_kernels import patch_embed, random_patches

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes
CHANNELS, GRID, DROP = 3, 4, 0.5


def stem(side, batch, width, layout="hwc"):
    """(images, keep, parameters) in fp16 with half of the patches kept."""
    shape = (batch, GRID * side, GRID * side, CHANNELS)
    images = torch.randint(256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    keep = random_patches(batch, (GRID, GRID), DROP, seed=0, step=0)
    parameters = [
        torch.randn(width, CHANNELS, side, side),
        torch.randn(width),
        torch.randn(1 + GRID**2, width),
        torch.randn(width),
    ]
    images = images if layout == "hwc" else images.contiguous()
    return images, keep, [(p / side).half().requires_grad_() for p in parameters]


def passes(images, keep, parameters):
    torch.use_deterministic_algorithms(False)  # or filling memory with NaN would count
    with counted() as forward:
        tokens = patch_embed(images, keep, *parameters, impl="triton").tokens
    with counted() as backward:
        torch.autograd.grad(tokens, parameters, torch.ones_like(tokens))
    for launch in (*forward.launches, *backward.launches):
        assert (launch.hazards, launch.out_of_bounds, launch.atomics) == (0, 0, 0), launch
    return forward, backward


@pytest.mark.parametrize(
    ("side", "most_flops", "layout"),
    [(16, 1.05, "hwc"), (14, 1.2, "hwc"), (14, 1.2, "chw")],
    ids=["p16", "p14", "p14-chw"],
)
def test_the_product_reads_kept_pixels_once(side, most_flops, layout):
    batch, width = 32, 256
    images, keep, parameters = stem(side, batch, width, layout)
    forward, backward = passes(images, keep, parameters)
    kept, pixels = keep.numel(), CHANNELS * side**2
    out, weight = batch * (1 + keep.shape[1]) * width * 2, width * pixels * 2
    small = (keep.numel() * 8) + (2 + GRID**2) * width * 2  # indices, bias and positions
    least = kept * pixels + out + weight + small
    (launch,) = forward.launches
    assert launch.unique <= 1.1 * least  # zero columns of padded runs are the rest
    assert launch.requested <= 4.3 * least
    assert launch.flops <= most_flops * 2 * kept * pixels * width
    weight_launch, *others = [x for x in backward.launches if "weight" in x.kernel]
    assert not others
    # Both gradients, of the weight and of the positions, from one reading of the tokens'.
    assert weight_launch.unique_loaded <= 1.1 * (kept * pixels + out)
    assert launch.flops + weight_launch.flops <= 2 * most_flops * 2 * kept * pixels * width
    splits_bytes = weight_launch.unique_stored
    assert splits_bytes <= 8 * 4 * width * (pixels * 1.15 + GRID**2)
    assert sum(x.launches for x in (forward.total(), backward.total())) <= 60
    # Of both passes what grows with the batch: all but the weight, here with its padded runs. The
    # prefix rows' gradient is a sum by eager torch.
    moved = launch.unique - 1.15 * weight + weight_launch.unique_loaded + batch * width * 2
    assert moved <= 1.1 * 2 * (kept * pixels + out)


@pytest.mark.parametrize("side", [16, 14], ids=["p16", "p14"])
def test_no_tensor_of_all_patches_and_no_float_image(side):
    """The forward makes its tokens and what depends on the parameters alone."""
    images, keep, parameters = stem(side, 128, 16)
    forward, _ = passes(images, keep, parameters)
    tokens = 128 * (1 + keep.shape[1]) * 16 * 2
    folded = 8 * parameters[0].numel() * 4
    assert forward.new_bytes <= tokens + folded + 64 * 1024
    assert folded + 64 * 1024 < images.numel()


PRODUCT = ("weight_ptr", "d_out_ptr")  # what the pixels of a pass are multiplied by


def test_machine_code_of_every_launch():
    """Of three architectures: nothing spills, tensor cores, no load of single bytes where the
    first pixel lies at a word."""
    rows = machine_code("patch_embed", "masking")
    check_rows(rows, spills_nothing)
    pixels = [row for row in rows if "images_ptr" in row.types]
    words = [row for row in pixels if not re.search("unaligned|emoji", row.label)]  # emoji: 8 px
    check_rows(words, lambda row: min(row.load_widths) >= 4)  # also of 14-pixel patches
    products = [row for row in pixels if "*fp32" not in map(row.types.get, PRODUCT)]
    check_rows(products, lambda row: cores(row) == {OWN_CORES[row.arch]})
