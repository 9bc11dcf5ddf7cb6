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

from ..launch import cdiv, launcher, rows_a_program, rows_of, sum_partial

# A warp's 16-byte loads in bf16 are 256 columns, which divide the hidden widths in use (1536, 3072,
# 4096, 5120). 16 numbers a thread forward; 8 backward: with 16 a ragged width spills on sm_90.
_FORWARD = dict(BLOCK_M=8, BLOCK_D=256)
_BACKWARD = dict(BLOCK_M=4, BLOCK_D=256)
_WARPS = 4
_STRIPS = 64  # of rows in a backward, at most: each leaves a row of partial sums
_LEAST_ROWS = 64  # of a strip: partial sums stay under 1/16 of the tiles' bytes
INV_SQRT_2PI = tl.constexpr((2 * torch.pi) ** -0.5)
TWO_SQRT_2_OVER_PI = tl.constexpr(2 * (2 / torch.pi) ** 0.5)


@triton.jit
def _normal(z):
    """(Phi(z), exp(-z^2 / 2)), Phi right to 2e-7.

    Phi(-|z|) is the exponential times a polynomial in 1 / (1 + 0.28 |z|), as in Abramowitz & Stegun
    7.1.26, its six coefficients fitted here. tl.erf branches at 1, so lanes part, and the slope
    needs the exponential in any case.
    """
    t = 1.0 / (1.0 + 0.28 * tl.abs(z))
    tail = t * 0.392955759 - 0.242075209 - 0.106551245 * t * t
    tail = ((tail * t + 0.273073382) * t + 0.0658026858) * t + 0.116794613
    bell = tl.exp(-0.5 * z * z)
    tail = tail * t * bell
    return tl.where(z < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _logistic(v):
    """(s, s (1 - s)) of s = sigmoid(v); the product does not lose the digits of 1 - s."""
    e = tl.exp(-tl.abs(v))
    r = 1.0 / (1.0 + e)
    return tl.where(v < 0.0, e * r, r), e * r * r


@triton.jit
def _gelu_and_slope(z, FORM: tl.constexpr):
    """gelu(z) and its derivative; what is not used costs nothing."""
    if FORM == "none":
        gate, bell = _normal(z)
        rise = z * bell * INV_SQRT_2PI
    elif FORM == "tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        cube = 0.044715 * z * z * z
        gate, bell = _logistic((z + cube) * TWO_SQRT_2_OVER_PI)
        rise = (z + 3.0 * cube) * TWO_SQRT_2_OVER_PI * bell
    else:
        gate, bell = _logistic(1.702 * z)
        rise = 1.702 * z * bell
    return z * gate, gate + rise


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
    block_m = (tl.program_id(0) // blocks_d).to(tl.int64)
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_m < rows)[:, None] & (offs_d < D)[None, :]
    # [BLOCK_M, BLOCK_D]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :]
    z = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    z += _bias_row(bias_ptr, offs_d, D)
    y, _ = _gelu_and_slope(z, FORM)
    y_ptrs = y_ptr + offs_m[:, None] * D + offs_d[None, :]
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
    for first in range(start, end, BLOCK_M):
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


@launcher
def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), dense."""
    flat = rows_of(x)
    rows, d = flat.shape
    y = flat.new_empty(x.shape)
    if not x.numel():
        return y
    _bias_gelu_fwd_kernel[(cdiv(rows, _FORWARD["BLOCK_M"]) * cdiv(d, _FORWARD["BLOCK_D"]),)](
        flat, None if bias is None else bias.contiguous(),
        y,
        rows, d,
        flat.stride(0),
        FORM=approximate, **_FORWARD,
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
    dx = x_rows.new_empty(x.shape)
    walked = rows_a_program(rows, _STRIPS, _LEAST_ROWS)
    strips = cdiv(rows, walked)
    partial = x_rows.new_empty(strips, 1, d, dtype=torch.float32) if bias_wanted else None
    if x.numel():
        _bias_gelu_bwd_kernel[(strips * cdiv(d, _BACKWARD["BLOCK_D"]),)](
            d_rows, x_rows, None if bias is None else bias.contiguous(),
            dx, partial,
            rows, d, walked,
            d_rows.stride(0), x_rows.stride(0),
            FORM=approximate, **_BACKWARD,
            num_warps=_WARPS,
        )  # fmt: skip
    return dx, None if partial is None else sum_partial(partial, bias.dtype)[0]
