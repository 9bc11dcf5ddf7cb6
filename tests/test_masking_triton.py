"""The choice of patches in one launch: the bits of the torch version, under the interpreter."""

import pytest
import torch

from bench.meters.counted import counted
from clipa_kernels import block_patches, grid_patches, random_patches

pytest.importorskip("triton")
MASKS = {
    "random": lambda batch, grid, **how: random_patches(batch, grid, 0.75, **how),
    "random, half": lambda batch, grid, **how: random_patches(batch, grid, 0.5, **how),
    "random, all": lambda batch, grid, **how: random_patches(batch, grid, 0.0, **how),
    "random, one": lambda batch, grid, **how: random_patches(batch, grid, 0.9999, **how),
    "grid": lambda batch, grid, **how: grid_patches(batch, grid, **how),
    "block": lambda batch, grid, **how: block_patches(batch, grid, 0.75, **how),
}
GRIDS = [(1, 1), (2, 3), (7, 7), (8, 8), (14, 14), (16, 16), (5, 17), (32, 32), (1, 1024)]
KEYS = {
    "zero": dict(seed=0, step=0),
    "one": dict(seed=1, step=1, first_sample=1),
    "plain": dict(seed=7, step=3, first_sample=4096),
    "high bits": dict(seed=2**64 - 3, step=2**32 - 1, first_sample=2**48 - 4),
    "carry": dict(seed=2**63 + 2**31, step=2**31, first_sample=2**32 - 2),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's: words wrap
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@masks
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
def test_any_grid_gives_the_same_bits(mask, grid):
    key = KEYS["plain"]
    assert torch.equal(mask(3, grid, **key, impl="triton"), mask(3, grid, **key, impl="torch"))


@masks
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_any_key_gives_the_same_bits(mask, key):
    assert torch.equal(
        mask(4, (9, 10), **key, impl="triton"), mask(4, (9, 10), **key, impl="torch")
    )


@masks
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_key_of_tensors_gives_the_same_bits(mask, key, impl):
    """So a CUDA graph, which holds the addresses, draws new masks as they change in place."""
    whole = dict(first_sample=0) | key
    device = {name: torch.tensor(signed(value)) for name, value in whole.items()}
    expected = mask(4, (9, 10), **key, impl="torch")
    assert torch.equal(mask(4, (9, 10), **device, impl=impl), expected)
    mixed = whole | dict(step=device["step"])  # what a training step changes
    assert torch.equal(mask(4, (9, 10), **mixed, impl=impl), expected)
    device["step"].sub_(1).remainder_(2**32)
    before = whole | dict(step=(key["step"] - 1) % 2**32)
    assert torch.equal(mask(4, (9, 10), **mixed, impl=impl), mask(4, (9, 10), **before))


def signed(number: int) -> int:
    """As int64 holds the bits of a number below 2**64."""
    return (number + 2**63) % 2**64 - 2**63


def test_an_empty_batch():
    assert random_patches(0, (4, 4), 0.5, seed=0, step=0, impl="triton").shape == (0, 8)


@masks
def test_too_many_patches_are_named(mask):
    with pytest.raises(ValueError, match='impl "triton" takes at most 1024 patches, got 1056'):
        mask(1, (32, 33), seed=0, step=0, impl="triton")


def test_an_unknown_impl():
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch, got 'cuda'"):
        random_patches(1, (2, 2), 0.5, seed=0, step=0, impl="cuda")


def test_the_operator_passes_opcheck():
    sizes = torch.empty(0), "random", 2, [4, 4, 4, 0, 0]
    for key in ([1, 2, 3, 4], None), ([], torch.tensor([1, 3, 4])):
        torch.library.opcheck(torch.ops.clipa.choose_patches, (*sizes, *key))


@masks
def test_one_launch_that_only_writes(mask, interpreted):
    with counted() as count:
        keep = mask(3, (14, 14), seed=0, step=0, impl="triton")
    (launch,) = count.launches
    assert launch.requested == launch.unique == keep.numel() * 8
    assert (launch.hazards, launch.out_of_bounds, count.torch_ops) == (0, 0, [])
