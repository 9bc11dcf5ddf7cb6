"""The losses' Triton kernels under the interpreter, which must be on before triton is imported."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from device import COMPILED, DTYPES
from tolerance import check_close

from bench.meters.counted import counted
from clipa_kernels import (
    ClipLoss,
    contrastive_loss,
    contrastive_loss_reference,
    sigmoid_loss,
    sigmoid_loss_reference,
)
from clipa_kernels.contrastive.ops import contrastive_grads
from clipa_kernels.contrastive.ops import contrastive_loss as contrastive_op
from clipa_kernels.contrastive.ops import sigmoid_loss as sigmoid_op

contrastive = pytest.importorskip("clipa_kernels.contrastive.kernels")
contrastive_grads_file = pytest.importorskip("clipa_kernels.contrastive.kernels_grads")

LOSSES = {
    "contrastive": (contrastive_loss, contrastive_loss_reference),
    "sigmoid": (sigmoid_loss, sigmoid_loss_reference),
}
both_losses = pytest.mark.parametrize(("loss", "reference"), LOSSES.values(), ids=LOSSES)
NAMES = ("loss", "image", "text", "scale", "bias")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp2 and log2


def leaves(n, e, scale=14.3, bias=-3.0, dtype=torch.float32, kind="random"):
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(n, e, generator=generator), dim=-1) for _ in "ab")
    if kind != "random":
        text = image.clone()
    if kind == "duplicates":  # of few bits: cosines are exact, so equal on any machine's BLAS
        image, text = ((256 * t).round() / 256 for t in (image, text))
        image[n // 2 :], text[n // 2 :] = image[: n - n // 2].clone(), text[: n - n // 2].clone()
    scalars = torch.tensor(scale), torch.tensor(bias)
    features = (t.to(dtype).requires_grad_() for t in (image, text))
    return [*features, *(t.requires_grad_() for t in scalars)]


def gradients(function, inputs, **how):
    loss = function(*inputs, **how)
    return loss.detach(), *torch.autograd.grad(loss, inputs, materialize_grads=True)


def check(loss, reference, values, **how):
    """Loss and gradients against the reference in fp64; baseline: the reference in the dtype."""
    exact = gradients(reference, [v.detach().double().requires_grad_() for v in values])
    actual, base = gradients(loss, values, impl="triton", **how), gradients(reference, values)
    # The scalars' gradients sum N^2 terms of both signs: their rounding is that of the terms.
    image, text, scale, bias = (v.detach().double() for v in values)
    cosines = image @ text.T
    logits = (scale * cosines + bias).requires_grad_()
    one = torch.eye(len(logits), dtype=torch.float64)
    (d_logits,) = torch.autograd.grad(reference(logits, one, torch.ones(())), logits)
    eps = 2 * torch.finfo(torch.float32).eps
    floors = {"scale": eps * (d_logits * cosines).abs().sum(), "bias": eps * d_logits.abs().sum()}
    for name, mine, true, rounded in zip(NAMES, actual, exact, base, strict=True):
        # Below fp64's own 1 + x, as in test_contrastive.py: negatives far below their positive.
        floor = floors.get(name, 0) + torch.finfo(torch.float64).eps * scale
        if (mine.double() - true).abs().max() > floor:
            check_close(name, mine.to(rounded.dtype), true, rounded)


@pytest.mark.parametrize("kind", ["random", "aligned", "duplicates"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, 500.0])
@both_losses
def test_exact_in_fp32(loss, reference, scale, kind):
    check(loss, reference, leaves(83, 24, scale, kind=kind))


@pytest.mark.parametrize(
    ("n", "e"),
    [(1, 16), (2, 16), (64, 32), (65, 48), (131, 17), (128, 64)],
    ids=["one pair", "two", "one tile", "a tile plus one", "primes", "tiles"],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@both_losses
def test_any_shape(loss, reference, n, e, dtype):
    values = leaves(n, e, dtype=dtype)
    if dtype == torch.float32:
        return check(loss, reference, values)
    wide = [v.detach().double().requires_grad_() for v in values]
    exact = gradients(reference, wide)
    low = gradients(lambda x, y, s, b: reference(x, y, s.half(), b.half()).float(), values)
    actual = gradients(loss, values, impl="triton")
    for name, mine, true, rounded in zip(NAMES, actual, exact, low, strict=True):
        check_close(name, mine, true, rounded.to(mine.dtype))


@pytest.mark.parametrize("kind", ["random", "aligned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_loss_at_scale_100_is_right_to_1e_4(dtype, kind):
    image, text, scale, _ = leaves(150, 64, 100.0, dtype=dtype, kind=kind)
    # counted multiplies bf16 as a GPU does
    with torch.no_grad(), nullcontext() if COMPILED else counted():
        image[3] = image[4]
        loss = contrastive_loss(image, text, scale, impl="triton")
    exact = contrastive_loss_reference(*(t.double() for t in (image, text, scale)))
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= 1e-4 * exact.item()


@both_losses
def test_strips_and_blocks_of_any_size(loss, reference, monkeypatch):
    """Several strips, and programs that walk several tiles: the values of one strip."""
    values = leaves(211, 40, 60.0)
    with torch.no_grad():
        values[0][11:15] *= 40
    whole = gradients(loss, values, impl="triton")
    monkeypatch.setitem(contrastive_grads_file.STRIP_ROWS, 4, 100)
    monkeypatch.setattr(contrastive, "_PROGRAMS", 2)
    assert contrastive.block_for(4, 4, 1) == (2, 4)
    for mine, true in zip(gradients(loss, values, impl="triton"), whole, strict=True):
        torch.testing.assert_close(mine, true, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("kind", ["random", "duplicates"])
@pytest.mark.parametrize(("n", "width"), [(200, 41), (300, 144), (384, 64)])
def test_strips_in_16_bits(n, width, kind, monkeypatch):
    """The texts' gradient is rounded once, at the end: where duplicates lie in two strips it
    cancels, which the last two shapes show. The other cases are for the shapes."""
    monkeypatch.setitem(contrastive_grads_file.STRIP_ROWS, 2, 128)
    values = leaves(n, width, 100.0, dtype=torch.float16, kind=kind)
    check(contrastive_loss, contrastive_loss_reference, values)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("tiles", [(1, 1), (1, 300), (300, 1), (7, 500), (64, 64), (1024, 1024)])
def test_blocks_leave_programs_for_the_device(tiles, groups):
    """And few partial sums: of a row as many as of a column, where tiles are many."""
    down, across = contrastive.block_for(*tiles, groups)
    assert 1 <= down <= tiles[0] and 1 <= across <= tiles[1]
    blocks = -(-tiles[0] // down), -(-tiles[1] // across)
    programs = blocks[0] * blocks[1]
    assert programs >= min(tiles[0] * tiles[1], contrastive._PROGRAMS) // 2
    assert programs <= 4 * contrastive._PROGRAMS
    if min(tiles) >= 64:
        assert groups * blocks[0] + blocks[1] <= 2.2 * (groups * programs) ** 0.5


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@both_losses
def test_any_subset_of_gradients(loss, reference, wanted):
    values = leaves(70, 16)
    full = gradients(loss, values, impl="triton")[1:]
    for index, value in enumerate(values):
        value.requires_grad_(index in wanted)
    loss(*values, impl="triton").backward()
    for index, value in enumerate(values):
        assert (value.grad is None) == (index not in wanted)
        if value.grad is not None:
            torch.testing.assert_close(value.grad, full[index])
    with torch.no_grad():
        torch.testing.assert_close(loss(*values, impl="triton"), loss(*values), rtol=1e-5, atol=0)


@both_losses
def test_strides_shared_tensors_and_scalars_of_one(loss, reference):
    image, text, scale, _ = leaves(40, 16)
    plain = loss(image, text, scale, impl="triton")
    for spread in (
        [torch.stack([t.detach(), t.detach() + 1], -1)[..., 0] for t in (image, text)],
        [torch.cat([t.detach(), t.detach() + 1], -1)[:, :16] for t in (image, text)],
    ):
        assert not spread[0].is_contiguous()
        assert torch.equal(loss(*spread, scale[None], impl="triton"), plain)
    both = gradients(lambda x, s: loss(x, x, s, impl="triton"), [image, scale])
    true = gradients(lambda x, s: reference(x, x, s), [image, scale])
    for mine, other in zip(both, true, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@both_losses
def test_two_runs_give_equal_bits(loss, reference):
    values = leaves(150, 32, 50.0, dtype=torch.float16)
    first, second = (gradients(loss, values, impl="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_losses
def test_a_large_d_loss_reaches_fp16_before_rounding(loss, reference):
    """A gradient scaler's factor is in before the gradient is rounded: small ones survive."""
    values = leaves(100, 16, dtype=torch.float16)
    for impl in ("triton", "torch"):
        value = loss(*values, impl=impl)
        (grad,) = torch.autograd.grad(value * 4096.0, values[0])
        exact = [v.detach().double().requires_grad_() for v in values]
        (true,) = torch.autograd.grad(reference(*exact) * 4096.0, exact[0])
        assert (grad - true).abs().max() <= 2e-3 * true.abs().max()


