"""The logits tile by tile, in plain torch: what the two contrastive losses run without a kernel.

A tile of logits is made, used and dropped; beside the features and their gradients only vectors
live through a pass. Logits are kept in bits (natural logits times log2 e): exp2 costs a quarter of
exp on CPUs, and sums move between whole shifts without rounding.

Positives are kept apart from negatives. With n the sum over a row's negatives and p its positive's
term, the loss is log(1 + n / p) and the positive's gradient -n / (n + p): as exact where a pair
is nearly sure as elsewhere, and duplicates cancel to the last bit.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Rows and columns of a tile. On CPUs it fits the L2 cache, and sums of 384 products keep fp32's
# rounding at that of a blocked BLAS; on devices 64 MB of logits make few launches.
_CPU_TILE, _DEVICE_TILE = (384, 384), (2048, 8192)
# Tiles whose logits all lie within +-60 bits need no shift: their sums stay inside fp32.
_UNSHIFTED_BITS = 60.0
_SAFE_EXP_LOGIT = 60.0
# Below this many multiplications the call costs more than it saves.
_ONEDNN_PRODUCTS = 1 << 21


class Pairs(NamedTuple):
    """Which logits are positives: those of row i, from begin to end, and column first + i."""

    first: int
    begin: int
    end: int


def compute_dtype(features: Tensor) -> torch.dtype:
    """fp64 for fp64 features, fp32 for all others."""
    return torch.promote_types(features.dtype, torch.float32)


def softmax_forward(
    image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of paired features, and rows [3, M], cols [2, M] and slope for softmax_grads."""
    rows, cols = softmax_stats(image, text, scale, Pairs(0, 0, len(image)))
    return softmax_loss(rows, cols), *softmax_divisors(rows, cols), scale.new_empty(0)


def softmax_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """Sums over the negatives of image [M, E] against text [N, E].

    Returns rows [3, M] = (shift, sum of 2^(logit - shift), positive logit, if it is here) and
    cols [2, N] = (shift, sum). Without a negative the sum is 0.
    """
    x, y = _operands(image, text)
    rows = torch.empty(3, x.shape[0], dtype=scale.dtype, device=x.device)
    cols = torch.empty(2, y.shape[0], dtype=scale.dtype, device=x.device)
    tile_rows, tile_cols = _tile_shape(x, y)
    for j in range(0, y.shape[0], tile_cols):
        col = slice(j, j + tile_cols)
        for i in range(0, x.shape[0], tile_rows):
            row = slice(i, i + tile_rows)
            tile = _logits(x[row], y[col], scale)
            positive, at = _positives(tile, pairs, i, j)
            rows[2, at] = positive
            unshifted = _needs_no_shift(tile)
            row_shift, row_sum, col_shift, col_sum = _tile_sums(tile, positive, unshifted)
            merge(rows[:2, row], row_shift, row_sum, is_first=j == 0)
            merge(cols[:, col], col_shift, col_sum, is_first=i == 0)
    return rows, cols


def softmax_loss(rows: Tensor, cols: Tensor) -> Tensor:
    """Mean over pairs of the two cross-entropies; cols [2, M] are those of the rows' partners."""
    positive = rows[2]
    # log(n / p), and NaN, not a loss of 0, where the positive is infinite.
    by_row = ((rows[0] - positive) * LN_2).add_(rows[1].log()).add_(positive * 0)
    by_col = ((cols[0] - positive) * LN_2).add_(cols[1].log())
    return (F.logsigmoid(-by_row).sum() + F.logsigmoid(-by_col).sum()) / (-2 * rows.shape[1])


