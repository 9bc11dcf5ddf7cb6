"""Beyond a first backward: every operation has the reference's derivative, or says it does not.

The gradient penalty |d loss / d inputs|^2, and derivatives in forward mode.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from clipa_kernels import (
    add_layer_norm,
    bias_gelu,
    contrastive_loss,
    cu_seqlens_of,
    patch_embed,
    sigmoid_loss,
    varlen_attention,
    varlen_attention_qkvpacked,
)
from clipa_kernels.attention import rivals
from clipa_kernels.contrastive import plain

RAGGED, EQUAL = cu_seqlens_of([3, 0, 4, 5]), cu_seqlens_of([4, 4, 4])
KEEP = torch.tensor([[0, 3], [2, 1]])
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.25])


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def unit(*shape):
    return F.normalize(normal(*shape), dim=-1)


def stem(images, weight, bias, table, token, **how):
    return patch_embed(images, KEEP, weight, bias, table, token, MEAN, STD, **how).tokens


def stem_of_bytes(weight, bias, table, **how):
    images = torch.arange(2 * 3 * 64).view(2, 3, 8, 8).to(torch.uint8)
    return patch_embed(images, None, weight, bias, table, **how).tokens


def norm(x, residual, weight, bias, **how):
    return torch.cat(add_layer_norm(x, residual, weight, bias, **how))


def first_norm(x, weight, bias, **how):
    return add_layer_norm(x, None, weight, bias, **how)[0]


PAIRS = (unit(6, 16), unit(6, 16) * torch.tensor(1.0), torch.tensor(10.0), torch.tensor(-5.0))
QKV = (normal(12, 2, 16), normal(12, 2, 16) + 1, normal(12, 2, 16) * 2)
ROWS = (normal(5, 16), normal(5, 16) + 1, normal(16), normal(16) + 1)
STEM = (normal(2, 3, 8, 8), normal(16, 3, 4, 4), normal(16), normal(5, 16), normal(16) + 1)
FORMS = {
    f"bias_gelu {form}": (lambda x, b, f=form, **how: bias_gelu(x, b, f, **how), ROWS[1:3])
    for form in ("none", "tanh", "quick")
}
# By name of the function that says it: what runs, and the tensors to differentiate.
CASES = FORMS | {
    "contrastive_loss": (contrastive_loss, PAIRS),
    "contrastive_loss in strips": (contrastive_loss, PAIRS[:3]),
    "sigmoid_loss": (sigmoid_loss, PAIRS),
    "varlen_attention": (lambda *t, **how: varlen_attention(*t, RAGGED, 5, **how), QKV),
    "varlen_attention of one length": (lambda *t, **h: varlen_attention(*t, EQUAL, 4, **h), QKV),
    "varlen_attention packed": (
        lambda t, **how: varlen_attention_qkvpacked(t, RAGGED, 5, causal=True, **how),
        (torch.stack(QKV, 1),),
    ),
    "add_layer_norm": (norm, ROWS),
    "add_layer_norm without residual": (first_norm, ROWS[1:]),
    "patch_embed": (stem, STEM),
    "patch_embed of bytes": (stem_of_bytes, (STEM[1], STEM[2], normal(4, 16))),
}
CAN = [
    (name, impl)
    for name in CASES
    for impl in ("torch", "triton", "sdpa")
    if (impl != "sdpa" or "attention" in name) and (impl, "strips" in name) != ("triton", True)
]


@pytest.fixture
def tiles(request, monkeypatch):
    if "strips" in request.node.name:
        monkeypatch.setattr(plain, "_CPU_STRIP", 16)


def penalised(function, tensors, wanted):
    """The value and its penalty, and the leaves: made with create_graph."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = function(*leaves)
    value = (value * torch.linspace(0.5, 1.5, value.numel()).view_as(value)).sum()
    of = leaves if wanted is None else [leaves[wanted]]
    first = torch.autograd.grad(value, of, create_graph=True, materialize_grads=True)
    return value, sum(gradient.square().sum() for gradient in first), leaves


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("name", "impl"), CAN, ids=[" ".join(pair) for pair in CAN])
def test_gradient_penalty(name, impl):
    """Of all inputs together and of the first; asked for by backward and for one leaf alone."""
    function, tensors = CASES[name]
    how = dict(retain_graph=True, materialize_grads=True, allow_unused=True)
    for wanted in (None, 0):
        value, penalty, leaves = penalised(
            lambda *t: function(*t, impl="reference"), tensors, wanted
        )
        true = torch.autograd.grad(value + 0.1 * penalty, leaves, **how)
        value, penalty, leaves = penalised(lambda *t: function(*t, impl=impl), tensors, wanted)
        total, raised = value + 0.1 * penalty, 0
        for leaf, expected in zip(leaves, true, strict=True):
            try:
                (came,) = torch.autograd.grad(total, leaf, **how)
            except RuntimeError:
                raised += 1
                continue
            off = (came - expected).abs().max()
            assert off <= 1e-3 * (1 + expected.abs().max()), (name, impl, wanted)
        if not raised:
            total.backward()
            continue
        says = f"{name.split()[0]}: a second derivative needs impl=.reference., got"
        of_torch = "derivative for aten::_scaled_dot_product_.* is not implemented"
        with pytest.raises(RuntimeError, match=f"{says}|{of_torch}"):
            total.backward()


