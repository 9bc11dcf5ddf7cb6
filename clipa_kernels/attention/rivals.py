"""Others' attention behind the contract of varlen_attention; what is not torch's is optional.

Each function takes varlen_attention's arguments, checked, and is named as its impl.
"""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..check import once
from ..packing import padded_index

PACKAGES = {"varlen_attn": "torch.nn.attention.varlen", "flash_attn": "flash_attn"}
PACKAGES |= {"xformers": "xformers"}


def require_rival(function: str, impl: str, like: Tensor) -> None:
    """RuntimeError unless an implementation of PACKAGES is installed and runs on such tensors."""
    if find_spec(PACKAGES[impl]) is None:
        raise RuntimeError(
            f'{function}: impl "{impl}" needs the package {PACKAGES[impl]}, got none installed'
        )
    if like.device.type != "cuda":
        raise RuntimeError(
            f'{function}: impl "{impl}" needs a CUDA tensor, got one on {like.device}'
        )


def differentiated_once(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs for a package of PACKAGES, some of which drop second derivatives: here all raise.

    Compiled, torch's ahead-of-time autograd refuses them itself.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return inputs
    return _Once.apply(*inputs)[:-1]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        zero = inputs[0].new_zeros(())
        ctx.save_for_backward(zero)
        return *(x.view_as(x) for x in inputs), zero

    @staticmethod
    @once("varlen_attention")
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def sdpa(q, k, v, cu_seqlens, max_seqlen, causal, scale) -> Tensor:
    """Torch's scaled_dot_product_attention over the padded batch."""
    if q.shape[0] == 0:
        return q + k + v
    batch = cu_seqlens.shape[0] - 1
    if q.shape[0] == batch * max_seqlen:
        q, k, v = (t.view(batch, max_seqlen, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        return out.transpose(1, 2).flatten(0, 1)
    total = q.shape[0]
    index, valid = padded_index(cu_seqlens, max_seqlen)
    index = index.clamp_(max=total - 1)
    q, k, v = (t[index].masked_fill(~valid[..., None, None], 0).transpose(1, 2) for t in (q, k, v))
    # A padded query sees all keys: its row is dropped below, and no softmax is empty.
    mask = (valid[:, None, :] | ~valid[:, :, None]).unsqueeze(1)
    if causal:
        mask = mask & torch.ones_like(mask[0, 0]).tril()
        mask = mask | torch.eye(max_seqlen, dtype=torch.bool, device=q.device)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    # Which sequence holds row t: the number of ends at or before t. No host copy.
    rows = torch.arange(total, dtype=torch.int32, device=q.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return out[sequence, rows - cu_seqlens[sequence]]


def varlen_attn(q, k, v, cu_seqlens, max_seqlen, causal, scale) -> Tensor:
    """Torch's own attention of packed sequences."""
    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return varlen_attn_of_two(q, k, v, *lengths, causal, scale)


def varlen_attn_of_two(q, k, v, ends_q, ends_k, longest_q, longest_k, causal, scale) -> Tensor:
    """The same with keys of other sequences; the last query sees all of them."""
    from torch.nn.attention.varlen import varlen_attn

    window = (-1, 0) if causal else (-1, -1)
    lengths = ends_q, ends_k, longest_q, longest_k
    return varlen_attn(q, k, v, *lengths, scale=scale, window_size=window)


def flash_attn(q, k, v, cu_seqlens, max_seqlen, causal, scale) -> Tensor:
    """flash-attention 2."""
    from flash_attn import flash_attn_varlen_func

    lengths = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scale, causal=causal)


def xformers(q, k, v, cu_seqlens, max_seqlen, causal, scale) -> Tensor:
    """xformers' memory_efficient_attention; its mask is made from lengths on the host."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(cu_seqlens.diff().tolist(), device=q.device)
    mask = mask.make_causal() if causal else mask
    one = (t.unsqueeze(0) for t in (q, k, v))
    return memory_efficient_attention(*one, attn_bias=mask, scale=scale).squeeze(0)
