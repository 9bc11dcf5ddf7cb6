"""patch_embed: value and gradients, layouts, uint8 exactness, only kept patches read, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerance import check_op

from clipa_kernels import patch_embed, patch_embed_reference

MEAN, STD = torch.tensor([0.48, 0.46, 0.41]), torch.tensor([0.27, 0.26, 0.28])


def inputs(side=4, grid=3, batch=2, width=24, prefix=1, kept=5, raw=True):
    torch.manual_seed(0)
    size = side * grid
    pixels = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    return {
        "images": pixels if raw else torch.randn(batch, 3, size, size),
        "keep": torch.randint(grid**2, (batch, kept)) if kept else None,
        "weight": torch.randn(width, 3, side, side) / side,
        "bias": torch.randn(width),
        "pos_embed": torch.randn(prefix + grid**2, width),
        "cls_token": torch.randn(prefix, width) if prefix else None,
    }


def tokens(function, **how):
    return lambda **tensors: function(**tensors, **how).tokens


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("kept", [0, 1, 5], ids=["all", "one", "five"])
@pytest.mark.parametrize("prefix", [0, 1, 3], ids=["no-cls", "cls", "registers"])
@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("side", [4, 7], ids=["p4", "p7"])
def test_matches_the_reference(side, raw, prefix, kept, dtype):
    tensors = inputs(side=side, raw=raw, prefix=prefix, kept=kept)
    how = dict(mean=MEAN, std=STD) if raw else {}
    check_op(
        tokens(patch_embed, impl="torch", **how),
        tokens(patch_embed_reference, **how),
        tensors,
        dtype,
    )


def test_reference_is_a_convolution_with_dropped_tokens():
    t = inputs(raw=False)
    x = F.conv2d(t["images"], t["weight"], t["bias"], stride=4).flatten(2).mT + t["pos_embed"][1:]
    expected = [
        torch.cat((t["cls_token"] + t["pos_embed"][:1], x[b, t["keep"][b]])) for b in (0, 1)
    ]
    packed = patch_embed_reference(**t)
    torch.testing.assert_close(packed.tokens, torch.cat(expected))
    assert packed.cu_seqlens.tolist() == [0, 6, 12] and packed.max_seqlen == 6


def test_layouts_give_the_same_bits():
    t = inputs()
    a = patch_embed(**t, mean=MEAN, std=STD).tokens
    b = patch_embed(**(t | {"images": t["images"].contiguous()}), mean=MEAN, std=STD).tokens
    assert torch.equal(a, b)


@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float"])
def test_dropped_patches_are_not_read(raw):
    t = inputs(raw=False, kept=0) | {"keep": torch.tensor([[0, 4], [8, 2]])}
    expected = patch_embed(**t).tokens
    for b, kept in enumerate(t["keep"].tolist()):
        for patch in set(range(9)) - set(kept):
            y, x = divmod(patch, 3)
            t["images"][b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = float("nan")
    if raw:  # the gradient of the weight reads the same patches again
        t["weight"].requires_grad_()
    out = patch_embed(**t).tokens
    assert torch.equal(out, expected)
    if raw:
        out.sum().backward()
        assert torch.isfinite(t["weight"].grad).all()


def test_uint8_pixels_are_exact_in_bfloat16():
    """A weight that picks one pixel gives every value 0..255 back, without a rounding."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    weight = torch.full((8, 1, 1, 1), 255.0, dtype=torch.bfloat16)
    zeros = torch.zeros(256, 8, dtype=torch.bfloat16)
    out = patch_embed(images, None, weight, None, zeros).tokens
    assert torch.equal(out[:, 0].float(), torch.arange(256.0))


def test_autocast_chooses_the_dtype():
    t = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        for impl in ("torch", "reference"):
            assert patch_embed(**t, impl=impl).tokens.dtype == torch.bfloat16
    assert patch_embed(**t).tokens.dtype == torch.float32


@pytest.mark.parametrize("kept", [0, 5], ids=["all", "five"])
def test_a_batch_of_zero_images(kept):
    t = inputs(batch=0, kept=kept)
    t["weight"].requires_grad_()
    packed = patch_embed(**t)
    assert packed.tokens.shape == (0, 24) and packed.cu_seqlens.tolist() == [0]
    packed.tokens.sum().backward()
    assert (t["weight"].grad == 0).all()


