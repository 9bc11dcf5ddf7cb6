"""A tile of rows of one head: its size, how a head size is cut, and its products; for all passes.

A head of D columns is at most three chunks of 64 or less: 80 = 64 + 16, 104 = 64 + 32 + 16 of
which 8 are masked. Padding to a power of two would multiply 128 columns for 80. Of 88 or 104
columns of 16 bits every other head begins in mid-sector: there the columns are taken in turned
order, from the ninth on and the first eight last, so that chunks begin where sectors do.
"""

from dataclasses import dataclass
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, cdiv, input_precision

LOG2E = tl.constexpr(LOG2_E)
LOWEST = tl.constexpr(-3.0e38)  # below any score, and a difference to it is still finite
# Tokens of the longest sequence that is one tile, by itemsize; beyond, a loop over keys. In fp32
# products are made by the FMA units, from registers, of which a tile of 32 rows needs too many.
SHORT = {2: 64, 4: 16}


@dataclass(frozen=True)
class Config:
    """Rows that stay, rows that pass by in a loop, and the launch's num_warps, num_stages and
    maxnreg: told how many registers it may take, ptxas does not spill to fit more blocks."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@cache
def config_for(max_seqlen: int, head_dim: int, itemsize: int) -> Config:
    """The tile of the short path (block_m == block_n) or the tiles of the long one."""
    if itemsize == 4:  # 32 rows spill on sm_80
        if max_seqlen <= 16:
            return Config(16, 16, 4 if head_dim > 112 else 2, 1)  # 2 warps spill on sm_100
        if 96 < head_dim <= 112:
            return Config(16, 32, 8, 1)  # three chunks: steps of 16 spill on sm_90, causal
        if head_dim > 80:
            return Config(16, 16, 8, 1)  # 4 warps spill on sm_100
        return Config(16, 16, 4, 1, 255)
    if max_seqlen <= 16:
        return Config(16, 16, 1, 1)  # one row of tensor-core tiles: a warp, 32 blocks an SM
    if max_seqlen <= 32:
        return Config(32, 32, 2, 1)  # 16 rows a warp
    if max_seqlen <= SHORT[2]:
        return Config(64, 64, 4, 1)  # 64 rows and 4 warps are what wgmma takes
    if head_dim > 64:
        # Steps of 32 spill on sm_80, and so do 4 warps with two accumulators of 64 x 128.
        return Config(64, 16, 8 if head_dim > 112 else 4, 1)
    return Config(64, 32, 4, 1)  # steps of 64 spill likewise, and so do two stages of loads


@cache
def forward_config(max_seqlen: int, head_dim: int, itemsize: int) -> Config:
    """The tiles of the long forward."""
    if itemsize == 4:
        if head_dim > 112:
            return Config(16, 32, 8, 1, 96)  # 4 warps spill on sm_90
        if head_dim > 96:
            return Config(16, 16, 4, 1)  # three chunks: steps of 32 spill on sm_80 and sm_100
        if 64 < head_dim <= 80:
            return Config(16, 16, 8, 1)  # 4 warps spill: steps of 32 on sm_80, of 16 on sm_90
        return Config(16, 32, 4, 1)
    # More rows than backward: keys and values are read less often. Two stages of loads leave two
    # blocks an SM; heads of 64 fit three on sm_90 without, and spill with them on sm_100.
    return Config(128, 32, 8, 2 if head_dim > 64 else 1)


def placed(*widths: int) -> tuple[tuple[int, int], ...]:
    """(first column, width) of chunks of these widths, end to end."""
    return tuple((sum(widths[:i]), width) for i, width in enumerate(widths))


@cache
def chunks(head_dim: int) -> tuple[tuple[int, int], ...]:
    """The head size, rounded up to a multiple of 16, as powers of two up to 64.

    >>> chunks(80), chunks(104)
    (((0, 64), (64, 16)), ((0, 64), (64, 32), (96, 16)))
    """
    padded = cdiv(head_dim, 16) * 16
    return placed(*[64] * (padded // 64), *(bit for bit in (32, 16) if padded & bit))


@triton.jit
def sequence(
    cu_seqlens_ptr, index, T, max_seqlen,
    UNIFORM: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """(first row, rows) of one sequence, or of PACK of one length end to end."""
    if UNIFORM:
        first = index * PACK * max_seqlen
        length = tl.minimum(T - first, PACK * max_seqlen).to(tl.int32)
    else:
        first = tl.load(cu_seqlens_ptr + index)
        length = tl.minimum(tl.load(cu_seqlens_ptr + index + 1) - first, max_seqlen)
        first = first.to(tl.int64)
    return first, length


@triton.jit
def turn_of(head, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns that a head's order is turned by: 8 in odd heads that begin in mid-sector."""
    turn = 0
    if len(CHUNKS) > 1 and HEAD_DIM % 16 == 8:
        turn = (head % 2) * 8
    return turn


