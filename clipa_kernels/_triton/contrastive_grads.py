"""The gradient of a strip of logits, for both losses, and the products that end the backward.

    softmax    G = scale * weight * (2^(S - row shift) / row divisor + the same by column)
    sigmoid    G = sigmoid(S), less 1 on positives; the loss comes from the same tile
    dX = G Y of the strip's rows, dY += G' X over the strips

dY of several strips is summed in fp32; in 16 bits the last strip's kernel rounds the sum so far,
and its product adds to that, in the features' dtype: no launch and no pass for a cast.
G is written in the features' dtype, with every factor, so that a 16-bit product is final; its
strip is all that is ever held of N x N. The softmax's scale gradient comes from the forward's
statistics; the sigmoid's sums over all logits (loss, scale, bias) leave a tile as one number each
and are added in a fixed order. Over a group G is without the scale, whose gradient is sum(X * dX).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Case, arch, cdiv, pointer
from .contrastive_tiles import (
    LOG2E,
    PART,
    config_for,
    constexprs,
    is_positive,
    log1p,
    narrow_parts,
    products,
    rowwise,
    rungs,
    signature,
)

# Rows of a strip: its G is 2 R N bytes. Products of 4096 rows keep a library at full speed.
STRIP_ROWS = {2: 4096, 4: 2048}
_SHARE = tl.constexpr(1024)  # elements that a program rounds at a time: 16 bytes a thread


@triton.jit
def _part_grads(
    cosine, scale, bias, row_shift, by_row, positive,
    cols_ptr, g_ptrs, stored,
    offs_m, offs_n, inside, N, first, begin, end, factor,
    SIGMOID: tl.constexpr, PAIRED: tl.constexpr, STORE_G: tl.constexpr,
):  # fmt: skip
    """G of a part of a tile, stored times factor; the sigmoid's sums of loss, G * cosine and G."""
    pair = is_positive(offs_m, offs_n, first, begin, end)
    if SIGMOID:
        s = scale * cosine + bias
        s = tl.where(pair, -s, s)
        e = tl.exp(-tl.abs(s))
        loss = tl.sum(tl.sum(tl.where(inside, tl.maximum(s, 0.0) + log1p(e), 0.0), 1), 0)
        g = tl.where(s >= 0.0, 1.0, e) / (1.0 + e)
        g = tl.where(pair, -g, g)
    else:
        mask_n = offs_n < N
        s = (scale * LOG2E) * cosine
        col_shift = tl.load(cols_ptr + offs_n, mask=mask_n, other=0.0)
        if PAIRED:
            by_col = 1.0 / tl.load(cols_ptr + N + offs_n, mask=mask_n, other=1.0)
            g = tl.exp2(s - row_shift[:, None]) * by_row[:, None]
            g += tl.exp2(s - col_shift[None, :]) * by_col[None, :]
        else:
            g = tl.exp2(s - row_shift[:, None]) + tl.exp2(s - col_shift[None, :])
        g = tl.where(pair, positive[:, None], g)
    g = tl.where(inside, g, 0.0)
    if STORE_G:
        tl.store(g_ptrs, (g * factor).to(g_ptrs.dtype.element_ty), mask=stored)
    if SIGMOID:
        return loss, tl.sum(tl.sum(g * cosine, 1), 0), tl.sum(tl.sum(g, 1), 0)
    return 0.0, 0.0, 0.0


@triton.jit
def _round_share(total_ptr, rounded_ptr, size):
    """rounded = total [size] in its dtype, all programs together."""
    step = tl.num_programs(0).to(tl.int64) * _SHARE
    for start in range(tl.program_id(0).to(tl.int64) * _SHARE, size, step):
        offs = start + tl.arange(0, _SHARE)
        total = tl.load(total_ptr + offs, mask=offs < size, other=0.0)
        tl.store(rounded_ptr + offs, total.to(rounded_ptr.dtype.element_ty), mask=offs < size)


