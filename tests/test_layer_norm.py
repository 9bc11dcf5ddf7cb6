"""add_layer_norm: value and gradients of every implementation, dtypes of both streams, errors."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from tolerance import check_close, check_op

from bench.meters.counted import counted
from clipa_kernels import add_layer_norm, add_layer_norm_reference
from clipa_kernels.layer_norm import api

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8), (37, 80), (0, 16), (3, 5, 24), (2, 129)]


def inputs(shape):
    torch.manual_seed(0)
    d = shape[-1]
    return {
        "x": torch.randn(shape),
        "residual": 3 * torch.randn(shape) + 1,
        "weight": 1 + 0.3 * torch.randn(d),
        "bias": torch.randn(d),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("first", [False, True], ids=["residual", "first"])
def test_matches_the_reference(shape, dtype, first):
    tensors = inputs(shape)
    if first:
        tensors["residual"] = None
    check_op(
        lambda **k: add_layer_norm(**k, impl="torch"), add_layer_norm_reference, tensors, dtype
    )


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_gradients_of_weights_over_many_rows(weights):
    """bf16 rows are added in fp32: only the result is rounded."""
    t = {name: value.bfloat16() for name, value in inputs((3000, 16)).items()}
    t |= {name: t[name].to(weights).requires_grad_() for name in ("weight", "bias")}
    dy = torch.randn(3000, 16).bfloat16()
    wide = {name: value.detach().double().requires_grad_() for name, value in t.items()}
    y, wide_y = add_layer_norm(**t)[0], add_layer_norm_reference(**wide)[0]
    grads = torch.autograd.grad(y, (t["weight"], t["bias"]), dy)
    exact = torch.autograd.grad(wide_y, (wide["weight"], wide["bias"]), dy.double())
    for grad, expected in zip(grads, exact, strict=True):
        error = (grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_over_rows_that_fill_no_cache(dtype, monkeypatch):
    """The weights' gradient is made of several parts, the last shorter."""
    monkeypatch.setattr(api, "_CACHED_ELEMENTS", 16 * 80)
    check_op(
        lambda **k: add_layer_norm(**k, impl="torch"),
        add_layer_norm_reference, inputs((37, 80)), dtype,
    )  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["residual", "first"])
def test_16_bits_on_a_cpu_are_not_widened(first):
    """As much memory as torch's own, but for a cache: what is written again costs the time."""
    leaves = {name: t.bfloat16().requires_grad_() for name, t in inputs((16384, 256)).items()}
    if first:
        leaves["residual"] = None

    def eager(x, residual, weight, bias):
        total = x if residual is None else x + residual
        return F.layer_norm(total, weight.shape, weight, bias), total

    made = []
    for function in (eager, add_layer_norm):
        with counted() as count:
            function(**leaves)[0].sum().backward()
        made.append(count.new_bytes)
    assert made[1] <= made[0] + 6e6


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_second_derivatives(dtype):
    def twice(function, to):
        torch.manual_seed(0)
        leaves = [t.to(dtype).to(to).requires_grad_() for t in inputs((9, 24)).values()]
        y, total = function(*leaves)
        weights = torch.randn(y.shape).to(dtype).to(to)
        grads = torch.autograd.grad((y * weights + total).sum(), leaves, create_graph=True)
        sums = sum(grad.double().square().sum() for grad in grads)
        return torch.autograd.grad(sums, leaves, materialize_grads=True)

    exact, own = (
        twice(add_layer_norm_reference, torch.float64), twice(add_layer_norm_reference, dtype),
    )  # fmt: skip
    for name, *values in zip(
        inputs((9, 24)), twice(add_layer_norm, dtype), exact, own, strict=True
    ):
        check_close(name, *values)


