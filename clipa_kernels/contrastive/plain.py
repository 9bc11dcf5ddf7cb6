"""The logits strip by strip, in plain torch: what the two contrastive losses run without a kernel.

A strip of rows against all columns is made, used and dropped; beside the features and their
gradients only vectors live through a pass. Logits are kept in bits (natural logits times log2 e):
exp2 costs a quarter of exp on CPUs, and sums move between whole shifts without rounding.

Positives are kept apart from negatives. With n the sum over a row's negatives and p its positive's
term, the loss is log(1 + n / p) and the positive's gradient -n / (n + p): as exact where a pair
is nearly sure as elsewhere, and duplicates cancel to the last bit.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# Logits of a strip. On CPUs 8 MB in fp32: two fit a shared cache, and operations last long enough
# that waiting for all threads after each costs little on a busy machine; on devices few launches.
_CPU_STRIP, _DEVICE_STRIP = 1 << 21, 1 << 24


class Pairs(NamedTuple):
    """Which logits are positives: those of row i, from begin to end, and column first + i."""

    first: int
    begin: int
    end: int


def compute_dtype(features: Tensor) -> torch.dtype:
    """fp64 for fp64 features, fp32 for all others."""
    return torch.promote_types(features.dtype, torch.float32)


def softmax_forward(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of paired features, and rows [3, M] and cols [2, M] for softmax_grads."""
    rows, cols = softmax_stats(image, text, scale, Pairs(0, 0, len(image)))
    return softmax_loss(rows, cols), *softmax_divisors(rows, cols)


