"""Attention over packed sequences of different lengths.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j,   j in the sequence of i  (and j <= i if causal)

Vaswani et al. (arXiv:1706.03762), in the packed layout of flash-attention's varlen functions.
Next to padding to [B, H, S, D]: no padded token is read, computed or stored, and between forward
and backward nothing is kept but the inputs; the probabilities are computed again.
"""

import torch
from torch import Tensor

from .. import check
from ..check import describe
from ..packing import check_packed
from . import ops, rivals

_IMPLS = ("triton", "torch", "sdpa", "reference", *rivals.PACKAGES)
# What the kernels hold in a tile and in registers; above, the libraries' larger tiles pay.
_LONGEST, _WIDEST = 1024, 128
# Above these lengths torch's varlen_attn is faster, modelled from machine code: us forward and
# backward of 16 heads in bf16 over 33,000 to 66,000 tokens, ours / flash-attention's:
#                    77 x 64      128 x 64      197 x 64      65 x 80       257 x 80
#     H100         625 /  732    379 /  609   1211 /  954   1653 /  773    2862 /  1625
#     A100        1370 / 1227    885 / 1073   2799 / 1806   2873 / 1295   11095 /  3302
# Its backward adds in no fixed order, so not where deterministic algorithms are asked for.
_LONG, _LONG_AND_WIDE = 128, 64
_VARLEN_ATTN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)  # with these arguments


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
        q, k, v: [T, H, D], one floating dtype. Dense in D, else of any strides: slices of one
            product are fine.
        cu_seqlens: int32 [B + 1], rising from 0 to T; equal neighbours are an empty sequence.
        max_seqlen: tokens of the longest sequence, or more; an int, or a tensor with one, which is
            read at every call: on a GPU that waits for the device. T == B * max_seqlen means that
            all have this length, and cu_seqlens is not read.
        causal: token i sees tokens j <= i of its sequence only.
        scale: factor of the scores, a number: no gradient reaches it (for a learnable one,
            multiply q); None is D ** -0.5.
        impl: "triton" (one launch each way; float32, float16 or bfloat16, D up to 128,
            max_seqlen up to 1024; at 8 tokens and fewer of one length, sequences share a tile, and
            a NaN reaches its neighbours there), "torch" (groups of like length, reads the lengths
            on the host), "sdpa" (pads, asks the device for nothing), "reference"; "varlen_attn" of
            torch and, if installed, "flash_attn" and "xformers" (lengths on the host), on CUDA.
            "auto" is "triton" on CUDA where it applies, but "varlen_attn" in 16 bits above 128
            tokens, or 64 with heads wider than 64, and beyond the limits of "triton", if torch is
            2.11 or newer and torch.use_deterministic_algorithms is not set: its backward is not
            deterministic; "torch" on a CPU where lengths differ or the dtype has 16 bits; else
            "sdpa".
    Returns:
        [T, H, D] in q's dtype, contiguous.
    Raises:
        TypeError: dtypes that differ or are not floating, cu_seqlens not int32, a scale that
            requires grad.
        ValueError: shapes or devices that disagree, D not a multiple of 8 from 8 to 256, a last
            stride that is not 1, cu_seqlens that falls or does not end at T, max_seqlen too small
            (the values of cu_seqlens are not checked on a GPU, which would wait for the device; the
            kernels leave out tokens past max_seqlen), an unknown impl, a size beyond its limits.
        RuntimeError: an impl that is not installed or does not run on these tensors, a second
            derivative or one in forward mode of any but "reference".
    Source: flash_attn.flash_attn_varlen_func of flash-attention 2.8.
    """
    name = "varlen_attention"
    check.require_float(name, q=q, k=k, v=v)
    check.require_same_dtype(name, q=q, k=k, v=v)
    if q.dim() != 3 or k.shape != q.shape or v.shape != q.shape:
        came = ", ".join(describe(t) for t in (q, k, v))
        raise ValueError(f"{name}: q, k and v must be [T, H, D], all alike, got {came}")
    check.require_same_device(name, q=q, k=k, v=v)
    impl, *rest = _check_rest(name, impl, cu_seqlens, max_seqlen, causal, scale, q, k, v)
    if impl == "torch":
        check.refuse_tangents(name, q, k, v)
        return ops.attention_packed(torch.stack((q, k, v), 1), cu_seqlens, *rest)
    return _separate(impl, q, k, v, cu_seqlens, *rest)


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
    check.require_float(name, qkv=qkv)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{name}: qkv must be [T, 3, H, D], got {describe(qkv)}")
    impl, *rest = _check_rest(name, impl, cu_seqlens, max_seqlen, causal, scale, qkv)
    if impl in ("torch", "triton"):
        check.refuse_tangents(name, qkv)
        return ops.attention_packed(qkv, cu_seqlens, *rest, impl == "triton")
    return _separate(impl, *qkv.unbind(1), cu_seqlens, *rest)


def _separate(impl: str, q, k, v, cu_seqlens, max_seqlen, causal, scale) -> Tensor:
    """The implementations that take three tensors; in their dtype also under autocast."""
    args = q, k, v, cu_seqlens, max_seqlen
    if check.autocast_dtype(q.device) is not None:
        with torch.autocast(q.device.type, enabled=False):
            return _separate(impl, *args, causal, scale)
    if impl == "reference":
        return varlen_attention_reference(*args, causal=causal, scale=scale)
    if impl == "sdpa":
        return rivals.sdpa(*args, causal, scale)
    check.refuse_tangents("varlen_attention", q, k, v)
    if impl == "triton":
        return ops.attention(*args, causal, scale)
    q, k, v = rivals.differentiated_once(q, k, v)
    return getattr(rivals, impl)(q, k, v, cu_seqlens, max_seqlen, causal, scale)


def _choose(name: str, impl: str, x: Tensor, batch: int, max_seqlen: int) -> str:
    """Resolve "auto": the kernels on a GPU, up to their limits. On a CPU groups of like length win
    when lengths differ or numbers are short.

    At equal lengths torch's fused CPU kernel is faster in fp32 (1.2x to 2x at 4 to 197 tokens) and
    4x to 6x slower in bf16, whose matrix units it does not use.
    """
    fits = x.shape[-1] <= _WIDEST and max_seqlen <= _LONGEST
    if isinstance(impl, str) and impl == "auto":
        kernels = fits and check.choose_impl(name, impl, _IMPLS, x) == "triton"
        if _library_is_faster(x, max_seqlen, kernels):
            return "varlen_attn"
        if kernels:
            return "triton"
        if x.device.type != "cpu":
            return "sdpa"
        equal = x.shape[0] == batch * max_seqlen
        return "torch" if not equal or x.dtype.itemsize == 2 else "sdpa"
    impl = check.choose_impl(name, impl, _IMPLS, x)
    if impl == "triton" and not fits:
        raise ValueError(
            f'{name}: impl "triton" takes heads of at most {_WIDEST} and sequences of at most '
            f"{_LONGEST}, got {x.shape[-1]} and {max_seqlen}"
        )
    if impl in rivals.PACKAGES:
        rivals.require_rival(name, impl, x)
    return impl


def _library_is_faster(x: Tensor, max_seqlen: int, kernels: bool) -> bool:
    """Whether torch's varlen_attn runs on x, [T, ..., D], and is faster than what else would."""
    if kernels and max_seqlen <= (_LONG if x.shape[-1] <= 64 else _LONG_AND_WIDE):
        return False
    return varlen_attn_runs(x)


