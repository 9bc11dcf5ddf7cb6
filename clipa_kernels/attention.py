"""Attention over packed sequences of different lengths.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in the sequence of i  (and j <= i if causal)

Vaswani et al. (arXiv:1706.03762), in the packed layout of flash-attention's varlen functions.
Next to padding to [B, H, S, D]: no padded token is read, computed or stored, and between forward
and backward nothing is kept but the inputs; the probabilities are computed again.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import choose_impl, describe, require_float, require_same_dtype, require_tensor
from .packing import check_packed, padded_index

_IMPLS = ("torch", "sdpa", "reference")
# Scores of at most this many elements at a time: a few MB, so that softmax runs in the cache.
_SCORES_AT_ONCE = 1 << 20


def varlen_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The specification in plain torch, one sequence after the other; see varlen_attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = scale * torch.einsum("ihd,jhd->hij", q[a:b].to(wide), k[a:b].to(wide))
        if causal:
            future = torch.ones(b - a, b - a, dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[a:b].to(wide)))
    return torch.cat(out).to(q.dtype) if out else q.clone()


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Self-attention within each of B packed sequences; see the formula above.

    Args:
        q, k, v: [T, H, D], one floating dtype. Any strides, so slices of one product are fine.
        cu_seqlens: int32 [B + 1], rising from 0 to T; equal neighbours are an empty sequence.
        max_seqlen: tokens of the longest sequence, or more. T == B * max_seqlen means that all
            have this length, and cu_seqlens is not read.
        causal: token i sees tokens j <= i of its sequence only.
        scale: factor of the scores; None is D ** -0.5.
        impl: "torch" (groups of like length, reads the lengths on the host), "sdpa" (pads, asks
            the device for nothing), "reference"; "auto" is "torch" on a CPU where lengths differ
            or the dtype has 16 bits, else "sdpa".
    Returns:
        [T, H, D] in q's dtype, contiguous.
    Raises:
        TypeError: dtypes that differ or are not floating, cu_seqlens not int32.
        ValueError: shapes or devices that disagree, D not a multiple of 8 from 8 to 256,
            cu_seqlens that falls or does not end at T, max_seqlen too small (cu_seqlens on a GPU
            is not looked into: that would wait for the device), an unknown impl.
    Source: flash_attn.flash_attn_varlen_func of flash-attention 2.8.
    """
    name = "varlen_attention"
    require_tensor(name, q=q, k=k, v=v)
    require_float(name, q=q, k=k, v=v)
    require_same_dtype(name, q=q, k=k, v=v)
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        came = ", ".join(describe(t) for t in (q, k, v))
        raise ValueError(f"{name}: q, k and v must be [T, H, D], all alike, got {came}")
    if len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"{name}: q, k and v must be on one device, got {k.device}, {v.device}")
    _check_rest(name, q, cu_seqlens, max_seqlen)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    impl = _choose(name, impl, q, cu_seqlens.shape[0] - 1, max_seqlen)
    if impl == "reference":
        args = (q, k, v, cu_seqlens, max_seqlen)
        return varlen_attention_reference(*args, causal=causal, scale=scale)
    if impl == "sdpa":
        return _sdpa(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    qkv = torch.stack((q, k, v), 1)
    return torch.ops.clipa.varlen_attention_qkvpacked(qkv, cu_seqlens, max_seqlen, causal, scale)


def varlen_attention_qkvpacked(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """varlen_attention of qkv[:, 0], qkv[:, 1], qkv[:, 2]; the gradient comes packed as well.

    Args:
        qkv: [T, 3, H, D], floating: the packed product as it stands, viewed.
        cu_seqlens, max_seqlen, causal, scale, impl: as in varlen_attention.
    Returns:
        [T, H, D] in qkv's dtype, contiguous.
    Raises:
        As varlen_attention.
    Source: flash_attn.flash_attn_varlen_qkvpacked_func of flash-attention 2.8.
    """
    name = "varlen_attention_qkvpacked"
    require_tensor(name, qkv=qkv)
    require_float(name, qkv=qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{name}: qkv must be [T, 3, H, D], got {describe(qkv)}")
    _check_rest(name, qkv, cu_seqlens, max_seqlen)
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    impl = _choose(name, impl, qkv, cu_seqlens.shape[0] - 1, max_seqlen)
    if impl == "torch":
        return torch.ops.clipa.varlen_attention_qkvpacked(
            qkv, cu_seqlens, max_seqlen, causal, scale
        )
    q, k, v = qkv.unbind(1)
    if impl == "sdpa":
        return _sdpa(q, k, v, cu_seqlens, max_seqlen, causal, scale)
    args = (q, k, v, cu_seqlens, max_seqlen)
    return varlen_attention_reference(*args, causal=causal, scale=scale)


def _choose(name: str, impl: str, x: Tensor, batch: int, max_seqlen: int) -> str:
    """Resolve "auto": groups of like length win on a CPU when lengths differ or numbers are short.

    At equal lengths torch's fused CPU kernel is faster in fp32 (1.2x to 2x at 4 to 197 tokens) and
    4x to 6x slower in bf16, whose matrix units it does not use.
    """
    if impl == "auto":
        equal = x.shape[0] == batch * max_seqlen
        grouped = x.device.type == "cpu" and (not equal or x.dtype.itemsize == 2)
        return "torch" if grouped else "sdpa"
    return choose_impl(name, impl, _IMPLS)


def _check_rest(name: str, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    heads, head_size = x.shape[-2:]
    if heads < 1 or not 8 <= head_size <= 256 or head_size % 8:
        raise ValueError(
            f"{name}: needs at least one head of a size from 8 to 256 in steps of 8, "
            f"got {heads} of {head_size}"
        )
    check_packed(name, x, cu_seqlens, max_seqlen)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
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


class _Group(NamedTuple):
    """b sequences of up to `size` tokens, padded to it, as one batched product.

    rows: the row of each place, int64 [b * size]; a padded place repeats its sequence's last row,
    so nothing foreign enters. None: rows `first` to `first + b * size`, no padding.
    real: places that are not padding; None is all. bias: 0, or -inf where a place must not look,
    broadcast to [b * H, size, size]; None is 0.
    """

    size: int
    first: int
    count: int
    rows: Tensor | None
    real: Tensor | None
    bias: Tensor | None


def _groups(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool) -> list[_Group]:
    total, heads = qkv.shape[0], qkv.shape[2]
    batch = cu_seqlens.shape[0] - 1
    if total and total == batch * max_seqlen:
        bias = _bias(None, max_seqlen, heads, causal, qkv) if max_seqlen > 1 else None
        step = max(1, _SCORES_AT_ONCE // (heads * max_seqlen**2))
        counts = [min(step, batch - first) for first in range(0, batch, step)]
        starts = range(0, total, step * max_seqlen)
        return [
            _Group(max_seqlen, start, count, None, None, bias)
            for start, count in zip(starts, counts, strict=True)
        ]
    return _ragged(tuple(cu_seqlens.tolist()), heads, causal, qkv.dtype, qkv.device)


@lru_cache(maxsize=16)
def _ragged(
    cu_seqlens: tuple[int, ...], heads: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> list[_Group]:
    """Sequences of like length together: those that round up to the same multiple of 8.

    Few places are padding, and a batch of captions needs few groups. Cached, since all layers of a
    step ask for the same lengths.
    """
    ends = torch.tensor(cu_seqlens)
    starts, lengths = ends[:-1], ends.diff()
    groups = []
    for bucket in torch.unique((lengths[lengths > 0] + 7) // 8).tolist():
        member = ((lengths + 7) // 8 == bucket).nonzero().squeeze(1)
        size = int(lengths[member].max())
        for part in member.split(max(1, _SCORES_AT_ONCE // (heads * size * size))):
            offset = torch.arange(size).unsqueeze(0)
            last = lengths[part].unsqueeze(1) - 1
            rows = (starts[part].unsqueeze(1) + torch.minimum(offset, last)).flatten()
            padding = offset > last
            real = None
            if bool(padding.any()):
                real = (~padding).flatten().nonzero().squeeze(1).to(device)
            like = torch.empty(0, dtype=dtype, device=device)
            bias = _bias(padding if real is not None else None, size, heads, causal, like)
            groups.append(_Group(size, 0, len(part), rows.to(device), real, bias))
    return groups


def _bias(
    padding: Tensor | None, size: int, heads: int, causal: bool, like: Tensor
) -> Tensor | None:
    if padding is None and not causal:
        return None
    blocked = torch.zeros(1, size, size, dtype=torch.bool)
    if causal:
        blocked = torch.ones_like(blocked).triu_(1)
    if padding is not None:
        blocked = (blocked | padding.unsqueeze(1)).repeat_interleave(heads, 0)
    bias = torch.zeros(blocked.shape, dtype=like.dtype).masked_fill_(blocked, float("-inf"))
    return bias.to(like.device)


def _heads_first(x: Tensor, group: _Group) -> Tensor:
    """The group's rows of x [T, ..., H, D] as [..., b * H, size, D], for batched products."""
    if group.rows is None:
        part = x[group.first : group.first + group.count * group.size]
    else:
        part = x.reshape(x.shape[0], -1).index_select(0, group.rows)
    part = part.view(group.count, group.size, *x.shape[1:])
    order = (2, 0, 3, 1, 4) if x.dim() == 4 else (0, 2, 1, 3)
    return part.permute(order).reshape(*x.shape[1:-2], -1, group.size, x.shape[-1])


def _store(out: Tensor, group: _Group, part: Tensor) -> None:
    """Write part [b, size, ...] to the group's rows of out; padded places go nowhere."""
    if group.rows is None:
        out[group.first : group.first + group.count * group.size].view(part.shape).copy_(part)
        return
    part, rows = part.reshape(group.count * group.size, -1), group.rows
    if group.real is not None:
        part, rows = part.index_select(0, group.real), rows.index_select(0, group.real)
    out.view(out.shape[0], -1).index_copy_(0, rows, part)


def _probabilities(q: Tensor, k: Tensor, group: _Group, scale: float) -> Tensor:
    """softmax(scale * q k^T + bias): [b * H, size, size] in q's dtype."""
    if group.bias is None:
        scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    else:
        scores = torch.baddbmm(group.bias, q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)


@torch.library.custom_op("clipa::varlen_attention_qkvpacked", mutates_args=())
def _forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    heads, head_size = qkv.shape[2:]
    out = torch.empty(qkv.shape[0], heads, head_size, dtype=qkv.dtype, device=qkv.device)
    with torch.autocast(qkv.device.type, enabled=False):
        for group in _groups(qkv, cu_seqlens, max_seqlen, causal):
            q, k, v = _heads_first(qkv, group)
            o = torch.bmm(_probabilities(q, k, group, scale), v)
            _store(out, group, o.view(-1, heads, group.size, head_size).transpose(1, 2))
    return out


@torch.library.custom_op("clipa::varlen_attention_qkvpacked_backward", mutates_args=())
def _backward(
    dout: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    heads, head_size = qkv.shape[2:]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    with torch.autocast(qkv.device.type, enabled=False):
        for group in _groups(qkv, cu_seqlens, max_seqlen, causal):
            q, k, v = _heads_first(qkv, group)
            do = _heads_first(dout, group)
            if group.real is not None:  # a padded place repeats a row, whose gradient counts once
                counts = do.new_zeros(group.count * group.size).index_fill_(0, group.real, 1)
                do.view(group.count, heads, -1).mul_(
                    counts.view(group.count, 1, -1).repeat_interleave(head_size, 2)
                )
            p = _probabilities(q, k, group, scale)
            d = torch.empty(3, *q.shape, dtype=qkv.dtype, device=qkv.device)
            torch.bmm(p.transpose(1, 2), do, out=d[2])
            dp = torch.bmm(do, v.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.baddbmm(d[0], ds, k, beta=0, alpha=scale, out=d[0])
            torch.baddbmm(d[1], ds.transpose(1, 2), q, beta=0, alpha=scale, out=d[1])
            d = d.view(3, -1, heads, group.size, head_size).permute(1, 3, 0, 2, 4)
            _store(dqkv, group, d)
    return dqkv


@_forward.register_fake
def _(qkv, cu_seqlens, max_seqlen, causal, scale):
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@_backward.register_fake
def _(dout, qkv, cu_seqlens, max_seqlen, causal, scale):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output) -> None:
    qkv, cu_seqlens, *ctx.rest = inputs
    ctx.save_for_backward(qkv, cu_seqlens)


def _gradient(ctx, dout: Tensor):
    dqkv = torch.ops.clipa.varlen_attention_qkvpacked_backward(dout, *ctx.saved_tensors, *ctx.rest)
    return dqkv, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_save)