def softmax_stats(
    image: Tensor, text: Tensor, scale: Tensor, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """Sums over the negatives of image [M, E] against text [N, E].

    Returns rows [3, M] = (shift, sum of 2^(logit - shift), positive logit, if it is here) and
    cols [2, N] = (shift, sum). Without a negative the sum is 0.
    """
    x, y = _operands(image, text)
    rows, cols = scale.new_empty(3, len(x)), scale.new_empty(2, len(y))
    lowest = torch.finfo(scale.dtype).min  # the shift of a row without a finite logit
    for row in _row_strips(x, y):
        logits = _logits(x[row], y, scale, LOG2_E)
        positive, own = _positives(logits, pairs, row)
        rows[2, own] = positive
        positive.fill_(-torch.inf)
        row_shift = logits.amax(1).ceil_().clamp_(min=lowest)
        col_shift = logits.amax(0).ceil_().clamp_(min=lowest)
        rows[0, row] = row_shift
        rows[1, row] = (logits - row_shift[:, None]).exp2_().sum(1)
        col_sum = logits.sub_(col_shift).exp2_().sum(0)
        merge(cols, col_shift, col_sum, is_first=row.start == 0)
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
    d_loss: Tensor,
    pairs: Pairs,
    wanted: tuple[bool, bool, bool],
    wide: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of image, text and scale where that of the logit of a negative pair is
    d_loss / 2M * (2^(logit - row shift) / row divisor + 2^(logit - col shift) / col divisor).

    rows [3, M] = (shift, divisor, gradient of the positive logit); cols [2, N] = (shift, divisor).
    wide: in fp32 (fp64), not yet in the features' dtype.
    """

    def gradient(logits: Tensor, row: slice) -> None:
        by_col = (logits - cols[0]).exp2_()
        logits.sub_(rows[0, row, None]).exp2_().div_(rows[1, row, None])
        logits.addcdiv_(by_col, cols[1])
        _positives(logits, pairs, row)[0].zero_()

    weight = d_loss / (2 * len(image))
    d_image, d_text, d_scale = _feature_grads(
        image, text, scale, gradient, rows[2], pairs, wanted, weight, unit=LOG2_E
    )
    if not wide:
        d_image, d_text = (g if g is None else g.to(image.dtype) for g in (d_image, d_text))
    return d_image, d_text, d_scale


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
    d_positive = scale.new_zeros(len(image))

    def gradient(logits: Tensor, row: slice) -> None:
        positive, own = _positives(logits.add_(bias), pairs, row)
        positive.neg_()
        # Beyond the threshold, softplus(x) is x to fp64's last bit.
        total.add_(F.softplus(logits, threshold=40).sum())
        logits.sigmoid_()
        d_positive[own] = -positive
        positive.zero_()
        d_bias.add_(logits.sum())

    weight = 1 / len(image)
    # Natural logits here: a bias in bits would round all alike.
    grads = _feature_grads(
        image, text, scale, gradient, d_positive, pairs, wanted[:3], weight, unit=1.0
    )
    d_bias = (d_bias.add_(d_positive.sum()) * weight).to(scale.dtype) if wanted[3] else None
    return (total * weight).to(scale.dtype), *grads, d_bias


def _feature_grads(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    gradient: Callable[[Tensor, slice], None],
    d_positive: Tensor,
    pairs: Pairs,
    wanted: tuple[bool, bool, bool],
    weight: Tensor | float,
    unit: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX = s G Y, dY = s G' X and ds = sum(X * G Y) times weight, where wanted.

    gradient turns a strip of logits into G in place, with 0 for the positives.
    """
    x, y = _operands(image, text)
    # The scale's gradient comes from a product made anyway; a locked tower's half is skipped.
    make_image, make_text = wanted[0] or (wanted[2] and not wanted[1]), wanted[1]
    d_image = torch.zeros_like(x, dtype=scale.dtype) if make_image else None
    d_text = torch.zeros_like(y, dtype=scale.dtype) if make_text else None
    for row in _row_strips(x, y):
        logits = _logits(x[row], y, scale, unit)
        gradient(logits, row)
        logits = logits.to(x.dtype)
        if make_image:
            _matmul(logits, y, into=d_image[row])
        if make_text:
            _matmul(logits.t(), x[row], into=d_text)
    # The positives' large gradients come last: fp32 sums of the small ones stay exact.
    row = slice(pairs.begin, pairs.end)
    own = slice(pairs.first + pairs.begin, pairs.first + pairs.end)
    if make_image:
        d_image[row].addcmul_(y[own], d_positive[row, None])
    if make_text:
        d_text[own].addcmul_(x[row], d_positive[row, None])
    d_scale = None
    if wanted[2]:
        d_scale = (x * d_image if make_image else y * d_text).sum() * weight
    d_image = d_image.mul_(scale * weight) if wanted[0] else None
    d_text = d_text.mul_(scale * weight) if make_text else None
    return d_image, d_text, d_scale


def merge(into: Tensor, shift: Tensor, total: Tensor, *, is_first: bool) -> None:
    """into [2, n] = (shift, sum): adds other sums under the larger of both shifts."""
    if is_first:
        into[0] = shift
        into[1] = total
        return
    high = torch.maximum(into[0], shift)
    into[1].mul_((into[0] - high).exp2_()).add_((shift - high).exp2_() * total)
    into[0] = high


def _row_strips(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Rows of x in strips of nearly one height, a multiple of 16: the last is no sliver."""
    most = max(1, (_CPU_STRIP if x.is_cpu else _DEVICE_STRIP) // len(y))
    count = -(-len(x) // most)
    height = -(-len(x) // count // 16) * 16
    for i in range(0, len(x), height):
        yield slice(i, min(i + height, len(x)))


def _positives(logits: Tensor, pairs: Pairs, row: slice) -> tuple[Tensor, slice]:
    """The view of the positives in a strip of logits, and the rows that they belong to."""
    begin, end = max(row.start, pairs.begin), min(row.stop, pairs.end)
    if begin >= end:
        return logits[:0, 0], slice(0, 0)
    view = logits[begin - row.start : end - row.start, pairs.first + begin :].diagonal()
    return view, slice(begin, end)


def _operands(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Features as the products take them: fp32 or fp64, or on CUDA 16 bit."""
    # On ROCm products of 16 bits with an fp32 result are refused up to torch 2.9.
    if image.is_cuda and image.dtype.itemsize == 2 and torch.version.hip is None:
        return image.contiguous(), text.contiguous()
    dtype = compute_dtype(image)
    return image.to(dtype).contiguous(), text.to(dtype).contiguous()


def _logits(x: Tensor, y: Tensor, scale: Tensor, unit: float) -> Tensor:
    """scale * x @ y.T in units (1: natural), of what _operands gave."""
    if x.dtype.itemsize == 2:
        return _matmul(x, y.t()).mul_(scale * unit)
    # The factors go into the elements: their rounding on the logits would not average out.
    return _matmul((x * scale).mul_(unit), y.t())


def _matmul(a: Tensor, b: Tensor, into: Tensor | None = None) -> Tensor:
    """a @ b with an fp32 (fp64) result, added to into."""
    if a.dtype.itemsize == 2:
        product = torch.mm(a, b, out_dtype=torch.float32)
        return product if into is None else into.add_(product)
    return torch.mm(a, b) if into is None else into.addmm_(a, b)