@pytest.mark.parametrize(
    ("image_is", "text_is"),
    [(torch.nan, 1.0), (torch.inf, 1.0), (3e38, 1.0), (1e20, 1e20)],
    ids=["nan", "inf", "a row overflows", "a positive overflows"],
)
def test_bad_features_are_not_hidden(image_is, text_is):
    image, text, scale, _ = leaves(70, 16)
    with torch.no_grad():
        image[3], text[3] = image_is, text_is
    assert contrastive_loss(image, text, scale, impl="triton").isnan()
    if text_is == 1:
        assert not sigmoid_loss(image, text, scale, impl="triton").isfinite()


@both_losses
def test_compiles_in_one_graph(loss, reference):
    values = leaves(70, 16)
    compiled = torch.compile(
        lambda *inputs: loss(*inputs, impl="triton"), fullgraph=True, backend="aot_eager"
    )
    expected = gradients(loss, values, impl="triton")
    for mine, other in zip(gradients(compiled, values), expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_operators_pass_opcheck():
    image, text, scale, bias = leaves(20, 16)
    torch.library.opcheck(contrastive_op, (image, text, scale, True))
    wanted, pairs = [True, False, True, True], (0, 0, 20)
    tensors = image, text, scale, bias
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(sigmoid_op, (*tensors, wanted, *pairs, True), test_utils=some)
    # The rest differentiates all outputs, of which gradients made in the forward raise.
    torch.library.opcheck(sigmoid_op, (*(t.detach() for t in tensors), wanted, *pairs, True))
    _, *stats = contrastive_op(image, text, scale, True)
    inputs = [t.detach() for t in (image, text, scale, *stats, torch.ones(()))]
    for wanted in ([True] * 3, [True, False, False], [False, False, True]):
        torch.library.opcheck(contrastive_grads, (*inputs, *pairs, wanted, False, True))


def test_a_dtype_without_kernels():
    values = leaves(8, 16, dtype=torch.float64)
    with pytest.raises(TypeError, match='impl "triton" takes float32, .*, got 8x16 float64'):
        contrastive_loss(*values[:3], impl="triton")
    assert ClipLoss()(*values[:3]).dtype == torch.float64
