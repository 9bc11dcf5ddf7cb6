"""Tiles of logits on a GPU: the statistics of a softmax, and the gradient of a strip of logits.

    forward    each 128 x 128 tile of S once; from it one log-sum-exp a row and one a column, each
               with its own maximum. A program walks a block of tiles and merges what it can in
               registers; one more launch merges the rest, N^2 / 32 to N^2 / 1024 floats in all.
    backward   the tile again, and G, its gradient, of a strip of rows in the features' dtype; two
               library products with fp32 accumulation turn a strip into dX and dY.

Every operand tile is read from memory as it lies, nothing is transposed or copied. 8 N^2 D
operations in all, the least that keeps no N x N. Positives are kept apart from negatives, as in
_strips.py: a nearly sure pair keeps its digits. Logits are in bits (times log2 e). No atomics: the
order of every sum is fixed.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Case, arch, cdiv, pointer
from .contrastive_tiles import (
    LN2,
    LOG2E,
    config_for,
    constexprs,
    halves,
    is_positive,
    log1p,
    products,
    rowwise,
    rungs,
    signature,
)

LOWEST = tl.constexpr(-3.0e38)  # below any logit, and a difference to it is still finite
MOST_ACROSS = 4  # their column sums stay in registers: 8 spill on sm_80
_PROGRAMS = 512  # about four a processor; what is above goes into larger blocks of tiles


def block_for(tiles_m: int, tiles_n: int) -> tuple[int, int]:
    """Tiles that a forward program walks, (down, across): fewer partial sums to merge."""
    spare = max(1, tiles_m * tiles_n // _PROGRAMS)
    across = 1
    while across < MOST_ACROSS and across * across < spare and across * 2 <= tiles_n:
        across *= 2
    return min(16, max(1, spare // across), tiles_m), across


@triton.jit
def _sums(s, AXIS: tl.constexpr):
    """(maximum, sum of 2^(s - maximum)) along an axis; -inf counts as nothing."""
    high = tl.maximum(tl.max(s, AXIS), LOWEST)
    return high, tl.sum(tl.exp2(s - tl.expand_dims(high, AXIS)), AXIS)


@triton.jit
def _merge(high, total, other_high, other_total):
    """Two (maximum, sum) as one."""
    top = tl.maximum(high, other_high)
    return top, total * tl.exp2(high - top) + other_total * tl.exp2(other_high - top)


@triton.jit
def _store_sums(ptr, part, parts, offs, n, mask, high, total, PAIRED: tl.constexpr):
    """One row of partial sums [parts, n]: a log-sum-exp, or PAIRED its maximum and its sum apart,
    for fp32 features: a logarithm of 20 bits has lost 4 of a sum's digits."""
    ptrs = ptr + part.to(tl.int64) * n + offs
    if PAIRED:
        tl.store(ptrs, high, mask=mask)
        tl.store(ptrs + parts.to(tl.int64) * n, total, mask=mask)
    else:
        tl.store(ptrs, high + tl.log2(total), mask=mask)