def softmax_divisors(
    rows: Tensor, cols: Tensor, d_loss: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """What softmax_grads takes, out of the statistics; cols [2, M] as in softmax_loss.

    d_loss: where each process has its own, it must travel with the columns, in their divisors.
    """
    positive = rows[2]
    by_row = ((positive - rows[0]).exp2_() + rows[1]) / d_loss
    by_col = ((positive - cols[0]).exp2_() + cols[1]) / d_loss
    d_positive = -(rows[1] / by_row + cols[1] / by_col)
    return torch.stack([rows[0], by_row, d_positive]), torch.stack([cols[0], by_col])


def softmax_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    rows: Tensor,
    cols: Tensor,
    slope: Tensor,
    d_loss: Tensor,
    pairs: Pairs,
    wanted: tuple[bool, bool, bool],
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale where that of the logit of a negative pair is
    d_loss / 2M * (2^(logit - row shift) / row divisor + 2^(logit - col shift) / col divisor).

    rows [3, M] = (shift, divisor, gradient of the positive logit); cols [2, N] = (shift, divisor).
    slope: [0], unused: here the scale's gradient is read off a product, by kernels off the forward.
    wide: in fp32 (fp64), not yet in the features' dtype.
    """

    def tile_gradient(tile: Tensor, row: slice, col: slice, i: int, j: int) -> Tensor:
        _divide(tile, rows[:, row], cols[:, col], _needs_no_shift(tile))
        _positives(tile, pairs, i, j)[0].zero_()
        return tile

    weight = d_loss / (2 * len(image))
    grads = _feature_grads(image, text, scale, tile_gradient, rows[2], pairs, wanted, weight)
    return grads if wide else _narrow(grads, image.dtype)


def fits_one_tile(image: Tensor) -> bool:
    """Whether the logits of these features with as many texts are one tile, for softmax_pass."""
    return image.shape[0] <= min(_CPU_TILE if image.is_cpu else _DEVICE_TILE)


def softmax_pass(
    image: Tensor, text: Tensor, scale: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The contrastive loss and its gradients, in fp32 (fp64), out of one tile made once."""
    x, y = _operands(image, text)
    tile = _logits(x, y, scale)
    positive = tile.diagonal().clone()
    unshifted = _needs_no_shift(tile)
    negatives = tile if unshifted else tile.clone()
    row_shift, row_sum, col_shift, col_sum = _tile_sums(negatives, negatives.diagonal(), unshifted)
    shifts, sums = torch.stack([row_shift, col_shift]), torch.stack([row_sum, col_sum])
    excess = (shifts.view(2, -1) - positive).mul_(LN_2).add_(sums.log()).add_(positive * 0)
    loss = F.logsigmoid(-excess).sum() / (-2 * len(x))
    if not any(wanted):
        return loss, None, None, None
    divisors = (positive - shifts.view(2, -1)).exp2_().add_(sums).mul_(2 * len(x))
    if unshifted:
        by_col = tile / divisors[1]
        tile.div_(divisors[0, :, None]).add_(by_col)
    else:
        _divide(tile, (row_shift, divisors[0]), (col_shift, divisors[1]), unshifted)
        tile.diagonal().zero_()
    tile = tile.to(x.dtype)
    d_positive = (sums / divisors).sum(0).neg_()
    d_image = _matmul(tile, y) if wanted[0] or not wanted[1] else None
    d_text = _transposed_matmul(tile, x) if wanted[1] else None
    weights = 1.0 if y.dtype.itemsize == 2 else LN_2, 1.0
    pairs = Pairs(0, 0, len(x))
    return loss, *_finish(x, y, d_image, d_text, d_positive, scale, pairs, wanted, weights)


def sigmoid_pass(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """sum_ij softplus(-label_ij logit_ij) / M and its gradients for image, text, scale and bias,
    in fp32 (fp64).

    The sigmoid needs no row statistics, so one pass gives both and no tile is made twice.
    """
    total = torch.zeros((), dtype=torch.float64, device=image.device)
    d_bias = torch.zeros_like(total)
    d_positive = torch.zeros(image.shape[0], dtype=scale.dtype, device=image.device)

    def tile_gradient(tile: Tensor, row: slice, col: slice, i: int, j: int) -> Tensor:
        positive, at = _positives(tile.add_(bias), pairs, i, j)
        positive.neg_()
        if tile.is_cpu and tile.amax().item() <= _SAFE_EXP_LOGIT:
            power = tile.mul_(LOG2_E).exp2_()
            total.add_(torch.log1p(power).sum())
            tile = power.div_(power + 1) if any(wanted) else power
        else:
            total.sub_(F.logsigmoid(-tile).sum())
            tile.sigmoid_()
        d_positive[at] = -positive
        positive.zero_()
        if wanted[3]:
            d_bias.add_(tile.sum())
        return tile

    weight = 1 / image.shape[0]
    # Natural logits here: a bias in bits would round all alike.
    grads = _feature_grads(
        image, text, scale, tile_gradient, d_positive, pairs, wanted[:3], weight, unit=1.0
    )
    d_bias = (d_bias.add_(d_positive.sum()) * weight).to(scale.dtype) if wanted[3] else None
    return (total * weight).to(scale.dtype), *grads, d_bias


def _feature_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    tile_gradient: Callable[[Tensor, slice, slice, int, int], Tensor],
    d_positive: Tensor,
    pairs: Pairs,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float,
    unit: float = LOG2_E,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX = s G Y, dY = s G' X and ds = sum(X * G Y) over all tiles times weight, where wanted."""
    # The scale's gradient comes from a product made anyway; a locked tower's half is skipped.
    make_image, make_text = wanted[0] or (wanted[2] and not wanted[1]), wanted[1]
    x, y = _operands(image, text, unit)
    kind = {"dtype": scale.dtype, "device": x.device}
    d_image = torch.empty(x.shape, **kind) if make_image else None
    d_text = torch.empty(y.shape, **kind) if make_text else None
    tile_rows, tile_cols = _tile_shape(x, y)
    strips = range(0, x.shape[0], tile_rows)
    x_t = [x[i : i + tile_rows].t().contiguous() for i in strips] if make_text else []
    for j in range(0, y.shape[0], tile_cols):
        col = slice(j, j + tile_cols)
        d_text_t = None
        for i in strips:
            row = slice(i, i + tile_rows)
            tile = _logits(x[row], y[col], scale, unit)
            tile = tile_gradient(tile, row, col, i, j).to(x.dtype)
            if make_image:
                part = _matmul(tile, y[col])
                d_image[row].copy_(part) if j == 0 else d_image[row].add_(part)
            if make_text:
                part = _matmul(x_t[i // tile_rows], tile)
                d_text_t = part if d_text_t is None else d_text_t.add_(part)
        if make_text:
            d_text[col] = d_text_t.t()
    y_weight = weight if y.dtype.itemsize == 2 else weight / unit
    weights = y_weight, weight
    return _finish(x, y, d_image, d_text, d_positive, scale, pairs, wanted, weights)


def _finish(x, y, d_image, d_text, d_positive, scale, pairs, wanted, weights):
    """Adds the positives to G Y and G' X, reads the scale's gradient off, applies all factors."""
    # The positives' large gradients come last: fp32 sums of the small ones stay exact.
    for i in range(pairs.begin, pairs.end, _DEVICE_TILE[0]):
        row = slice(i, min(i + _DEVICE_TILE[0], pairs.end))
        own = slice(pairs.first + row.start, pairs.first + row.stop)
        if d_image is not None:
            d_image[row].add_(y[own] * d_positive[row, None])
        if d_text is not None:
            d_text[own].add_(x[row] * d_positive[row, None])
    d_scale = None
    if wanted[2]:
        product = x * d_image if d_image is not None else y * d_text
        d_scale = product.sum() * weights[0]
    d_image = d_image.mul_(scale * weights[0]) if wanted[0] else None
    d_text = d_text.mul_(scale * weights[1]) if wanted[1] else None
    return d_image, d_text, d_scale


def _narrow(grads, dtype):
    d_image, d_text = (None if grad is None else grad.to(dtype) for grad in grads[:2])
    return d_image, d_text, grads[2]


def _tile_sums(
    tile: Tensor, positive: Tensor, unshifted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and column (shift, sum) of a tile without its positives. Overwrites the tile."""
    if unshifted:
        tile.exp2_()
        positive.zero_()
        none = tile.new_zeros(())
        return none, tile.sum(1), none, tile.sum(0)
    lowest = torch.finfo(tile.dtype).min
    positive.fill_(-torch.inf)
    row_shift = tile.amax(1).ceil_().clamp_(min=lowest)
    col_shift = tile.amax(0).ceil_().clamp_(min=lowest)
    row_sum = (tile - row_shift[:, None]).exp2_().sum(1)
    return row_shift, row_sum, col_shift, tile.sub_(col_shift).exp2_().sum(0)


def _divide(tile: Tensor, rows: Tensor, cols: Tensor, unshifted: bool) -> None:
    """tile = 2^(tile - row shift) / row divisor + 2^(tile - col shift) / col divisor, in place."""
    if unshifted:
        row = rows[0].exp2().mul_(rows[1])
        col = cols[0].exp2().mul_(cols[1])
        by_col = tile.exp2_() / col
        tile.div_(row[:, None]).add_(by_col)
        return
    by_col = (tile - cols[0]).exp2_().div_(cols[1])
    tile.sub_(rows[0][:, None]).exp2_().div_(rows[1][:, None]).add_(by_col)


def _needs_no_shift(tile: Tensor) -> bool:
    """Whether 2^logit itself serves rows and columns: one exponential a logit instead of two.

    Asked on CPUs only: elsewhere the answer would wait for the device.
    """
    if not tile.is_cpu:
        return False
    return tile.amax().item() <= _UNSHIFTED_BITS and tile.amin().item() >= -_UNSHIFTED_BITS


def merge(into: Tensor, shift: Tensor, total: Tensor, *, is_first: bool) -> None:
    """into [2, n] = (shift, sum): adds other sums under the larger of both shifts."""
    if is_first:
        into[0] = shift
        into[1] = total
        return
    high = torch.maximum(into[0], shift)
    into[1].mul_((into[0] - high).exp2_()).add_((shift - high).exp2_() * total)
    into[0] = high


def _positives(tile: Tensor, pairs: Pairs, i: int, j: int) -> tuple[Tensor, slice]:
    """The view of the positives in the tile at row i, column j, and the rows they belong to."""
    start = max(i, pairs.begin, j - pairs.first)
    stop = min(i + tile.shape[0], pairs.end, j + tile.shape[1] - pairs.first)
    if start >= stop:
        return tile[:0, 0], slice(0, 0)
    view = tile[start - i : stop - i, start + pairs.first - j :].diagonal()
    return view, slice(start, stop)


def _operands(image: Tensor, text: Tensor, unit: float = LOG2_E) -> tuple[Tensor, Tensor]:
    """Features as the products take them: fp32 or fp64 with text times unit, or on CUDA 16 bit.

    The factor goes into the elements: on the logits its rounding would not average out.
    """
    # On ROCm products of 16 bits with an fp32 result are refused up to torch 2.9.
    if image.is_cuda and image.dtype.itemsize == 2 and torch.version.hip is None:
        return image.contiguous(), text.contiguous()
    dtype = compute_dtype(image)
    text = text.to(dtype).contiguous()
    return image.to(dtype).contiguous(), text if unit == 1 else text * unit


def _tile_shape(x: Tensor, y: Tensor) -> tuple[int, int]:
    """Tiles of nearly one size, in multiples of 16: the last is no sliver."""
    most = _CPU_TILE if x.is_cpu else _DEVICE_TILE
    counts = (-(-len(rows) // tile) for rows, tile in zip((x, y), most, strict=True))
    return tuple(
        -(-len(rows) // count // 16) * 16 for rows, count in zip((x, y), counts, strict=True)
    )


def _logits(x: Tensor, y: Tensor, scale: Tensor, unit: float = LOG2_E) -> Tensor:
    """A tile of scale * x @ y.T in units (1: natural), of what _operands gave."""
    if x.dtype.itemsize == 2:
        return _matmul(x, y.t()).mul_(scale * unit)
    return _matmul(x * scale, y.t())


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 (fp64) result."""
    if a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    if _takes_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def _transposed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b; oneDNN wants the narrow factor transposed, not the tile."""
    if _takes_onednn(a, b):
        return _matmul(b.t().contiguous(), a).t().contiguous()
    return _matmul(a.t(), b)


def _takes_onednn(a: Tensor, b: Tensor) -> bool:
    if not a.is_cpu or a.dtype != torch.float32 or a.numel() * b.shape[1] < _ONEDNN_PRODUCTS:
        return False
    return _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """Whether oneDNN's fp32 product is there and better than the BLAS behind torch.mm: MKL keeps to
    AVX2 on AMD CPUs. EPYC Zen 5, 2 threads: 430 against 200 GFLOP/s at 512 x 2048 x 512."""
    if not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")
