"""add_layer_norm's Triton kernels under the interpreter."""

import pytest
import torch
from device import DTYPES
from tolerance import check_close, check_op

from clipa_kernels import add_layer_norm, add_layer_norm_reference

kernels = pytest.importorskip("clipa_kernels.layer_norm.kernels")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of empty lanes
SHAPES = [(1, 8), (37, 80), (0, 16), (3, 5, 24), (2, 129), (17, 768), (16, 1), (5, 4096)]


def inputs(shape, offset=1.0):
    torch.manual_seed(0)
    d = shape[-1]
    return {
        "x": torch.randn(shape),
        "residual": 3 * torch.randn(shape) + offset,
        "weight": 1 + 0.3 * torch.randn(d),
        "bias": torch.randn(d),
    }


def triton(**tensors):
    return add_layer_norm(**tensors, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("first", [False, True], ids=["residual", "first"])
def test_matches_the_reference(shape, dtype, first):
    tensors = inputs(shape)
    if first:
        tensors["residual"] = None
    check_op(triton, add_layer_norm_reference, tensors, dtype)


def test_a_large_mean_costs_no_digits():
    """Two passes over the row in registers: the variance is not a difference of large sums."""
    check_op(triton, add_layer_norm_reference, inputs((9, 200), 1000.0), torch.float32)


@pytest.mark.parametrize("rows", [15, 16, 17, 101])
def test_programs_that_walk_several_tiles(rows, monkeypatch):
    monkeypatch.setattr(kernels, "sms", lambda device: 2)
    monkeypatch.setattr(kernels, "_RESIDENT", 1)
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 1)
    check_op(triton, add_layer_norm_reference, inputs((rows, 40)), torch.float32)


@pytest.mark.parametrize("stream", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("branch", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_streams_and_weights_of_other_dtypes(branch, stream):
    """Each gradient in its input's dtype; both streams' from one launch."""
    t = inputs((21, 48))
    values = t["x"].to(branch), t["residual"].to(stream), t["weight"], t["bias"]
    weights = torch.randn(2, 21, 48, dtype=torch.float64)

    def run(function, values):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        outputs = function(*leaves)
        loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    actual = run(lambda *v: add_layer_norm(*v, impl="triton"), values)
    exact = run(add_layer_norm_reference, [v.double() for v in values])
    base = run(add_layer_norm_reference, values)
    names = ("y", "total", "x", "residual", "weight", "bias")
    for name, mine, true, rounded in zip(names, actual, exact, base, strict=True):
        # The sum is exact up to the stream's rounding, which the norm then sees.
        eps = torch.finfo(torch.float16).eps if torch.float16 in (branch, stream) else 0
        if (mine.double() - true).abs().max() > 2 * eps * true.abs().max():
            check_close(name, mine, true, rounded)
        assert mine.dtype == rounded.dtype


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["norm", "sum"])
@pytest.mark.parametrize("first", [False, True], ids=["residual", "first"])
def test_one_output_unused(used, first):
    t = inputs((7, 24))
    if first:
        t["residual"] = None
    leaves = [value.requires_grad_() for value in t.values() if value is not None]

    def grads(impl):
        outputs = add_layer_norm(**t, impl=impl)
        loss = sum(o.square().sum() for o, use in zip(outputs, used, strict=True) if use)
        return torch.autograd.grad(loss, leaves, materialize_grads=True)

    for mine, other in zip(grads("triton"), grads("torch"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_cost_no_sums():
    t = inputs((7, 24))
    whole = [v.clone().requires_grad_() for v in t.values()]
    part = [v.clone().requires_grad_(i < 2) for i, v in enumerate(t.values())]
    for values in (whole, part):
        sum(o.square().sum() for o in add_layer_norm(*values, impl="triton")).backward()
    assert torch.equal(part[0].grad, whole[0].grad) and torch.equal(part[1].grad, whole[1].grad)
    assert part[2].grad is None and part[3].grad is None


def test_strided_inputs_give_the_same_bits():
    t = inputs((12, 40))
    plain = triton(**t)
    wide = {name: t[name].repeat(1, 2)[:, :40] for name in ("x", "residual")}
    thin = {name: torch.stack([value, value], -1)[..., 0] for name, value in t.items()}
    for spread in (wide, thin):
        assert not spread["x"].is_contiguous()
        assert all(map(torch.equal, triton(**(t | spread)), plain))


def test_two_runs_give_equal_bits():
    def run():
        leaves = [value.half().requires_grad_() for value in inputs((70, 64)).values()]
        y, total = add_layer_norm(*leaves, impl="triton")
        return torch.autograd.grad(y.sum() + total.sum(), leaves)

    assert all(map(torch.equal, run(), run()))


def test_nan_stays_in_its_row():
    t = inputs((5, 24))
    t["x"][2, 3] = float("nan")
    y, total = triton(**t)
    assert y[2].isnan().all() and total[2].isnan().sum() == 1
    assert y[[0, 1, 3, 4]].isfinite().all()


def test_compiles_in_one_graph():
    t = {name: value.requires_grad_() for name, value in inputs((6, 16)).items()}
    compiled = torch.compile(triton, fullgraph=True, backend="aot_eager")

    def grads(function):
        y, total = function(**t)
        return torch.autograd.grad((y * total).sum(), list(t.values()))

    assert all(map(torch.equal, grads(compiled), grads(triton)))


@pytest.mark.parametrize("first", [False, True], ids=["residual", "first"])
def test_operators_pass_opcheck(first):
    x, residual, weight, bias = (v.requires_grad_() for v in inputs((6, 16)).values())
    residual = None if first else residual
    torch.library.opcheck(torch.ops.clipa.add_layer_norm, (x, residual, weight, bias, 1e-5))
    x, weight = x.detach(), weight.detach()
    for stream, d_total, wanted in ((x, x, torch.float32), (x.half(), None, None)):
        args = (x, d_total, stream, weight, 1e-5, wanted)
        torch.library.opcheck(torch.ops.clipa.add_layer_norm_backward, args)


def test_a_dtype_without_kernels():
    t = inputs((4, 16))
    with pytest.raises(TypeError, match='impl "triton" takes float32, .*, got 4x16 float64'):
        triton(**(t | {"residual": t["residual"].double()}))
