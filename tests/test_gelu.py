"""bias_gelu: the three forms, value and gradients, what it saves, errors."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from tolerance import check_op

from clipa_kernels import bias_gelu, bias_gelu_reference

FORMS = ["none", "tanh", "quick"]


def inputs(shape=(9, 40)):
    torch.manual_seed(0)
    return {"x": 3 * torch.randn(shape), "bias": torch.randn(shape[-1])}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("shape", [(1, 8), (37, 129), (0, 16), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
def test_matches_the_reference(form, dtype, shape, biased):
    tensors = inputs(shape)
    if not biased:
        tensors["bias"] = None
    check_op(
        lambda **k: bias_gelu(**k, approximate=form, impl="torch"),
        lambda **k: bias_gelu_reference(**k, approximate=form),
        tensors,
        dtype,
    )


def test_reference_is_the_known_function():
    t = {name: value.double() for name, value in inputs().items()}
    z = t["x"] + t["bias"]
    for form in ("none", "tanh"):
        torch.testing.assert_close(
            bias_gelu_reference(**t, approximate=form), F.gelu(z, approximate=form)
        )
    torch.testing.assert_close(
        bias_gelu_reference(**t, approximate="quick"), z * (1.702 * z).sigmoid()
    )


def test_large_inputs_stay_finite():
    x = torch.tensor([[-1e4, -60.0, 60.0, 1e4]], requires_grad=True)
    for form in FORMS:
        y = bias_gelu(x, None, form)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y.detach(), torch.tensor([[0.0, 0.0, 60.0, 1e4]]))
        assert torch.equal(slope, torch.tensor([[0.0, 0.0, 1.0, 1.0]]))


def test_saves_one_tensor():
    t = inputs()
    x, bias = t["x"].requires_grad_(), t["bias"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: saved.append(s) or s, lambda s: s):
        bias_gelu(x, bias, "quick")
    assert [s.shape for s in saved] == [x.shape]
    assert torch.equal(saved[0], x + bias)


def test_compiles_in_one_graph():
    t = inputs()
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**t), bias_gelu(**t))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"bias": torch.ones(3)},
            ValueError,
            r"bias must be \[D\] for x \[..., D\], got 3 float32",
        ),
        ({"approximate": "erf"}, ValueError, "approximate must be one of .*, got 'erf'"),
        ({"x": torch.ones(2, 40).long()}, TypeError, "x must be floating point, got 2x40 int64"),
        ({"bias": torch.ones(40, device="meta")}, ValueError, "must be on one device"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"impl": numpy.ones(2)}, ValueError, r"impl must be one of .*, got array\("),
        ({"approximate": ["none"]}, ValueError, r"approximate must be one of .*, got \['none'\]"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(2, 40).to(torch.float8_e5m2)}, TypeError, "got 2x40 float8_e5m2"),
        ({"bias": torch.ones(40).to_sparse()}, TypeError, "bias must be dense, got torch.sparse"),
    ],
    ids=str,
)
def test_bad_input_is_named(change, error, words):
    with pytest.raises(error, match=words):
        bias_gelu(**(inputs() | change))
