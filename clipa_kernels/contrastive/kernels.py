"""Tiles of logits on a GPU: the statistics of a softmax, and the gradient of a strip of logits.

    forward    each 128 x 128 tile of S once; from it a log-sum-exp and a mean cosine for each row
               and each column, each with its own maximum. A program walks a block of tiles and
               merges what it can in registers; one more launch merges the rest, N^2 / 32 to
               N^2 / 200 floats in all, into loss, divisors and, from the means, the scale's slope.
    backward   the tile again, and G, its gradient, of a strip of rows in the features' dtype; two
               products with fp32 accumulation turn a strip into dX and dY: the library's, but for
               the last dY of several in 16 bits, see kernels_grads.py.

Every operand tile is read from memory as it lies, nothing is transposed or copied. 8 N^2 D
operations in all, the least that keeps no N x N. Positives are kept apart from negatives, as in
plain.py: a nearly sure pair keeps its digits. Logits are in bits (times log2 e). No atomics: the
order of every sum is fixed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import arch, cdiv, launcher
from .kernels_tiles import (
    LN2,
    LOG2E,
    PART,
    PLACES,
    constexprs,
    forward_config,
    is_positive,
    log1p,
    narrow_parts,
    products,
    rowwise,
)

LOWEST = tl.constexpr(-3.0e38)  # below any logit, and a difference to it is still finite
MOST_ACROSS = 4  # their column sums stay in registers: 8 spill on sm_80
_PROGRAMS = 512  # about four an SM; what is above goes into larger blocks of tiles
# Rows, and partial sums of them that are loaded at once: whole lines, in one wait where N is 32768.
_MERGE = dict(BLOCK=64, PARTS=64)


def block_for(tiles_m: int, tiles_n: int) -> tuple[int, int]:
    """Tiles that a forward program walks, (down, across): fewer partial sums to merge."""
    spare = max(1, tiles_m * tiles_n // _PROGRAMS)
    across = 1
    # Near squares have the least border, and partial sums lie on the border.
    while across < MOST_ACROSS and across * across < spare and across * 2 <= tiles_n:
        across *= 2
    return min(16, max(1, spare // across), tiles_m), across


@triton.jit
def _sums(s, cosine, AXIS: tl.constexpr):
    """(maximum, sum of e = 2^(s - maximum), sum of e * cosine) along an axis; -inf is nothing."""
    high = tl.maximum(tl.max(s, AXIS), LOWEST)
    e = tl.exp2(s - tl.expand_dims(high, AXIS))
    return high, tl.sum(e, AXIS), tl.sum(e * cosine, AXIS)


@triton.jit
def _merge(high, total, moment, other_high, other_total, other_moment):
    """Two of what _sums makes as one."""
    top = tl.maximum(high, other_high)
    # No exponent is above 0, so nothing overflows.
    own, other = tl.exp2(high - top), tl.exp2(other_high - top)
    return top, total * own + other_total * other, moment * own + other_moment * other


@triton.jit
def _store_sums(ptr, part, parts, offs, n, mask, high, total, moment, PAIRED: tl.constexpr):
    """Partial sums into planes [parts, n]: the log-sum-exp and the mean cosine; PAIRED, for fp32
    features, the maximum, the mean and the sum: a logarithm of 20 bits has lost 4 of its digits."""
    ptrs = ptr + tl.cast(part, tl.int64) * n + offs
    plane = tl.cast(parts, tl.int64) * n  # a constant where n is 1: it has no .to()
    tl.store(ptrs + plane, tl.where(total > 0.0, moment / total, 0.0), mask=mask)
    if PAIRED:
        tl.store(ptrs, high, mask=mask)
        tl.store(ptrs + 2 * plane, total, mask=mask)
    else:
        tl.store(ptrs, high + tl.log2(total), mask=mask)


@triton.jit
def _part_stats(
    cosine, scale, row_high, row_sum, row_moment, col_high, col_sum, col_moment, slot,
    positive_ptr, offs_m, start_n, M, N, first, begin, end,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Takes a part of a tile into the running (maximum, sum, moment) of its rows and columns."""
    s = scale * cosine
    offs_n = start_n + tl.arange(0, PART)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    # A block of the diagonal: scalars, so the others skip it.
    top = tl.min(offs_m, 0) + first
    if (top < start_n + PART) & (top + offs_m.shape[0] > start_n):
        pair = is_positive(offs_m, offs_n, first, begin, end)
        column = offs_m + first
        here = (offs_m >= begin) & (offs_m < end) & (offs_m < M)
        here = here & (column >= start_n) & (column < start_n + PART)
        # One part of one tile holds a row's pair: no other program writes there.
        tl.store(positive_ptr + offs_m, tl.sum(tl.where(pair, cosine, 0.0), 1), mask=here)
        s = tl.where(pair, -float("inf"), s)
    s = tl.where(inside, s, -float("inf"))
    high, total, moment = _sums(s, cosine, 1)
    row_high, row_sum, row_moment = _merge(row_high, row_sum, row_moment, high, total, moment)
    high, total, moment = _sums(s, cosine, 0)
    high, total, moment = _merge(
        col_high, col_sum, col_moment, high[None, :], total[None, :], moment[None, :]
    )
    # Registers take no index: every slot is merged, and one is kept.
    own = (tl.arange(0, SLOTS) == slot)[:, None]
    col_high, col_sum = tl.where(own, high, col_high), tl.where(own, total, col_sum)
    return row_high, row_sum, row_moment, col_high, col_sum, tl.where(own, moment, col_moment)