@triton.jit
def _chunk(
    ptr, offs_m, mask_m, stride, turn,
    INDEX: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Pointers and mask of rows x the turned columns of a chunk, [rows, width]; transposed where
    rows go ACROSS."""
    START: tl.constexpr = CHUNKS[INDEX][0]
    WIDTH: tl.constexpr = CHUNKS[INDEX][1]
    ROWS: tl.constexpr = 0 if ACROSS else 1  # the axis that offsets of rows lack
    offs_m = tl.expand_dims(offs_m, ROWS)
    offs_d = tl.expand_dims(START + tl.arange(0, WIDTH), 1 - ROWS)
    mask = tl.expand_dims(mask_m, ROWS) & (offs_d < HEAD_DIM)
    if HEAD_DIM % 16 == 8:
        offs_d += turn
        if START + WIDTH + 8 > HEAD_DIM:
            offs_d = tl.where(offs_d < HEAD_DIM, offs_d, offs_d - HEAD_DIM)
    return ptr + (offs_m * stride + offs_d), mask


@triton.jit
def load_chunk(
    ptr, offs_m, mask_m, stride, turn,
    INDEX: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr = False,
):  # fmt: skip
    """One chunk of rows of a head, 0 where there is no row or column: [rows, width]."""
    ptrs, mask = _chunk(ptr, offs_m, mask_m, stride, turn, INDEX, CHUNKS, HEAD_DIM, ACROSS)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_chunk(
    ptr, offs_m, mask_m, stride, turn, x,
    INDEX: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write what load_chunk reads, in the dtype of the pointer: the one cast."""
    ptrs, mask = _chunk(ptr, offs_m, mask_m, stride, turn, INDEX, CHUNKS, HEAD_DIM, False)
    tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=mask)


# Rows of a head are a tuple of chunks, which grows in unrolled loops: Triton 3.4 compiles no
# comprehension. Neither 3.4 nor 3.6 passes on a tuple taken out of CHUNKS: hence INDEX.


@triton.jit
def load_rows(
    ptr, offs_m, mask_m, stride, turn,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr = False,
):  # fmt: skip
    """Rows of a head, all chunks; where rows go ACROSS, [width, rows] each."""
    x = ()
    for i in tl.static_range(len(CHUNKS)):
        x += (load_chunk(ptr, offs_m, mask_m, stride, turn, i, CHUNKS, HEAD_DIM, ACROSS),)
    return x


@triton.jit
def store_rows(
    ptr, offs_m, mask_m, stride, turn, x,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Write what load_rows reads."""
    for i in tl.static_range(len(CHUNKS)):
        store_chunk(ptr, offs_m, mask_m, stride, turn, x[i], i, CHUNKS, HEAD_DIM)


@triton.jit
def exp(x):
    """e to the x, 0 where that is below 2^-126: three instructions fewer than tl.exp."""
    # Not in the scale of scores: of large ones, the rounded product is off by more than 1 is.
    return tl.exp2(x * LOG2E)


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """a @ b.T over all chunks, fp32."""
    acc = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        acc = tl.dot(a[i], tl.trans(b[i]), acc, input_precision=PRECISION)
    return acc


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """a @ b.T over all chunks, fp32, of b that was loaded ACROSS.

    inner's transpose takes b's whole tile into registers before the product; this one takes it
    from shared memory piece by piece.
    """
    acc = tl.dot(a[0], b[0], input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        acc = tl.dot(a[i], b[i], acc, input_precision=PRECISION)
    return acc


@triton.jit
def zeros(ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Accumulators, fp32."""
    x = ()
    for i in tl.static_range(len(CHUNKS)):
        x += (tl.full([ROWS, CHUNKS[i][1]], 0.0, dtype=tl.float32),)
    return x


@triton.jit
def scaled(x, factor):
    """x * factor."""
    out = ()
    for i in tl.static_range(len(x)):
        out += (x[i] * factor,)
    return out


@triton.jit
def accumulate(x, p, b, PRECISION: tl.constexpr):
    """x + p @ b, p rounded to b's dtype."""
    p = p.to(b[0].dtype)
    out = ()
    for i in tl.static_range(len(x)):
        out += (tl.dot(p, b[i], x[i], input_precision=PRECISION),)
    return out


def within_reach(x: Tensor, max_seqlen: int) -> Tensor:
    """Dense columns, and rows near enough that offsets in a sequence have 32 bits, which takes
    half the registers; others are copied."""
    near = x.stride(-1) == 1 and abs(x.stride(0)) * max_seqlen < 2**31
    return x if near else x.contiguous()


def stride_unit(*tensors: Tensor) -> int:
    """8 where all strides of rows and heads divide by it: then rows are known to be aligned."""
    for tensor in tensors:  # a generator takes twice as long
        first, second = tensor.stride()[:2]
        if first % 8 or second % 8:
            return 1
    return 8


def constexprs(
    head_dim: int, itemsize: int, causal: bool, uniform: bool, unit: int
) -> dict[str, object]:
    """Those that all kernels share."""
    return dict(
        UNIFORM=uniform,
        IS_CAUSAL=causal,
        CHUNKS=chunks(head_dim),
        HEAD_DIM=head_dim,
        UNIT=unit,
        PRECISION=input_precision(itemsize),
    )


SIZES = ("T", "H", "max_seqlen")
STRIDES = ("stride_qt", "stride_qh", "stride_kt", "stride_kh", "stride_vt", "stride_vh")
STRIDES += ("stride_ot", "stride_oh")
GRAD_STRIDES = (*STRIDES, "stride_gt", "stride_gh")
