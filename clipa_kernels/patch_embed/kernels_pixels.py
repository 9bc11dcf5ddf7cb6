"""How the stem's kernels read patches: by pixel, by words of four, or by words shifted together."""

import triton
import triton.language as tl


@triton.jit
def _place(columns, stride_o, stride_y, stride_e, PADDED: tl.constexpr, SIDE: tl.constexpr):
    """(place in the run, offset from the patch's first pixel) of columns of the weight."""
    # Runs are numbered channel by channel (CHW) or row by row (HWC): SIDE runs a channel.
    run = columns // PADDED
    place = columns % PADDED
    return place, run // SIDE * stride_o + run % SIDE * stride_y + place * stride_e


@triton.jit
def load_pixels(
    images_ptr, base, mask_m, start_k, K,
    stride_o, stride_y, stride_e,
    RUN: tl.constexpr, PADDED: tl.constexpr, SIDE: tl.constexpr,
    WORDS: tl.constexpr, SHIFTED: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns start_k and on of the patches whose first pixels lie at base, for unpacked.

    Pixels [BLOCK_M, BLOCK_K], or words [BLOCK_M, BLOCK_K / 4] of four; SHIFTED: two words each.
    """
    if SHIFTED:
        columns = start_k + tl.arange(0, BLOCK_K // 4) * 4
        place, offset = _place(columns, stride_o, stride_y, stride_e, PADDED, SIDE)
        mask = mask_m[:, None] & ((columns < K) & (place < RUN))[None, :]
        first = base[:, None] + offset[None, :]
        # The last byte of a quad may be outside the run.
        last = first + tl.minimum(3, RUN - 1 - place)[None, :]
        # Four pixels from any byte on lie in one aligned word or in two neighbours.
        words_ptr = images_ptr.to(tl.pointer_type(tl.uint32))
        low = tl.load(words_ptr + (first >> 2), mask=mask, other=0)
        high = tl.load(words_ptr + (last >> 2), mask=mask, other=0)
    else:
        A_LOAD: tl.constexpr = 4 if WORDS else 1  # pixels
        if WORDS:
            images_ptr = images_ptr.to(tl.pointer_type(tl.uint32))
            stride_e = 1  # of words: four pixels next to each other are one
        columns = start_k // A_LOAD + tl.arange(0, BLOCK_K // A_LOAD)
        place, offset = _place(
            columns, stride_o // A_LOAD, stride_y // A_LOAD, stride_e, PADDED // A_LOAD, SIDE
        )
        mask = mask_m[:, None]
        if not EVEN_K or PADDED != RUN:
            mask = mask & ((columns < K // A_LOAD) & (place < RUN // A_LOAD))[None, :]
        pixel_ptrs = images_ptr + (base // A_LOAD)[:, None] + offset[None, :]
        low = tl.load(pixel_ptrs, mask=mask, other=0)
        high = low  # not used, but all layouts return two tensors
    return low, high


@triton.jit
def unpacked(
    low, high, base, start_k, stride_o, stride_y, stride_e,
    DTYPE: tl.constexpr, PADDED: tl.constexpr, SIDE: tl.constexpr,
    WORDS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] of what load_pixels gave; uint8 about its middle, 128: exact in bf16, and
    sums of it lose half as much to rounding as sums of 0 to 255."""
    if WORDS:
        if SHIFTED:
            columns = start_k + tl.arange(0, BLOCK_K // 4) * 4
            _, offset = _place(columns, stride_o, stride_y, stride_e, PADDED, SIDE)
            first = base[:, None] + offset[None, :]
            # Little-endian: the pixel at byte i of the pair is in bits 8 i and up.
            both = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
            low = (both >> ((first & 3) * 8).to(tl.uint64)).to(tl.uint32)
        shifts = (tl.arange(0, 4) * 8).to(tl.uint32)
        pixels = (low[:, :, None] >> shifts[None, None, :]) & 255
        pixels = tl.reshape(pixels, (BLOCK_M, BLOCK_K))
    else:
        pixels = low
    centre: tl.constexpr = 128.0 if pixels.dtype.is_int() else 0.0
    return (pixels.to(tl.float32) - centre).to(DTYPE)


@triton.jit
def kept_patches(keep_ptr, offs_m, mask_m, kept):
    """Numbers of the kept patches offs_m of the batch in their images; all are, where None."""
    if keep_ptr is not None:
        return tl.load(keep_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    else:
        return offs_m % kept


@triton.jit
def first_pixel(index, offs_m, kept, columns, stride_b, stride_py, stride_px):
    """Offset of the first pixel of these patches."""
    return offs_m // kept * stride_b + index // columns * stride_py + index % columns * stride_px
