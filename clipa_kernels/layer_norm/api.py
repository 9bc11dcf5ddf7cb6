"""Residual sum and LayerNorm in one step.

    residual' = x + residual
    normalised = (residual' - mean) / sqrt(var + eps) * weight + bias     (mean, var over D)

A pre-norm transformer block ends one branch and begins the next with exactly this pair. Ba et al.,
"Layer Normalization" (arXiv:1607.06450); torch.nn.functional.layer_norm is the definition.
Plain torch writes the sum, reads it back, and saves a copy of the input in fp32 under autocast;
the kernels save the sum alone, and one launch makes both outputs, one both gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import check, dispatch
from ..check import describe

# 2 MB in fp32: what the kernel reads again is still in a cache. EPYC Zen 5, November 2026.
_CACHED_ELEMENTS = 1 << 19


def add_layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The specification in plain torch; see add_layer_norm."""
    total = x if residual is None else (x + residual).to(residual.dtype)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    var = (wide - mean).square().mean(-1, keepdim=True)
    normalised = (wide - mean) * torch.rsqrt(var + eps)
    return (normalised * weight + bias).to(x.dtype), total


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Equals `r = x + residual; (layer_norm(r, weight, bias, eps), r)`, statistics in fp32.

    Args:
        x: [..., D], floating point: what the last branch wrote.
        residual: [..., D] like x, floating point, its own dtype (a bf16 or fp32 stream); None is
            the first norm, where the stream is x itself.
        weight, bias: [D], floating point, each its own dtype.
        eps: added to the variance, a number.
        impl: "auto", "triton", "torch" or "reference".
    Returns:
        (normalised in x's dtype, new residual in residual's dtype), both [..., D].
    Raises:
        ValueError: shapes or devices that disagree, eps below 0, an unknown impl.
        TypeError: a tensor that is not floating point, or "triton" with one of 64 bits.
        RuntimeError: "triton" where it cannot run, or differentiated twice or in forward mode.
    Source: torch.nn.functional.layer_norm.
    """
    eps = _check_arguments(x, residual, weight, bias, eps)
    widest = x
    for t in (residual, weight, bias):  # torch 2.8 does not compile a max by key
        if t is not None and t.dtype.itemsize > widest.dtype.itemsize:
            widest = t
    impl = check.choose_impl("add_layer_norm", impl, ("triton", "torch", "reference"), widest)
    if impl == "reference":
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    if impl == "triton":
        check.refuse_tangents("add_layer_norm", x, residual, weight, bias)
        y, total = _add_layer_norm(x, residual, weight, bias, eps)
        return y, x if residual is None else total
    total = x if residual is None else (x + residual).to(residual.dtype)
    both = torch.promote_types(weight.dtype, bias.dtype)
    weight, bias = weight.to(both), bias.to(both)
    # Autocast would widen the whole stream to fp32; the statistics are fp32 in any case.
    if check.autocast_dtype(x.device) is not None:
        with torch.autocast(x.device.type, enabled=False):
            return _layer_norm(total, weight, bias, eps, x.dtype), total
    return _layer_norm(total, weight, bias, eps, x.dtype), total


def _layer_norm(
    total: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """layer_norm in dtype, where weights and stream may differ in dtype."""
    wide = torch.promote_types(total.dtype, weight.dtype)
    if total.device.type == "cpu":
        wide = torch.promote_types(wide, torch.float32)
        narrow = total.dtype == dtype and dtype.itemsize == 2 and wide == torch.float32
        if (
            narrow
            and not torch.compiler.is_compiling()
            and not check.has_tangent(total, weight, bias)
        ):
            return _NarrowLayerNorm.apply(total, weight, bias, eps)[0]
    if total.dtype == weight.dtype == wide:
        return F.layer_norm(total, weight.shape, weight, bias, eps).to(dtype)
    return F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(dtype)


class _NarrowLayerNorm(torch.autograd.Function):
    """layer_norm of 16 bits on a CPU, and its statistics. torch's kernel reads 16 bits as fast as
    can be, but adds the weight's gradient in them: over 2,000 rows it is 6% wrong. That gradient
    alone is made in fp32 here, of as many rows at a time as stay in a cache."""

    generate_vmap_rule = True

    @staticmethod
    def forward(total: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        wide = weight.float(), bias.float()
        return torch.ops.aten.native_layer_norm(total, weight.shape, *wide, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        total, weight, bias, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(total, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx, dy: Tensor, _mean, _rstd) -> tuple[Tensor | None, ...]:
        *leaves, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated once more
            total, *affine = (leaf.float() for leaf in leaves)
            y = F.layer_norm(total, affine[0].shape, *affine, ctx.eps).to(dy.dtype)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            made = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(made) if leaf.requires_grad else None for leaf in leaves), None
        total, weight, bias = leaves
        wide = weight.float(), bias.float()
        d_total = d_weight = d_bias = None
        if any(ctx.needs_input_grad[1:3]):  # first: the next product takes its memory over
            d_weight, d_bias = _affine_grads(dy, total, mean, rstd, *wide)
            d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(bias.dtype)
        if ctx.needs_input_grad[0]:
            d_total = torch.ops.aten.native_layer_norm_backward(
                dy, total, weight.shape, mean, rstd, *wide, [True, False, False]
            )[0]
        return d_total, d_weight, d_bias, None


def _affine_grads(
    dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias in fp32."""
    d = len(weight)
    rows = max(1, _CACHED_ELEMENTS // d)
    wide, made = torch.empty(2, rows, d), []
    parts = (t.reshape(-1, t.shape[-1]).split(rows) for t in (dy, total, mean, rstd))
    for *narrow, mean_part, rstd_part in zip(*parts, strict=True):
        dy_part, total_part = (w[: len(n)].copy_(n) for w, n in zip(wide, narrow, strict=True))
        grads = torch.ops.aten.native_layer_norm_backward(
            dy_part, total_part, [d], mean_part, rstd_part, weight, bias, [False, True, True]
        )
        made.append(grads[1:])
    d_weight, d_bias = zip(*made, strict=True)
    return torch.stack(d_weight).sum(0), torch.stack(d_bias).sum(0)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normalised, new residual), the latter empty where it is x itself."""
    from . import kernels

    y, total = kernels.forward(x, residual, weight, bias, eps)
    return y, x.new_empty(0) if total is None else total


def _backward(
    dy: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (empty: the same), weight and bias (empty: bias_dtype is None)."""
    from . import kernels

    dx, *others = kernels.backward(dy, d_total, total, weight, eps, bias_dtype)
    if any(grad is None for grad in others):
        others = [dy.new_empty(0) if grad is None else grad for grad in others]
    return dx, *others


