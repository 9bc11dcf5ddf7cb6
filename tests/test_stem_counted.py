"""What the patch stem asks of a GPU, counted without one: bytes, operations, new tensors, code."""

import pytest
import torch
from machine_code import check_rows, machine_code, spills_nothing

from bench.meters.counted import counted
from clipa_kernels import patch_embed, random_patches
from clipa_kernels.patch_embed import api

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes
CHANNELS, GRID, DROP = 3, 4, 0.5
KEPT = GRID**2 // 2


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


def by_name(count):
    return {op.name: op for op in count.torch_ops}


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
    [(16, 1.05, "hwc"), (14, 1.1, "hwc"), (14, 1.2, "chw")],
    ids=["p16", "p14", "p14-chw"],
)
def test_kept_pixels_are_read_once(side, most_flops, layout):
    batch, width = 32, 256
    images, keep, parameters = stem(side, batch, width, layout)
    forward, backward = passes(images, keep, parameters)
    kept, pixels = keep.numel(), CHANNELS * side**2
    tokens = batch * (1 + keep.shape[1])
    least = kept * pixels
    (copy,) = forward.launches
    # A token's row of the copy ends with its position and zero columns of padded runs.
    assert copy.unique_loaded <= 1.1 * least + kept * 8  # whole words at the ends of runs
    assert copy.unique_stored <= most_flops * tokens * pixels * 2
    assert copy.requested <= 2.3 * least + kept * 8 * 4 + copy.unique_stored
    # One product each way, and nothing else that grows with the batch: both gradients, of the
    # weight and of the positions, come from one reading of the tokens'.
    assert not backward.launches
    for count in (forward, backward):
        product = by_name(count)["mm"]
        assert product.calls == 1
        assert product.flops <= most_flops * 2 * tokens * pixels * width
        operands = copy.unique_stored + (tokens + most_flops * pixels + 32) * width * 2
        assert product.read + product.written <= operands
        others = sum(op.read + op.written for op in count.torch_ops if op is not product)
        assert others <= 48 * width * pixels  # of the weight and its gradient, folded
    assert forward.total().launches + backward.total().launches <= 50


@pytest.mark.parametrize("kept", [KEPT, None], ids=["kept", "all"])
def test_many_positions_are_added_before_the_product_and_summed_after_it(kept, monkeypatch):
    monkeypatch.setattr(api, "MOST_BY_PRODUCT", 0)
    batch, width, side = 48, 512, 4
    images, keep, parameters = stem(side, batch, width)
    keep = keep if kept else None
    forward, backward = passes(images, keep, parameters)
    tokens = batch * (1 + (kept or GRID**2))
    product, gradient = by_name(forward)["addmm_"], by_name(backward)["mm"]
    assert product.flops == gradient.flops == 2 * tokens * CHANNELS * side**2 * width
    grown = [op for op in backward.torch_ops if op.read >= tokens * width * 2]
    assert len(grown) + len(backward.launches) == 2  # the product, and the sum of positions
    assert sum(x.unique_stored for x in backward.launches) <= (1 + GRID**2) * width * 4


@pytest.mark.parametrize("side", [16, 14], ids=["p16", "p14"])
def test_no_tensor_of_all_patches_and_no_float_image(side):
    """The forward makes its tokens, a copy of the kept patches in their dtype, and what depends on
    the parameters alone."""
    images, keep, parameters = stem(side, 48, 16)
    forward, _ = passes(images, keep, parameters)
    tokens = 48 * (1 + keep.shape[1])
    copy = 1.1 * tokens * CHANNELS * side**2 * 2
    folded = 8 * parameters[0].numel() * 4
    assert forward.new_bytes <= tokens * 16 * 2 + copy + folded + 64 * 1024
    assert folded + 64 * 1024 < images.numel()


def test_machine_code_of_every_launch():
    """Of three architectures: nothing spills; no load of single bytes where the first pixel lies at
    a word, also of 14-pixel patches; the copy is written in whole vectors."""
    rows = machine_code("patch_embed", "masking")
    check_rows(rows, spills_nothing)
    copies = [row for row in rows if "images_ptr" in row.types]
    words = [row for row in copies if "unaligned" not in row.label]
    check_rows(words, lambda row: min(row.load_widths) >= 4)
    check_rows(copies, lambda row: min(row.store_widths) == 16)
