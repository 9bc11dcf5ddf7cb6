"""Which patches stay, on a GPU: one launch for a batch, one program an image.

Each patch makes the 32-bit word that decides on it with tl.philox, which gives the words of
api.py; kept patches find their places by a running count, so they come out ascending.
random looks for the K-th smallest of the keys (word, index), one bit of it after the other: a bit
costs a count over the program's patches, 42 counts in all, where a sort takes 55 exchanges and
leaves the patches out of order. Nothing is read; the indices are all that is written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launcher

INDEX_BITS = tl.constexpr(10)  # of a patch: 1024 at most
# Not specialised: no address depends on their alignment, so one kernel serves all values, and none
# becomes a constant, as Triton makes of an integer that is 1: a constant has no .to().
_NUMBERS = ("seed_low", "seed_high", "step", "first", "rows", "columns", "kept", "tall", "wide")


@triton.jit
def _words(seed, step, sample, columns):
    """Word columns % 4 of counter columns // 4, as int64."""
    high = ((sample >> 32) << 16).to(tl.uint32)  # stream 0
    counter = (columns // 4).to(tl.uint32)
    low = counter * 0 + sample.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, counter, low, counter * 0 + step, counter * 0 + high)
    word = columns % 4
    even = tl.where(word == 0, w0, w2)
    odd = tl.where(word == 1, w1, w3)
    return tl.where(word % 2 == 0, even, odd).to(tl.int64)


@triton.jit(do_not_specialize=_NUMBERS)
def _choose_patches_kernel(
    keep_ptr, key_ptr,
    seed_low, seed_high, step, first,
    rows, columns, kept, tall, wide,
    MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """keep [B, kept], int64, ascending; tall x wide is the rectangle of "block".

    key: int64 [3], the seed, the step and the first sample; None: they are numbers.
    """
    image = tl.program_id(0).to(tl.int64)
    if key_ptr is None:
        seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
        step = step.to(tl.uint32, bitcast=True)
    else:
        seed = tl.load(key_ptr)
        step = tl.load(key_ptr + 1).to(tl.uint32)
        first = tl.load(key_ptr + 2)
    sample = first.to(tl.int64) + image
    patch = tl.arange(0, BLOCK)
    y = patch // columns
    x = patch % columns
    if MASK == "random":
        key = (_words(seed, step, sample, patch) << INDEX_BITS) | patch
        key = tl.where(patch < rows * columns, key, 0x7FFFFFFFFFFFFFFF)
        last = sample * 0
        for i in range(32 + INDEX_BITS):
            higher = last | (sample * 0 + 1 << (31 + INDEX_BITS - i))
            # The kept-th smallest key is at least `higher` where fewer keys than kept lie below.
            below = tl.sum((key < higher).to(tl.int32), 0)
            last = tl.where(below < kept, higher, last)
        stays = key <= last
    elif MASK == "grid":
        top = y // 2 * 2
        left = x // 2 * 2
        words = _words(seed, step, sample, y // 2 * ((columns + 1) // 2) + x // 2)
        # A window cut to one row or column has no second one to choose.
        top += tl.where(top + 1 < rows, (words >> 31).to(tl.int32), 0)
        left += tl.where(left + 1 < columns, (words >> 30 & 1).to(tl.int32), 0)
        stays = (y == top) & (x == left) & (y < rows)
    else:
        free_columns = columns - wide + 1
        places = (rows - tall + 1).to(tl.int64) * free_columns
        place = ((_words(seed, step, sample, patch * 0) * places) >> 32).to(tl.int32)
        top = place // free_columns
        left = place % free_columns
        stays = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
    rank = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(keep_ptr + image * kept + rank, patch.to(tl.int64), mask=stays)


@launcher
def choose_patches(
    mask: str,
    batch: int,
    sizes: list[int],
    words: list[int],
    key: Tensor | None,
    device: torch.device,
) -> Tensor:
    """int64 [batch, K], ascending, as api.py's mask of that name.

    sizes: grid's rows and columns, K, and the rectangle of "block"; words: the seed's halves and
    the step as int32 with their bits in place, so a kernel fits all values, and the first sample;
    none where key, int64 [3] on the device, holds seed, step and first sample.
    """
    rows, columns, kept, tall, wide = sizes
    keep = torch.empty(batch, kept, dtype=torch.int64, device=device)
    if not batch:
        return keep
    block = max(16, triton.next_power_of_2(rows * columns))
    _choose_patches_kernel[(batch,)](
        keep, key,
        *(words or [0] * 4),
        rows, columns, kept, tall, wide,
        MASK=mask, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return keep


def _warps(block: int) -> int:
    """Eight patches a thread at most: counts within a warp need no barrier."""
    return max(1, block // 256)