@pytest.mark.parametrize("name", FORMS)
def test_plain_torch_differentiates_twice(name):
    function, tensors = CASES[name]
    value, penalty, _ = penalised(lambda *t: function(*t, impl="torch"), tensors, None)
    (value + penalty).backward()


@pytest.mark.parametrize(("name", "impl"), CAN, ids=[" ".join(pair) for pair in CAN])
def test_forward_mode(name, impl):
    """Right, or refused: by these functions, or by torch where its own operators lack it."""
    function, tensors = CASES[name]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.full_like(t, 0.1)) for t in tensors]
        true = forward_ad.unpack_dual(function(*duals, impl="reference")).tangent
        try:
            came = forward_ad.unpack_dual(function(*duals, impl=impl)).tangent
        except NotImplementedError:
            return
        except RuntimeError as error:
            assert 'a derivative in forward mode needs impl="reference", got' in str(error)
            return
        torch.testing.assert_close(came, true, rtol=1e-3, atol=1e-3)


def test_first_derivatives_stay_right_with_create_graph():
    """And retain their graph for whoever asks for no more."""
    for name in ("bias_gelu quick", "contrastive_loss", "sigmoid_loss", "varlen_attention"):
        function, tensors = CASES[name]
        leaves = [t.clone().requires_grad_() for t in tensors]
        total = function(*leaves, impl="torch").square().sum()
        plain = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
        kept = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True)), name


def test_compiled_for_eager():
    """With ahead-of-time autograd the refusal is torch's, which not all its versions have."""
    function, tensors = CASES["sigmoid_loss"]
    compiled = torch.compile(lambda *t: function(*t, impl="torch"), backend="eager", fullgraph=True)
    value, penalty, _ = penalised(compiled, tensors, None)
    with pytest.raises(RuntimeError, match="sigmoid_loss: a second derivative needs"):
        (value + penalty).backward()


def test_packages_that_drop_second_derivatives():
    """A package may make its gradient outside autograd, as flash-attention's kernels do."""

    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return q * k * v

        @staticmethod
        def backward(ctx, dout):
            q, k, v = (dout.detach() * t.detach() for t in ctx.saved_tensors)
            return k * v, q * v, q * k

    leaves = [t.clone().requires_grad_() for t in QKV]
    for inputs in (leaves, rivals.differentiated_once(*leaves)):
        total = Foreign.apply(*inputs).sum()
        first = torch.autograd.grad(total, leaves, create_graph=True)
        assert torch.equal(first[0], QKV[1] * QKV[2])
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="varlen_attention: a second derivative needs"):
            torch.autograd.grad(first[0].sum(), leaf, retain_graph=True)
