"""The gradient of many positions: sums of rows, sorted by index where tokens were chosen; in a
fixed order, no atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launcher

_BLOCK = dict(BLOCK_R=16, BLOCK_D=128)  # rows on their way, and programs, enough for memory to bind


@triton.jit
def _sum_sorted_kernel(
    d_out_ptr, order_ptr, ends_ptr,
    sums_ptr,
    D,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums [rows of the table, D]: of the rows of d_out whose position it is, in their order."""
    position = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(ends_ptr + position)
    end = tl.load(ends_ptr + position + 1)
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    offs_r = start + tl.arange(0, BLOCK_R)
    row = tl.load(order_ptr + offs_r, mask=offs_r < end, other=0)
    # Rows of one position are next to each other in `order`: one program adds them all.
    for _ in range(start, end, BLOCK_R):
        mask = (offs_r < end)[:, None] & mask_d[None, :]
        d_out_ptrs = d_out_ptr + row[:, None] * D + offs_d[None, :]
        offs_r += BLOCK_R
        row = tl.load(order_ptr + offs_r, mask=offs_r < end, other=0)  # a step ahead
        acc += tl.load(d_out_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + position.to(tl.int64) * D + offs_d, tl.sum(acc, 0), mask=mask_d)


def table_rows(keep: Tensor, prefix: int) -> Tensor:
    """[B, R + K]: the row of the table that each token is given."""
    index = torch.arange(prefix, device=keep.device).expand(keep.shape[0], prefix)
    return torch.cat((index, keep + prefix), 1)


@launcher
def table_grad(d_out: Tensor, keep: Tensor | None, rows: int, prefix: int) -> Tensor:
    """fp32 [rows, D]: sums of d_out [B, S, D] by row of the table; without keep, row s is of all
    tokens s."""
    d = d_out.shape[2]
    if keep is None:
        return d_out.sum(0, dtype=torch.float32)
    index = table_rows(keep, prefix)
    # Stable, so that equal positions keep the order of tokens and sums repeat to the bit.
    index, order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(index, torch.arange(rows + 1, device=d_out.device))
    sums = d_out.new_empty(rows, d, dtype=torch.float32)
    _sum_sorted_kernel[(rows, cdiv(d, _BLOCK["BLOCK_D"]))](
        d_out, order, ends,
        sums,
        d,
        **_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return sums
