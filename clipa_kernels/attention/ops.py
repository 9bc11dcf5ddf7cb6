"""The custom operators behind varlen_attention: opaque to torch.compile, saving only their inputs.

Plain torch runs without autocast: q, k, v arrive in the dtype to multiply in. Two forms, since an
operator must not return views: one packed tensor with its packed gradient, or three with theirs.
"""

import torch
from torch import Tensor

from .. import dispatch
from ..check import once_operator
from . import plain


def _attention_packed(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    kernels: bool = False,
) -> Tensor:
    """kernels: Triton's instead of torch's batched products."""
    if not kernels:
        with torch.autocast(qkv.device.type, enabled=False):
            return plain.forward(qkv, cu_seqlens, max_seqlen, causal, scale)
    from ..launch import require_products
    from . import kernels

    require_products("varlen_attention_qkvpacked", qkv)
    return kernels.forward(*qkv.unbind(1), cu_seqlens, max_seqlen, causal, scale)


def _attention_packed_backward(
    dout: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    kernels: bool = False,
) -> Tensor:
    """Gradient of qkv, [T, 3, H, D]."""
    if not kernels:
        with torch.autocast(qkv.device.type, enabled=False):
            return plain.backward(dout, qkv, cu_seqlens, max_seqlen, causal, scale)
    from . import kernels

    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    rest = max_seqlen, causal, scale
    kernels.backward(dout, *qkv.unbind(1), cu_seqlens, dqkv.unbind(1), *rest)
    return dqkv


_packed = torch.library.custom_op(
    "clipa::varlen_attention_qkvpacked", _attention_packed, mutates_args=()
)
_packed_backward = torch.library.custom_op(
    "clipa::varlen_attention_qkvpacked_backward", _attention_packed_backward, mutates_args=()
)
_packed_gradients = dispatch.backward(_packed_backward, _attention_packed_backward)


@_packed.register_fake
def _(qkv, cu_seqlens, max_seqlen, causal, scale, kernels=False):
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@_packed_backward.register_fake
def _(dout, qkv, cu_seqlens, max_seqlen, causal, scale, kernels=False):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save_packed(ctx, inputs, output) -> None:
    qkv, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(qkv, cu_seqlens)


def _packed_gradient(ctx, dout: Tensor):
    dqkv = _packed_gradients(dout, *ctx.saved_tensors, *ctx.rest)
    return dqkv, None, None, None, None, None


attention_packed = dispatch.forward(_packed, _attention_packed, _save_packed, _packed_gradient)
once_operator(_packed_backward, "varlen_attention")


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    """Triton's kernels on three tensors, read where they lie."""
    from ..launch import require_products
    from . import kernels

    require_products("varlen_attention", q)
    return kernels.forward(q, k, v, cu_seqlens, max_seqlen, causal, scale)


def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, [T, H, D] each."""
    from . import kernels

    grads = tuple(torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in "qkv")
    kernels.backward(dout, q, k, v, cu_seqlens, grads, max_seqlen, causal, scale)
    return grads


_separate = torch.library.custom_op("clipa::varlen_attention", _attention, mutates_args=())
_separate_backward = torch.library.custom_op(
    "clipa::varlen_attention_backward", _attention_backward, mutates_args=()
)
_separate_gradients = dispatch.backward(_separate_backward, _attention_backward)


@_separate.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, causal, scale):
    return q.new_empty(q.shape)


@_separate_backward.register_fake
def _(dout, q, k, v, cu_seqlens, max_seqlen, causal, scale):
    return tuple(q.new_empty(q.shape) for _ in "qkv")


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.max_seqlen, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dout: Tensor):
    rest = ctx.max_seqlen, ctx.causal, ctx.scale
    return *_separate_gradients(dout, *ctx.saved_tensors, *rest), None, None, None, None


attention = dispatch.forward(_separate, _attention, _save, _gradient)
once_operator(_separate_backward, "varlen_attention")
