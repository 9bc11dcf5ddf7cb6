"""Attention of packed sequences on a GPU: one launch each way, and nothing kept between.

    short   (longest at most 64) a program holds one sequence of one head in a tile of 16, 32 or
            64 rows, or several of 8 tokens and fewer under a block-diagonal mask. Softmax needs no
            rescaling. The backward makes scores and statistics again, rowsum(P * dP) instead of
            rowsum(O * dO), so q, k, v and dO are read once and each gradient is written once.
            All that fits beside its neighbours in shared memory is asked for before the first wait.
    long    see kernels_long.py

Short attention is bound by memory, L / 2 operations a byte, so the empty part of a tile is nearly
free. q, k, v are read where they lie, by strides, and gradients are written likewise: packed
[T, 3, H, D] products are never taken apart. No atomics, no
scratch, no order that could change.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import arch, cdiv, dense_like, launcher
from .kernels_long import long_backward, long_forward
from .kernels_tiles import (
    GRAD_STRIDES,
    LOWEST,
    SHORT,
    SIZES,
    STRIDES,
    accumulate,
    config_for,
    constexprs,
    exp,
    inner,
    load_chunk,
    load_rows,
    placed,
    product,
    scaled,
    sequence,
    store_chunk,
    store_rows,
    stride_unit,
    turn_of,
    within_reach,
    zeros,
)

# Chunks of the short forward in 16 bits, where those of chunks() spill or leave three blocks.
_CUTS = {
    104: placed(64, 16, 32),  # 64 + 32 + 16 spill on sm_80, causal and ragged
    120: placed(64, 32, 32),  # with 64 + 64 three blocks on sm_80
    128: placed(64, 32, 32),
}


@triton.jit
def _probabilities(
    s, offs, length, max_seqlen, scale,
    PACK: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """softmax(scale * s) along keys, zero in rows beyond the length: [BLOCK, BLOCK]."""
    rows = offs[:, None]
    columns = offs[None, :]
    seen = columns < length
    if PACK > 1:
        # Block-diagonal: sequences that share a tile do not see each other.
        seen = seen & (rows // max_seqlen == columns // max_seqlen)
    if IS_CAUSAL:
        seen = seen & (columns <= rows)
    s = tl.where(seen, s * scale, -float("inf"))
    # Where a row sees no key, -inf less -inf would be NaN.
    high = tl.maximum(tl.max(s, 1), LOWEST)
    p = exp(s - high[:, None])
    # The largest is 1, so a sum below 1 is that of a row without keys.
    return p * (1.0 / tl.maximum(tl.sum(p, 1), 1.0))[:, None]


@triton.jit
def _load_and_multiply(
    a, ptr, offs_m, mask_m, stride, turn,
    APART: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a @ b.T with b read here, where APART chunk by chunk, fp32."""
    if APART:
        b = load_chunk(ptr, offs_m, mask_m, stride, turn, 0, CHUNKS, HEAD_DIM, ACROSS=True)
        acc = tl.dot(a[0], b, input_precision=PRECISION)
        for i in tl.static_range(1, len(CHUNKS)):
            b = load_chunk(ptr, offs_m, mask_m, stride, turn, i, CHUNKS, HEAD_DIM, ACROSS=True)
            acc = tl.dot(a[i], b, acc, input_precision=PRECISION)
    else:
        b = load_rows(ptr, offs_m, mask_m, stride, turn, CHUNKS, HEAD_DIM, ACROSS=True)
        acc = product(a, b, PRECISION)
    return acc