@pytest.mark.parametrize("raw", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("kept", [0, 3], ids=["all", "three"])
def test_opcheck(raw, kept):
    t = inputs(raw=raw, kept=kept)
    images = t["images"] if raw else t["images"].requires_grad_()
    weight = torch.randn(24, 48, requires_grad=True)
    positions = torch.randn(9, 24, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    args = (images, t["keep"], weight, bias, positions, 4)
    torch.library.opcheck(torch.ops.clipa.patch_embed, args)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_compiles_in_one_graph(kind):
    t, norm = inputs(), dict(mean=kind(MEAN.tolist()), std=kind(STD.tolist()))
    f = torch.compile(tokens(patch_embed, **norm), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(**t), patch_embed(**t, **norm).tokens)


@pytest.mark.parametrize("function", [patch_embed, patch_embed_reference])
def test_mean_and_std_come_as_numbers_too(function):
    expected = function(**inputs(), mean=MEAN, std=STD).tokens
    for kind in (list, tuple, np.array, lambda numbers: [np.float32(number) for number in numbers]):
        norm = dict(mean=kind(MEAN.tolist()), std=kind(STD.tolist()))
        assert torch.equal(function(**inputs(), **norm).tokens, expected)
    ours = function(**inputs(), mean=(0, 0, 0), std=(1, 1, 1)).tokens
    assert torch.equal(ours, function(**inputs(), mean=torch.zeros(3), std=torch.ones(3)).tokens)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("function", [patch_embed, patch_embed_reference])
def test_tables_come_with_a_dimension_of_one_image_too(function, prefix):
    t = inputs(prefix=prefix)
    names = [name for name in ("pos_embed", "cls_token") if t[name] is not None]
    timm = t | {name: t[name].unsqueeze(0).requires_grad_() for name in names}
    came = function(**timm).tokens
    assert torch.equal(came, function(**t).tokens)
    came.sum().backward()
    assert all(timm[name].grad.shape == timm[name].shape for name in names)


BAD = {
    "size": (dict(images=torch.zeros(2, 3, 13, 12)), ValueError, "patch side 4, got 13x12"),
    "small": (dict(images=torch.zeros(2, 3, 2, 2)), ValueError, "patch side 4, got 2x2"),
    "channels": (dict(images=torch.zeros(2, 1, 12, 12)), ValueError, r"\[B, 3, height, width\]"),
    "integer": (dict(images=torch.zeros(2, 3, 12, 12).int()), TypeError, "uint8 or floating point"),
    "weight": (dict(weight=torch.zeros(24, 3, 4, 3)), ValueError, r"weight must be \[D, C, P, P\]"),
    "bias": (dict(bias=torch.zeros(3)), ValueError, r"bias must be \[24\], got 3 float32"),
    "half a norm": (dict(mean=MEAN), ValueError, "must come together"),
    "mean": (dict(mean=MEAN[:2], std=STD), ValueError, r"mean must be \[3\], got 2"),
    "zero std": (dict(mean=MEAN, std=torch.zeros(3)), ValueError, "std must be positive"),
    "positions": (dict(pos_embed=torch.zeros(9, 24)), ValueError, "1 prefix \\+ 9 patches, 24"),
    "position tables": (dict(pos_embed=torch.zeros(2, 10, 24)), ValueError, "24.*, got 2x10x24"),
    "cls": (dict(cls_token=torch.zeros(5)), ValueError, r"cls_token must be \[24\] or \[R, 24\]"),
    "too high": (dict(keep=torch.tensor([[0], [9]])), ValueError, "from 0 to 8, got 0 to 9"),
    "negative": (dict(keep=torch.tensor([[0], [-1]])), ValueError, "from 0 to 8, got -1 to 0"),
    "none kept": (dict(keep=torch.zeros(2, 0).long()), ValueError, "K at least 1, got 2x0"),
    "batch": (dict(keep=torch.zeros(3, 1).long()), ValueError, r"keep must be \[2, K\]"),
    "float keep": (dict(keep=torch.zeros(2, 1)), TypeError, "keep must hold int32 or int64"),
    "device": (dict(pos_embed=torch.zeros(10, 24, device="meta")), ValueError, "one device"),
    "impl": (dict(impl="conv"), ValueError, "impl must be one of"),
    "short keep": (
        dict(keep=torch.zeros(2, 1).short()),
        TypeError,
        "int32 or int64, got 2x1 int16",
    ),
    "two numbers": (dict(mean=(0, 0), std=(1, 1, 1)), ValueError, r"mean .* \[3\], got 2 numbers"),
    "bool numbers": (dict(mean=MEAN, std=(True,) * 3), TypeError, "std must be a tensor or 3 num"),
    "text": (dict(mean="0.5", std=STD), TypeError, "mean must be a tensor or 3 numbers, got '0.5'"),
    "infinite": (dict(mean=(0, 0, 1e39), std=STD), ValueError, "mean must be finite, got"),
}
for name, value in {"nan": float("nan"), "below": -0.5, "huge": float("inf")}.items():
    words = "std must be positive and finite"
    BAD[f"{name} std"] = (dict(mean=MEAN, std=torch.full((3,), value)), ValueError, words)
    BAD[f"{name} std as numbers"] = (dict(mean=MEAN, std=(1, 1, value)), ValueError, words)
for name in ("bias", "mean", "std", "pos_embed", "cls_token", "keep", "weight", "images"):
    both = {"mean": dict(std=STD), "std": dict(mean=MEAN)}.get(name, {})
    shape = inputs()[name].shape if name in inputs() else (3,)
    for label, value in {
        "list": [["x"]],
        "complex": torch.zeros(shape, dtype=torch.complex64),
        "bool": torch.zeros(shape, dtype=torch.bool),
        "int16": torch.zeros(shape, dtype=torch.int16),
        "sparse": torch.zeros(shape, dtype=torch.int64 if name == "keep" else None).to_sparse(),
    }.items():
        BAD[f"{name} {label}"] = (both | {name: value}, TypeError, f"{name} must (be|hold) ")


@pytest.mark.parametrize(("change", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=f"^patch_embed: .*{words}"):
        patch_embed(**(inputs() | change))
    if "impl" not in change:
        with pytest.raises(error, match=f"^patch_embed_reference: .*{words}"):
            patch_embed_reference(**(inputs() | change))
