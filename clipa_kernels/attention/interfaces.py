"""varlen_attention under the names and arguments of others, for those who swap an import.

flash-attention 2.8's varlen functions, and the function that Hugging Face's AttentionInterface
takes. An argument that is not implemented raises by its name unless it has its neutral value.
"""

from numbers import Integral, Number
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..check import as_flag, as_float, as_int, describe, readable, require_tensor
from . import plain
from .api import varlen_attention, varlen_attention_qkvpacked
from .cross import log_sum_exp, varlen_cross_attention

# What transformers' attention functions take that would change the result.
_NOT_IMPLEMENTED = ("softcap", "position_bias", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k")


def _refuse(function: str, **arguments: tuple[Any, float | None]) -> None:
    """ValueError where an argument is neither None nor its neutral value: (came, neutral)."""
    for name, (came, neutral) in arguments.items():
        if came is not None and not (isinstance(came, Number) and came == neutral):
            came = describe(came) if isinstance(came, Tensor) else repr(came)
            raise ValueError(f"{function}: {name} must be {neutral}, got {came}")


def _flash_masks(function: str, causal: object, window: object, max_seqlen: int) -> bool:
    """Whether flash-attention would be causal; ValueError for a window that hides anything else.

    A query sees keys from `left` before it to `right` behind it, a negative number is no limit, and
    causal sets right to 0.
    """
    causal = as_flag(function, causal=causal)
    window = (-1, -1) if window is None else window
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not pair or not all(isinstance(side, Integral) for side in window):
        raise TypeError(f"{function}: window_size must be two integers, got {window!r}")
    left, right = window
    causal = causal or right == 0
    if 0 <= left < max_seqlen - 1 or (not causal and 0 <= right < max_seqlen - 1):
        raise ValueError(
            f"{function}: window_size must be (-1, -1), (-1, 0) or as wide as max_seqlen "
            f"{max_seqlen}, got {tuple(window)}"
        )
    return causal


def _flash(
    function: str, inputs: tuple[Tensor, ...], cu_seqlens, max_seqlen, causal, window, scale, wanted
) -> Tensor | tuple[Tensor, Tensor, None]:
    """The attention of q, k and v, or of qkv, and what flash-attention adds to it where wanted."""
    causal = _flash_masks(function, causal, window, max_seqlen)
    scale = None if scale is None else as_float(function, softmax_scale=scale)
    wanted = as_flag(function, return_attn_probs=wanted)
    attend = varlen_attention_qkvpacked if len(inputs) == 1 else varlen_attention
    out = attend(*inputs, cu_seqlens, max_seqlen, causal=causal, scale=scale)
    if not wanted:
        return out
    qk = inputs[0][:, :2] if len(inputs) == 1 else torch.stack(inputs[:2], 1)
    scale = qk.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), torch.autocast(qk.device.type, enabled=False):
        lse = plain.log_sum_exp(qk, cu_seqlens, max_seqlen, causal, scale)
    return out, lse, None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """varlen_attention with flash-attention's arguments, or varlen_cross_attention.

    Args:
        q: [Tq, H, D]; k, v: [Tk, H, D], as many heads as q.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1]; where they are one tensor, or of equal values
            (compared on a CPU), queries and keys are of the same sequences.
        max_seqlen_q, max_seqlen_k: tokens of the longest sequence; as in varlen_attention.
        softmax_scale, causal: as scale and causal in varlen_attention.
        window_size: (-1, -1); or (left, right) that hide nothing else: both at least
            max_seqlen - 1, or right 0, which is causal.
        deterministic: any; the result always is.
        return_attn_probs: also return the log-sum-exp of the scores, as flash-attention does. It is
            computed in plain torch, from scores made again; on a GPU this waits for the lengths.
        dropout_p, softcap: 0 or None. alibi_slopes, block_table: None.
    Returns:
        [Tq, H, D]; with return_attn_probs (that, the log-sum-exp [H, Tq] in fp32 without gradient,
        None for the probabilities, which flash-attention fills under dropout alone).
    Raises:
        ValueError: an argument that is not implemented; else as varlen_attention.
    Source: flash_attn.flash_attn_varlen_func of flash-attention 2.8.
    """
    name = "flash_attn_varlen_func"
    _refuse(
        name,
        dropout_p=(dropout_p, 0.0),
        softcap=(softcap, 0.0),
        alibi_slopes=(alibi_slopes, None),
        block_table=(block_table, None),
    )
    require_tensor(name, q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    longest = as_int(name, 0, 2**31, max_seqlen_q=max_seqlen_q)
    longest_k = longest
    if max_seqlen_k is not max_seqlen_q:
        longest_k = as_int(name, 0, 2**31, max_seqlen_k=max_seqlen_k)
    options = causal, window_size, softmax_scale, return_attn_probs
    if not _same_sequences(q, k, cu_seqlens_q, cu_seqlens_k, longest, longest_k):
        ends = cu_seqlens_q, cu_seqlens_k, longest, longest_k
        return _flash_cross(name, (q, k, v), ends, *options)
    return _flash(name, (q, k, v), cu_seqlens_q, longest, *options)


def _same_sequences(
    q: Tensor, k: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int
) -> bool:
    """Whether queries and keys are of the same sequences, for what is not read: the same tensor."""
    if q.shape != k.shape or ends_q.shape != ends_k.shape or longest_q != longest_k:
        return False
    if ends_q is ends_k:
        return True
    if readable(ends_q) and readable(ends_k):
        return torch.equal(ends_q, ends_k)
    # All of one length: there is one way to cut them.
    return len(ends_q) > 1 and q.shape[0] == (len(ends_q) - 1) * longest_q


def _flash_cross(
    function: str, inputs: tuple[Tensor, ...], ends: tuple, causal, window, scale, wanted
) -> Tensor | tuple[Tensor, Tensor, None]:
    """_flash where keys are of other sequences."""
    causal = _flash_masks(function, causal, window, max(ends[2:]))
    scale = None if scale is None else as_float(function, softmax_scale=scale)
    wanted = as_flag(function, return_attn_probs=wanted)
    out = varlen_cross_attention(*inputs, *ends, causal=causal, scale=scale)
    if not wanted:
        return out
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        return out, log_sum_exp(*inputs[:2], *ends, causal, scale), None


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """flash_attn_varlen_func of kv[:, 0] and kv[:, 1].

    Args:
        kv: [Tk, 2, H, D]. The rest, Returns, Raises: as flash_attn_varlen_func.
    Source: flash_attn.flash_attn_varlen_kvpacked_func of flash-attention 2.8.
    """
    name = "flash_attn_varlen_kvpacked_func"
    require_tensor(name, kv=kv)
    if kv.dim() != 4 or kv.shape[1] != 2:
        raise ValueError(f"{name}: kv must be [Tk, 2, H, D], got {describe(kv)}")
    ends = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    rest = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes
    return flash_attn_varlen_func(q, *kv.unbind(1), *ends, *rest, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """varlen_attention_qkvpacked with flash-attention's arguments.

    Args:
        qkv: [T, 3, H, D]. cu_seqlens, max_seqlen: as in varlen_attention. The rest: as in
            flash_attn_varlen_func.
    Returns:
        As flash_attn_varlen_func.
    Raises:
        As flash_attn_varlen_func.
    Source: flash_attn.flash_attn_varlen_qkvpacked_func of flash-attention 2.8.
    """
    name = "flash_attn_varlen_qkvpacked_func"
    _refuse(
        name, dropout_p=(dropout_p, 0.0), softcap=(softcap, 0.0), alibi_slopes=(alibi_slopes, None)
    )
    longest = as_int(name, 0, 2**31, max_seqlen=max_seqlen)
    options = causal, window_size, softmax_scale, return_attn_probs
    return _flash(name, (qkv,), cu_seqlens, longest, *options)


def varlen_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """varlen_attention for models of transformers.

        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("clipa", varlen_attention_forward)
        AttentionMaskInterface.register("clipa", sdpa_mask)
        model.set_attn_implementation("clipa")

    Without the second, transformers passes no mask, and padding is attended to. sdpa_mask shows all
    that a model hides, so a mask that hides anything but padding and later tokens can be refused;
    flash_attention_mask shows padding alone, and SigLIP 2's pooling, which runs outside, misreads
    it.

    Args:
        module: its is_causal counts where is_causal is None; a module without is not causal.
        query, key, value: [B, H, S, D].
        attention_mask: None; [B, S], 0 where a token is padding; or boolean [B, 1, S, S], padding
            with or without causality, which then counts. With a mask the host waits for the
            device, for the number of tokens and for what the mask hides. Rows of padding are 0 with
            [B, S], as in flash-attention, and with the other what sdpa returns for them: SigLIP
            pools the last token of its texts, padding or not.
        dropout: 0. scaling: None is D ** -0.5.
        kwargs: sliding_window must be None or at least S; softcap, position_bias, s_aux,
            cu_seq_lens_q and cu_seq_lens_k None; others change no result and are not used.
    Returns:
        ([B, S, H, D], None): the result, and no weights.
    Raises:
        ValueError: an argument that is not implemented, keys of another shape than queries (a
            cache, fewer heads), a mask of another shape or that hides anything else, a masked
            cross-attention.
    Source: transformers 5, integrations/sdpa_attention.py.
    """
    name = "varlen_attention_forward"
    given = {key: (kwargs.get(key), None) for key in _NOT_IMPLEMENTED}
    _refuse(name, dropout=(dropout, 0.0), **given)
    require_tensor(name, query=query, key=key, value=value)
    if query.dim() != 4 or key.shape != query.shape or value.shape != query.shape:
        came = ", ".join(describe(t) for t in (query, key, value))
        raise ValueError(
            f"{name}: query, key and value must be [B, H, S, D], all alike, got {came}"
        )
    batch, _, length, _ = query.shape
    window = kwargs.get("sliding_window")
    if window is not None and as_int(name, 1, 2**63, sliding_window=window) < length:
        raise ValueError(f"{name}: sliding_window must be None or at least {length}, got {window}")
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = as_flag(name, is_causal=causal)
    scale = None if scaling is None else as_float(name, scaling=scaling)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    if attention_mask is None:
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        out = varlen_attention(q, k, v, ends, length, causal=causal, scale=scale)
        return out.unflatten(0, (batch, length)), None
    kept, causal = _padding(name, attention_mask, batch, length, causal)
    if not causal and _is_cross(module):
        raise ValueError(
            f"{name}: attention_mask must be None in cross-attention, "
            f"got {describe(attention_mask)} in {type(module).__name__}"
        )
    rows = kept.flatten().nonzero().squeeze(1)
    ends = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
    torch.cumsum(kept.sum(1), 0, dtype=torch.int32, out=ends[1:])
    q, k, v = (t.index_select(0, rows) for t in (q, k, v))
    out = varlen_attention(q, k, v, ends, length, causal=causal, scale=scale)
    padded = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, rows, out)
    padded = padded.unflatten(0, (batch, length))
    if attention_mask.dim() == 4 and len(rows) < batch * length:
        padded = _with_padding_rows(padded, kept, query, key, value, attention_mask, scale)
    return padded, None


def _with_padding_rows(
    out: Tensor, kept: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None
) -> Tensor:
    """out [B, S, H, D] with sdpa's rows where a token is padding, of places that hold any."""
    places = (~kept).any(0).nonzero().squeeze(1)
    q, seen = q.index_select(2, places), seen.index_select(2, places)
    rows = F.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(1, 2)
    real = kept.index_select(1, places)[..., None, None]
    rows = torch.where(real, out.index_select(1, places), rows.to(out.dtype))
    return out.index_copy(1, places, rows)


def _is_cross(module: nn.Module) -> bool:
    """Whether keys are others' than the queries, even where they are as many: then a mask of keys
    says nothing of the queries. transformers has no one sign of it."""
    named = "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False)
    return bool(named or getattr(module, "is_decoder", False))


def _padding(
    function: str, mask: Tensor, batch: int, length: int, causal: bool
) -> tuple[Tensor, bool]:
    """Which tokens are not padding, [B, S], and whether the mask is causal."""
    require_tensor(function, attention_mask=mask)
    if mask.shape == (batch, length):
        return mask != 0, causal
    if mask.shape != (batch, 1, length, length) or mask.dtype != torch.bool:
        raise ValueError(
            f"{function}: attention_mask must be None, [B, S] = {batch}x{length} or boolean "
            f"{batch}x1x{length}x{length}, got {describe(mask)}"
        )
    seen = mask[:, 0]
    kept = seen[:, -1]
    expected = kept.unsqueeze(1).expand(-1, length, -1)
    for is_causal in (causal, not causal):
        hidden = expected.tril() if is_causal else expected
        if bool(((seen == hidden) | ~kept.unsqueeze(2)).all()):
            return kept, is_causal
    raise ValueError(
        f"{function}: attention_mask must hide padding, and what is later, alone, "
        f"got {describe(mask)} that hides other tokens"
    )