@triton.jit
def _store_product(
    ptr, token, head, stride_t, stride_h, offs_m, mask_m, turn, factor, p, b,
    BLOCK: tl.constexpr, APART: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write factor * p @ b, where APART chunk by chunk, the widest, which is the first, last."""
    if APART:
        ptr += token * stride_t + head * stride_h
        p = p.to(b[0].dtype)
        for i in tl.static_range(len(CHUNKS) - 1, -1, -1):
            x = tl.dot(p, b[i], input_precision=PRECISION) * factor
            store_chunk(ptr, offs_m, mask_m, stride_t * UNIT, turn, x, i, CHUNKS, HEAD_DIM)
    else:
        x = accumulate(zeros(BLOCK, CHUNKS), p, b, PRECISION)
        store_rows(  # the address is made here: before the product, 17x88 spills on sm_90
            ptr + token * stride_t + head * stride_h, offs_m, mask_m, stride_t * UNIT, turn,
            scaled(x, factor), CHUNKS, HEAD_DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr,
    o_ptr,
    T, H, max_seqlen,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    scale,
    UNIFORM: tl.constexpr, PACK: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, APART: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one tile; strides in UNIT elements."""
    # Heads first: in a packed row the heads of a token lie next to each other.
    turn = turn_of(tl.program_id(0) % H, CHUNKS, HEAD_DIM)
    head = (tl.program_id(0) % H).to(tl.int64) * UNIT
    first, length = sequence(
        cu_seqlens_ptr, (tl.program_id(0) // H).to(tl.int64), T, max_seqlen, UNIFORM, PACK
    )
    token = first * UNIT
    q_ptr += token * stride_qt + head * stride_qh
    k_ptr += token * stride_kt + head * stride_kh
    v_ptr += token * stride_vt + head * stride_vh
    offs_m = tl.arange(0, BLOCK)
    mask_m = offs_m < length
    # [BLOCK, D] in chunks, k transposed
    q = load_rows(q_ptr, offs_m, mask_m, stride_qt * UNIT, turn, CHUNKS, HEAD_DIM)
    k = load_rows(k_ptr, offs_m, mask_m, stride_kt * UNIT, turn, CHUNKS, HEAD_DIM, ACROSS=True)
    if EARLY > 1:
        v = load_rows(v_ptr, offs_m, mask_m, stride_vt * UNIT, turn, CHUNKS, HEAD_DIM)
    # [BLOCK, BLOCK]
    s = product(q, k, PRECISION)
    p = _probabilities(s, offs_m, length, max_seqlen, scale, PACK, IS_CAUSAL)
    if EARLY < 2:  # where k was
        v = load_rows(v_ptr, offs_m, mask_m, stride_vt * UNIT, turn, CHUNKS, HEAD_DIM)
    _store_product(
        o_ptr, token, head, stride_ot, stride_oh, offs_m, mask_m, turn,
        1.0, p, v, BLOCK, APART, CHUNKS, HEAD_DIM, UNIT, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, *GRAD_STRIDES])
def _attention_short_bwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, do_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    T, H, max_seqlen,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_gt, stride_gh,
    scale,
    UNIFORM: tl.constexpr, PACK: tl.constexpr, IS_CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr, APART: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of one tile; strides in UNIT elements, those of the three gradients alike."""
    turn = turn_of(tl.program_id(0) % H, CHUNKS, HEAD_DIM)
    head = (tl.program_id(0) % H).to(tl.int64) * UNIT
    first, length = sequence(
        cu_seqlens_ptr, (tl.program_id(0) // H).to(tl.int64), T, max_seqlen, UNIFORM, PACK
    )
    token = first * UNIT
    q_ptr += token * stride_qt + head * stride_qh
    k_ptr += token * stride_kt + head * stride_kh
    v_ptr += token * stride_vt + head * stride_vh
    do_ptr += token * stride_ot + head * stride_oh
    offs_m = tl.arange(0, BLOCK)
    mask_m = offs_m < length
    # [BLOCK, D] in chunks, v transposed. k last: its two forms, plain and transposed, are made as
    # it comes, and what is asked for later waits.
    q = load_rows(q_ptr, offs_m, mask_m, stride_qt * UNIT, turn, CHUNKS, HEAD_DIM)
    if EARLY > 0:
        do = load_rows(do_ptr, offs_m, mask_m, stride_ot * UNIT, turn, CHUNKS, HEAD_DIM)
    if EARLY > 1:
        v = load_rows(v_ptr, offs_m, mask_m, stride_vt * UNIT, turn, CHUNKS, HEAD_DIM, ACROSS=True)
    k = load_rows(k_ptr, offs_m, mask_m, stride_kt * UNIT, turn, CHUNKS, HEAD_DIM)
    # [BLOCK, BLOCK]
    s = inner(q, k, PRECISION)
    p = _probabilities(s, offs_m, length, max_seqlen, scale, PACK, IS_CAUSAL)
    if EARLY == 0:
        do = load_rows(do_ptr, offs_m, mask_m, stride_ot * UNIT, turn, CHUNKS, HEAD_DIM)
    if APART:  # before v comes, which would need registers beside dO and its product
        _store_product(
            dv_ptr, token, head, stride_gt, stride_gh, offs_m, mask_m, turn,
            1.0, tl.trans(p.to(q[0].dtype)), do, BLOCK, APART, CHUNKS, HEAD_DIM, UNIT, PRECISION,
        )  # fmt: skip
    if EARLY > 1:
        dp = product(do, v, PRECISION)
    else:
        dp = _load_and_multiply(
            do, v_ptr, offs_m, mask_m, stride_vt * UNIT, turn, APART, CHUNKS, HEAD_DIM, PRECISION
        )
    # rowsum(P * dP) is rowsum(O * dO), and O is not there.
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(q[0].dtype)
    if not APART:  # one chunk: earlier it takes a block from sm_80
        _store_product(
            dv_ptr, token, head, stride_gt, stride_gh, offs_m, mask_m, turn,
            1.0, tl.trans(p.to(q[0].dtype)), do, BLOCK, APART, CHUNKS, HEAD_DIM, UNIT, PRECISION,
        )  # fmt: skip
    _store_product(
        dq_ptr, token, head, stride_gt, stride_gh, offs_m, mask_m, turn,
        scale, ds, k, BLOCK, APART, CHUNKS, HEAD_DIM, UNIT, PRECISION,
    )  # fmt: skip
    _store_product(
        dk_ptr, token, head, stride_gt, stride_gh, offs_m, mask_m, turn,
        scale, tl.trans(ds), q, BLOCK, APART, CHUNKS, HEAD_DIM, UNIT, PRECISION,
    )  # fmt: skip


@launcher
def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float
) -> Tensor:
    """[T, H, D] in q's dtype, contiguous."""
    q, k, v = (within_reach(t, max_seqlen) for t in (q, k, v))
    cu_seqlens = cu_seqlens.contiguous()
    out = dense_like(q)
    if max_seqlen > SHORT[q.element_size()]:
        return long_forward(q, k, v, cu_seqlens, out, max_seqlen, causal, scale)
    grid, launch = _short(
        "forward", q, k, v, out, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal
    )
    unit = launch["UNIT"]
    if grid:
        _attention_short_fwd_kernel[(grid,)](
            q, k, v, cu_seqlens,
            out,
            q.shape[0], q.shape[1], max_seqlen,
            # A constant UNIT tells Triton that rows are aligned, whatever the strides are.
            *(s // unit for t in (q, k, v, out) for s in t.stride()[:2]),
            scale,
            **launch,
        )  # fmt: skip
    return out


@launcher
def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    max_seqlen: int,
    causal: bool,
    scale: float,
) -> None:
    """Fill grads (of q, k, v; [T, H, D] each, of like strides), as forward's inputs."""
    do, q, k, v = (within_reach(t, max_seqlen) for t in (do, q, k, v))
    cu_seqlens = cu_seqlens.contiguous()
    if max_seqlen > SHORT[q.element_size()]:
        long_backward(do, q, k, v, cu_seqlens, grads, max_seqlen, causal, scale)
        return
    grid, launch = _short(
        "backward", do, q, k, v, *grads, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal
    )
    unit = launch["UNIT"]
    if grid:
        _attention_short_bwd_kernel[(grid,)](
            q, k, v, cu_seqlens, do,
            *grads,
            q.shape[0], q.shape[1], max_seqlen,
            *(s // unit for t in (q, k, v, do, grads[0]) for s in t.stride()[:2]),
            scale,
            **launch,
        )  # fmt: skip


def pack_for(max_seqlen: int, uniform: bool) -> int:
    """Sequences of one length that share a tile of 16 rows."""
    return 16 // max_seqlen if uniform and 0 < max_seqlen <= 8 else 1


def _early(name: str, head_dim: int, itemsize: int, max_seqlen: int) -> int:
    """What is asked for beside q and k before the first wait: 0 nothing, 1 dO, 2 dO and v."""
    if itemsize == 4:
        return 0  # more registers: half the blocks
    if head_dim <= 80:
        return 2
    # Four wide tiles in shared memory leave two blocks of 64 rows on sm_80, three on sm_90.
    return 2 if name == "backward" and max_seqlen <= 32 and arch() >= 90 else 1


def _constants(
    name: str, head_dim: int, itemsize: int, max_seqlen: int, causal: bool, uniform: bool, unit: int
) -> dict[str, Any]:
    """Those of the short kernel `name`. In 16 bits the chunks of a head go APART, each read, made
    and written by itself: in the registers of one. In fp32 that takes more than all together."""
    constants = constexprs(head_dim, itemsize, causal, uniform, unit)
    if itemsize == 2 and name == "forward" and head_dim in _CUTS:
        constants |= dict(CHUNKS=_CUTS[head_dim])
    apart = itemsize == 2 and len(constants["CHUNKS"]) > 1
    constants |= dict(PACK=pack_for(max_seqlen, uniform), APART=apart)
    constants |= dict(EARLY=_early(name, head_dim, itemsize, max_seqlen))
    return constants | dict(BLOCK=config_for(max_seqlen, head_dim, itemsize).block_m)


def _short(
    name: str, *tensors: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool
) -> tuple[int, dict[str, Any]]:
    """Programs, and the constants, num_warps and num_stages of either short kernel."""
    x = tensors[0]
    batch = cu_seqlens.shape[0] - 1
    uniform = x.shape[0] == batch * max_seqlen
    shape = (x.shape[2], x.element_size(), max_seqlen, causal, uniform)
    launch = _constants(name, *shape, stride_unit(*tensors))
    config = config_for(max_seqlen, x.shape[2], x.element_size())
    launch |= dict(num_warps=config.num_warps, num_stages=config.num_stages)
    if name == "backward" and 96 < x.shape[2] <= 112 and launch["BLOCK"] == 64:
        # Without spills: three blocks an SM, where ptxas takes 190, and on sm_90 four, where 132.
        launch |= dict(maxnreg=128 if arch() == 90 else 168)
    return cdiv(batch, launch["PACK"]) * x.shape[1] if x.shape[0] else 0, launch