def test_reference_is_torchs_layer_norm():
    t = {name: value.double() for name, value in inputs((7, 24)).items()}
    y, total = add_layer_norm_reference(**t, eps=1e-6)
    assert torch.equal(total, t["x"] + t["residual"])
    torch.testing.assert_close(y, F.layer_norm(total, (24,), t["weight"], t["bias"], 1e-6))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_each_output_keeps_its_dtype(stream, autocast):
    t = inputs((6, 16))
    x, residual = t["x"].bfloat16(), t["residual"].to(stream)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, total = add_layer_norm(x, residual, t["weight"], t["bias"])
    assert (y.dtype, total.dtype) == (torch.bfloat16, stream)
    exact = F.layer_norm(x.double() + residual.double(), (16,), t["weight"].double(), None)
    error = (y.double() - exact - t["bias"].double()).abs().max()
    assert error < 2 * torch.finfo(torch.bfloat16).eps * (exact.abs().max() + 3)


@pytest.mark.parametrize("eps", [1e-5, 1, numpy.float32(1e-5), torch.tensor(1e-5)], ids=repr)
def test_eps_of_any_kind_of_number(eps):
    t = inputs((4, 16))
    for came, true in zip(
        add_layer_norm(**t, eps=eps), add_layer_norm_reference(**t, eps=float(eps)), strict=True
    ):
        torch.testing.assert_close(came, true)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("weight", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("bias", DTYPES, ids=lambda d: str(d)[6:])
def test_a_bias_of_another_dtype(weight, bias):
    """Beside a stream of each; gradients come in the dtypes of what they are of."""
    for stream in DTYPES:
        t = {name: value.to(stream) for name, value in inputs((4, 16)).items()}
        t |= {"weight": t["weight"].to(weight), "bias": t["bias"].to(bias)}
        leaves = {name: value.requires_grad_() for name, value in t.items()}
        y, total = add_layer_norm(**leaves)
        assert y.dtype == total.dtype == stream
        expected = add_layer_norm_reference(**leaves)[0]
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=5e-2)
        grads = torch.autograd.grad(y.sum(), [*leaves.values()])
        assert [g.dtype for g in grads] == [value.dtype for value in leaves.values()]


def test_compiles_in_one_graph():
    t = inputs((4, 16))
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(**t), add_layer_norm(**t), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(3)}, ValueError, r"\[D\] for x \[..., D\], got 3 float32"),
        ({"residual": torch.ones(3, 16)}, ValueError, "residual must have x's shape"),
        ({"x": torch.ones(4, 16, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"bias": torch.ones(16, device="meta")}, ValueError, "must be on one device"),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, triton, torch, .*, got 'cuda'"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"eps": None}, TypeError, "eps must be a number, got None"),
        ({"eps": True}, TypeError, "eps must be a number, got True"),
        ({"eps": "1e-5"}, TypeError, "eps must be a number, got '1e-5'"),
        ({"eps": torch.ones(2)}, TypeError, "eps must be a number, got 2 float32"),
        ({"eps": float("nan")}, ValueError, "eps must be finite, got nan"),
        ({"bias": torch.ones(16, dtype=torch.complex64)}, TypeError, "bias must be floating"),
        ({"residual": torch.ones(4, 16).to_sparse()}, TypeError, "residual must be dense, got"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        add_layer_norm(**(inputs((4, 16)) | change))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_mode_in_plain_torch(dtype):
    """torch.func.jvp on a CPU: the tangent of the reference in fp64."""
    torch.manual_seed(0)
    x, tangent, weight, bias = (torch.randn(n, 16).squeeze(0).to(dtype) for n in (5, 5, 1, 1))

    def tangent_of(function, to):
        leaves = [t.to(to) for t in (x, tangent, weight, bias)]
        norm = lambda t: function(t, None, *leaves[2:], 1e-5)[0]  # noqa: E731
        return torch.func.jvp(norm, (leaves[0],), (leaves[1],))[1]

    exact = tangent_of(add_layer_norm_reference, torch.float64)
    baseline = tangent_of(add_layer_norm_reference, dtype)
    check_close("tangent", tangent_of(add_layer_norm, dtype), exact, baseline)
