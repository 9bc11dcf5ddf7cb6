"""Bias and GELU on a GPU: a tile is loaded once and written once, each way.

forward    x read, y written
backward   dy and x read, dx written; x + bias is made again, so no z is ever stored. A program
           walks down a strip of columns and leaves one row of partial sums for the bias, which
           a second launch adds in order. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import (
    LOG2_E,
    cdiv,
    dense_like,
    launcher,
    rows_a_program,
    rows_of,
    sms,
    sum_partial,
)

# A warp's 16-byte loads in bf16 are 256 columns, which divide the hidden widths in use (1536, 3072,
# 4096, 5120).
_BLOCK_D = 256
_FORWARD_ROWS, _BACKWARD_ROWS = 16, 4  # of a tile: 32 numbers a thread and, as it keeps more, 8
_WARPS = 4
_RESIDENT = 8  # programs of a backward on an SM at once, of a strip of rows and columns each
_LEAST_ROWS = 64  # of a strip: partial sums stay under 1/16 of the tiles' bytes
INV_SQRT_2PI = tl.constexpr((2 * torch.pi) ** -0.5)
LOG2E = tl.constexpr(LOG2_E)
TANH = tl.constexpr(2 * (2 / torch.pi) ** 0.5)


@triton.jit
def _inverse(x):
    """1 / x of finite x >= 1, to a rounding: rsqrt, one instruction, and three, not eight."""
    r = tl.rsqrt(x)
    r = r * r
    return tl.fma(r, tl.fma(-x, r, 1.0), r)  # Newton's step


@triton.jit
def _tails(size, FORM: tl.constexpr):
    """Of gelu(z) = z P(z) at size = |z|: P(-size), and that less size P'(size)."""
    square = size * size
    if FORM == "none":
        # Phi(-size), right to 2e-7, is exp(-size^2 / 2) times a polynomial in 1 / (1 + 0.28 size),
        # as in Abramowitz & Stegun 7.1.26, its six coefficients fitted here. tl.erf branches at 1,
        # so lanes part, and the slope needs the exponential in any case.
        t = _inverse(1.0 + 0.28 * size)
        tail = (0.392955759 - 0.106551245 * t) * t - 0.242075209
        tail = ((tail * t + 0.273073382) * t + 0.0658026858) * t + 0.116794613
        bell = tl.exp2(square * (-0.5 * LOG2E))
        tail = tail * t * bell
        return tail, tail - size * bell * INV_SQRT_2PI
    else:
        if FORM == "tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
            inner = size * (TANH + 0.044715 * TANH * square)
            rise = size * (TANH + 3 * 0.044715 * TANH * square)
        else:
            inner = 1.702 * size
            rise = inner
        e = tl.exp2(inner * -LOG2E)
        r = _inverse(1.0 + e)
        tail = e * r
        return tail, tail - rise * tail * r


@triton.jit
def _gelu_and_slope(z, FORM: tl.constexpr):
    """gelu(z) and its derivative; what is not used costs nothing."""
    # Where the tails are 0 in fp32; finite, as 0 times infinity is not a number.
    size = tl.minimum(tl.abs(z), 64.0, propagate_nan=tl.PropagateNan.ALL)
    tail, fall = _tails(size, FORM)
    return tl.maximum(z, 0.0) - size * tail, tl.where(z < 0.0, fall, 1.0 - fall)


