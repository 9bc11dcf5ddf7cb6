"""Bias and GELU in one step, the middle of a transformer's MLP.

    z = x + bias
    exact: z * Phi(z)     tanh: z/2 * (1 + tanh(sqrt(2/pi) * (z + 0.044715 z^3)))
    quick: z * sigmoid(1.702 z)

Hendrycks & Gimpel (arXiv:1606.08415). CLIPA-v1 and open_clip use the exact form, CLIPA-v2 (JAX)
tanh, OpenAI's CLIP quick. Eager torch writes and saves z, and for quick two more tensors. Here the
kernels save x and bias and make z in registers, once in each direction; without them z is saved.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import check, dispatch
from ..check import describe

_FORMS = ("none", "tanh", "quick")


def bias_gelu_reference(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """The specification in plain torch; see bias_gelu."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z if bias is None else z + bias
    if approximate == "quick":
        y = z * torch.sigmoid(1.702 * z)
    elif approximate == "tanh":
        y = 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    else:
        y = 0.5 * z * (1 + torch.erf(z * 0.5**0.5))
    return y.to(x.dtype)


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, impl: str = "auto"
) -> Tensor:
    """Equals `gelu(x + bias, approximate)`; one tensor like x is saved for the backward.

    Args:
        x: [..., D], floating point, a product without its bias.
        bias: [D], floating point; None adds nothing.
        approximate: "none" (erf), "tanh" or "quick" (x * sigmoid(1.702 x)).
        impl: "auto", "triton", "torch" or "reference".
    Returns:
        [..., D] in x's dtype.
    Raises:
        ValueError: a bias that is not [D], an unknown approximate or impl, devices that differ.
        TypeError: a tensor that is not floating point, or "triton" with one of 64 bits.
        RuntimeError: "triton" where it cannot run, or differentiated twice or in forward mode.
    Source: torch.nn.functional.gelu; quick: OpenAI CLIP's QuickGELU.
    """
    name = "bias_gelu"
    check.require_float(name, x=x)
    if bias is not None:
        check.require_float(name, bias=bias)
        if x.dim() < 1 or bias.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: bias must be [D] for x [..., D], got {describe(bias)} for {describe(x)}"
            )
        check.require_same_device(name, x=x, bias=bias)
    if not isinstance(approximate, str) or approximate not in _FORMS:
        raise ValueError(f"{name}: approximate must be one of {_FORMS}, got {approximate!r}")
    widest = bias if bias is not None and bias.dtype.itemsize > x.dtype.itemsize else x
    impl = check.choose_impl(name, impl, ("triton", "torch", "reference"), widest)
    if impl == "reference":
        return bias_gelu_reference(x, bias, approximate)
    if impl == "triton":
        check.refuse_tangents(name, x, bias)
        return _bias_gelu(x, bias, approximate)
    if torch.compiler.is_compiling():
        return _gelu(x if bias is None else _AddBias.forward(x, bias), approximate)
    z = x if bias is None else _AddBias.apply(x, bias)
    return _Quick.apply(z) if approximate == "quick" else _gelu(z, approximate)


def _gelu(z: Tensor, approximate: str) -> Tensor:
    if approximate == "quick":
        return z * torch.sigmoid(1.702 * z)
    return F.gelu(z, approximate=approximate)


class _AddBias(torch.autograd.Function):
    """x + bias in x's dtype; saves nothing, and widens no gradient of x to sum the bias's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor) -> Tensor:
        return (x + bias).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.bias_dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, dz: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return dz, None
        # torch adds 16 bits in fp32; a dtype narrower than dz's would round each term first.
        wide = torch.promote_types(dz.dtype, ctx.bias_dtype)
        return dz, dz.sum(tuple(range(dz.dim() - 1)), dtype=wide).to(ctx.bias_dtype)


class _Quick(torch.autograd.Function):
    """z * sigmoid(1.702 z); saves z alone, where autograd keeps three tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return _gelu(z, "quick")

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        s = torch.sigmoid(1.702 * z)
        return dy * (s + 1.702 * z * s * (1 - s))


def _forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    from . import kernels

    return kernels.forward(x, bias, approximate)


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_wanted: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias, the latter empty where it is not wanted."""
    from . import kernels

    dx, d_bias = kernels.backward(dy, x, bias, approximate, bias_wanted)
    return dx, x.new_empty(0) if d_bias is None else d_bias


_operator = torch.library.custom_op("clipa::bias_gelu", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "clipa::bias_gelu_backward", _backward, mutates_args=()
)
_gradients = dispatch.backward(_backward_operator, _backward)


@_operator.register_fake
def _(x, bias, approximate):
    return x.new_empty(x.shape)


@_backward_operator.register_fake
def _(dy, x, bias, approximate, bias_wanted):
    return x.new_empty(x.shape), bias.new_empty(bias.shape) if bias_wanted else x.new_empty(0)


def _save(ctx, inputs, output) -> None:
    x, bias, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _gradient(ctx, dy: Tensor):
    x, bias = ctx.saved_tensors
    wanted = bias is not None and ctx.needs_input_grad[1]
    dx, d_bias = _gradients(dy, x, bias, ctx.approximate, wanted)
    return dx, d_bias if wanted else None, None


_bias_gelu = dispatch.forward(_operator, _forward, _save, _gradient)
check.once_operator(_backward_operator, "bias_gelu")
