"""varlen_attention under the names and arguments of others, for those who swap an import.

flash-attention 2.8's varlen functions, and the function that Hugging Face's AttentionInterface
takes. An argument that is not implemented raises by its name unless it has its neutral value.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ._check import describe, readable, require_tensor
from .attention import varlen_attention, varlen_attention_qkvpacked

# What transformers' attention functions take that would change the result.
_NOT_IMPLEMENTED = ("sliding_window", "softcap", "position_bias", "s_aux")
_NOT_IMPLEMENTED += ("cu_seq_lens_q", "cu_seq_lens_k")


def _refuse(function: str, **arguments: tuple[Any, Any]) -> None:
    """ValueError where an argument is not its neutral value: (came, neutral)."""
    for name, (came, neutral) in arguments.items():
        came = tuple(came) if isinstance(came, list) else came
        if came is not neutral and (isinstance(came, Tensor) or came != neutral):
            raise ValueError(f"{function}: {name} must be {neutral}, got {came}")


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
) -> Tensor:
    """varlen_attention with flash-attention's arguments; queries and keys of the same sequences.

    Args:
        q, k, v: [T, H, D] with as many heads each.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], of equal values (on a GPU not looked into).
        max_seqlen_q, max_seqlen_k: tokens of the longest sequence, equal.
        softmax_scale, causal: as scale and causal in varlen_attention.
        deterministic: any; the result always is.
        dropout_p, window_size, softcap, alibi_slopes, return_attn_probs, block_table: their
            defaults.
    Returns:
        [T, H, D].
    Raises:
        ValueError: an argument that is not implemented; else as varlen_attention.
    Source: flash_attn.flash_attn_varlen_func of flash-attention 2.8.
    """
    name = "flash_attn_varlen_func"
    _refuse(
        name,
        dropout_p=(dropout_p, 0.0),
        window_size=(window_size, (-1, -1)),
        softcap=(softcap, 0.0),
        alibi_slopes=(alibi_slopes, None),
        return_attn_probs=(return_attn_probs, False),
        block_table=(block_table, None),
    )
    require_tensor(name, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    alike = cu_seqlens_q.shape == cu_seqlens_k.shape and max_seqlen_q == max_seqlen_k
    if alike and readable(cu_seqlens_q) and readable(cu_seqlens_k):
        alike = cu_seqlens_q is cu_seqlens_k or torch.equal(cu_seqlens_q, cu_seqlens_k)
    if not alike:
        raise ValueError(
            f"{name}: keys must be of the same sequences as queries, got cu_seqlens_q "
            f"{describe(cu_seqlens_q)} with max_seqlen_q {max_seqlen_q}, cu_seqlens_k "
            f"{describe(cu_seqlens_k)} with max_seqlen_k {max_seqlen_k}"
        )
    return varlen_attention(q, k, v, cu_seqlens_q, max_seqlen_q, causal=causal, scale=softmax_scale)


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
) -> Tensor:
    """varlen_attention_qkvpacked with flash-attention's arguments.

    Args:
        qkv: [T, 3, H, D]. cu_seqlens, max_seqlen: as in varlen_attention. The rest: as in
            flash_attn_varlen_func.
    Returns:
        [T, H, D].
    Raises:
        As flash_attn_varlen_func.
    Source: flash_attn.flash_attn_varlen_qkvpacked_func of flash-attention 2.8.
    """
    _refuse(
        "flash_attn_varlen_qkvpacked_func",
        dropout_p=(dropout_p, 0.0),
        window_size=(window_size, (-1, -1)),
        softcap=(softcap, 0.0),
        alibi_slopes=(alibi_slopes, None),
        return_attn_probs=(return_attn_probs, False),
    )
    return varlen_attention_qkvpacked(
        qkv, cu_seqlens, max_seqlen, causal=causal, scale=softmax_scale
    )


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
        from transformers.masking_utils import flash_attention_mask

        AttentionInterface.register("clipa", varlen_attention_forward)
        AttentionMaskInterface.register("clipa", flash_attention_mask)
        model.set_attn_implementation("clipa")

    Without the second, transformers passes no mask, and padding is attended to.

    Args:
        module: its is_causal counts where is_causal is None; a module without is not causal.
        query, key, value: [B, H, S, D].
        attention_mask: None, or [B, S], 0 where a token is padding: those rows are 0. With a mask
            the device is waited for once, for the number of tokens.
        dropout: 0. scaling: None is D ** -0.5.
        kwargs: sliding_window, softcap, position_bias, s_aux, cu_seq_lens_q and cu_seq_lens_k
            must be None; others change no result and are not used.
    Returns:
        ([B, S, H, D], None): the result, and no weights.
    Raises:
        ValueError: an argument that is not implemented, keys of another shape than queries, or a
            mask of another shape.
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
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    how = dict(causal=bool(causal), scale=scaling)
    if attention_mask is None:
        ends = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * length
        return varlen_attention(q, k, v, ends, length, **how).unflatten(0, (batch, length)), None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"{name}: attention_mask must be None or [B, S] = {batch}x{length}, "
            f"got {describe(attention_mask)}"
        )
    kept = attention_mask != 0
    rows = kept.flatten().nonzero().squeeze(1)
    ends = torch.zeros(batch + 1, dtype=torch.int32, device=q.device)
    torch.cumsum(kept.sum(1), 0, dtype=torch.int32, out=ends[1:])
    out = varlen_attention(*(t.index_select(0, rows) for t in (q, k, v)), ends, length, **how)
    padded = out.new_zeros(q.shape).index_copy(0, rows, out)
    return padded.unflatten(0, (batch, length)), None
