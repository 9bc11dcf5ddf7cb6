"""patch_embed's Triton kernels under the interpreter."""

import pytest
import torch
from device import DEVICE, DTYPES
from test_patch_embed import MEAN, STD, inputs, tokens
from tolerance import check_op

from clipa_kernels import patch_embed, patch_embed_reference
from clipa_kernels.patch_embed import api

kernels = pytest.importorskip("clipa_kernels.patch_embed.kernels")
MEAN, STD = MEAN.to(DEVICE), STD.to(DEVICE)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes


def check(tensors, dtype, **how):
    triton, reference = (
        tokens(patch_embed, impl="triton", **how),
        tokens(patch_embed_reference, **how),
    )
    check_op(triton, reference, tensors, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kept", [0, 1, 5], ids=["all", "one", "five"])
@pytest.mark.parametrize("prefix", [0, 1, 3], ids=["no-cls", "cls", "registers"])
@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("side", [4, 7], ids=["p4", "p7"])
def test_matches_the_reference(side, raw, prefix, kept, dtype):
    tensors = inputs(side=side, raw=raw, prefix=prefix, kept=kept)
    check(tensors, dtype, **(dict(mean=MEAN, std=STD) if raw else {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["hwc", "chw", "cropped", "odd rows"])
@pytest.mark.parametrize("side", [8, 14, 16], ids=["p8", "p14", "p16"])
def test_layouts(side, layout, dtype):
    tensors = inputs(side=side, batch=2, width=40, grid=2, kept=3)
    if layout == "chw":
        tensors["images"] = tensors["images"].contiguous()
    elif layout == "cropped":  # of larger images, at an odd byte
        large = torch.randint(256, (2, 2 * side + 1, 2 * side + 3, 3), dtype=torch.uint8)
        tensors["images"] = large[:, 1:, 1 : 1 + 2 * side].permute(0, 3, 1, 2)
    elif layout == "odd rows":  # which begin at any byte of a word
        large = torch.randint(256, (2, 2 * side + 1, 2 * side + 3, 3), dtype=torch.uint8)
        tensors["images"] = large[:, : 2 * side, : 2 * side].permute(0, 3, 1, 2)
        assert kernels._layout(tensors["images"], side, True)[1]["SHIFTED"]
    check(tensors, dtype, mean=MEAN, std=STD)


@pytest.mark.parametrize("kept", [0, 7], ids=["all", "seven"])
@pytest.mark.parametrize("most", [64, 0], ids=["product", "sorted"])
def test_many_tiles(most, kept, monkeypatch):
    """With positions as columns of the product, and added before it."""
    monkeypatch.setattr(api, "MOST_BY_PRODUCT", most)
    check(inputs(batch=33, width=72, kept=kept), torch.float32, mean=MEAN, std=STD)


@pytest.mark.parametrize("kept", [0, 5], ids=["all", "five"])
def test_a_batch_of_zero_images(kept):
    t = inputs(batch=0, kept=kept)
    t["weight"].requires_grad_()
    packed = patch_embed(**t, impl="triton")
    assert packed.tokens.shape == (0, 24) and packed.cu_seqlens.tolist() == [0]
    packed.tokens.sum().backward()
    assert (t["weight"].grad == 0).all()


def test_two_runs_give_equal_bits():
    def run():
        t = inputs(batch=9)
        leaves = [t[n].requires_grad_() for n in ("weight", "bias", "pos_embed", "cls_token")]
        return torch.autograd.grad(patch_embed(**t, impl="triton").tokens.square().sum(), leaves)

    assert all(map(torch.equal, run(), run()))


def test_dropped_patches_are_not_read():
    t = inputs(raw=False, kept=0) | {"keep": torch.tensor([[0, 4], [8, 2]])}
    expected = patch_embed(**t, impl="triton").tokens
    for b, kept in enumerate(t["keep"].tolist()):
        for patch in set(range(9)) - set(kept):
            y, x = divmod(patch, 3)
            t["images"][b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = float("nan")
    assert torch.equal(patch_embed(**t, impl="triton").tokens, expected)


def test_compiles_in_one_graph():
    t = inputs()
    function = tokens(patch_embed, mean=MEAN, std=STD, impl="triton")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**t), function(**t))


@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("kept", [0, 5], ids=["all", "five"])
@pytest.mark.parametrize("columns", [True, False], ids=["columns", "table"])
def test_operators_pass_opcheck(raw, kept, columns):
    t = inputs(raw=raw, kept=kept)
    images = t["images"] if raw else t["images"].requires_grad_()
    weight = torch.randn(24, 64 if columns else 48, requires_grad=True)
    table = None if columns else torch.randn(10, 24, requires_grad=True)
    args = (images, t["keep"], weight, table, 4, 1, 48)
    torch.library.opcheck(torch.ops.clipa.patch_embed_tokens, args)
