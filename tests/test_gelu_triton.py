"""bias_gelu's Triton kernels under the interpreter."""

import pytest
import torch
from device import DTYPES
from tolerance import check_close, check_op

from clipa_kernels import bias_gelu, bias_gelu_reference

kernels = pytest.importorskip("clipa_kernels.gelu.kernels")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of exp
FORMS = ["none", "tanh", "quick"]
SHAPES = [(1, 8), (37, 129), (0, 16), (2, 3, 24), (8, 256), (9, 257), (130, 1)]
all_forms = pytest.mark.parametrize("form", FORMS)


def inputs(shape=(9, 40)):
    torch.manual_seed(0)
    return {"x": 3 * torch.randn(shape), "bias": torch.randn(shape[-1])}


def triton(form):
    return lambda x, bias=None: bias_gelu(x, bias, form, impl="triton")


def reference(form):
    return lambda x, bias=None: bias_gelu_reference(x, bias, form)


@all_forms
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_matches_the_reference(form, dtype, shape, biased):
    tensors = inputs(shape)
    if not biased:
        del tensors["bias"]
    check_op(triton(form), reference(form), tensors, dtype)


@all_forms
def test_large_inputs_stay_finite(form):
    x = torch.tensor([[-1e4, -60.0, 60.0, 1e4]], requires_grad=True)
    y = triton(form)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(
        y.detach(), torch.tensor([[0.0, 0.0, 60.0, 1e4]]), rtol=0, atol=1e-30
    )
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), rtol=0, atol=1e-30)


@all_forms
def test_infinity_and_what_is_not_a_number(form):
    x = torch.tensor([[-torch.inf, -3e38, 3e38, torch.inf, torch.nan]], requires_grad=True)
    y = triton(form)(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y[0, :4].tolist() == [0.0, 0.0, x[0, 2], torch.inf] and y[0, 4].isnan()
    assert slope[0, :4].tolist() == [0.0, 0.0, 1.0, 1.0] and slope[0, 4].isnan()


@all_forms
def test_digits(form):
    """Right to half a unit in the last place of numbers just below 10; slopes to two of 1."""
    x = torch.linspace(-10, 10, 1 << 16).view(-1, 256).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    y, exact = triton(form)(x), reference(form)(exact_x)
    (slope,), (exact_slope,) = (
        torch.autograd.grad(out.sum(), at) for out, at in ((y, x), (exact, exact_x))
    )
    assert (y - exact).abs().max() <= 5e-7
    assert (slope - exact_slope).abs().max() <= 2.5e-7


def test_strips_of_any_height(monkeypatch):
    monkeypatch.setattr(kernels, "sms", lambda device: 3)
    monkeypatch.setattr(kernels, "_RESIDENT", 2)  # 6 programs: 3 strips of 2 blocks of columns
    monkeypatch.setattr(kernels, "_LEAST_ROWS", 1)
    check_op(triton("none"), reference("none"), inputs((101, 300)), torch.float32)


def test_a_bias_of_another_dtype():
    """An fp16 product with fp32 parameters, as under autocast: each gradient in its own dtype."""
    t = inputs((70, 40))
    values = t["x"].half(), t["bias"]
    weights = torch.randn(70, 40, dtype=torch.float64)

    def run(function, values):
        leaves = [value.detach().clone().requires_grad_() for value in values]
        y = function(*leaves)
        return [y, *torch.autograd.grad((y.double() * weights).sum(), leaves)]

    results = (
        run(triton("none"), values),
        run(reference("none"), [v.double() for v in values]),
        run(reference("none"), values),
    )
    for name, mine, true, rounded in zip(("y", "x", "bias"), *results, strict=True):
        # The gradient of y arrives rounded to fp16 on its way to both.
        if name != "bias" or (mine - true).abs().max() > 1e-2:
            check_close(name, mine, true, rounded)
        assert mine.dtype == rounded.dtype


def test_saves_only_its_inputs():
    t = inputs()
    x, bias = t["x"].requires_grad_(), t["bias"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        triton("quick")(x, bias)
    assert {s.data_ptr() for s in saved} == {x.data_ptr(), bias.data_ptr()}


def test_strided_inputs_give_the_same_bits():
    t = inputs((12, 40))
    for spread in (t["x"].repeat(1, 2)[:, :40], torch.stack([t["x"]] * 2, -1)[..., 0]):
        assert not spread.is_contiguous()
        assert torch.equal(triton("tanh")(spread, t["bias"]), triton("tanh")(**t))
    spread_bias = torch.stack([t["bias"]] * 2, -1)[..., 0]
    assert torch.equal(triton("tanh")(t["x"], spread_bias), triton("tanh")(**t))


def test_a_frozen_bias_costs_no_sum():
    t = inputs()
    x = t["x"].requires_grad_()
    (dx,) = torch.autograd.grad(triton("none")(x, t["bias"]).sum(), x)
    both = torch.autograd.grad(triton("none")(x, t["bias"].requires_grad_()).sum(), (x, t["bias"]))
    assert torch.equal(dx, both[0])


@all_forms
def test_compiles_in_one_graph(form):
    leaves = [value.requires_grad_() for value in inputs().values()]
    compiled = torch.compile(triton(form), fullgraph=True, backend="aot_eager")

    def grads(function):
        return torch.autograd.grad(function(*leaves).square().sum(), leaves)

    assert all(map(torch.equal, grads(compiled), grads(triton(form))))


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_operators_pass_opcheck(biased):
    x, bias = (v.requires_grad_() for v in inputs().values())
    bias = bias if biased else None
    torch.library.opcheck(torch.ops.clipa.bias_gelu, (x, bias, "none"))
    x, bias = x.detach(), bias.detach() if biased else None
    torch.library.opcheck(torch.ops.clipa.bias_gelu_backward, (x, x, bias, "tanh", biased))


def test_a_dtype_without_kernels():
    t = inputs()
    with pytest.raises(TypeError, match='impl "triton" takes float32, .*, got 40 float64'):
        bias_gelu(t["x"], t["bias"].double(), impl="triton")
