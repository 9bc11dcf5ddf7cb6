"""Tiles of logits on a GPU: the statistics of a softmax, and the gradient of a strip of logits.

    forward    each tile of S once; from it (maximum, sum, sum times cosine) for each row and each
               column, each with its own maximum. What one thread holds of a row, and one warp of a
               column, is summed alone: no barrier. A program walks a block of tiles; a grid merges
               what is left, at most N^2 / 7 floats and from N = 4096 on 480 N, into divisors and
               shares of the loss and of its slope for the scale; one more program adds the shares.
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
    PLACES,
    constexprs,
    forward_config,
    log1p,
    narrow_parts,
    products,
    rowwise,
)

LOWEST = tl.constexpr(-3.0e38)  # below any logit, and a difference to it is still finite
_PROGRAMS = 512  # about four an SM; what is above goes into larger blocks of tiles
# Rows, and partial sums of them that are loaded at once: whole lines, in one wait where N is 32768.
_MERGE = dict(BLOCK=64, PARTS=64)


def block_for(tiles_m: int, tiles_n: int, row_groups: int) -> tuple[int, int]:
    """Tiles that a forward program walks, (down, across): fewer partial sums to merge."""
    down = across = 1
    while down * across * 2 * _PROGRAMS <= tiles_m * tiles_n:
        # Of column sums a block has row_groups a column, of row sums one a row: halve what is more.
        if row_groups * cdiv(tiles_m, down) > cdiv(tiles_n, across):
            down *= 2
        else:
            across *= 2
    return down, across


@triton.jit
def _row_sums(s, cosine, COL_GROUPS: tl.constexpr):
    """(maximum, sum of e = 2^(s - maximum), sum of e * cosine) of each row in each group of its
    columns, [rows, groups]: what a thread holds, so none waits for another. -inf is nothing."""
    SHAPE: tl.constexpr = (s.shape[0], s.shape[1] // (2 * COL_GROUPS), COL_GROUPS, 2)
    s, cosine = tl.reshape(s, SHAPE), tl.reshape(cosine, SHAPE)
    high = tl.maximum(tl.max(tl.max(s, 3), 1), LOWEST)
    e = tl.exp2(s - high[:, None, :, None])
    return high, tl.sum(tl.sum(e, 3), 1), tl.sum(tl.sum(e * cosine, 3), 1)


@triton.jit
def _col_sums(s, cosine, ROW_GROUPS: tl.constexpr):
    """The same of each column in each group of rows, [groups, columns]: what a warp holds."""
    SHAPE: tl.constexpr = (s.shape[0] // (16 * ROW_GROUPS), ROW_GROUPS, 16, s.shape[1])
    s, cosine = tl.reshape(s, SHAPE), tl.reshape(cosine, SHAPE)
    high = tl.maximum(tl.max(tl.max(s, 0), 1), LOWEST)
    e = tl.exp2(s - high[None, :, None, :])
    return high, tl.sum(tl.sum(e, 0), 1), tl.sum(tl.sum(e * cosine, 0), 1)


@triton.jit
def _beside(left, right):
    """[rows, n] and [rows, n] as [rows, 2n]."""
    both = tl.permute(tl.join(left, right), (0, 2, 1))
    return tl.reshape(both, (left.shape[0], 2 * left.shape[1]))


@triton.jit
def _whole(parts):
    """Parts of narrow_parts side by side."""
    if len(parts) == 1:
        whole = parts[0]
    else:
        whole = _beside(_whole(parts[: len(parts) // 2]), _whole(parts[len(parts) // 2 :]))
    return whole


@triton.jit
def _merge_groups(high, total, moment, AXIS: tl.constexpr):
    """(maximum, sum, moment) of all groups, which lie along an axis."""
    top = tl.max(high, AXIS)
    weight = tl.exp2(high - tl.expand_dims(top, AXIS))
    return top, tl.sum(total * weight, AXIS), tl.sum(moment * weight, AXIS)


@triton.jit
def _merge(high, total, moment, other_high, other_total, other_moment):
    """Two of what _row_sums makes as one."""
    top = tl.maximum(high, other_high)
    # No exponent is above 0, so nothing overflows.
    own, other = tl.exp2(high - top), tl.exp2(other_high - top)
    return top, total * own + other_total * other, moment * own + other_moment * other


@triton.jit
def _load_sums(ptrs, plane, mask):
    """(maximum, sum, moment) from three planes; nothing where the mask is off."""
    high = tl.load(ptrs, mask=mask, other=LOWEST)
    total = tl.load(ptrs + plane, mask=mask, other=0.0)
    return high, total, tl.load(ptrs + 2 * plane, mask=mask, other=0.0)


@triton.jit
def _store_sums(ptrs, plane, mask, high, total, moment):
    tl.store(ptrs, high, mask=mask)
    tl.store(ptrs + plane, total, mask=mask)
    tl.store(ptrs + 2 * plane, moment, mask=mask)


@triton.jit
def _part_stats(
    cosine, scale, row_high, row_sum, row_moment,
    positive_ptr, start_m, start_n, M, N, first, begin, end,
    ROW_GROUPS: tl.constexpr, COL_GROUPS: tl.constexpr,
):  # fmt: skip
    """Takes a part of a tile into the running (maximum, sum, moment) of its rows; returns them, and
    those of its columns in this tile."""
    s = scale * cosine
    BLOCK_M: tl.constexpr = cosine.shape[0]
    WIDTH: tl.constexpr = cosine.shape[1]
    # On the diagonal or over the edge: scalars, so the others skip it.
    paired = (start_m + first < start_n + WIDTH) & (start_m + BLOCK_M + first > start_n)
    if paired | (start_m + BLOCK_M > M) | (start_n + WIDTH > N):
        rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
        own = (rows >= begin - start_m) & (rows < tl.minimum(end, M) - start_m)
        # The column of a row's positive, -1 if it is elsewhere.
        column = rows + (start_m + first - start_n)
        column = tl.where(own & (column < N - start_n), column, -1)
        pair = columns[None, :] == column[:, None]
        # One part of one tile holds a row's pair: no other program writes there.
        here = (column >= 0) & (column < WIDTH)
        row_ptrs = positive_ptr + (start_n - first) + column
        tl.store(row_ptrs, tl.sum(tl.where(pair, cosine, 0.0), 1), mask=here)
        inside = (rows < M - start_m)[:, None] & (columns < N - start_n)[None, :]
        s = tl.where(inside & (pair == 0), s, -float("inf"))
    high, total, moment = _row_sums(s, cosine, COL_GROUPS)
    row_high, row_sum, row_moment = _merge(row_high, row_sum, row_moment, high, total, moment)
    high, total, moment = _col_sums(s, cosine, ROW_GROUPS)
    return row_high, row_sum, row_moment, high, total, moment


@triton.jit(do_not_specialize=[*PLACES, "down", "across"])
def _contrastive_fwd_kernel(
    x_ptr, y_ptr, scale_ptr,
    row_sums_ptr, col_sums_ptr, positive_ptr,
    M, N, D, first, begin, end, down, across,
    stride_xm, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, ROW_GROUPS: tl.constexpr, COL_GROUPS: tl.constexpr,
):  # fmt: skip
    """Sums over the negatives of a block of down x across tiles.

    row_sums [3, blocks across, M], col_sums [3, blocks down x ROW_GROUPS, N]: (maximum, sum,
    moment), in bits; positive [M], a cosine.
    """
    # Down first: programs that run together share their columns, which stay in the L2 cache.
    blocks_m = tl.cdiv(tl.cdiv(M, BLOCK_M), down)
    blocks_n = tl.cdiv(tl.cdiv(N, BLOCK_N), across)
    block_m = tl.program_id(0) % blocks_m
    block_n = tl.program_id(0) // blocks_m
    rows_left = tl.cdiv(M, BLOCK_M) - block_m * down
    tiles_left = tl.cdiv(N, BLOCK_N) - block_n * across
    scale = tl.load(scale_ptr) * LOG2E
    row_plane = tl.cast(blocks_n, tl.int64) * M
    col_plane = tl.cast(blocks_m * ROW_GROUPS, tl.int64) * N
    row_ptr = row_sums_ptr + tl.cast(block_n, tl.int64) * M
    col_ptr = col_sums_ptr + tl.cast(block_m * ROW_GROUPS, tl.int64) * N
    for i in range(tl.minimum(down, rows_left)):
        start_m = (block_m * down + i) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        row_high = tl.full([BLOCK_M, COL_GROUPS], LOWEST, dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M, COL_GROUPS], dtype=tl.float32)
        row_moment = tl.zeros([BLOCK_M, COL_GROUPS], dtype=tl.float32)
        for j in range(tl.minimum(across, tiles_left)):
            start_n = (block_n * across + j) * BLOCK_N
            # [BLOCK_M, BLOCK_N]. Rows beyond the last are others again: of tl.minimum the products
            # with strides are hoisted out of the loop, and spill.
            cosine = products(
                x_ptr, y_ptr, offs_m % M, (start_n + tl.arange(0, BLOCK_N)) % N, D,
                stride_xm, stride_yn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            parts = narrow_parts(cosine, BLOCK_M, BLOCK_N, WIDTH)
            highs, totals, moments = (), (), ()
            for part in tl.static_range(BLOCK_N // WIDTH):
                row_high, row_sum, row_moment, high, total, moment = _part_stats(
                    parts[part], scale, row_high, row_sum, row_moment,
                    positive_ptr, start_m, start_n + part * WIDTH, M, N, first, begin, end,
                    ROW_GROUPS, COL_GROUPS,
                )  # fmt: skip
                highs += (high,)
                totals += (total,)
                moments += (moment,)
            offs_n = tl.arange(0, BLOCK_N)
            mask_n = tl.broadcast_to((offs_n < N - start_n)[None, :], (ROW_GROUPS, BLOCK_N))
            # [ROW_GROUPS, BLOCK_N]: kept in memory from one row of tiles to the next, as registers
            # take no index. Only this program has them, and its products wait in between.
            col_ptrs = col_ptr + start_n + (tl.arange(0, ROW_GROUPS)[:, None] * N + offs_n[None, :])
            col_high, col_sum, col_moment = _load_sums(col_ptrs, col_plane, mask_n & (i > 0))
            high, total, moment = _merge(
                col_high, col_sum, col_moment, _whole(highs), _whole(totals), _whole(moments)
            )
            _store_sums(col_ptrs, col_plane, mask_n, high, total, moment)
        row_high, row_sum, row_moment = _merge_groups(row_high, row_sum, row_moment, 1)
        _store_sums(row_ptr + offs_m, row_plane, offs_m < M, row_high, row_sum, row_moment)


@triton.jit
def _merged(sums_ptr, offs, mask, n, parts, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """(maximum, sum, moment) over the parts in sums [3, parts, n] at some columns: [BLOCK] each."""
    high = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    moment = tl.zeros([BLOCK], dtype=tl.float32)
    plane = tl.cast(parts, tl.int64) * n  # a constant where n is 1: it has no .to()
    for part in range(0, parts, PARTS):
        offs_p = part + tl.arange(0, PARTS)
        mask_p = (offs_p < parts)[:, None] & mask[None, :]
        # [PARTS, BLOCK]
        ptrs = sums_ptr + offs_p.to(tl.int64)[:, None] * n + offs[None, :]
        part_high, part_sum, part_moment = _load_sums(ptrs, plane, mask_p)
        part_high, part_sum, part_moment = _merge_groups(part_high, part_sum, part_moment, 0)
        high, total, moment = _merge(high, total, moment, part_high, part_sum, part_moment)
    return high, total, moment


@triton.jit
def _finish_half(
    sums_ptr, stats_ptr, positive, scale, offs, mask, n, parts,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of rows or columns, with sums n of the negatives and p of the positive: stores the shift
    (and, PAIRED, the divisor n + p) of softmax_grads in stats [2, n]; returns the loss
    log(1 + n / p), its gradient for the scale, the mean cosine less the positive's, and for the
    positive, -n / (n + p): [BLOCK] each."""
    high, total, moment = _merged(sums_ptr, offs, mask, n, parts, BLOCK, PARTS)
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
    row_sums_ptr, col_sums_ptr, scale_ptr,
    rows_ptr, cols_ptr, shares_ptr,
    M, N, row_parts, col_parts, begin, end,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial sums to whole ones, in rows [3, M] and cols [2, N], a block of each a program.

    Where the loss is wanted (M == N): rows (shift, divisor, gradient of the positive) and cols
    (shift, divisor), without PAIRED no divisor, and in shares [programs, 2] the block's share of
    the loss and of its scale gradient. Where shares_ptr is None: rows (shift, sum, positive in
    bits, from begin to end) and cols (shift, sum).
    """
    scale = tl.load(scale_ptr) * LOG2E
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_m = offs < M
    mask_n = offs < N
    if shares_ptr is not None:
        positive = tl.load(rows_ptr + 2 * M + offs, mask=mask_m, other=0.0)
        by_row, row_slope, d_row = _finish_half(
            row_sums_ptr, rows_ptr, positive, scale, offs, mask_m, M, row_parts,
            PAIRED, BLOCK, PARTS,
        )  # fmt: skip
        by_col, col_slope, d_col = _finish_half(
            col_sums_ptr, cols_ptr, positive, scale, offs, mask_n, N, col_parts,
            PAIRED, BLOCK, PARTS,
        )  # fmt: skip
        tl.store(rows_ptr + 2 * M + offs, d_row + d_col, mask=mask_m)
        loss = tl.sum(tl.where(mask_m, by_row + by_col, 0.0), 0)
        slope = tl.sum(tl.where(mask_m, row_slope + col_slope, 0.0), 0)
        tl.store(shares_ptr + 2 * tl.program_id(0), loss / (2.0 * M))
        tl.store(shares_ptr + 2 * tl.program_id(0) + 1, slope / (2.0 * M))
    else:
        high, total, _ = _merged(row_sums_ptr, offs, mask_m, M, row_parts, BLOCK, PARTS)
        tl.store(rows_ptr + offs, high, mask=mask_m)
        tl.store(rows_ptr + M + offs, total, mask=mask_m)
        here = (offs >= begin) & (offs < end) & mask_m
        positive = tl.load(rows_ptr + 2 * M + offs, mask=here, other=0.0)
        tl.store(rows_ptr + 2 * M + offs, positive * scale, mask=here)
        high, total, _ = _merged(col_sums_ptr, offs, mask_n, N, col_parts, BLOCK, PARTS)
        tl.store(cols_ptr + offs, high, mask=mask_n)
        tl.store(cols_ptr + N + offs, total, mask=mask_n)


@triton.jit(do_not_specialize=["parts"])
def _contrastive_sum_kernel(
    shares_ptr,
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
        loss += tl.load(shares_ptr + 2 * (part + offs), mask=mask, other=0.0)
        slope += tl.load(shares_ptr + 2 * (part + offs) + 1, mask=mask, other=0.0)
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
    shares = scale.new_empty(cdiv(len(image), _MERGE["BLOCK"]), 2)
    _merge_launch(partial, scale, rows, cols, pairs, shares, image.element_size() == 4)
    loss, slope = torch.empty_like(scale), torch.empty_like(scale)
    _contrastive_sum_kernel[(1,)](
        shares,
        loss, slope,
        len(shares),
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
    _merge_launch(partial, scale, rows, cols, pairs)
    return rows, cols


def _tile_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = rowwise(image), rowwise(text)
    (m, d), n = x.shape, y.shape[0]
    config = forward_config(d, x.element_size(), arch())
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    down, across = block_for(tiles_m, tiles_n, config.row_groups)
    blocks_m, blocks_n = cdiv(tiles_m, down), cdiv(tiles_n, across)
    rows, cols = scale.new_empty(3, m), scale.new_empty(2, n)
    # (maximum, sum, moment)
    row_sums = scale.new_empty(3, blocks_n, m)
    col_sums = scale.new_empty(3, blocks_m * config.row_groups, n)
    _contrastive_fwd_kernel[(blocks_m * blocks_n,)](
        x, y, scale,
        row_sums, col_sums, rows[2],
        m, n, d, *pairs, down, across,
        x.stride(0), y.stride(0),
        WIDTH=config.width, ROW_GROUPS=config.row_groups, COL_GROUPS=config.col_groups,
        **constexprs(config, d, x.element_size()),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rows, cols, row_sums, col_sums


def _merge_launch(
    partial, scale, rows, cols, pairs, shares: Tensor | None = None, paired: bool = False
) -> None:
    """Fills rows and cols from the partial sums of _tile_stats; where the loss is wanted, shares
    [programs, 2] of it and of its slope. paired: divisors beside shifts, see softmax_grads."""
    row_sums, col_sums = partial
    (_, row_parts, m), (_, col_parts, n) = row_sums.shape, col_sums.shape
    _contrastive_merge_kernel[(cdiv(max(m, n), _MERGE["BLOCK"]),)](
        row_sums, col_sums, scale,
        rows, cols, shares,
        m, n, row_parts, col_parts, *pairs[1:],
        PAIRED=paired, **_MERGE,
        num_warps=4,
    )  # fmt: skip