@triton.jit
def _bias_row(bias_ptr, offs_d, D):
    """bias[offs_d], fp32 [1, BLOCK_D]; 0 without a bias."""
    if bias_ptr is not None:
        return tl.load(bias_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]
    else:
        return 0.0


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr,
    y_ptr,
    rows, D,
    stride_xm,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y [rows, D], dense."""
    # Columns first: programs that run together read one row from end to end.
    blocks_d = tl.cdiv(D, BLOCK_D)
    first = (tl.program_id(0) // blocks_d).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_m < rows - first) & (offs_d < D)[None, :]
    # [BLOCK_M, BLOCK_D]; 64-bit numbers stay scalar
    x_ptrs = x_ptr + first * stride_xm + (offs_m * stride_xm + offs_d[None, :])
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    z += _bias_row(bias_ptr, offs_d, D)
    y, _ = _gelu_and_slope(z, FORM)
    y_ptrs = y_ptr + first * D + (offs_m * D + offs_d[None, :])
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_a_program"])
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr,
    dx_ptr, partial_ptr,
    rows, D, rows_a_program,
    stride_ym, stride_xm,
    FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [rows, D], dense; partial [strips, 1, D], or None, holds the sums of dx over a strip."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    strip = (tl.program_id(0) // blocks_d).to(tl.int64)
    start = strip * rows_a_program
    end = tl.minimum(start + rows_a_program, rows)
    offs_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    bias = _bias_row(bias_ptr, offs_d, D)
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    # [BLOCK_M, BLOCK_D]; 64-bit numbers stay scalar
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Two stages: the next tiles are on their way to shared memory while these are worked on.
    for first in tl.range(start, end, BLOCK_M, num_stages=2):
        mask = (offs_m < end - first) & mask_d[None, :]
        x_ptrs = x_ptr + first * stride_xm + (offs_m * stride_xm + offs_d[None, :])
        dy_ptrs = dy_ptr + first * stride_ym + (offs_m * stride_ym + offs_d[None, :])
        z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        _, slope = _gelu_and_slope(z, FORM)
        dx = dy * slope
        acc += dx  # in fp32, before dx is rounded for its store
        dx_ptrs = dx_ptr + first * D + (offs_m * D + offs_d[None, :])
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    # No atomics: a strip leaves one row, and sum_partial adds the rows in order.
    if partial_ptr is not None:
        tl.store(partial_ptr + strip * D + offs_d, tl.sum(acc, 0), mask=mask_d)


def _block_m(rows: int, d: int) -> int:
    """Rows of a tile; half of them where numbers are loaded one by one, and some of the addresses
    and masks would spill."""
    return rows if d % 16 == 0 else rows // 2


@launcher
def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), dense."""
    flat = rows_of(x)
    rows, d = flat.shape
    y = dense_like(x)
    if not x.numel():
        return y
    block_m = _block_m(_FORWARD_ROWS, d)
    _bias_gelu_fwd_kernel[(cdiv(rows, block_m) * cdiv(d, _BLOCK_D),)](
        flat, None if bias is None else bias.contiguous(),
        y,
        rows, d,
        flat.stride(0),
        FORM=approximate, BLOCK_M=block_m, BLOCK_D=_BLOCK_D,
        num_warps=_WARPS,
    )  # fmt: skip
    return y


@launcher
def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, bias_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and, where wanted, of bias."""
    d_rows, x_rows = rows_of(dy), rows_of(x)
    rows, d = x_rows.shape
    dx = dense_like(x)
    block_m, blocks_d = _block_m(_BACKWARD_ROWS, d), cdiv(d, _BLOCK_D)
    strips = max(1, _RESIDENT * sms(x.device) // blocks_d)
    walked = rows_a_program(rows, strips, _LEAST_ROWS, block_m)
    strips = cdiv(rows, walked)
    partial = x_rows.new_empty(strips, 1, d, dtype=torch.float32) if bias_wanted else None
    if x.numel():
        _bias_gelu_bwd_kernel[(strips * blocks_d,)](
            d_rows, x_rows, None if bias is None else bias.contiguous(),
            dx, partial,
            rows, d, walked,
            d_rows.stride(0), x_rows.stride(0),
            FORM=approximate, BLOCK_M=block_m, BLOCK_D=_BLOCK_D,
            num_warps=_WARPS,
        )  # fmt: skip
    return dx, None if partial is None else sum_partial(partial, bias.dtype)[0]
