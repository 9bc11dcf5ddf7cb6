"""A tile of logits: its size, its products, and where its pairs lie; for both passes."""

from dataclasses import astuple, dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..launch import LOG2_E, input_precision

LOG2E = tl.constexpr(LOG2_E)
LN2 = tl.constexpr(1 / LOG2_E)
PART = tl.constexpr(32)  # columns of a tile that the work on logits takes at a time
# Where the pairs lie. Not specialised, like counts of tiles and parts: no address depends on their
# alignment, so one kernel serves all values, and none becomes a constant, as an integer 1 does.
PLACES = ("first", "begin", "end")


@dataclass(frozen=True)
class Config:
    """Tile of logits, slice of the feature width, and the launch's num_warps and num_stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def config_for(width: int, itemsize: int, arch: int) -> Config:
    """The tile for features of `width` columns of `itemsize` bytes, on sm_`arch`."""
    if width % 16:  # rows that begin anywhere take a pointer for every few columns
        if itemsize == 4:
            # Slices of 32 spill everywhere, 32 rows and two stages on sm_90.
            return Config(64, 64, 16, 8, 3 if 90 <= arch < 100 else 2)
        return Config(64, 64, 32, 8 if arch < 90 else 4, 3)  # 4 warps spill on sm_80
    if itemsize == 4 and arch < 90:
        # fp32 runs on the FMA units, operands in registers: slices of 32 spill with Triton 3.6.
        return Config(64, 64, 16, 8, 2)
    if itemsize == 4:
        return Config(32, 64, 32, 4, 2)  # 64 rows spill on sm_90 and sm_100, 32 on sm_80
    if arch < 90:
        return Config(128, 128, 32, 8, 4)  # slices of 64 spill in the forward: more addresses
    if width % 64 and width < 512:
        return Config(128, 128, 32, 8, 3)  # less of the last slice is empty
    return Config(128, 128, 64, 8, 3)  # 128 x 256 spills on sm_80, sm_90 and sm_100


@dataclass(frozen=True)
class ForwardConfig(Config):
    """The forward's: its tile is summed in parts of `width` columns. Sums of columns are kept for
    row_groups groups of 16 rows and those of rows for col_groups pairs of columns: what one thread,
    or one warp, holds of a product, so that none waits for another."""

    width: int
    row_groups: int
    col_groups: int


def forward_config(width: int, itemsize: int, arch: int) -> ForwardConfig:
    """The tile of the forward, which holds the sums of its columns besides."""
    if itemsize == 2 and width % 16 == 0:
        if arch < 90:
            return ForwardConfig(128, 128, 64, 8, 3, 64, 2, 16)  # 256 rows spill
        if arch >= 100:
            return ForwardConfig(128, 128, 32, 8, 3, 64, 8, 1)  # slices of 64 spill
        # 3/4 of the bytes that 128 rows ask of L2, which binds; parts of 32 columns spill.
        slice = 32 if width % 64 and width < 512 else 64  # less of the last slice is empty
        return ForwardConfig(256, 128, slice, 8, 3, 16, 8, 4)
    tile = config_for(width, itemsize, arch)
    if itemsize == 4 and width % 16 == 0 and arch < 90:
        tile = Config(64, 128, 16, 8, 2)  # 64 columns spill with Triton 3.6 (ptxas 12.8)
    elif itemsize == 4 and width % 16 == 0 and arch >= 100:
        tile = Config(32, 64, 16, 4, 2)  # slices of 32 spill with Triton 3.6; these do on sm_90
    return ForwardConfig(*astuple(tile), PART.value, 1, 1)


@triton.jit
def products(
    x_ptr, y_ptr,
    offs_m, offs_n, D,
    stride_xm, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[offs_m] @ y[offs_n].T, fp32 [BLOCK_M, BLOCK_N]. All are rows that exist: no load needs a
    mask for them."""
    offs_k = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    y_ptrs = y_ptr + offs_n.to(tl.int64)[None, :] * stride_yn + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        if EVEN_K:
            x, y = tl.load(x_ptrs), tl.load(y_ptrs)
        else:
            mask_k = offs_k < D - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            y = tl.load(y_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        y_ptrs += BLOCK_K
    return acc


@triton.jit
def is_positive(offs_m, offs_n, first, begin, end):
    """Where a tile holds a pair: row i with column first + i, for rows from begin to end."""
    paired = (offs_m >= begin) & (offs_m < end)
    return (offs_n[None, :] == (offs_m + first)[:, None]) & paired[:, None]


@triton.jit
def _halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Left and right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def narrow_parts(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """A tile's columns in parts of WIDTH: a part's logits and exponentials fit the registers."""
    left, right = _halves(tile, BLOCK_M, BLOCK_N)
    if BLOCK_N == 2 * WIDTH:
        parts = left, right
    else:
        parts = narrow_parts(left, BLOCK_M, BLOCK_N // 2, WIDTH)
        parts += narrow_parts(right, BLOCK_M, BLOCK_N // 2, WIDTH)
    return parts


@triton.jit
def log1p(e):
    """log(1 + e) for e in [0, 1], right to 2e-6 of itself: a series where log(1 + e) rounds."""
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * 0.25)))
    return tl.where(e < 0.03, series, tl.log(1.0 + e))


def rowwise(features: Tensor) -> Tensor:
    """Features whose rows are dense; others are copied."""
    return features if features.stride(1) == 1 else features.contiguous()


def constexprs(config: Config, width: int, itemsize: int) -> dict[str, object]:
    return dict(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=width % config.block_k == 0,
        PRECISION=input_precision(itemsize),
    )
