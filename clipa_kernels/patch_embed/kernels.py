"""Kept patches straight into the product on a GPU: no pixel is copied, no dropped one is read.

    forward    an implicit product: a tile of patches is gathered by index while it is multiplied;
               bias and position are added to the sums before the one rounding; further programs of
               the same launch write the prefix rows
    backward   the weight's gradient is the same product from the other side, patches gathered
               again, in a few splits of the tokens that a second launch adds in order; up to 64
               positions are further columns of it, so that d_out is read once, more are sums of
               rows, sorted by index where tokens were chosen. No atomics.

A patch is RUNS runs of RUN pixels next to each other (HWC: its rows; CHW: its rows, channel by
channel). A run that is no multiple of 16, as of 14-pixel patches, begins at any byte: it is read as
words of four pixels, two words shifted into one, and padded to 16 against zero weights. A patchify
pass would write and read each kept patch once more: 1.3 to 1.7 of the minimum at widths to 1280.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import arch, cdiv, input_precision, launcher, sum_partial
from .kernels_pixels import first_pixel, kept_patches, load_pixels, unpacked
from .kernels_table import table_grad

_SPLITS = 8  # of the tokens in the weight's gradient: their sums stay small beside the tokens
_MOST_BY_PRODUCT = 64  # positions whose gradient comes as further columns of the weight's
_COUNTS = ("patches", "batch", "kept", "columns", "prefix", "positions")  # they align no address


def padded(run: int, dtype: torch.dtype) -> int:
    """Columns of the weight for a run: uint8 runs go to a multiple of 16."""
    return cdiv(run, 16) * 16 if dtype == torch.uint8 else run


def blocks(dtype: torch.dtype, halved: bool) -> dict[str, int]:
    """Tile of tokens, width and pixels: 128 x 128 x 64 is the most that no GPU spills. Half the
    pixels where a run may begin anywhere, which takes a pointer for each few; and padded runs end
    on a multiple of 32 more often than of 64."""
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=16 if halved else 32)
    return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32 if halved else 64)


def _backward_m(dtype: torch.dtype, layout: dict, halved: bool) -> int:
    """Tokens of a step of the weight's gradient, by what spills."""
    if dtype == torch.float32:
        return 32
    if layout["SHIFTED"]:
        return 32 if arch() >= 100 else 64  # 64 of 224-pixel images spill on sm_100
    if layout["RUN"] % 16:  # 8 pixels: 128 spill on sm_80, which reads words, 64 on sm_100
        return 64 if layout["WORDS"] else 128
    return 64 if halved else 128  # 128 of images that begin at any byte spill on sm_100