@triton.jit
def _contrastive_bwd_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, rows_ptr, cols_ptr, slope_ptr, d_loss_ptr, total_ptr,
    g_ptr, sums_ptr, rounded_ptr,
    row0, height, M, N, D, first, begin, end, part0, tiles, size,
    stride_xm, stride_yn, stride_gm,
    weight,
    SIGMOID: tl.constexpr, PAIRED: tl.constexpr, SCALED: tl.constexpr, STORE_G: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the strip of `height` rows from row0; ROUND, also rounded = total [size].

    softmax: G = weight * d_loss * (2^(S - row shift) / row divisor + the same by column), PAIRED,
    else without divisors; SCALED, times scale, and sums is the scale's gradient, slope * d_loss.
    sigmoid: G = sigmoid(S), negative on positives, and sums [3, tiles] this tile's share of the
    loss, the scale's and the bias's gradient, without weight and scale.
    """
    # Down the strip first: its rows stay in the L2 cache while the columns pass once.
    tiles_m = tl.cdiv(height, BLOCK_M)
    offs_s = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = tl.program_id(0) // tiles_m * BLOCK_N
    offs_m = row0 + offs_s
    # [BLOCK_M, BLOCK_N]
    cosine = products(
        x_ptr, y_ptr, offs_m, start_n + tl.arange(0, BLOCK_N), row0 + height, N, D,
        stride_xm, stride_yn, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    scale = tl.load(scale_ptr)
    bias, row_shift, by_row, positive, factor = 0.0, 0.0, 0.0, 0.0, 1.0
    if SIGMOID:
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
        if SCALED:
            factor = scale * factor
            if (tl.program_id(0) == 0) & (row0 == 0):
                tl.store(sums_ptr, tl.load(slope_ptr) * d_loss)
    parts = narrow_parts(cosine, BLOCK_M, BLOCK_N)
    loss, d_scale, d_bias = 0.0, 0.0, 0.0
    for part in tl.static_range(BLOCK_N // PART):
        offs_n = start_n + part * PART + tl.arange(0, PART)
        g_ptrs = g_ptr + offs_s.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
        inside = (offs_s < height)[:, None] & (offs_n < N)[None, :]
        # The pitch, a multiple of 16, lets a store be whole where N is odd: zeros beyond N.
        stored = (offs_s < height)[:, None] & (offs_n < stride_gm)[None, :]
        sums = _part_grads(
            parts[part], scale, bias, row_shift, by_row, positive,
            cols_ptr, g_ptrs, stored,
            offs_m, offs_n, inside, N, first, begin, end, factor, SIGMOID, PAIRED, STORE_G,
        )  # fmt: skip
        loss += sums[0]
        d_scale += sums[1]
        d_bias += sums[2]
    if SIGMOID:
        part_ptr = sums_ptr + part0 + tl.program_id(0)
        tl.store(part_ptr, loss)
        tl.store(part_ptr + tiles, d_scale)
        tl.store(part_ptr + 2 * tiles, d_bias)
    if ROUND:
        _round_share(total_ptr, rounded_ptr, size)


def softmax_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    slope: Tensor,
    d_loss: Tensor,
    pairs: tuple[int, int, int],
    wanted: tuple[bool, bool, bool],
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As _strips.softmax_grads, rows, cols and slope of softmax_forward; G carries all factors, so
    the products are final. wide: without a slope, rows and cols of _strips.softmax_divisors."""
    weight = 0.5 / image.shape[0]
    if not (wide or wanted[0] or wanted[1]):
        return None, None, slope * d_loss
    stats = (scale, rows.contiguous(), cols.contiguous(), scale if wide else slope, d_loss)
    if not wide:
        form = (image.dtype.itemsize == 4, True)
        grads = _strip_pass(image, text, scale, stats, pairs, wanted, weight, image.dtype, form)
        return *grads[:2], grads[2] if wanted[2] else None
    # The scale's gradient is read off a product made anyway.
    made, form = (wanted[0] or not wanted[1], wanted[1]), (True, False)
    d_image, d_text, _ = _strip_pass(
        image, text, scale, stats, pairs, made, weight, torch.float32, form
    )
    d_scale = None
    if wanted[2]:
        d_scale = (image * d_image if made[0] else text * d_text).sum()
    return (
        d_image.mul_(scale) if wanted[0] else None,
        d_text.mul_(scale) if wanted[1] else None,
        d_scale,
    )


