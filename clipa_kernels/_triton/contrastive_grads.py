"""The gradient of a strip of logits, for both losses, and the products that end the backward.

    softmax    G = scale * weight * (2^(S - row shift) / row divisor + the same by column)
    sigmoid    G = sigmoid(S), less 1 on positives; the loss comes from the same tile
    dX = G Y of the strip's rows, dY += G' X over the strips

G is written in the features' dtype, with every factor, so that a 16-bit product is final; its
strip is all that is ever held of N x N. The sums over all logits (scale, bias, loss) leave a tile
as one number each and are added in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Case, arch, cdiv, pointer
from .contrastive_tiles import (
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

# Rows of a strip: its G is 2 R N bytes. Products of 4096 rows keep a library at full speed.
STRIP_ROWS = {2: 4096, 4: 2048}


@triton.jit
def _part_grads(
    cosine, scale, bias, row_shift, by_row, positive,
    cols_ptr, g_ptrs, stored,
    offs_m, offs_n, inside, N, first, begin, end, factor,
    SIGMOID: tl.constexpr, STORE_G: tl.constexpr,
):  # fmt: skip
    """G of a part of a tile, stored times factor; the sums of G, G * cosine, and the loss."""
    pair = is_positive(offs_m, offs_n, first, begin, end)
    loss = 0.0
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
        by_col = 1.0 / tl.load(cols_ptr + N + offs_n, mask=mask_n, other=1.0)
        g = tl.exp2(s - row_shift[:, None]) * by_row[:, None]
        g += tl.exp2(s - col_shift[None, :]) * by_col[None, :]
        g = tl.where(pair, positive[:, None], g)
    g = tl.where(inside, g, 0.0)
    if STORE_G:
        tl.store(g_ptrs, (g * factor).to(g_ptrs.dtype.element_ty), mask=stored)
    return tl.sum(tl.sum(g, 1), 0), tl.sum(tl.sum(g * cosine, 1), 0), loss


@triton.jit
def _contrastive_bwd_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr, rows_ptr, cols_ptr, d_loss_ptr,
    g_ptr, parts_ptr,
    row0, height, M, N, D, first, begin, end, part0, parts,
    stride_xm, stride_yn, stride_gm,
    weight,
    SIGMOID: tl.constexpr, STORE_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the strip of `height` rows from row0: G, and this tile's share of the sums.

    softmax: G = scale * weight * d_loss * (2^(S - row shift) / row divisor + the same by column),
    parts [1, tiles] the scale's gradient. sigmoid: G = sigmoid(S), negative on positives, and
    parts [3, tiles] of the loss, the scale's and the bias's gradient, without weight and scale.
    """
    HALF: tl.constexpr = BLOCK_N // 2
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
        by_row = 1.0 / tl.load(rows_ptr + M + offs_m, mask=mask_m, other=1.0)
        positive = tl.load(rows_ptr + 2 * M + offs_m, mask=mask_m, other=0.0)
        weight = weight * tl.load(d_loss_ptr)
        factor = scale * weight
    left, right = halves(cosine, BLOCK_M, BLOCK_N)
    plain, scaled, loss = 0.0, 0.0, 0.0
    for half in tl.static_range(2):
        quarters = halves(left if half == 0 else right, BLOCK_M, HALF)
        for quarter in tl.static_range(2):
            offs_n = start_n + half * HALF + quarter * (HALF // 2) + tl.arange(0, HALF // 2)
            g_ptrs = g_ptr + offs_s.to(tl.int64)[:, None] * stride_gm + offs_n[None, :]
            inside = (offs_s < height)[:, None] & (offs_n < N)[None, :]
            # The pitch, a multiple of 16, lets a store be whole where N is odd: zeros beyond N.
            stored = (offs_s < height)[:, None] & (offs_n < stride_gm)[None, :]
            sums = _part_grads(
                quarters[quarter], scale, bias, row_shift, by_row, positive,
                cols_ptr, g_ptrs, stored,
                offs_m, offs_n, inside, N, first, begin, end, factor, SIGMOID, STORE_G,
            )  # fmt: skip
            plain += sums[0]
            scaled += sums[1]
            loss += sums[2]
    part_ptr = parts_ptr + part0 + tl.program_id(0)
    if SIGMOID:
        tl.store(part_ptr, loss)
        tl.store(part_ptr + parts, scaled)
        tl.store(part_ptr + 2 * parts, plain)
    else:
        tl.store(part_ptr, scaled * weight)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As _strips.softmax_grads; G carries all factors, so the products are final."""
    weight = 0.5 / image.shape[0]
    stats = (scale, rows.contiguous(), cols.contiguous(), d_loss)
    kind = torch.float32 if wide else image.dtype
    d_image, d_text, parts = _strip_pass(image, text, scale, stats, pairs, wanted, weight, kind)
    return d_image, d_text, parts[0].sum() if wanted[2] else None


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
    stats = (bias, scale, scale, scale)
    d_image, d_text, parts = _strip_pass(
        image, text, scale, stats, pairs, wanted, None, torch.float32
    )
    loss, d_scale, d_bias = (parts.sum(1) * weight).unbind()
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
    stats: tuple[Tensor, Tensor, Tensor, Tensor],
    pairs: tuple[int, int, int],
    wanted: tuple[bool, ...],
    weight: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Strip by strip: G, then dX = G Y and dY += G' X in dtype; and the sums of every tile."""
    x, y = rowwise(image), rowwise(text)
    (m, d), n = x.shape, y.shape[0]
    config = config_for(d, x.element_size(), arch())
    strips = cdiv(m, STRIP_ROWS[x.element_size()])
    height = cdiv(cdiv(m, strips), config.block_m) * config.block_m
    tiles = cdiv(m, config.block_m) * cdiv(n, config.block_n)
    parts = scale.new_empty(1 if weight is not None else 3, tiles)
    store = wanted[0] or wanted[1]
    g = x.new_empty(min(height, m), cdiv(n, 16) * 16) if store else x.new_empty(1, 16)
    d_image = x.new_empty(m, d, dtype=dtype) if wanted[0] else None
    d_text, done = None, 0
    for row0 in range(0, m, height):
        strip = min(height, m - row0)
        grid = cdiv(strip, config.block_m) * cdiv(n, config.block_n)
        _contrastive_bwd_kernel[(grid,)](
            x, y, scale, *stats,
            g, parts,
            row0, strip, m, n, d, *pairs, done, tiles,
            x.stride(0), y.stride(0), g.stride(0),
            weight or 0.0,
            SIGMOID=weight is None, STORE_G=store,
            **constexprs(config, d),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        done += grid
        made = g[:strip, :n]
        if wanted[0]:
            _product(made, y, d_image[row0 : row0 + strip])
        if wanted[1] and strips == 1:
            d_text = _product(made.t(), x, x.new_empty(n, d, dtype=dtype))
        elif wanted[1]:
            d_text = _add_product(d_text, made.t(), x[row0 : row0 + strip])
    return d_image, None if d_text is None else d_text.to(dtype), parts


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b with fp32 accumulation, in out's dtype."""
    if out.dtype == a.dtype and (a.is_cuda or a.dtype == torch.float32):
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a.float() @ b.float())


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32, in place; None is zero."""
    if total is None:
        return _product(a, b, a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32))
    if a.dtype == torch.float32:
        return torch.addmm(total, a, b, out=total)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return total.addmm_(a.float(), b.float())


def cases() -> Iterator[Case]:
    """Every rung of the table with every variant of the kernel."""
    pointers = ("bias_ptr", "rows_ptr", "cols_ptr", "d_loss_ptr", "parts_ptr")
    sizes = ("row0", "height", "part0", "parts", "stride_gm")
    for dtype, width, archs in rungs():
        types = signature(dtype) | dict.fromkeys(pointers, "*fp32") | dict.fromkeys(sizes, "i32")
        types |= dict(g_ptr=pointer(dtype), weight="fp32")
        config = config_for(width, dtype.itemsize, archs[0])
        for sigmoid, store in ((False, True), (True, True), (False, False), (True, False)):
            name = f"{'sigmoid' if sigmoid else 'backward'}{'' if store else ', sums only,'}"
            yield Case(
                f"{name} {pointer(dtype)[1:]} D={width}",
                _contrastive_bwd_kernel,
                types,
                dict(SIGMOID=sigmoid, STORE_G=store) | constexprs(config, width),
                config.num_warps,
                config.num_stages,
                archs,
            )
