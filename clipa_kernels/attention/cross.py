"""Attention of packed queries to other packed sequences: pooling heads, decoders as CoCa's.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in the key sequence of i's query sequence
                                                    (and j - i <= keys - queries if causal)

Few queries, or few layers: no kernel of its own, but torch's varlen_attn or its padded attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import check
from ..check import describe
from ..packing import check_packed, padded_index
from . import rivals
from .api import varlen_attn_runs

_IMPLS = ("varlen_attn", "sdpa", "reference")


def varlen_cross_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The specification in plain torch, one sequence at a time; see varlen_cross_attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = []
    ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for a, b, c, d in zip(ends[0][:-1], ends[0][1:], ends[1][:-1], ends[1][1:], strict=True):
        if d == c:
            out.append(0 * q[a:b].to(wide))
            continue
        seen = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device)
        seen = seen.tril((d - c) - (b - a)) if causal else seen
        blind = ~seen.any(-1)[:, None]
        scores = scale * torch.einsum("ihd,jhd->hij", q[a:b].to(wide), k[c:d].to(wide))
        p = scores.masked_fill(~(seen | blind), float("-inf")).softmax(-1).masked_fill(blind, 0.0)
        out.append(torch.einsum("hij,jhd->ihd", p, v[c:d].to(wide)))
    out = torch.cat(out).to(q.dtype) if out else q.clone()
    return out if len(q) and len(k) else out + 0 * (k.sum() + v.sum())  # gradients are zeros


def varlen_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of each of B query sequences to a key sequence of its own; see the formula above.

    Args:
        q: [Tq, H, D], floating; k, v: [Tk, H, D], in q's dtype.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], rising from 0 to Tq and to Tk.
        max_seqlen_q, max_seqlen_k: tokens of the longest sequence, or more.
        causal: the last query sees all keys, each one before it one key fewer, as flash-attention's
            queries behind a cache. A query that sees no key gives 0.
        scale: factor of the scores, a number; None is D ** -0.5.
        impl: "varlen_attn" (torch 2.11 or newer, CUDA, 16 bits), "sdpa" (pads, any device) or
            "reference". "auto" is the first where it runs and
            torch.use_deterministic_algorithms is not set, else "sdpa".
    Returns:
        [Tq, H, D] in q's dtype.
    Raises:
        TypeError: dtypes that differ or are not floating, cu_seqlens not int32.
        ValueError: shapes, devices or numbers of sequences that disagree, cu_seqlens that falls or
            does not end at its T (values are checked on the CPU only), an unknown impl.
        RuntimeError: an impl that does not run on these tensors, a second derivative of
            "varlen_attn".
    Source: flash_attn.flash_attn_varlen_func of flash-attention 2.8.
    """
    name = "varlen_cross_attention"
    check.require_float(name, q=q, k=k, v=v)
    check.require_same_dtype(name, q=q, k=k, v=v)
    if q.dim() != 3 or k.dim() != 3 or k.shape[1:] != q.shape[1:] or v.shape != k.shape:
        came = ", ".join(describe(t) for t in (q, k, v))
        must = "q must be [Tq, H, D] and k, v [Tk, H, D]"
        raise ValueError(f"{name}: {must}, got {came}")
    check.require_same_device(name, q=q, k=k, v=v)
    longest_q = check_packed(name, q, cu_seqlens_q, max_seqlen_q)
    longest_k = check_packed(name, k, cu_seqlens_k, max_seqlen_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        came = f"{len(cu_seqlens_q) - 1} and {len(cu_seqlens_k) - 1}"
        raise ValueError(f"{name}: there must be as many key sequences as queries', got {came}")
    causal = check.as_flag(name, causal=causal)
    scale = q.shape[-1] ** -0.5 if scale is None else check.as_float(name, scale=scale)
    ends = cu_seqlens_q, cu_seqlens_k, longest_q, longest_k
    if isinstance(impl, str) and impl == "auto":
        impl = "varlen_attn" if varlen_attn_runs(q) else "sdpa"
    impl = check.choose_impl(name, impl, _IMPLS, q)
    with torch.autocast(q.device.type, enabled=False):
        if impl == "reference":
            return varlen_cross_attention_reference(q, k, v, *ends, causal=causal, scale=scale)
        if impl == "sdpa":
            return _padded(q, k, v, *ends, causal, scale)
        rivals.require_rival(name, impl, q)
        q, k, v = rivals.differentiated_once(q, k, v)
        return rivals.varlen_attn_of_two(q, k, v, *ends, causal, scale)


def _padded(q, k, v, ends_q, ends_k, longest_q, longest_k, causal, scale) -> Tensor:
    """scaled_dot_product_attention over the padded batch."""
    if not (q.shape[0] and k.shape[0]):
        return q * 0 + k.sum() * 0 + v.sum() * 0
    seen = visible(ends_q, ends_k, longest_q, longest_k, causal)
    blind = ~seen.any(-1)  # a query without a key: it sees all here, and its row becomes 0
    queries = _batch(q, ends_q, longest_q)
    keys, values = (_batch(t, ends_k, longest_k) for t in (k, v))
    mask = (seen | blind[..., None])[:, None]
    out = F.scaled_dot_product_attention(queries, keys, values, mask, scale=scale).transpose(1, 2)
    out = torch.where(blind[..., None, None], torch.zeros_like(out), out)
    return _unbatch(out, len(q), ends_q)


def _batch(x: Tensor, ends: Tensor, longest: int) -> Tensor:
    """[B, H, longest, D], 0 where there is no token."""
    index, real = padded_index(ends, longest)
    x = x[index.clamp_(max=len(x) - 1)]
    return x.masked_fill(~real[..., None, None], 0).transpose(1, 2)


def log_sum_exp(q, k, ends_q, ends_k, longest_q, longest_k, causal, scale) -> Tensor:
    """Of each query's scores, [H, Tq] in fp32 (fp64); infinity where it sees no key, as of
    flash-attention."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if not (len(q) and len(k)):
        return torch.full((q.shape[1], len(q)), float("inf"), dtype=wide, device=q.device)
    seen = visible(ends_q, ends_k, longest_q, longest_k, causal)[:, None]
    scores = _batch(q.to(wide), ends_q, longest_q) @ _batch(k.to(wide), ends_k, longest_k).mT
    lse = (scale * scores).masked_fill(~seen, float("-inf")).logsumexp(-1)
    lse = lse.masked_fill(~seen.any(-1), float("inf"))
    return _unbatch(lse.mT[..., None], len(q), ends_q)[..., 0].t()


def _unbatch(x: Tensor, rows: int, ends: Tensor) -> Tensor:
    """The tokens of [B, longest, ...], end to end."""
    # Which sequence holds row t: the number of ends at or before t. No host copy.
    row = torch.arange(rows, dtype=torch.int32, device=x.device)
    sequence = torch.searchsorted(ends[1:].contiguous(), row, right=True)
    return x[sequence, row - ends[sequence]]


def visible(ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, causal: bool) -> Tensor:
    """Which keys the queries of a padded batch see: bool [B, longest_q, longest_k]."""
    counts_q, counts_k = ends_q.diff()[:, None, None], ends_k.diff()[:, None, None]
    i = torch.arange(longest_q, device=ends_q.device)[None, :, None]
    j = torch.arange(longest_k, device=ends_q.device)[None, None, :]
    seen = (i < counts_q) & (j < counts_k)
    return seen & (j - i <= counts_k - counts_q) if causal else seen