@triton.jit
def _half_stats(
    s, row_high, row_sum, col_high, col_sum, slot,
    positive_ptr, offs_m, start_n, M, N, first, begin, end,
    SLOTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Takes half a tile of logits into the running (maximum, sum) of its rows and columns."""
    offs_n = start_n + tl.arange(0, HALF)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    # A block of the diagonal: scalars, so the others skip it.
    top = tl.min(offs_m, 0) + first
    if (top < start_n + HALF) & (top + offs_m.shape[0] > start_n):
        pair = is_positive(offs_m, offs_n, first, begin, end)
        column = offs_m + first
        here = (offs_m >= begin) & (offs_m < end) & (offs_m < M)
        here = here & (column >= start_n) & (column < start_n + HALF)
        tl.store(positive_ptr + offs_m, tl.sum(tl.where(pair, s, 0.0), 1), mask=here)
        s = tl.where(pair, -float("inf"), s)
    s = tl.where(inside, s, -float("inf"))
    high, total = _sums(s, 1)
    row_high, row_sum = _merge(row_high, row_sum, high, total)
    high, total = _sums(s, 0)
    high, total = _merge(col_high, col_sum, high[None, :], total[None, :])
    own = (tl.arange(0, SLOTS) == slot)[:, None]
    return row_high, row_sum, tl.where(own, high, col_high), tl.where(own, total, col_sum)


@triton.jit
def _contrastive_fwd_kernel(
    x_ptr, y_ptr, scale_ptr,
    row_lse_ptr, col_lse_ptr, positive_ptr,
    M, N, D, first, begin, end, down, across,
    stride_xm, stride_yn,
    SLOTS: tl.constexpr, PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over the negatives of a block of down x across tiles, 2 across <= SLOTS.

    row_lse [blocks across, M], col_lse [blocks down, N] as _store_sums; positive [M]; in bits.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    # Down first: programs that run together share their columns, which stay in the L2 cache.
    blocks_m = tl.cdiv(tl.cdiv(M, BLOCK_M), down)
    blocks_n = tl.cdiv(tl.cdiv(N, BLOCK_N), across)
    block_m = tl.program_id(0) % blocks_m
    block_n = tl.program_id(0) // blocks_m
    rows_left = tl.cdiv(M, BLOCK_M) - block_m * down
    tiles_left = tl.cdiv(N, BLOCK_N) - block_n * across
    scale = tl.load(scale_ptr) * LOG2E
    # [SLOTS, HALF], a slot for each half tile
    col_high = tl.full([SLOTS, HALF], LOWEST, dtype=tl.float32)
    col_sum = tl.zeros([SLOTS, HALF], dtype=tl.float32)
    for i in range(tl.minimum(down, rows_left)):
        offs_m = (block_m * down + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_high = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
        for j in range(tl.minimum(across, tiles_left)):
            start_n = (block_n * across + j) * BLOCK_N
            # [BLOCK_M, BLOCK_N]
            s = scale * products(
                x_ptr, y_ptr, offs_m, start_n + tl.arange(0, BLOCK_N), M, N, D,
                stride_xm, stride_yn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            left, right = halves(s, BLOCK_M, BLOCK_N)
            row_high, row_sum, col_high, col_sum = _half_stats(
                left, row_high, row_sum, col_high, col_sum, 2 * j,
                positive_ptr, offs_m, start_n, M, N, first, begin, end, SLOTS, HALF,
            )  # fmt: skip
            row_high, row_sum, col_high, col_sum = _half_stats(
                right, row_high, row_sum, col_high, col_sum, 2 * j + 1,
                positive_ptr, offs_m, start_n + HALF, M, N, first, begin, end, SLOTS, HALF,
            )  # fmt: skip
        mask_m = offs_m < M
        _store_sums(row_lse_ptr, block_n, blocks_n, offs_m, M, mask_m, row_high, row_sum, PAIRED)
    slots = tl.arange(0, SLOTS)[:, None]
    offs_n = (block_n * 2 * across + slots) * HALF
    offs_n = offs_n + tl.arange(0, HALF)[None, :]
    mask_n = (offs_n < N) & (slots < 2 * across)
    _store_sums(col_lse_ptr, block_m, blocks_m, offs_n, N, mask_n, col_high, col_sum, PAIRED)


@triton.jit
def _merged(
    lse_ptr, offs, mask, n, parts,
    PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(maximum, sum) over the parts of lse [parts, n] at some columns: [BLOCK] each."""
    high = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, parts, PARTS):
        offs_p = part + tl.arange(0, PARTS)
        mask_p = (offs_p < parts)[:, None] & mask[None, :]
        # [PARTS, BLOCK]
        lse_ptrs = lse_ptr + offs_p.to(tl.int64)[:, None] * n + offs[None, :]
        lse = tl.load(lse_ptrs, mask=mask_p, other=-float("inf"))
        if PAIRED:
            part_sum = tl.load(lse_ptrs + parts.to(tl.int64) * n, mask=mask_p, other=0.0)
            more = tl.maximum(tl.max(lse, 0), LOWEST)
            summed = tl.sum(part_sum * tl.exp2(lse - more[None, :]), 0)
        else:
            more, summed = _sums(lse, 0)
        high, total = _merge(high, total, more, summed)
    return high, total


@triton.jit
def _half_loss(high, total, positive):
    """(log(1 + n / p), n + p, the positive's gradient -n / (n + p)), sums in units of 2^high."""
    x = (high - positive) * LN2 + tl.log(total)
    loss = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
    divisor = tl.exp2(positive - high) + total
    return loss, divisor, -total / divisor


