"""Sequences of different lengths, end to end in one tensor: no padding is stored or computed.

    tokens[cu_seqlens[b] : cu_seqlens[b + 1]]  is sequence b

the layout of flash-attention's varlen functions. Next to a padded [B, S, D] tensor every
token-wise layer (products, norms, GELU) works on sum(lengths) rows instead of B * S.
"""

from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ._check import describe, readable, require_tensor


class Packed(NamedTuple):
    """Sequences end to end.

    tokens: [T, ...], T the sum of all lengths. cu_seqlens: int32 [B + 1], rising from 0 to T, on
    the device of tokens. max_seqlen: the longest length, a Python int so that nothing asks the
    device for it.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """int32 [B + 1]: 0 and the running sums of the lengths (tokens)."""
    if any(length < 0 for length in lengths):
        raise ValueError(f"cu_seqlens_of: lengths must be at least 0, got {min(lengths)}")
    sums = [0, *accumulate(lengths)]
    if sums[-1] >= 2**31:
        raise ValueError(f"cu_seqlens_of: lengths must sum to less than 2**31, got {sums[-1]}")
    return torch.tensor(sums, dtype=torch.int32, device=device)


def pack(x: Tensor, lengths: Sequence[int]) -> Packed:
    """Drop the padding of a batch: the first lengths[b] rows of every x[b], end to end.

    Args:
        x: [B, S, ...], any dtype and device.
        lengths: B Python ints, tokens; 0 is an empty sequence.
    Returns:
        Packed with tokens [sum(lengths), ...].
    Raises:
        ValueError: x has fewer than two dimensions, or lengths does not fit x.

    >>> import torch
    >>> pack(torch.arange(6).view(2, 3), [1, 3]).tokens
    tensor([0, 3, 4, 5])
    """
    require_tensor("pack", x=x)
    lengths = [int(length) for length in lengths]
    if x.dim() < 2 or len(lengths) != x.shape[0]:
        raise ValueError(
            f"pack: x must be [B, S, ...] with B = {len(lengths)} lengths, got {describe(x)}"
        )
    if any(not 0 <= length <= x.shape[1] for length in lengths):
        came = next(length for length in lengths if not 0 <= length <= x.shape[1])
        raise ValueError(f"pack: lengths must be from 0 to {x.shape[1]}, got {came}")
    rows = [b * x.shape[1] + s for b, length in enumerate(lengths) for s in range(length)]
    index = torch.tensor(rows, dtype=torch.int64, device=x.device)
    tokens = x.reshape(-1, *x.shape[2:]).index_select(0, index)
    return Packed(tokens, cu_seqlens_of(lengths, x.device), max(lengths, default=0))


def unpack(packed: Packed, fill: float = 0.0) -> Tensor:
    """[B, max_seqlen, ...]: every sequence from column 0 on, `fill` behind its end.

    unpack(pack(x, lengths)) equals x where x is not padding. No host-device copy.
    """
    tokens, cu_seqlens, max_seqlen = packed
    check_packed("unpack", tokens, cu_seqlens, max_seqlen)
    if tokens.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen:
        return tokens.view(cu_seqlens.shape[0] - 1, max_seqlen, *tokens.shape[1:])
    index, valid = padded_index(cu_seqlens, max_seqlen)
    padded = tokens[index.clamp_(max=max(tokens.shape[0] - 1, 0))]
    return padded.masked_fill(~valid.view(*valid.shape, *[1] * (tokens.dim() - 1)), fill)


def padded_index(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Row of tokens for each place of a padded batch, [B, max_seqlen], and which places are real.

    Places past a sequence's end point past it too and may exceed T - 1: clamp before use.
    """
    start = cu_seqlens[:-1].long().unsqueeze(1)
    offset = torch.arange(max_seqlen, device=cu_seqlens.device).unsqueeze(0)
    return start + offset, offset < cu_seqlens.diff().unsqueeze(1)


def check_packed(function: str, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Raise unless cu_seqlens and max_seqlen describe tokens; values are read on the host only."""
    require_tensor(function, tokens=tokens, cu_seqlens=cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise TypeError(f"{function}: cu_seqlens must be int32 [B + 1], got {describe(cu_seqlens)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"{function}: cu_seqlens must be on {tokens.device}, got {describe(cu_seqlens)}"
        )
    if not isinstance(max_seqlen, (Integral, torch.SymInt)):
        raise TypeError(f"{function}: max_seqlen must be an integer, got {max_seqlen!r}")
    if max_seqlen < 0:
        raise ValueError(f"{function}: max_seqlen must be at least 0, got {max_seqlen}")
    if not readable(cu_seqlens):
        return
    lengths = cu_seqlens.diff()
    if lengths.numel() and lengths.min() < 0:
        raise ValueError(f"{function}: cu_seqlens must not fall, got a step of {lengths.min()}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens.shape[0]:
        raise ValueError(
            f"{function}: cu_seqlens must run from 0 to T = {tokens.shape[0]}, "
            f"got {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    if lengths.numel() and lengths.max() > max_seqlen:
        raise ValueError(
            f"{function}: max_seqlen must be at least the longest sequence, {lengths.max()}, "
            f"got {max_seqlen}"
        )