def varlen_attn_runs(x: Tensor) -> bool:
    """Whether "auto" may take torch's varlen_attn for tensors as x."""
    if not (x.is_cuda and _VARLEN_ATTN and x.dtype in (torch.float16, torch.bfloat16)):
        return False
    if torch.version.hip is not None or torch.are_deterministic_algorithms_enabled():
        return False
    if torch.compiler.is_compiling() or not torch.cuda.is_available():  # the latter: a fake tensor
        return True
    return torch.cuda.get_device_properties(x.device).major >= 8


def _check_rest(
    name: str, impl: str, cu_seqlens, max_seqlen, causal, scale, *tensors: Tensor
) -> tuple[str, int, bool, float]:
    """The implementation to run, max_seqlen, causal and scale, once all have been checked."""
    heads, head_size = tensors[0].shape[-2:]
    if heads < 1 or not 8 <= head_size <= 256 or head_size % 8:
        raise ValueError(
            f"{name}: needs at least one head of a size from 8 to 256 in steps of 8, "
            f"got {heads} of {head_size}"
        )
    for x in tensors:
        if x.stride(-1) != 1:
            raise ValueError(f"{name}: the last stride must be 1, got {x.stride(-1)}")
    max_seqlen = check_packed(name, tensors[0], cu_seqlens, max_seqlen)
    causal = check.as_flag(name, causal=causal)
    scale = head_size**-0.5 if scale is None else check.as_float(name, scale=scale)
    impl = _choose(name, impl, tensors[0], cu_seqlens.shape[0] - 1, max_seqlen)
    return impl, max_seqlen, causal, scale
