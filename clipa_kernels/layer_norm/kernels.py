"""Residual sum and LayerNorm on a GPU: a row stays in registers from its load to its last store.

    forward    x and residual read once, their sum and its norm written once: 4 rows
    backward   the gradients of both, and the sum, read once, one gradient written: 4 rows; the two
               parameter gradients leave a program as one row each, and a second launch adds these

Nothing is saved but the sum, which the stream holds anyway: mean and deviation are computed again
from the row the backward must read in any case. Saving them would cost 16 bytes a token more, and
the row is in registers, so the second time costs two sums and no memory. No atomics: a program
walks its own rows in order; how many walk depends on the GPU's SMs alone.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, dense_like, launcher, rows_a_program, rows_of, sms, sum_partial

_RESIDENT = 4  # programs of a backward on an SM at once, at most: their rows in flight fill memory
_LEAST_ROWS = 32  # of a backward program where each SM has one: partial sums stay under 1/16
_FORWARD_PROGRAMS = 2048  # at least, where there are rows for them
_FORWARD_ROWS = 16  # at most: the parameters, 8 bytes a column, are loaded once for all of them


@dataclass(frozen=True)
class Config:
    """Rows of a tile (whole rows, padded to a power of two) and warps of a program."""

    block_m: int
    block_d: int
    num_warps: int


@cache
def config_for(width: int, numbers: int) -> Config:
    """The tile for rows of `width` columns, of which a thread holds `numbers` of each tensor.

    16, two 16-byte loads in bf16. 8 in a backward of rows of 512 or less, several a tile, as it
    keeps four times as much beside them: with 16, of widths of 16 to 512, 64 spills on sm_100, and
    100 and 200, whose numbers are loaded one by one, on sm_80 and sm_90 too.
    """
    block_d = max(16, triton.next_power_of_2(width))
    if block_d > 2048:
        return Config(1, block_d, 8)  # 16 numbers both ways: with 16 warps ragged fp32 spills
    if block_d > 128 * numbers:
        return Config(1, block_d, block_d // (32 * numbers))  # one row fills more than four warps
    return Config(min(16, 128 * numbers // block_d), block_d, 4)  # short rows: several fill them


@triton.jit
def _row(ptr, D, BLOCK_D: tl.constexpr):
    """A parameter, fp32 [1, BLOCK_D]; loaded as a vector, whose layout is its own dtype's."""
    offs_d = tl.arange(0, BLOCK_D)
    return tl.load(ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _statistics(total, mask_d, D, eps):
    """(total - mean, 0 beyond D; 1 / deviation) of rows [BLOCK_M, BLOCK_D]."""
    mean = tl.sum(total, 1) / D
    # Columns of padding would be -mean here and count in the variance.
    centred = tl.where(mask_d, total - mean[:, None], 0.0)
    var = tl.sum(centred * centred, 1) / D
    return centred, 1.0 / tl.sqrt(var + eps)


@triton.jit
def _two_sums(a, b):
    """Sums of the rows of a and of b [BLOCK_M, BLOCK_D], with the shuffles and barriers of one."""
    ROWS: tl.constexpr = a.shape[0]
    both = tl.permute(tl.join(a, b), (2, 0, 1))
    # Flat in between, which costs nothing: the interpreter then adds dense rows, by halves.
    both = tl.reshape(tl.reshape(both, (2 * a.numel,)), (2 * ROWS, a.shape[1]))
    return tl.split(tl.permute(tl.reshape(tl.sum(both, 1), (2, ROWS)), (1, 0)))


@triton.jit(do_not_specialize=["rows", "rows_a_program"])
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,
    y_ptr, total_ptr,
    rows, D, rows_a_program,
    stride_xm, stride_rm,
    eps,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """total = x + residual, y = norm(total) * weight + bias; y [rows, D] and total are dense.

    Without a residual x is the sum, and total_ptr is None as well.
    """
    start = tl.program_id(0).to(tl.int64) * rows_a_program
    end = tl.minimum(start + rows_a_program, rows)
    weight, bias = _row(weight_ptr, D, BLOCK_D), _row(bias_ptr, D, BLOCK_D)
    offs_d = tl.max_contiguous(tl.arange(0, BLOCK_D), VECTOR)
    mask_d = (offs_d < D)[None, :]
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    # [BLOCK_M, BLOCK_D]; 64-bit numbers stay scalar
    out = offs_m * D + offs_d[None, :]
    for first in range(start, end, BLOCK_M):
        mask = (offs_m < end - first) & mask_d
        x_ptrs = x_ptr + first * stride_xm + (offs_m * stride_xm + offs_d[None, :])
        total = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual_ptrs = residual_ptr + first * stride_rm
            residual_ptrs += offs_m * stride_rm + offs_d[None, :]
            total += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
            stored = total.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + first * D + out, stored, mask=mask)
            total = stored.to(tl.float32)  # the norm is that of the stream as others read it
        centred, rstd = _statistics(total, mask_d, D, eps)
        y = centred * rstd[:, None] * weight + bias
        tl.store(y_ptr + first * D + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_a_program"])
def _add_layer_norm_bwd_kernel(
    dy_ptr, d_total_ptr, total_ptr, weight_ptr,
    dx_ptr, d_residual_ptr, partial_ptr,
    rows, D, rows_a_program,
    stride_ym, stride_dm, stride_tm,
    eps,
    VECTOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d = d_total + rstd (g - mean(g) - n mean(g n)), g = dy * weight, n the normalised row.

    dx [rows, D] is d in its dtype, d_residual the same in another; partial [programs, 2, D] holds
    the sums of dy n and of dy over a program's rows. Those two, and d_total, may be None.
    """
    program = tl.program_id(0).to(tl.int64)
    start = program * rows_a_program
    end = tl.minimum(start + rows_a_program, rows)
    weight = _row(weight_ptr, D, BLOCK_D)
    offs_d = tl.max_contiguous(tl.arange(0, BLOCK_D), VECTOR)
    mask_d = (offs_d < D)[None, :]
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    # [BLOCK_M, BLOCK_D]; 64-bit numbers stay scalar
    out = offs_m * D + offs_d[None, :]
    # Sums over rows are made once, after the loop: here each place adds its own.
    d_weight = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    d_bias = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Two stages: the next rows are on their way to shared memory while these are worked on.
    for first in tl.range(start, end, BLOCK_M, num_stages=2):
        mask = (offs_m < end - first) & mask_d
        total_ptrs = total_ptr + first * stride_tm + (offs_m * stride_tm + offs_d[None, :])
        dy_ptrs = dy_ptr + first * stride_ym + (offs_m * stride_ym + offs_d[None, :])
        total = tl.load(total_ptrs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
        if d_total_ptr is not None:
            d_total_ptrs = d_total_ptr + first * stride_dm
            d_total_ptrs += offs_m * stride_dm + offs_d[None, :]
            d_total = tl.load(d_total_ptrs, mask=mask, other=0.0).to(tl.float32)
        # Chosen, so that no difference below is taken of a product before it is rounded: g less its
        # mean is 0 where a row is one number, and 1 / deviation is large there.
        g = tl.where(mask_d, dy * weight, 0.0)
        sum_total, sum_g = _two_sums(total, g)
        centred = tl.where(mask_d, total - (sum_total / D)[:, None], 0.0)
        sum_squares, sum_gc = _two_sums(centred * centred, g * centred)
        rstd = tl.rsqrt(sum_squares / D + eps)
        normal = centred * rstd[:, None]
        if partial_ptr is not None:
            d_weight += dy * normal
            d_bias += dy
        mean_gn = sum_gc / D * rstd
        d = rstd[:, None] * (g - (sum_g / D)[:, None] - normal * mean_gn[:, None])
        if d_total_ptr is not None:
            d += d_total
        tl.store(dx_ptr + first * D + out, d.to(dx_ptr.dtype.element_ty), mask=mask)
        if d_residual_ptr is not None:
            tl.store(
                d_residual_ptr + first * D + out, d.to(d_residual_ptr.dtype.element_ty), mask=mask
            )
    if partial_ptr is not None:
        partial_ptrs = partial_ptr + program * 2 * D + offs_d
        tl.store(partial_ptrs, tl.sum(d_weight, 0), mask=offs_d < D)
        tl.store(partial_ptrs + D, tl.sum(d_bias, 0), mask=offs_d < D)


def _vector(*streams: Tensor) -> int:
    """Columns next to each other in a thread: 16 bytes of the widest stream, which would
    otherwise touch each sector twice."""
    return 16 // max(stream.element_size() for stream in streams)


@launcher
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    """(normalised, x + residual), dense; the sum is None where there is no residual."""
    flat = rows_of(x)
    rows, d = flat.shape
    y = dense_like(x)
    total = None if residual is None else dense_like(residual)
    if not x.numel():
        return y, total
    stream = flat if residual is None else rows_of(residual)
    config = config_for(d, 16)
    # Several rows a program only where there are rows enough for every SM.
    walked = min(_FORWARD_ROWS, rows_a_program(rows, _FORWARD_PROGRAMS, 1, config.block_m))
    _add_layer_norm_fwd_kernel[(cdiv(rows, walked),)](
        flat, None if residual is None else stream, weight.contiguous(), bias.contiguous(),
        y, total,
        rows, d, walked,
        flat.stride(0), stream.stride(0),
        eps,
        VECTOR=_vector(flat, stream), BLOCK_M=config.block_m, BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )  # fmt: skip
    return y, total


@launcher
def backward(
    dy: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    eps: float,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (x, residual, weight, bias).

    x's is in dy's dtype; residual's in total's dtype, None where that is the same tensor; the
    parameters' are None where bias_dtype is.
    """
    flat, stream = rows_of(dy), rows_of(total)
    rows, d = flat.shape
    dx = dense_like(dy)
    d_residual = dense_like(total) if total.dtype != dy.dtype else None
    config = config_for(d, 16 if d > 512 else 8)
    # As many on one SM as on another, and all at once: a second wave would wait for the first.
    gpu = sms(flat.device)
    resident = max(1, min(_RESIDENT, rows // (_LEAST_ROWS * gpu)))
    walked = rows_a_program(rows, resident * gpu, _LEAST_ROWS // 2, config.block_m)
    programs = cdiv(rows, walked)
    partial = None
    if bias_dtype is not None:
        partial = flat.new_empty(programs, 2, d, dtype=torch.float32)
    if dy.numel():
        more = stream if d_total is None else rows_of(d_total)
        _add_layer_norm_bwd_kernel[(programs,)](
            flat, None if d_total is None else more, stream, weight.contiguous(),
            dx, d_residual, partial,
            rows, d, walked,
            flat.stride(0), more.stride(0), stream.stride(0),
            eps,
            VECTOR=_vector(flat, stream), BLOCK_M=config.block_m, BLOCK_D=config.block_d,
            num_warps=config.num_warps,
        )  # fmt: skip
    if partial is None:
        return dx, d_residual, None, None
    return dx, d_residual, *sum_partial(partial, weight.dtype, bias_dtype)
