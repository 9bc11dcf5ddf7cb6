"""Sequences of different lengths, end to end in one tensor: no padding is stored or computed.

    tokens[cu_seqlens[b] : cu_seqlens[b + 1]]  is sequence b

the layout of flash-attention's varlen functions. Next to a padded [B, S, D] tensor every
token-wise layer (products, norms, GELU) works on sum(lengths) rows instead of B * S.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import accumulate
from numbers import Complex, Real
from typing import NamedTuple

import torch
from torch import Tensor

from . import check
from .check import describe


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
    """int32 [B + 1]: 0 and the running sums of the lengths (tokens).

    Raises:
        TypeError: a length is not an integer.
        ValueError: a length is negative, or their sum is 2**31 or more.
    """
    device = check.require_device("cu_seqlens_of", device)
    lengths = _integers("cu_seqlens_of", lengths)
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
        TypeError: x is not a tensor, or a length not an integer.
        ValueError: x has fewer than two dimensions, or lengths does not fit x.

    >>> import torch
    >>> pack(torch.arange(6).view(2, 3), [1, 3]).tokens
    tensor([0, 3, 4, 5])
    """
    check.require_tensor("pack", x=x)
    lengths = _integers("pack", lengths)
    if x.dim() < 2 or len(lengths) != x.shape[0]:
        raise ValueError(
            f"pack: x must be [B, S, ...] with B = {len(lengths)} lengths, got {describe(x)}"
        )
    if any(not 0 <= length <= x.shape[1] for length in lengths):
        came = next(length for length in lengths if not 0 <= length <= x.shape[1])
        raise ValueError(f"pack: lengths must be from 0 to {x.shape[1]}, got {came}")
    rows = [b * x.shape[1] + s for b, length in enumerate(lengths) for s in range(length)]
    index = torch.tensor(rows, dtype=torch.int64, device=x.device)
    tokens = x.flatten(0, 1).index_select(0, index)
    return Packed(tokens, cu_seqlens_of(lengths, x.device), max(lengths, default=0))


def unpack(packed: Packed, fill: float = 0.0) -> Tensor:
    """[B, max_seqlen, ...]: every sequence from column 0 on, `fill` behind its end.

    unpack(pack(x, lengths)) equals x where x is not padding. No host-device copy.

    Raises:
        TypeError: packed is not a Packed, a part of it is of another type, or fill is not a number.
        ValueError: cu_seqlens or max_seqlen does not fit tokens, or their dtype cannot hold fill.
    """
    if not isinstance(packed, tuple) or len(packed) != 3:
        raise TypeError(f"unpack: packed must be Packed, got {type(packed).__name__}")
    tokens, cu_seqlens, max_seqlen = packed
    max_seqlen = check_packed("unpack", tokens, cu_seqlens, max_seqlen)
    fill = _filling(tokens, fill)
    if tokens.shape[0] == (cu_seqlens.shape[0] - 1) * max_seqlen:
        return tokens.view(cu_seqlens.shape[0] - 1, max_seqlen, *tokens.shape[1:])
    if not tokens.shape[0]:
        return tokens.new_full((cu_seqlens.shape[0] - 1, max_seqlen, *tokens.shape[1:]), fill)
    index, valid = padded_index(cu_seqlens, max_seqlen)
    padded = tokens[index.clamp_(max=tokens.shape[0] - 1)]
    valid = valid.view(*valid.shape, *[1] * (tokens.dim() - 1))
    return torch.where(valid, padded, tokens.new_full((), fill))


def _integers(function: str, lengths: Iterable[int]) -> list[int]:
    """The lengths as Python's integers; a tensor of them may come in place of a sequence."""
    if hasattr(lengths, "tolist"):  # of torch or NumPy: a tensor without dimensions gives a number
        lengths = lengths.tolist()
    if not isinstance(lengths, Iterable) or isinstance(lengths, (str, bytes, Mapping, Set)):
        raise TypeError(f"{function}: lengths must be a sequence of integers, got {lengths!r}")
    whole = [n.item() if isinstance(n, Tensor) and n.numel() == 1 else n for n in lengths]
    for length in whole:
        if isinstance(length, bool) or not isinstance(length, check.INTEGERS):
            raise TypeError(f"{function}: lengths must be integers, got {length!r}")
    return [int(length) for length in whole]


def _filling(tokens: Tensor, fill: float) -> complex | Tensor:
    """fill as what torch takes, if tokens can hold it: masked_fill cuts 0.5 to the integer 0."""
    if isinstance(fill, Tensor) and not fill.dim():
        return fill
    if not isinstance(fill, Complex):
        raise TypeError(f"unpack: fill must be a number, got {fill!r}")
    parts = (fill,) if isinstance(fill, Real) else (fill.real, fill.imag)
    if tokens.is_floating_point() or tokens.is_complex():
        kind, largest = complex if tokens.is_complex() else float, torch.finfo(tokens.dtype).max
        held = not any(largest < abs(part) < float("inf") for part in parts)
    else:
        limits = None if tokens.dtype == torch.bool else torch.iinfo(tokens.dtype)
        kind, (low, high) = int, (limits.min, limits.max) if limits else (0, 1)
        held = all(low <= part <= high and part % 1 == 0 for part in parts)
    if not held or (len(parts) > 1 and kind is not complex):
        raise ValueError(f"unpack: fill must be a value of {tokens.dtype}, got {fill!r}")
    return kind(fill)


def padded_index(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Row of tokens for each place of a padded batch, [B, max_seqlen], and which places are real.

    Places past a sequence's end point past it too and may exceed T - 1: clamp before use.
    """
    start = cu_seqlens[:-1].long().unsqueeze(1)
    offset = torch.arange(max_seqlen, device=cu_seqlens.device).unsqueeze(0)
    return start + offset, offset < cu_seqlens.diff().unsqueeze(1)


def check_packed(function: str, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> int:
    """max_seqlen as an int; raise unless it and cu_seqlens describe tokens.

    Values of cu_seqlens are read on the host only.
    """
    check.require_tensor(function, tokens=tokens, cu_seqlens=cu_seqlens)
    if not tokens.dim():
        raise ValueError(f"{function}: tokens must be [T, ...], got {describe(tokens)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise TypeError(f"{function}: cu_seqlens must be int32 [B + 1], got {describe(cu_seqlens)}")
    if cu_seqlens.device != tokens.device:
        raise ValueError(
            f"{function}: cu_seqlens must be on {tokens.device}, got {describe(cu_seqlens)}"
        )
    max_seqlen = check.as_int(function, 0, 2**31, max_seqlen=max_seqlen)
    if not check.readable(cu_seqlens):
        return max_seqlen
    lengths = cu_seqlens.diff()
    if lengths.numel() and lengths.min() < 0:
        raise ValueError(f"{function}: cu_seqlens must not fall, got a step of {lengths.min()}")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens.shape[0]:
        raise ValueError(
            f"{function}: cu_seqlens must run from 0 to T = {tokens.shape[0]}, "
            f"got {cu_seqlens[0]} to {cu_seqlens[-1]}"
        )
    if lengths.numel() and (longest := int(lengths.max())) > max_seqlen:
        raise ValueError(
            f"{function}: max_seqlen must be at least the longest sequence, {longest}, "
            f"got {max_seqlen}"
        )
    return max_seqlen
