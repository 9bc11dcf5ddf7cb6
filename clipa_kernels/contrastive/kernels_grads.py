"""The gradient of a strip of logits, for both losses, and the products that end the backward.

    softmax    G = scale * weight * (2^(S - row shift) / row divisor + the same by column)
    sigmoid    G = sigmoid(S), less 1 on positives; the loss comes from the same tile
    dX = G Y of the strip's rows, dY += G' X over the strips

dY of several strips is summed in fp32. In 16 bits the last strip's product is a kernel here: no
library product adds to an fp32 sum and writes 16 bits, and a cast would be a launch and a pass.
G is written in the features' dtype, with every factor, so that a 16-bit product is final; its
strip is all that is ever held of N x N. The softmax's scale gradient comes from the forward's
statistics; the sigmoid's sums over all logits (loss, scale, bias) leave a tile as one number each
and are added in a fixed order. Over a group G is without the scale, whose gradient is sum(X * dX).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import arch, cdiv, launcher
from .kernels_tiles import (
    LOG2E,
    PART,
    PLACES,
    config_for,
    constexprs,
    is_positive,
    log1p,
    narrow_parts,
    products,
    rowwise,
)

# Rows of a strip: its G is 2 R N bytes. Products of 4096 rows keep a library at full speed.
STRIP_ROWS = {2: 4096, 4: 2048}
# Before, the sum that a 16-bit product is added to must have 16 bits as well.
_ADDS_TO_FP32 = torch.__version__ >= (2, 10)


@triton.jit
def _softmax_part(
    cosine, scale, row_shift, by_row, positive, pair, cols_ptr, offs_n, N, PAIRED: tl.constexpr
):
    """G of a part of a tile, without factors."""
    mask_n = offs_n < N
    s = (scale * LOG2E) * cosine
    col_shift = tl.load(cols_ptr + offs_n, mask=mask_n, other=0.0)
    if PAIRED:
        by_col = 1.0 / tl.load(cols_ptr + N + offs_n, mask=mask_n, other=1.0)
        g = tl.exp2(s - row_shift[:, None]) * by_row[:, None]
        g += tl.exp2(s - col_shift[None, :]) * by_col[None, :]
    else:
        g = tl.exp2(s - row_shift[:, None]) + tl.exp2(s - col_shift[None, :])
    return tl.where(pair, positive[:, None], g)


@triton.jit
def _sigmoid_part(cosine, scale, bias, pair, inside):
    """(G of a part of a tile, the sum of its losses)."""
    s = scale * cosine + bias
    s = tl.where(pair, -s, s)
    # At most 1, so neither the loss nor the quotient below overflows.
    e = tl.exp(-tl.abs(s))
    # Over both axes at once: one after the other, Triton 3.6 fails on sm_100.
    loss = tl.sum(tl.where(inside, tl.maximum(s, 0.0) + log1p(e), 0.0))
    g = tl.where(s >= 0.0, 1.0, e) / (1.0 + e)
    return tl.where(pair, -g, g), loss


@triton.jit(do_not_specialize=[*PLACES, "part0"])
def _contrastive_bwd_kernel(
    x_ptr, y_ptr, scale_ptr,
    g_ptr,
    row0, height, M, N, D, first, begin, end, part0,
    stride_xm, stride_yn, stride_gm,
    PAIRED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    rows_ptr=None, cols_ptr=None, d_loss_ptr=None, weight=None, slope_ptr=None, d_scale_ptr=None,
    bias_ptr=None, sums_ptr=None,
):  # fmt: skip
    """One tile of the strip of `height` rows from row0; G is not stored where g_ptr is None.

    softmax, from rows to d_scale: G = weight * d_loss * (2^(S - row shift) / row divisor + the same
    by column), PAIRED, else without divisors; with a slope, which makes d_scale, times scale.
    sigmoid, bias and sums: G = sigmoid(S), negative on positives; sums [tiles, 3], the strip's from
    part0 on, a tile's share of the loss, the scale's and the bias's gradient, without weight and
    scale.
    """
    # Down the strip first: its rows stay in the L2 cache while the columns pass once.
    tiles_m = tl.cdiv(height, BLOCK_M)
    offs_s = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(0) // tiles_m * BLOCK_N
    offs_m = row0 + offs_s
    # [BLOCK_M, BLOCK_N]
    cosine = products(
        x_ptr, y_ptr, tl.minimum(offs_m, M - 1),
        tl.minimum(start_n + tl.arange(0, BLOCK_N), N - 1), D,
        stride_xm, stride_yn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    by_row, factor = 0.0, 1.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr)
    else:
        mask_m = offs_s < height
        row_shift = tl.load(rows_ptr + offs_m, mask=mask_m, other=0.0)
        if PAIRED:
            by_row = 1.0 / tl.load(rows_ptr + M + offs_m, mask=mask_m, other=1.0)
        column = offs_m + first  # of the positive: off the diagonal none is loaded
        mask_p = mask_m & (column >= start_n) & (column < start_n + BLOCK_N)
        positive = tl.load(rows_ptr + 2 * M + offs_m, mask=mask_p, other=0.0)
        d_loss = tl.load(d_loss_ptr)
        factor = weight * d_loss
        if slope_ptr is not None:
            factor = scale * factor
            # The forward knows the slope: one program of the first strip multiplies it.
            if (tl.program_id(0) == 0) & (row0 == 0):
                tl.store(d_scale_ptr, tl.load(slope_ptr) * d_loss)
    parts = narrow_parts(cosine, BLOCK_M, BLOCK_N, PART)
    loss, d_scale, d_bias = 0.0, 0.0, 0.0
    for part in tl.static_range(BLOCK_N // PART):
        offs_n = start_n + part * PART + tl.arange(0, PART)
        if g_ptr is not None:
            g_ptrs = g_ptr + offs_s.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
            # The pitch, a multiple of 16, lets a store be whole where N is odd: zeros beyond N.
            stored = (offs_s < height)[:, None] & (offs_n < stride_gm)[None, :]
        inside = (offs_s < height)[:, None] & (offs_n < N)[None, :]
        pair = is_positive(offs_m, offs_n, first, begin, end)
        if bias_ptr is not None:
            g, part_loss = _sigmoid_part(parts[part], scale, bias, pair, inside)
        else:
            g = _softmax_part(
                parts[part], scale, row_shift, by_row, positive, pair, cols_ptr, offs_n, N, PAIRED
            )
        # A logit beyond M or N is 0, its G is not: it would count in sums and the last product.
        g = tl.where(inside, g, 0.0)
        if g_ptr is not None:
            tl.store(g_ptrs, (g * factor).to(g_ptr.dtype.element_ty), mask=stored)
        if sums_ptr is not None:
            loss += part_loss
            d_scale += tl.sum(g * parts[part])
            d_bias += tl.sum(g)
    if sums_ptr is not None:
        # A place for each tile, and no atomics: torch adds them in a fixed order.
        part_ptr = sums_ptr + 3 * (part0 + tl.program_id(0))
        tl.store(part_ptr, loss)
        tl.store(part_ptr + 1, d_scale)
        tl.store(part_ptr + 2, d_bias)


@triton.jit
def _last_product_kernel(
    g_ptr, x_ptr, total_ptr,
    out_ptr,
    row0, height, N, D,
    stride_gm, stride_xm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = total + G' X, both [N, D] dense; G and X of the strip of `height` rows from row0."""
    tiles_n = tl.cdiv(D, BLOCK_N)
    start_m = tl.program_id(0) // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
    g_ptrs = g_ptr + start_m + (offs_m[:, None] + offs_k[None, :] * stride_gm)
    x_ptrs = x_ptr + tl.cast(row0, tl.int64) * stride_xm + start_n
    x_ptrs += offs_k[:, None] * stride_xm + offs_n[None, :]
    mask_m = offs_m < stride_gm - start_m  # up to the pitch, where G is 0: whole loads
    mask_n = offs_n < D - start_n
    # [BLOCK_M, BLOCK_N]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, height, BLOCK_K):
        mask_k = offs_k < height - k
        g = tl.load(g_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(g, x, acc)
        g_ptrs += BLOCK_K * stride_gm
        x_ptrs += BLOCK_K * stride_xm
    parts = narrow_parts(acc, BLOCK_M, BLOCK_N, PART)
    # 64 bits for the tile's corner alone: offsets within a tile fit in 32.
    place = tl.cast(start_m, tl.int64) * D + start_n
    for part in tl.static_range(BLOCK_N // PART):
        # Four columns a thread, 16 bytes of the total: of eight, a load takes half of each sector.
        offs_p = part * PART + tl.max_contiguous(tl.arange(0, PART), 4)
        offs = offs_m[:, None] * D + offs_p[None, :]
        mask = (offs_m < N - start_m)[:, None] & (offs_p < D - start_n)[None, :]
        out = parts[part] + tl.load(total_ptr + place + offs, mask=mask, other=0.0)
        tl.store(out_ptr + place + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@launcher
def softmax_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    d_loss: Tensor,
    pairs: tuple[int, int, int],
    wanted: tuple[bool, bool, bool],
    wide: bool = False,
    slope: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As plain.softmax_grads; rows, cols and the slope, which is the scale's gradient, are those of
    softmax_forward; G carries all factors, so the products are final. wide: without a slope, rows
    and cols of plain.softmax_divisors."""
    if not (wide or wanted[0] or wanted[1]):
        return None, None, slope * d_loss
    stats = dict(rows_ptr=rows.contiguous(), cols_ptr=cols.contiguous(), d_loss_ptr=d_loss)
    stats |= dict(weight=0.5 / image.shape[0])
    if not wide:
        d_scale = torch.empty_like(scale)
        stats |= dict(PAIRED=image.dtype.itemsize == 4, slope_ptr=slope, d_scale_ptr=d_scale)
        grads = _strip_pass(image, text, scale, pairs, wanted, image.dtype, **stats)
        return *grads, d_scale if wanted[2] else None
    # The scale's gradient is read off a product made anyway.
    made = wanted[0] or not wanted[1], wanted[1]
    d_image, d_text = _strip_pass(
        image, text, scale, pairs, made, torch.float32, PAIRED=True, **stats
    )
    d_scale = None
    if wanted[2]:
        d_scale = (image * d_image if made[0] else text * d_text).sum()
    return (
        d_image.mul_(scale) if wanted[0] else None,
        d_text.mul_(scale) if wanted[1] else None,
        d_scale,
    )


@launcher
def sigmoid_pass(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: tuple[int, int, int],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As plain.sigmoid_pass: loss and gradients, those of features in fp32."""
    weight = 1 / image.shape[0]
    config = config_for(image.shape[1], image.element_size(), arch())
    tiles = cdiv(image.shape[0], config.block_m) * cdiv(text.shape[0], config.block_n)
    sums = scale.new_empty(tiles, 3)
    d_image, d_text = _strip_pass(
        image, text, scale, pairs, wanted, torch.float32,
        PAIRED=False, bias_ptr=bias, sums_ptr=sums,
    )  # fmt: skip
    loss, d_scale, d_bias = (sums.sum(0) * weight).unbind()
    factor = scale * weight
    return (
        # An operator must not return views of one tensor.
        loss.clone(),
        d_image.mul_(factor) if wanted[0] else None,
        d_text.mul_(factor) if wanted[1] else None,
        d_scale.clone() if wanted[2] else None,
        d_bias.clone() if wanted[3] else None,
    )


def _strip_pass(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairs: tuple[int, int, int],
    wanted: tuple[bool, ...],
    dtype: torch.dtype,
    **own: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Strip by strip: G, then dX = G Y and dY += G' X in dtype, where wanted. own: the arguments
    of the kernel that are one loss's."""
    x, y = rowwise(image), rowwise(text)
    (m, d), n = x.shape, y.shape[0]
    config = config_for(d, x.element_size(), arch())
    strips = cdiv(m, STRIP_ROWS[x.element_size()])
    # Strips of nearly one height in whole tiles: the last is no sliver.
    height = cdiv(cdiv(m, strips), config.block_m) * config.block_m
    tiles_n, pitch = cdiv(n, config.block_n), cdiv(n, 16) * 16
    # One buffer for all strips: the next is written after the products of the last are done.
    g = x.new_empty(min(height, m), pitch) if wanted[0] or wanted[1] else None
    d_image = x.new_empty(m, d, dtype=dtype) if wanted[0] else None
    d_text = None
    for row0 in range(0, m, height):
        strip = min(height, m - row0)
        _contrastive_bwd_kernel[(cdiv(strip, config.block_m) * tiles_n,)](
            x, y, scale,
            g,
            row0, strip, m, n, d, *pairs, row0 // config.block_m * tiles_n,
            x.stride(0), y.stride(0), pitch,
            **own, **constexprs(config, d, x.element_size()),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if wanted[0]:
            _product(g[:strip, :n], y, d_image[row0 : row0 + strip])
        if wanted[1]:
            last = row0 + strip == m
            d_text = _text_product(d_text, g[:strip], n, x, row0, dtype if last else torch.float32)
    return d_image, d_text


def _text_product(
    total: Tensor | None, g: Tensor, n: int, x: Tensor, row0: int, dtype: torch.dtype
) -> Tensor:
    """total + G' X in dtype, in place where that is total's; None is 0. g: the strip from row0,
    [rows, pitch] for n texts."""
    height, d = g.shape[0], x.shape[1]
    g_t, strip = g[:, :n].t(), x[row0 : row0 + height]
    if total is None:
        total = x.new_empty(n, d, dtype=dtype)
        _product(g_t, strip, total)
    elif total.dtype == dtype:
        _add_product(g_t, strip, total)
    else:
        config, out = config_for(d, x.element_size(), arch()), x.new_empty(n, d, dtype=dtype)
        _last_product_kernel[(cdiv(n, config.block_m) * cdiv(d, config.block_n),)](
            g, x, total,
            out,
            row0, height, n, d,
            g.stride(0), x.stride(0),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return out
    return total


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b with fp32 accumulation, in out's dtype."""
    if out.dtype == a.dtype and (a.is_cuda or a.dtype == torch.float32):
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, out in fp32."""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda and _ADDS_TO_FP32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        product = torch.empty_like(out)
        _product(a, b, product)
        out.add_(product)