@triton.jit
def _contrastive_merge_kernel(
    row_lse_ptr, col_lse_ptr,
    rows_ptr, cols_ptr, loss_ptr,
    M, N, row_parts, col_parts,
    FINISH: tl.constexpr, PAIRED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Partial sums to whole ones, in rows [3, M] and cols [2, N].

    FINISH (one program, M == N): rows (shift, divisor, gradient of the positive), cols (shift,
    divisor), and the loss. Otherwise, a program a block: rows (shift, sum, positive), cols (shift,
    sum).
    """
    if FINISH:
        acc = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, M, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < M
            positive = tl.load(rows_ptr + 2 * M + offs, mask=mask, other=0.0)
            high, total = _merged(row_lse_ptr, offs, mask, M, row_parts, PAIRED, BLOCK, PARTS)
            by_row, divisor, d_positive = _half_loss(high, total, positive)
            tl.store(rows_ptr + offs, high, mask=mask)
            tl.store(rows_ptr + M + offs, divisor, mask=mask)
            high, total = _merged(col_lse_ptr, offs, mask, N, col_parts, PAIRED, BLOCK, PARTS)
            by_col, divisor, d_more = _half_loss(high, total, positive)
            tl.store(cols_ptr + offs, high, mask=mask)
            tl.store(cols_ptr + N + offs, divisor, mask=mask)
            tl.store(rows_ptr + 2 * M + offs, d_positive + d_more, mask=mask)
            # NaN, not a loss of 0, where the positive is infinite.
            acc += tl.where(mask, by_row + by_col + positive * 0.0, 0.0)
        tl.store(loss_ptr, tl.sum(acc, 0) / (2.0 * M))
    else:
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask_m = offs < M
        mask_n = offs < N
        high, total = _merged(row_lse_ptr, offs, mask_m, M, row_parts, PAIRED, BLOCK, PARTS)
        tl.store(rows_ptr + offs, high, mask=mask_m)
        tl.store(rows_ptr + M + offs, total, mask=mask_m)
        high, total = _merged(col_lse_ptr, offs, mask_n, N, col_parts, PAIRED, BLOCK, PARTS)
        tl.store(cols_ptr + offs, high, mask=mask_n)
        tl.store(cols_ptr + N + offs, total, mask=mask_n)


def softmax_forward(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of paired features, and rows [3, M] and cols [2, M] for softmax_grads."""
    m = image.shape[0]
    rows, cols, *partial = _tile_stats(image, text, scale, (0, 0, m))
    loss = torch.empty_like(scale)
    _merge_launch(partial, rows, cols, loss)
    return loss, rows, cols


def softmax_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """As _strips.softmax_stats: (shift, sum, positive) of rows and (shift, sum) of columns."""
    rows, cols, *partial = _tile_stats(image, text, scale, pairs)
    _merge_launch(partial, rows, cols, None)
    return rows, cols


def _tile_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = rowwise(image), rowwise(text)
    (m, d), n = x.shape, y.shape[0]
    config = config_for(d, x.element_size(), arch())
    tiles_m, tiles_n = cdiv(m, config.block_m), cdiv(n, config.block_n)
    down, across = block_for(tiles_m, tiles_n)
    blocks_m, blocks_n = cdiv(tiles_m, down), cdiv(tiles_n, across)
    rows, cols = scale.new_empty(3, m), scale.new_empty(2, n)
    paired = image.element_size() == 4
    row_lse = scale.new_empty(1 + paired, blocks_n, m)
    col_lse = scale.new_empty(1 + paired, blocks_m, n)
    _contrastive_fwd_kernel[(blocks_m * blocks_n,)](
        x, y, scale,
        row_lse, col_lse, rows[2],
        m, n, d, *pairs, down, across,
        x.stride(0), y.stride(0),
        SLOTS=2 * MOST_ACROSS, PAIRED=paired,
        **constexprs(config, d),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return rows, cols, row_lse, col_lse


def _merge_launch(partial: list[Tensor], rows: Tensor, cols: Tensor, loss: Tensor | None) -> None:
    row_lse, col_lse = partial
    (numbers, row_parts, m), (_, col_parts, n) = row_lse.shape, col_lse.shape
    # One program for the loss: its sum is final, at a launch less than a second level.
    block, parts, warps = (512, 8, 16) if loss is not None else (128, 8, 4)
    grid = 1 if loss is not None else cdiv(max(m, n), block)
    _contrastive_merge_kernel[(grid,)](
        row_lse, col_lse,
        rows, cols, rows if loss is None else loss,
        m, n, row_parts, col_parts,
        FINISH=loss is not None, PAIRED=numbers == 2, BLOCK=block, PARTS=parts,
        num_warps=warps,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Every rung of the table with every variant of the kernels."""
    for dtype, width, archs in rungs():
        config = config_for(width, dtype.itemsize, archs[0])
        yield Case(
            f"forward {pointer(dtype)[1:]} D={width}",
            _contrastive_fwd_kernel,
            signature(dtype)
            | dict.fromkeys(("row_lse_ptr", "col_lse_ptr", "positive_ptr"), "*fp32")
            | dict(down="i32", across="i32"),
            dict(SLOTS=2 * MOST_ACROSS, PAIRED=dtype == torch.float32) | constexprs(config, width),
            config.num_warps,
            config.num_stages,
            archs,
        )
    pointers = ("row_lse_ptr", "col_lse_ptr", "rows_ptr", "cols_ptr", "loss_ptr")
    merge = dict.fromkeys(pointers, "*fp32")
    merge |= dict.fromkeys(("M", "N", "row_parts", "col_parts"), "i32")
    for paired in (False, True):
        for finish, block, warps in ((True, 512, 16), (False, 128, 4)):
            sizes = dict(FINISH=finish, PAIRED=paired, BLOCK=block, PARTS=8)
            label = f"merge{' and loss' if finish else ''}{', paired' if paired else ''}"
            yield Case(label, _contrastive_merge_kernel, merge, sizes, warps)