@triton.jit(do_not_specialize=[*PLACES, "down", "across"])
def _contrastive_fwd_kernel(
    x_ptr, y_ptr, scale_ptr,
    row_lse_ptr, col_lse_ptr, positive_ptr,
    M, N, D, first, begin, end, down, across,
    stride_xm, stride_yn,
    SLOTS: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the negatives of a block of down x across tiles, SLOTS parts of a tile at most.

    row_lse [2 or 3, blocks across, M], col_lse [2 or 3, blocks down, N] as _store_sums, in bits;
    positive [M], a cosine.
    """
    # Down first: programs that run together share their columns, which stay in the L2 cache.
    blocks_m = tl.cdiv(tl.cdiv(M, BLOCK_M), down)
    blocks_n = tl.cdiv(tl.cdiv(N, BLOCK_N), across)
    block_m = tl.program_id(0) % blocks_m
    block_n = tl.program_id(0) // blocks_m
    rows_left = tl.cdiv(M, BLOCK_M) - block_m * down
    tiles_left = tl.cdiv(N, BLOCK_N) - block_n * across
    scale = tl.load(scale_ptr) * LOG2E
    # [SLOTS, PART], a slot for each part of a tile
    col_high = tl.full([SLOTS, PART], LOWEST, dtype=tl.float32)
    col_sum = tl.zeros([SLOTS, PART], dtype=tl.float32)
    col_moment = tl.zeros([SLOTS, PART], dtype=tl.float32)
    # Row sums end with a row of tiles; column sums stay in registers down the block.
    for i in range(tl.minimum(down, rows_left)):
        offs_m = (block_m * down + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_high = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        row_moment = tl.zeros([BLOCK_M], dtype=tl.float32)
        for j in range(tl.minimum(across, tiles_left)):
            start_n = (block_n * across + j) * BLOCK_N
            # [BLOCK_M, BLOCK_N]
            cosine = products(
                x_ptr, y_ptr, offs_m, start_n + tl.arange(0, BLOCK_N), M, N, D,
                stride_xm, stride_yn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            parts = narrow_parts(cosine, BLOCK_M, BLOCK_N)
            for part in tl.static_range(BLOCK_N // PART):
                row_high, row_sum, row_moment, col_high, col_sum, col_moment = _part_stats(
                    parts[part], scale, row_high, row_sum, row_moment,
                    col_high, col_sum, col_moment, j * (BLOCK_N // PART) + part,
                    positive_ptr, offs_m, start_n + part * PART, M, N, first, begin, end, SLOTS,
                )  # fmt: skip
        _store_sums(
            row_lse_ptr, block_n, blocks_n, offs_m, M, offs_m < M,
            row_high, row_sum, row_moment, PAIRED,
        )  # fmt: skip
    slots = tl.arange(0, SLOTS)[:, None]
    offs_n = block_n * across * BLOCK_N + slots * PART + tl.arange(0, PART)[None, :]
    # Slots past the block's width were never filled: their columns are the next block's.
    mask_n = (offs_n < N) & (offs_n < (block_n + 1) * across * BLOCK_N)
    _store_sums(
        col_lse_ptr, block_m, blocks_m, offs_n, N, mask_n,
        col_high, col_sum, col_moment, PAIRED,
    )  # fmt: skip


@triton.jit
def _merged(
    lse_ptr, offs, mask, n, parts,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, moment) over the parts of _store_sums at some columns: [BLOCK] each."""
    high = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    moment = tl.zeros([BLOCK], dtype=tl.float32)
    plane = tl.cast(parts, tl.int64) * n
    for part in range(0, parts, PARTS):
        offs_p = part + tl.arange(0, PARTS)
        mask_p = (offs_p < parts)[:, None] & mask[None, :]
        # [PARTS, BLOCK]
        lse_ptrs = lse_ptr + offs_p.to(tl.int64)[:, None] * n + offs[None, :]
        lse = tl.load(lse_ptrs, mask=mask_p, other=-float("inf"))
        mean = tl.load(lse_ptrs + plane, mask=mask_p, other=0.0)
        more = tl.maximum(tl.max(lse, 0), LOWEST)
        # exp2 of a log-sum-exp is the sum under the common maximum; PAIRED keeps sums as they are.
        weights = tl.exp2(lse - more[None, :])
        if PAIRED:
            weights *= tl.load(lse_ptrs + 2 * plane, mask=mask_p, other=0.0)
        part_sum, part_moment = tl.sum(weights, 0), tl.sum(weights * mean, 0)
        high, total, moment = _merge(high, total, moment, more, part_sum, part_moment)
    return high, total, moment


@triton.jit
def _finish_half(
    lse_ptr, stats_ptr, positive, scale, offs, mask, n, parts,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of rows or columns, with sums n of the negatives and p of the positive: stores the shift
    (and, PAIRED, the divisor n + p) of softmax_grads in stats [2, n]; returns the loss
    log(1 + n / p), its gradient for the scale, the mean cosine less the positive's, and for the
    positive, -n / (n + p): [BLOCK] each."""
    high, total, moment = _merged(lse_ptr, offs, mask, n, parts, PAIRED, BLOCK, PARTS)
    bits = positive * scale
    # x = log(n / p), and log(1 + e^x) as softplus, which overflows on neither side.
    x = (high - bits) * LN2 + tl.log(total)
    # NaN, not a loss of 0, where the positive is infinite.
    loss = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x))) + bits * 0.0
    divisor = tl.exp2(bits - high) + total
    if PAIRED:
        tl.store(stats_ptr + offs, high, mask=mask)
        tl.store(stats_ptr + n + offs, divisor, mask=mask)
    else:
        tl.store(stats_ptr + offs, high + tl.log2(divisor), mask=mask)
    return loss, (moment - total * positive) / divisor, -total / divisor


@triton.jit(do_not_specialize=[*PLACES, "row_parts", "col_parts"])
def _contrastive_merge_kernel(
    row_lse_ptr, col_lse_ptr, scale_ptr,
    rows_ptr, cols_ptr, sums_ptr,
    M, N, row_parts, col_parts, begin, end,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial sums to whole ones, in rows [3, M] and cols [2, N], a block of each a program.

    Where the loss is wanted (M == N): rows (shift, divisor, gradient of the positive) and cols
    (shift, divisor), without PAIRED no divisor, and in sums [programs, 2] the block's share of the
    loss and of its scale gradient. Where sums_ptr is None: rows (shift, sum, positive in bits, from
    begin to end) and cols (shift, sum).
    """
    scale = tl.load(scale_ptr) * LOG2E
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_m = offs < M
    mask_n = offs < N
    if sums_ptr is not None:
        positive = tl.load(rows_ptr + 2 * M + offs, mask=mask_m, other=0.0)
        by_row, row_slope, d_row = _finish_half(
            row_lse_ptr, rows_ptr, positive, scale, offs, mask_m, M, row_parts,
            PAIRED, BLOCK, PARTS,
        )  # fmt: skip
        by_col, col_slope, d_col = _finish_half(
            col_lse_ptr, cols_ptr, positive, scale, offs, mask_n, N, col_parts,
            PAIRED, BLOCK, PARTS,
        )  # fmt: skip
        tl.store(rows_ptr + 2 * M + offs, d_row + d_col, mask=mask_m)
        loss = tl.sum(tl.where(mask_m, by_row + by_col, 0.0), 0)
        slope = tl.sum(tl.where(mask_m, row_slope + col_slope, 0.0), 0)
        tl.store(sums_ptr + 2 * tl.program_id(0), loss / (2.0 * M))
        tl.store(sums_ptr + 2 * tl.program_id(0) + 1, slope / (2.0 * M))
    else:
        high, total, _ = _merged(row_lse_ptr, offs, mask_m, M, row_parts, PAIRED, BLOCK, PARTS)
        tl.store(rows_ptr + offs, high, mask=mask_m)
        tl.store(rows_ptr + M + offs, total, mask=mask_m)
        here = (offs >= begin) & (offs < end) & mask_m
        positive = tl.load(rows_ptr + 2 * M + offs, mask=here, other=0.0)
        tl.store(rows_ptr + 2 * M + offs, positive * scale, mask=here)
        high, total, _ = _merged(col_lse_ptr, offs, mask_n, N, col_parts, PAIRED, BLOCK, PARTS)
        tl.store(cols_ptr + offs, high, mask=mask_n)
        tl.store(cols_ptr + N + offs, total, mask=mask_n)


@triton.jit(do_not_specialize=["parts"])
def _contrastive_sum_kernel(
    sums_ptr,
    loss_ptr, slope_ptr,
    parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and slope from the shares of the merge's programs, [parts, 2]: one program, in order."""
    offs = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], dtype=tl.float32)
    slope = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, parts, BLOCK):
        mask = offs < parts - part
        loss += tl.load(sums_ptr + 2 * (part + offs), mask=mask, other=0.0)
        slope += tl.load(sums_ptr + 2 * (part + offs) + 1, mask=mask, other=0.0)
    tl.store(loss_ptr, tl.sum(loss, 0))
    tl.store(slope_ptr, tl.sum(slope, 0))