_operator = torch.library.custom_op("clipa::add_layer_norm", _forward, mutates_args=())
_backward_operator = torch.library.custom_op(
    "clipa::add_layer_norm_backward", _backward, mutates_args=()
)
_gradients = dispatch.backward(_backward_operator, _backward)


@_operator.register_fake
def _(x, residual, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(0) if residual is None else residual.new_empty(x.shape)


@_backward_operator.register_fake
def _(dy, d_total, total, weight, eps, bias_dtype):
    d_residual = total.new_empty(0 if total.dtype == dy.dtype else total.shape)
    if bias_dtype is None:
        return dy.new_empty(dy.shape), d_residual, dy.new_empty(0), dy.new_empty(0)
    d_bias = weight.new_empty(weight.shape, dtype=bias_dtype)
    return dy.new_empty(dy.shape), d_residual, weight.new_empty(weight.shape), d_bias


def _save(ctx, inputs, output) -> None:
    x, residual, weight, bias, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.has_residual, ctx.x_dtype, ctx.bias_dtype = residual is not None, x.dtype, bias.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight)


def _gradient(ctx, dy: Tensor | None, d_total: Tensor | None):
    total, weight = ctx.saved_tensors
    if not ctx.has_residual:
        d_total = None
    if dy is None:  # the norm was not used
        return (None if d_total is None else d_total.to(ctx.x_dtype)), d_total, None, None, None
    wanted = ctx.bias_dtype if any(ctx.needs_input_grad[2:4]) else None
    dx, d_residual, d_weight, d_bias = _gradients(dy, d_total, total, weight, ctx.eps, wanted)
    if not ctx.has_residual:
        d_residual = None
    elif total.dtype == dy.dtype:
        d_residual = dx  # one tensor for both: the sum's gradient is that of each term
    return dx, d_residual, d_weight if wanted else None, d_bias if wanted else None, None


_add_layer_norm = dispatch.forward("clipa::add_layer_norm", _operator, _forward, _save, _gradient)
check.once_operator(_backward_operator, "add_layer_norm")


def _check_arguments(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> float:
    """eps as a float, if the rest is right."""
    name = "add_layer_norm"
    check.require_float(name, x=x, weight=weight, bias=bias)
    if x.dim() < 1 or weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: weight and bias must be [D] for x [..., D], "
            f"got {describe(weight)} and {describe(bias)} for x {describe(x)}"
        )
    if residual is not None:
        check.require_float(name, residual=residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"{name}: residual must have x's shape {tuple(x.shape)}, got {describe(residual)}"
            )
    check.require_same_device(name, x=x, residual=residual, weight=weight, bias=bias)
    eps = check.as_float(name, eps=eps)
    if eps < 0:
        raise ValueError(f"{name}: eps must be at least 0, got {eps}")
    return eps