@triton.jit(do_not_specialize=_COUNTS)
def _patch_embed_fwd_kernel(
    images_ptr, keep_ptr, weight_ptr, bias_ptr, table_ptr,
    out_ptr,
    patches, batch, kept, columns, prefix, D, K,
    stride_b, stride_py, stride_px, stride_o, stride_y, stride_e,
    RUN: tl.constexpr, PADDED: tl.constexpr, SIDE: tl.constexpr,
    WORDS: tl.constexpr, SHIFTED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [batch, prefix + kept, D], dense."""
    tiles_n = tl.cdiv(D, BLOCK_N)
    tiles = tl.cdiv(patches, BLOCK_M) * tiles_n
    program = tl.program_id(0)
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    offs_n = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < D
    # Tiles of patches, then tiles of prefix rows, which need no product.
    if program < tiles:
        offs_m = (program // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < patches
        index = kept_patches(keep_ptr, offs_m, mask_m, kept)
        base = first_pixel(index, offs_m, kept, columns, stride_b, stride_py, stride_px)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        # Words to be shifted are read a step ahead, while the product of the step before runs.
        if SHIFTED:
            low, high = load_pixels(
                images_ptr, base, mask_m, 0, K, stride_o, stride_y, stride_e,
                RUN, PADDED, SIDE, WORDS, SHIFTED, EVEN_K, BLOCK_K,
            )  # fmt: skip
        for start_k in range(0, K, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            if not SHIFTED:
                low, high = load_pixels(
                    images_ptr, base, mask_m, start_k, K, stride_o, stride_y, stride_e,
                    RUN, PADDED, SIDE, WORDS, SHIFTED, EVEN_K, BLOCK_K,
                )  # fmt: skip
            x = unpacked(
                low, high, base, start_k, stride_o, stride_y, stride_e,
                DTYPE, PADDED, SIDE, WORDS, SHIFTED, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if SHIFTED:
                low, high = load_pixels(
                    images_ptr, base, mask_m, start_k + BLOCK_K, K, stride_o, stride_y, stride_e,
                    RUN, PADDED, SIDE, WORDS, SHIFTED, EVEN_K, BLOCK_K,
                )  # fmt: skip
            # [BLOCK_K, BLOCK_N]
            weight_ptrs = weight_ptr + offs_n[None, :].to(tl.int64) * K + offs_k[:, None]
            mask_k = mask_n[None, :]
            if not EVEN_K:
                mask_k = mask_k & (offs_k < K)[:, None]
            acc = tl.dot(
                x, tl.load(weight_ptrs, mask=mask_k, other=0.0), acc, input_precision=PRECISION
            )
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        table_ptrs = table_ptr + (prefix + index)[:, None] * D + offs_n[None, :]
        acc += tl.load(table_ptrs, mask=mask, other=0.0).to(tl.float32)
        # Patch k of an image is its token prefix + k.
        row = offs_m // kept * (prefix + kept) + prefix + offs_m % kept
        out_ptrs = out_ptr + row[:, None] * D + offs_n[None, :]
        tl.store(out_ptrs, acc.to(DTYPE), mask=mask)
    else:
        offs_r = ((program - tiles) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_r < batch * prefix)[:, None] & mask_n[None, :]
        table_ptrs = table_ptr + (offs_r % prefix)[:, None] * D + offs_n[None, :]
        row = offs_r // prefix * (prefix + kept) + offs_r % prefix
        out_ptrs = out_ptr + row[:, None] * D + offs_n[None, :]
        tl.store(out_ptrs, tl.load(table_ptrs, mask=mask, other=0.0).to(DTYPE), mask=mask)


@triton.jit
def _d_out(d_out_ptr, offs_m, mask_m, offs_n, mask_n, kept, prefix, D):
    """Gradients of the tokens of these patches: [BLOCK_N, BLOCK_M]."""
    row = offs_m // kept * (prefix + kept) + prefix + offs_m % kept
    d_out_ptrs = d_out_ptr + row[None, :] * D + offs_n[:, None]
    return tl.load(d_out_ptrs, mask=mask_n[:, None] & mask_m[None, :], other=0.0)


@triton.jit(do_not_specialize=_COUNTS)
def _patch_embed_bwd_weight_kernel(
    d_out_ptr, images_ptr, keep_ptr,
    partial_ptr, table_partial_ptr,
    patches, kept, columns, prefix, D, K, walked, positions,
    stride_b, stride_py, stride_px, stride_o, stride_y, stride_e,
    RUN: tl.constexpr, PADDED: tl.constexpr, SIDE: tl.constexpr,
    WORDS: tl.constexpr, SHIFTED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial [splits, 1, D, K] = d_out' patches over the `walked` patches of a split, and as
    further columns table_partial [splits, 1, positions, D], sums of d_out by patch number."""
    tiles_x = tl.cdiv(K, BLOCK_K)
    tiles_k = tiles_x + tl.cdiv(positions, BLOCK_K)
    tiles = tiles_k * tl.cdiv(D, BLOCK_N)
    split = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    offs_n = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < D
    DTYPE: tl.constexpr = d_out_ptr.dtype.element_ty
    start_m = split * walked
    end = tl.minimum(start_m + walked, patches)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    if tile % tiles_k < tiles_x:
        start_k = tile % tiles_k * BLOCK_K
        if SHIFTED:
            offs_m = start_m + tl.arange(0, BLOCK_M)
            index = kept_patches(keep_ptr, offs_m, offs_m < end, kept)
            base = first_pixel(index, offs_m, kept, columns, stride_b, stride_py, stride_px)
            low, high = load_pixels(
                images_ptr, base, offs_m < end, start_k, K, stride_o, stride_y, stride_e,
                RUN, PADDED, SIDE, WORDS, SHIFTED, EVEN_K, BLOCK_K,
            )  # fmt: skip
            # Indices go two steps ahead, since addresses of pixels wait for them.
            offs_m += BLOCK_M
            index = kept_patches(keep_ptr, offs_m, offs_m < end, kept)
        for first in range(start_m, end, BLOCK_M):
            offs_m = first + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end
            if not SHIFTED:
                index = kept_patches(keep_ptr, offs_m, mask_m, kept)
                base = first_pixel(index, offs_m, kept, columns, stride_b, stride_py, stride_px)
                low, high = load_pixels(
                    images_ptr, base, mask_m, start_k, K, stride_o, stride_y, stride_e,
                    RUN, PADDED, SIDE, WORDS, SHIFTED, EVEN_K, BLOCK_K,
                )  # fmt: skip
            # [BLOCK_M, BLOCK_K]
            x = unpacked(
                low, high, base, start_k, stride_o, stride_y, stride_e,
                DTYPE, PADDED, SIDE, WORDS, SHIFTED, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if SHIFTED:
                next_m = offs_m + BLOCK_M
                base = first_pixel(index, next_m, kept, columns, stride_b, stride_py, stride_px)
                low, high = load_pixels(
                    images_ptr, base, next_m < end, start_k, K, stride_o, stride_y, stride_e,
                    RUN, PADDED, SIDE, WORDS, SHIFTED, EVEN_K, BLOCK_K,
                )  # fmt: skip
                next_m += BLOCK_M
                index = kept_patches(keep_ptr, next_m, next_m < end, kept)
            d_out = _d_out(d_out_ptr, offs_m, mask_m, offs_n, mask_n, kept, prefix, D)
            acc = tl.dot(d_out, x, acc, input_precision=PRECISION)
        offs_k = start_k + tl.arange(0, BLOCK_K)
        # Each split has a plane of its own, so the sum over splits has a fixed order.
        partial_ptrs = partial_ptr + (split * D + offs_n)[:, None] * K + offs_k[None, :]
        tl.store(partial_ptrs, acc, mask=mask_n[:, None] & (offs_k < K)[None, :])
    else:
        offs_l = (tile % tiles_k - tiles_x) * BLOCK_K + tl.arange(0, BLOCK_K)
        for first in range(start_m, end, BLOCK_M):
            offs_m = first + tl.arange(0, BLOCK_M)
            mask_m = offs_m < end
            index = kept_patches(keep_ptr, offs_m, mask_m, kept)
            # [BLOCK_M, BLOCK_K], 1 where the patch has the number: exact products
            x = (index[:, None] == offs_l[None, :]).to(DTYPE)
            d_out = _d_out(d_out_ptr, offs_m, mask_m, offs_n, mask_n, kept, prefix, D)
            acc = tl.dot(d_out, x, acc, input_precision="ieee")
        table_ptrs = table_partial_ptr + (split * positions + offs_l)[None, :] * D + offs_n[:, None]
        tl.store(table_ptrs, acc, mask=mask_n[:, None] & (offs_l < positions)[None, :])


def is_hwc(images: Tensor) -> bool:
    """Whether a row of a patch, all channels, is one run; else a channel's row is."""
    return images.stride(1) == 1 and images.stride(3) == images.shape[1]


def _layout(images: Tensor, side: int) -> tuple[tuple[int, ...], dict[str, int], bool]:
    """Strides and constexprs that the product's kernels share, and whether blocks are halved."""
    channels, hwc = images.shape[1], is_hwc(images)
    b, c, y, x = images.stride()
    run = side * channels if hwc else side
    extent = sum((n - 1) * s for n, s in zip(images.shape, images.stride(), strict=True)) + 1
    # From image to image, from patch to patch down and across, then inside a patch.
    strides = (b, side * y, side * x, 0 if hwc else c, y, 1 if hwc else x)
    words = images.dtype == torch.uint8 and images.data_ptr() % 4 == 0 and (hwc or x == 1)
    if any(n % 4 for n in (run, *strides[:-1])):
        shifted = words = words and extent % 4 == 0
    else:
        # mma.sync would take bytes from shared memory one by one, and with conflicts; later cores
        # take them in fewer instructions than words.
        words, shifted = words and arch() < 90, False
    layout = dict(RUN=run, PADDED=padded(run, images.dtype), SIDE=side)
    halved = shifted or any(n % 16 for n in (run, images.data_ptr(), *strides[:-1]))
    return strides, layout | dict(WORDS=words, SHIFTED=shifted), halved


@launcher
def forward(
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    table: Tensor,
    side: int,
    prefix: int,
) -> Tensor:
    """[B, prefix + K, D]; weight [D, runs * padded run]; table [prefix + L, D]: what is added."""
    batch, columns = images.shape[0], images.shape[3] // side
    kept = table.shape[0] - prefix if keep is None else keep.shape[1]
    d, k = weight.shape
    out = weight.new_empty(batch, prefix + kept, d)
    if not batch:
        return out
    strides, layout, halved = _layout(images, side)
    block = blocks(weight.dtype, halved)
    tiles_m = cdiv(batch * kept, block["BLOCK_M"]) + cdiv(batch * prefix, block["BLOCK_M"])
    weight, table = weight.contiguous(), table.to(weight.dtype).contiguous()
    _patch_embed_fwd_kernel[(tiles_m * cdiv(d, block["BLOCK_N"]),)](
        images, None if keep is None else keep.contiguous(), weight,
        None if bias is None else bias.contiguous(), table,
        out,
        batch * kept, batch, kept, columns, prefix, d, k,
        *strides,
        **layout, EVEN_K=k % block["BLOCK_K"] == 0, **block,
        PRECISION=input_precision(weight.element_size()),
        num_warps=8, num_stages=3 if weight.element_size() == 2 else 2,
    )  # fmt: skip
    return out


@launcher
def backward(
    d_out: Tensor,
    images: Tensor,
    keep: Tensor | None,
    weight: Tensor,
    side: int,
    prefix: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, in its shape and dtype, and of the table, fp32 [rows, D]; d_out
    dense."""
    batch, columns = images.shape[0], images.shape[3] // side
    kept, (d, k) = d_out.shape[1] - prefix, weight.shape
    # Up to here one more tile of products is cheaper than a second reading of d_out.
    positions = rows - prefix if rows - prefix <= _MOST_BY_PRODUCT else 0
    strides, layout, halved = _layout(images, side)
    block = blocks(weight.dtype, halved)
    block["BLOCK_M"] = _backward_m(weight.dtype, layout, halved)
    # Whole steps a split: only the last split of all has a partial step.
    walked = max(1, cdiv(cdiv(batch * kept, _SPLITS), block["BLOCK_M"])) * block["BLOCK_M"]
    splits = cdiv(batch * kept, walked)
    partial = weight.new_empty(splits, 1, d * k, dtype=torch.float32)
    table_partial = weight.new_empty(splits, 1, positions * d, dtype=torch.float32)
    if batch:
        tiles_k = cdiv(k, block["BLOCK_K"]) + cdiv(positions, block["BLOCK_K"])
        _patch_embed_bwd_weight_kernel[(splits * cdiv(d, block["BLOCK_N"]) * tiles_k,)](
            d_out, images, None if keep is None else keep.contiguous(),
            partial, table_partial,
            batch * kept, kept, columns, prefix, d, k, walked, positions,
            *strides,
            **layout, EVEN_K=k % block["BLOCK_K"] == 0, **block,
            PRECISION=input_precision(weight.element_size()),
            num_warps=8, num_stages=3 if weight.element_size() == 2 else 2,
        )  # fmt: skip
    dweight = sum_partial(partial, weight.dtype)[0].view(d, k)
    if not positions:
        return dweight, table_grad(d_out, keep, rows, prefix)
    (patches,) = sum_partial(table_partial, torch.float32)
    first = d_out[:, :prefix].sum(0, dtype=torch.float32)
    return dweight, torch.cat((first, patches.view(positions, d)))