@launcher
def softmax_forward(
    image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of paired features, rows [3, M] and cols [2, M] for softmax_grads, and the slope:
    the loss's gradient for the scale."""
    pairs = (0, 0, image.shape[0])
    rows, cols, *partial = _tile_stats(image, text, scale, pairs)
    sums = scale.new_empty(cdiv(len(image), _MERGE["BLOCK"]), 2)
    _merge_launch(partial, scale, rows, cols, pairs, sums)
    loss, slope = torch.empty_like(scale), torch.empty_like(scale)
    _contrastive_sum_kernel[(1,)](
        sums,
        loss, slope,
        len(sums),
        BLOCK=1024,
        num_warps=4,
    )  # fmt: skip
    return loss, rows, cols, slope


@launcher
def softmax_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """As plain.softmax_stats: (shift, sum, positive) of rows and (shift, sum) of columns."""
    rows, cols, *partial = _tile_stats(image, text, scale, pairs)
    _merge_launch(partial, scale, rows, cols, pairs, None)
    return rows, cols


def _tile_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = rowwise(image), rowwise(text)
    (m, d), n = x.shape, y.shape[0]
    config = forward_config(d, x.element_size(), arch())
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    down, across = block_for(tiles_m, tiles_n)
    blocks_m, blocks_n = cdiv(tiles_m, down), cdiv(tiles_n, across)
    rows, cols = scale.new_empty(3, m), scale.new_empty(2, n)
    paired = image.element_size() == 4
    # fp32 features keep (maximum, mean, sum), 16 bits (log-sum-exp, mean): see _store_sums.
    row_lse = scale.new_empty(2 + paired, blocks_n, m)
    col_lse = scale.new_empty(2 + paired, blocks_m, n)
    _contrastive_fwd_kernel[(blocks_m * blocks_n,)](
        x, y, scale,
        row_lse, col_lse, rows[2],
        m, n, d, *pairs, down, across,
        x.stride(0), y.stride(0),
        SLOTS=MOST_ACROSS * config.block_n // PART.value,
        PAIRED=paired, **constexprs(config, d, x.element_size()),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rows, cols, row_lse, col_lse


def _merge_launch(partial, scale, rows, cols, pairs, sums: Tensor | None) -> None:
    """Fills rows and cols from the partial sums of _tile_stats; sums [programs, 2]: shares of the
    loss and its slope, if wanted."""
    row_lse, col_lse = partial
    (planes, row_parts, m), (_, col_parts, n) = row_lse.shape, col_lse.shape
    _contrastive_merge_kernel[(cdiv(max(m, n), _MERGE["BLOCK"]),)](
        row_lse, col_lse, scale,
        rows, cols, sums,
        m, n, row_parts, col_parts, *pairs[1:],
        PAIRED=planes == 3, **_MERGE,
        num_warps=4,
    )  # fmt: skip