def sigmoid_pass(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: tuple[int, int, int],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As _strips.sigmoid_pass: loss and gradients, those of features in fp32."""
    weight = 1 / image.shape[0]
    stats = (bias, scale, scale, scale, scale)
    d_image, d_text, sums = _strip_pass(
        image, text, scale, stats, pairs, wanted, None, torch.float32
    )
    loss, d_scale, d_bias = (sums.sum(1) * weight).unbind()
    factor = scale * weight
    return (
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
    stats: tuple[Tensor, ...],
    pairs: tuple[int, int, int],
    wanted: tuple[bool, ...],
    weight: float | None,
    dtype: torch.dtype,
    form: tuple[bool, bool] = (False, False),
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Strip by strip: G, then dX = G Y and dY += G' X in dtype; and the kernel's sums. weight None:
    the sigmoid's; form: the softmax's PAIRED and SCALED."""
    x, y = rowwise(image), rowwise(text)
    (m, d), n = x.shape, y.shape[0]
    config = config_for(d, x.element_size(), arch())
    strips = cdiv(m, STRIP_ROWS[x.element_size()])
    height = cdiv(cdiv(m, strips), config.block_m) * config.block_m
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    sums = torch.empty_like(scale) if weight is not None else scale.new_empty(3, tiles)
    store = wanted[0] or wanted[1]
    g = x.new_empty(min(height, m), cdiv(n, 16) * 16) if store else x.new_empty(1, 16)
    d_image = x.new_empty(m, d, dtype=dtype) if wanted[0] else None
    d_text, done = None, 0
    for row0 in range(0, m, height):
        strip, total = min(height, m - row0), d_text
        kind = dtype if row0 + strip == m else torch.float32
        rounds = total is not None and total.dtype != kind
        if wanted[1] and (total is None or rounds):
            d_text = x.new_empty(n, d, dtype=kind)
        grid = cdiv(strip, config.block_m) * cdiv(n, config.block_n)
        _contrastive_bwd_kernel[(grid,)](
            x, y, scale, *stats, total if rounds else scale,
            g, sums, d_text if rounds else g,
            row0, strip, m, n, d, *pairs, done, tiles, n * d,
            x.stride(0), y.stride(0), g.stride(0),
            weight or 0.0,
            SIGMOID=weight is None, PAIRED=form[0], SCALED=form[1], STORE_G=store,
            ROUND=rounds, **constexprs(config, d),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        done += grid
        made = g[:strip, :n]
        if wanted[0]:
            _product(made, y, d_image[row0 : row0 + strip])
        if wanted[1]:
            product = _product if total is None else _add_product
            product(made.t(), x[row0 : row0 + strip], d_text)
    return d_image, d_text, sums


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b with fp32 accumulation, in out's dtype."""
    if out.dtype == a.dtype and (a.is_cuda or a.dtype == torch.float32):
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a.float() @ b.float())


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b with fp32 accumulation, in out's dtype."""
    if out.dtype == a.dtype and (a.is_cuda or a.dtype == torch.float32):
        torch.addmm(out, a, b, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.addmm(out.float(), a.float(), b.float()))


def cases() -> Iterator[Case]:
    """Every rung of the table with every variant of the kernel."""
    pointers = ("bias_ptr", "rows_ptr", "cols_ptr", "slope_ptr", "d_loss_ptr", "total_ptr")
    pointers += ("sums_ptr",)
    sizes = ("row0", "height", "part0", "tiles", "size", "stride_gm")
    for dtype, width, archs in rungs():
        types = signature(dtype) | dict.fromkeys(pointers, "*fp32") | dict.fromkeys(sizes, "i32")
        types |= dict(g_ptr=pointer(dtype), rounded_ptr=pointer(dtype), weight="fp32")
        config = config_for(width, dtype.itemsize, archs[0])
        for name, sigmoid, scaled, store, rounds in (
            ("backward", False, True, True, False),
            ("backward, last strip,", False, True, True, True),
            ("backward over a group", False, False, True, False),
            ("sigmoid", True, False, True, False),
            ("sigmoid, sums only,", True, False, False, False),
        ):
            if rounds and dtype == torch.float32:
                continue
            paired = not sigmoid and (dtype == torch.float32 or not scaled)
            form = dict(SIGMOID=sigmoid, PAIRED=paired, SCALED=scaled, STORE_G=store, ROUND=rounds)
            yield Case(
                f"{name} {pointer(dtype)[1:]} D={width}",
                _contrastive_bwd_kernel,
                types,
                form | constexprs(config, width),
                config.num_warps,
                config.num_stages,
                archs,
            )
