"""Attention over packed sequences in plain torch: sequences of like length as batched products."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Scores of at most this many elements at a time: a few MB, so that softmax runs in the cache.
_SCORES_AT_ONCE = 1 << 20


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


@lru_cache(maxsize=2)
def _ragged(
    cu_seqlens: tuple[int, ...], heads: int, causal: bool, dtype: torch.dtype, device: torch.device
) -> list[_Group]:
    """Sequences of like length together: those that round up to the same multiple of 8.

    Few places are padding, and a batch of captions needs few groups. Cached, since all layers of a
    step ask for the same lengths; only of two, since the masks of a batch take megabytes.
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


def _scores(q: Tensor, k: Tensor, group: _Group, scale: float) -> Tensor:
    """scale * q k^T + bias: [b * H, size, size] in q's dtype."""
    if group.bias is None:
        return torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(group.bias, q, k.transpose(1, 2), alpha=scale)


def _probabilities(q: Tensor, k: Tensor, group: _Group, scale: float) -> Tensor:
    return torch.softmax(_scores(q, k, group, scale), -1)


def log_sum_exp(
    qk: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    """Of each query's scores, [H, T] in fp32 (fp64) of qk [T, 2, H, D]."""
    qk = qk.to(torch.promote_types(qk.dtype, torch.float32))
    heads = qk.shape[2]
    lse = qk.new_empty(qk.shape[0], heads)
    for group in _groups(qk, cu_seqlens, max_seqlen, causal):
        rows = _scores(*_heads_first(qk, group), group, scale).logsumexp(-1)
        _store(lse, group, rows.view(-1, heads, group.size).transpose(1, 2))
    return lse.t()


def forward(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float) -> Tensor:
    """[T, H, D] of qkv [T, 3, H, D]."""
    heads, head_size = qkv.shape[2:]
    out = torch.empty(qkv.shape[0], heads, head_size, dtype=qkv.dtype, device=qkv.device)
    for group in _groups(qkv, cu_seqlens, max_seqlen, causal):
        q, k, v = _heads_first(qkv, group)
        o = torch.bmm(_probabilities(q, k, group, scale), v)
        _store(out, group, o.view(-1, heads, group.size, head_size).transpose(1, 2))
    return out


def backward(
    dout: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    """The gradient of qkv, packed likewise."""
    heads, head_size = qkv.shape[2:]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
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
