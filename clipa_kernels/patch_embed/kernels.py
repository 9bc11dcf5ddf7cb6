"""Kept patches on a GPU: gathered in one pass, then the library's product, at every patch size.

    forward    a row of pixels for each token, zeros for prefix rows, and a 1 in a further column,
               that of its position; the product of this copy and [weight | positions] is the result
    backward   the product from the other side, of the same copy, which is saved: the gradients of
               weight and positions from one reading of the tokens'
    more than 64 positions are added before the product, and their gradients are sums of rows

A patch is runs of RUN pixels next to each other (HWC: its rows; CHW: its rows, channel by channel).
Runs of bytes that are no multiple of 16, as of 14-pixel patches, or begin anywhere are read as
words, two shifted into four pixels, and padded to whole words against zero weights.

The other form is an implicit product, which gathers pixels while it multiplies. It makes no copy,
but each tile of the width fetches and converts the pixels again, and the backward once more.
Modelled by bench.meters.roofs, a library product at 0.7 of the peak, microseconds of both passes at
batch 4096 on H100 / A100, the implicit product with 64-bit and with 32-bit indices:

                          64 bits         32 bits       this
    B/16 224 px, half   3703 / 6819    3542 / 5778    2059 / 5514
    L/16  96 px         1500 / 3085    1357 / 2652     864 / 2526
    H/14  84 px         5937 / 8217    4891 / 6397     837 / 2502
    bigG/14 70 px       5379 / 7274    4317 / 5847     753 / 2265
    B/32 224 px, half   2610 / 6057    2326 / 5116    1751 / 5064
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launcher

_COUNTS = ("tokens", "kept", "columns", "prefix")  # they align no address


@triton.jit(do_not_specialize=_COUNTS)
def _patch_copy_kernel(
    images_ptr, keep_ptr,
    patches_ptr,
    tokens, kept, columns, prefix, pixels, width,
    stride_b, stride_py, stride_px, stride_o, stride_y, stride_e,
    RUN: tl.constexpr, PADDED: tl.constexpr, SIDE: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """patches [tokens, width]: pixels, less 128 where they are bytes, then 1 in the column of the
    token's position."""
    tiles_k = tl.cdiv(width, BLOCK_K)
    offs_m = tl.program_id(0) // tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tokens
    start_k = tl.program_id(0) % tiles_k * BLOCK_K
    size = prefix + kept
    image = (offs_m.to(tl.uint32) // size.to(tl.uint32)).to(tl.int32)  # shorter without signs
    place = offs_m - image * size  # the row of the table, of prefix rows
    mask_p = mask_m & (place >= prefix)
    patch = place - prefix
    if keep_ptr is not None:
        offs_p = image.to(tl.int64) * kept + patch
        patch = tl.load(keep_ptr + offs_p, mask=mask_p, other=0).to(tl.int32)
    # 64 bits for each image and each run; 32 for what is between.
    down = (patch.to(tl.uint32) // columns.to(tl.uint32)).to(tl.int32)
    base = image.to(tl.int64) * stride_b
    base += down.to(tl.int64) * stride_py + (patch - down * columns).to(tl.int64) * stride_px
    A_LOAD: tl.constexpr = 4 if SHIFTED else 1  # pixels
    offs_k = start_k + tl.arange(0, BLOCK_K // A_LOAD) * A_LOAD
    run, inside = offs_k // PADDED, offs_k % PADDED
    # Runs are numbered channel by channel (CHW) or row by row (HWC): SIDE runs a channel.
    offset = (run // SIDE).to(tl.int64) * stride_o + run % SIDE * stride_y + inside * stride_e
    mask_k = offs_k < pixels
    if PADDED != RUN:
        mask_k = mask_k & (inside < RUN)
    mask = mask_p[:, None] & mask_k[None, :]
    if SHIFTED:
        # Four pixels from any byte on lie in one aligned word or in two neighbours; the last byte
        # of four may be outside the run.
        words_ptr = images_ptr.to(tl.pointer_type(tl.uint32))
        words_ptrs = words_ptr + (base >> 2)[:, None] + (offset >> 2)[None, :]
        first = (base & 3).to(tl.int32)[:, None] + (offset & 3).to(tl.int32)[None, :]
        last = first + tl.minimum(3, RUN - 1 - inside)[None, :]
        middle = 0x80808080  # of pixels that are not there
        low = tl.load(words_ptrs + (first >> 2), mask=mask, other=middle).to(tl.uint64)
        high = tl.load(words_ptrs + (last >> 2), mask=mask, other=middle).to(tl.uint64)
        # Little-endian: the pixel at byte i of the pair is in bits 8 i and up.
        word = ((low | (high << 32)) >> ((first & 3) * 8).to(tl.uint64)).to(tl.uint32)
        shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
        x = tl.reshape((word[:, :, None] >> shifts[None, None, :]) & 255, (BLOCK_M, BLOCK_K))
    else:
        x = tl.load(images_ptr + base[:, None] + offset[None, :], mask=mask, other=0)
    # Bytes about their middle are exact in bf16, and their sums lose half as much to rounding.
    centre: tl.constexpr = 128.0 if images_ptr.dtype.element_ty.is_int() else 0.0
    x = x.to(tl.float32) - centre
    if not SHIFTED:  # other=128 would do, but Triton 3.8 fills vectors of bytes with 255 for it
        x = tl.where(mask, x, 0.0)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    row = tl.where(place < prefix, place, prefix + patch)
    x = tl.where(offs_k[None, :] - pixels == row[:, None], 1.0, x)
    patches_ptrs = patches_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    mask = mask_m[:, None] & (offs_k < width)[None, :]
    tl.store(patches_ptrs, x.to(patches_ptr.dtype.element_ty), mask=mask)


def _layout(images: Tensor, side: int, hwc: bool) -> tuple[tuple[int, ...], dict[str, int]]:
    """Strides and the constexprs that depend on them."""
    b, c, y, x = images.stride()
    run = side * images.shape[1] if hwc else side
    # From image to image, from patch to patch down and across, then inside a patch.
    strides = (b, side * y, side * x, 0 if hwc else c, y, 1 if hwc else x)
    extent = sum((n - 1) * s for n, s in zip(images.shape, images.stride(), strict=True)) + 1
    words = images.data_ptr() % 4 == 0 and extent % 4 == 0 and strides[-1] == 1
    # Where all are multiples of 16, Triton reads 16 bytes at a time by itself.
    shifted = images.dtype == torch.uint8 and words and any(n % 16 for n in (run, *strides[:-1]))
    return strides, dict(RUN=run, SHIFTED=shifted)


# A warp alone: its threads work out the places of few rows, and memory binds the pass.
_BLOCK = dict(BLOCK_M=4, BLOCK_K=256)


@launcher
def patch_copy(
    images: Tensor,
    keep: Tensor | None,
    side: int,
    prefix: int,
    hwc: bool,
    pixels: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """[B * (prefix + K), width] in a dtype: in the first `pixels` columns runs of equal length,
    rows of the patch (hwc) or of each of its channels; then positions."""
    batch, channels, height, _ = images.shape
    columns = images.shape[3] // side
    kept = height // side * columns if keep is None else keep.shape[1]
    tokens = batch * (prefix + kept)
    patches = images.new_empty(tokens, width, dtype=dtype)
    if not batch:
        return patches
    strides, layout = _layout(images, side, hwc)
    _patch_copy_kernel[(cdiv(tokens, _BLOCK["BLOCK_M"]) * cdiv(width, _BLOCK["BLOCK_K"]),)](
        images, None if keep is None else keep.contiguous(),
        patches,
        tokens, kept, columns, prefix, pixels, width,
        *strides,
        PADDED=pixels * layout["RUN"] // (channels * side**2), SIDE=side, **layout, **_BLOCK,
        num_warps=1,
    )  # fmt: skip
    return patches
