"""Sequences of 65 to 1024 tokens: a loop over keys forward, and a backward of one launch.

    forward     a program holds a block of queries and walks the keys; softmax is rescaled as it
                goes (Milakov and Gimelshein, arXiv:1805.02867)
    backward    a program holds one sequence of one head and walks its blocks twice. First blocks
                of queries: over all keys the maximum, the sum, delta = rowsum(P * dP) and, since
                delta is known at the end alone, dQ as (P * dP) K - delta P K. Then blocks of keys:
                over all queries dK and dV. Log-sum-exp and delta stay in registers.

What a step reads is asked for together. 8 products backward where one that saves its statistics
makes 7: nothing is kept from the forward, no gradient is added to in memory, and the order of every
sum is fixed. The rows beyond the last full block of 64 are a block of their own size, TAIL, where
all sequences are of one length: 197 tokens are 192 + 16 rows, not 256.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv
from .kernels_tiles import (
    GRAD_STRIDES,
    LOWEST,
    SIZES,
    STRIDES,
    Config,
    accumulate,
    config_for,
    constexprs,
    exp,
    forward_config,
    inner,
    load_rows,
    placed,
    product,
    scaled,
    sequence,
    store_chunk,
    store_rows,
    stride_unit,
    turn_of,
    zeros,
)


@triton.jit
def _seen(s, rows, columns, length, IS_CAUSAL: tl.constexpr):
    """Scores, -inf where a row does not see a column."""
    seen = columns < length
    if IS_CAUSAL:
        seen = seen & (columns <= rows)
    return tl.where(seen, s, -float("inf"))


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def _attention_long_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr,
    o_ptr,
    T, H, max_seqlen,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    scale,
    UNIFORM: tl.constexpr, IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of one block of queries; strides in UNIT elements."""
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    start_m = tl.program_id(0) % blocks * BLOCK_M
    turn = turn_of(tl.program_id(0) // blocks % H, CHUNKS, HEAD_DIM)
    head = (tl.program_id(0) // blocks % H).to(tl.int64) * UNIT
    index = (tl.program_id(0) // blocks // H).to(tl.int64)
    first, length = sequence(cu_seqlens_ptr, index, T, max_seqlen, UNIFORM, 1)
    token = first * UNIT
    k_ptr += token * stride_kt + head * stride_kh
    v_ptr += token * stride_vt + head * stride_vh
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length
    # [BLOCK_M, D] in chunks
    q = load_rows(
        q_ptr + token * stride_qt + head * stride_qh, offs_m, mask_m, stride_qt * UNIT, turn,
        CHUNKS, HEAD_DIM,
    )  # fmt: skip
    o = zeros(BLOCK_M, CHUNKS)
    # Not -inf: where a row sees no key, exp(-inf + inf) would be NaN.
    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    end = length
    if IS_CAUSAL:
        # Keys after the block's last query are seen by none of it.
        end = tl.minimum(length, start_m + BLOCK_M)
    if start_m >= length:
        end = 0  # a shorter sequence: the block stores nothing
    for start_n in range(0, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        # [BLOCK_N, D] in chunks
        k = load_rows(k_ptr, offs_n, mask_n, stride_kt * UNIT, turn, CHUNKS, HEAD_DIM, ACROSS=True)
        v = load_rows(v_ptr, offs_n, mask_n, stride_vt * UNIT, turn, CHUNKS, HEAD_DIM)
        # [BLOCK_M, BLOCK_N]
        s = _seen(
            product(q, k, PRECISION) * scale, offs_m[:, None], offs_n[None, :], length, IS_CAUSAL
        )
        top = tl.maximum(m_i, tl.max(s, 1))
        p = exp(s - top[:, None])
        alpha = exp(m_i - top)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = top
        alpha = alpha[:, None]
        o = accumulate(scaled(o, alpha), p, v, PRECISION)
    # The largest counted as 1, so a sum below 1 is that of a row beyond the length.
    by_sum = (1.0 / tl.maximum(l_i, 1.0))[:, None]
    store_rows(
        o_ptr + token * stride_ot + head * stride_oh, offs_m, mask_m, stride_ot * UNIT, turn,
        scaled(o, by_sum), CHUNKS, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _query_block(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr,
    start_m, length, stride_q, stride_k, stride_v, stride_o, stride_g, turn, scale,
    IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dq of a block of queries; returns their log-sum-exp and rowsum(P * dP)."""
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < length
    # [BLOCK_M, D] in chunks
    q = load_rows(q_ptr, offs_m, mask_m, stride_q, turn, CHUNKS, HEAD_DIM)
    do = load_rows(do_ptr, offs_m, mask_m, stride_o, turn, CHUNKS, HEAD_DIM)
    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    # delta sums P * dP, a_sum the same less the centre; a and b those weights times K. All are
    # rescaled as the maximum rises, so dQ is put together after the last key.
    delta = tl.zeros([BLOCK_M], dtype=tl.float32)
    a_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    centre = tl.zeros([BLOCK_M], dtype=tl.float32)
    a = zeros(BLOCK_M, CHUNKS)
    b = zeros(BLOCK_M, CHUNKS)
    end = length
    if IS_CAUSAL:
        end = tl.minimum(length, start_m + BLOCK_M)
    for start_n in range(0, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        # [BLOCK_N, D] in chunks
        v = load_rows(v_ptr, offs_n, mask_n, stride_v, turn, CHUNKS, HEAD_DIM, ACROSS=True)
        k = load_rows(k_ptr, offs_n, mask_n, stride_k, turn, CHUNKS, HEAD_DIM)
        # [BLOCK_M, BLOCK_N]
        s = _seen(
            inner(q, k, PRECISION) * scale, offs_m[:, None], offs_n[None, :], length, IS_CAUSAL
        )
        top = tl.maximum(m_i, tl.max(s, 1))
        p = exp(s - top[:, None])
        alpha = exp(m_i - top)
        m_i = top
        p_sum = tl.sum(p, 1)
        l_i = l_i * alpha + p_sum
        dp = product(do, v, PRECISION)
        p_dp = tl.sum(p * dp, 1)
        delta = delta * alpha + p_dp
        # The first keys' mean of dP: what is rounded below is small where dP varies little.
        centre = tl.where(start_n == 0, p_dp / tl.maximum(p_sum, 1.0), centre)
        # Rounded as the product takes it: dQ's terms cancel where one key has all the weight.
        p_dp = (p * (dp - centre[:, None])).to(k[0].dtype)
        a_sum = a_sum * alpha + tl.sum(p_dp.to(tl.float32), 1)
        alpha = alpha[:, None]
        b = accumulate(scaled(b, alpha), p, k, PRECISION)
        a = accumulate(scaled(a, alpha), p_dp, k, PRECISION)
    by_sum = 1.0 / tl.maximum(l_i, 1.0)
    d_i = (a_sum * by_sum)[:, None]
    factor = (scale * by_sum)[:, None]
    for i in tl.static_range(len(CHUNKS)):
        dq = (a[i] - d_i * b[i]) * factor
        store_chunk(dq_ptr, offs_m, mask_m, stride_g, turn, dq, i, CHUNKS, HEAD_DIM)
    return m_i + tl.log(tl.maximum(l_i, 1.0)), delta * by_sum


@triton.jit
def _key_block(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse, delta,
    start_n, length, stride_q, stride_k, stride_v, stride_o, stride_g, turn, scale,
    IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of a block of BLOCK_N keys; lse, delta: those of all queries."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < length
    # [BLOCK_N, D] in chunks
    k = load_rows(k_ptr, offs_n, mask_n, stride_k, turn, CHUNKS, HEAD_DIM)
    v = load_rows(v_ptr, offs_n, mask_n, stride_v, turn, CHUNKS, HEAD_DIM)
    dk = zeros(BLOCK_N, CHUNKS)
    dv = zeros(BLOCK_N, CHUNKS)
    begin = 0
    if IS_CAUSAL:
        # Queries before the block's first key see none of it.
        begin = start_n // BLOCK_M * BLOCK_M
    for start_m in range(begin, length, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length
        # [BLOCK_M, D] in chunks
        q = load_rows(q_ptr, offs_m, mask_m, stride_q, turn, CHUNKS, HEAD_DIM)
        do = load_rows(do_ptr, offs_m, mask_m, stride_o, turn, CHUNKS, HEAD_DIM)
        # [BLOCK_N, BLOCK_M]: rows are keys, so both products below take it from registers
        s = inner(k, q, PRECISION) * scale
        seen = mask_n[:, None] & mask_m[None, :]
        if IS_CAUSAL:
            seen = seen & (offs_n[:, None] <= offs_m[None, :])
        # Masked after the exponential, which may be inf in rows beyond the length.
        p = tl.where(seen, exp(s - tl.gather(lse, offs_m, 0)[None, :]), 0.0)
        dv = accumulate(dv, p, do, PRECISION)
        dp = inner(v, do, PRECISION)
        ds = p * (dp - tl.gather(delta, offs_m, 0)[None, :])
        dk = accumulate(dk, ds, q, PRECISION)
    store_rows(dk_ptr, offs_n, mask_n, stride_g, turn, scaled(dk, scale), CHUNKS, HEAD_DIM)
    store_rows(dv_ptr, offs_n, mask_n, stride_g, turn, dv, CHUNKS, HEAD_DIM)


@triton.jit
def _put(all_rows, start, block, LMAX: tl.constexpr, BLOCK: tl.constexpr):
    """all_rows [LMAX] with block [BLOCK] at start."""
    # Registers take no index: each place picks the old value or the new one.
    place = tl.arange(0, LMAX) - start
    here = (place >= 0) & (place < BLOCK)
    return tl.where(here, tl.gather(block, tl.where(here, place, 0), 0), all_rows)


@triton.jit(do_not_specialize=[*SIZES, *GRAD_STRIDES])
def _attention_long_bwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_seqlens_ptr, do_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    T, H, max_seqlen,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_gt, stride_gh,
    scale,
    UNIFORM: tl.constexpr, IS_CAUSAL: tl.constexpr, LMAX: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr, TAIL: tl.constexpr,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv of one sequence and head; strides in UNIT elements, gradients' alike.

    BLOCK rows stay while STEP rows pass by; the last max_seqlen % BLOCK rows in a block of TAIL,
    which is 0 where lengths differ.
    """
    turn = turn_of(tl.program_id(0) % H, CHUNKS, HEAD_DIM)
    head = (tl.program_id(0) % H).to(tl.int64) * UNIT
    first, length = sequence(
        cu_seqlens_ptr, (tl.program_id(0) // H).to(tl.int64), T, max_seqlen, UNIFORM, 1
    )
    token = first * UNIT
    q_ptr += token * stride_qt + head * stride_qh
    k_ptr += token * stride_kt + head * stride_kh
    v_ptr += token * stride_vt + head * stride_vh
    do_ptr += token * stride_ot + head * stride_oh
    grad = token * stride_gt + head * stride_gh
    dq_ptr += grad
    dk_ptr += grad
    dv_ptr += grad
    lse = tl.zeros([LMAX], dtype=tl.float32)
    delta = tl.zeros([LMAX], dtype=tl.float32)
    full = length
    # Constant for a launch: without a tail the second body is not compiled.
    if TAIL > 0:
        full = length // BLOCK * BLOCK
    # All queries first: a block of keys needs the statistics of every query.
    for start_m in range(0, full, BLOCK):
        lse_i, d_i = _query_block(
            q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr,
            start_m, length, stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT,
            stride_ot * UNIT, stride_gt * UNIT, turn, scale,
            IS_CAUSAL, BLOCK, STEP, CHUNKS, HEAD_DIM, PRECISION,
        )  # fmt: skip
        lse = _put(lse, start_m, lse_i, LMAX, BLOCK)
        delta = _put(delta, start_m, d_i, LMAX, BLOCK)
    if TAIL > 0:
        lse_i, d_i = _query_block(
            q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr,
            full, length, stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT,
            stride_ot * UNIT, stride_gt * UNIT, turn, scale,
            IS_CAUSAL, TAIL, STEP, CHUNKS, HEAD_DIM, PRECISION,
        )  # fmt: skip
        lse = _put(lse, full, lse_i, LMAX, TAIL)
        delta = _put(delta, full, d_i, LMAX, TAIL)
    for start_n in range(0, full, BLOCK):
        _key_block(
            q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse, delta,
            start_n, length, stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT,
            stride_ot * UNIT, stride_gt * UNIT, turn, scale,
            IS_CAUSAL, STEP, BLOCK, CHUNKS, HEAD_DIM, PRECISION,
        )  # fmt: skip
    if TAIL > 0:
        _key_block(
            q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse, delta,
            full, length, stride_qt * UNIT, stride_kt * UNIT, stride_vt * UNIT,
            stride_ot * UNIT, stride_gt * UNIT, turn, scale,
            IS_CAUSAL, STEP, TAIL, CHUNKS, HEAD_DIM, PRECISION,
        )  # fmt: skip


def tail_for(max_seqlen: int, head_dim: int, block: int, uniform: bool) -> int:
    """Rows of the block for what is left of one length after full blocks; 0 is none.

    Wide heads go without: with the code of a second block they spill on sm_80.
    """
    fits = head_dim <= (80 if max_seqlen <= 256 else 64)
    left = max_seqlen % block if uniform and fits else 0
    return max(16, triton.next_power_of_2(left)) if left else 0


def _backward_constants(
    config: Config, longest: int, head_dim: int, size: int, causal: bool, uniform: bool, unit: int
) -> dict[str, Any]:
    constants = constexprs(head_dim, size, causal, uniform, unit)
    if 96 < head_dim <= 112 and longest > 512 and config.block_m == 64:
        # In 16 bits; with 1024 statistics, 64 + 32 + 16 spill on sm_80.
        constants |= dict(CHUNKS=placed(64, 64))
    constants |= dict(BLOCK=config.block_m, STEP=config.block_n)
    constants |= dict(LMAX=triton.next_power_of_2(longest))
    return constants | dict(TAIL=tail_for(longest, head_dim, config.block_m, uniform))


def long_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, out: Tensor,
    max_seqlen: int, causal: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Fill out [T, H, D], and return it."""
    (total, heads, head_dim), batch = q.shape, cu_seqlens.shape[0] - 1
    config = forward_config(max_seqlen, head_dim, q.element_size())
    unit = stride_unit(q, k, v, out)
    if total:
        _attention_long_fwd_kernel[(batch * heads * cdiv(max_seqlen, config.block_m),)](
            q, k, v, cu_seqlens,
            out,
            total, heads, max_seqlen,
            *(s // unit for t in (q, k, v, out) for s in t.stride()[:2]),
            scale,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            **constexprs(head_dim, q.element_size(), causal, total == batch * max_seqlen, unit),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
        )  # fmt: skip
    return out


def long_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    grads: tuple[Tensor, Tensor, Tensor], max_seqlen: int, causal: bool, scale: float,
) -> None:  # fmt: skip
    """Fill grads, of q, k and v."""
    (total, heads, head_dim), batch = q.shape, cu_seqlens.shape[0] - 1
    size = q.element_size()
    config = config_for(max_seqlen, head_dim, size)
    uniform, unit = total == batch * max_seqlen, stride_unit(q, k, v, do, *grads)
    if total:
        # One program a sequence and head: no gradient has two writers.
        _attention_long_bwd_kernel[(batch * heads,)](
            q, k, v, cu_seqlens, do,
            *grads,
            total, heads, max_seqlen,
            *(s // unit for t in (q, k, v, do, grads[0]) for s in t.stride()[:2]),
            scale,
            **_backward_constants(config, max_seqlen, head_dim, size, causal, uniform, unit),
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
        )  # fmt: skip
