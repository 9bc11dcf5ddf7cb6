"""Token choice: which patches and which text tokens stay, as explicit integer indices.

Every choice is a function of (seed, step, stream, global sample index) alone, through the
counter-based generator Philox4x32-10 (Salmon et al., SC 2011). A mask is therefore the same on any
device and for any number of ranks, is remade on resume, and needs no state. The 32-bit word for one
column of one sample is word column % 4 of philox4x32_10(counter, key), where

    key     = (seed & 0xffffffff, seed >> 32)
    counter = (column // 4, sample & 0xffffffff, step, (sample >> 32) << 16 | stream)

with seed < 2**64, step < 2**32, sample < 2**48, stream < 2**16, one for each use (philox.py).
tl.philox(seed, *counter) in Triton gives the same four words.

Images: keep is int64 [B, K], ascending in each row; K is known without asking the device.
    random  the max(1, int(L * (1 - drop))) patches with the smallest words, column = patch index
    grid    one patch of each 2x2 window, column = window index
    block   one rectangle of about as many patches as random keeps, placed uniformly, column 0
    all     every patch; CLIPA's fourth way, resizing, makes the image small before it gets here

Text: captions are ragged, flat ids and lengths. keep is int64 [T'], ascending indices into the flat
ids; a caption of at most `context` content tokens stays whole, start and end tokens are the
caller's. The size depends on the lengths, so the host waits for a GPU: use it in the loader.
    truncate  the first tokens
    random    those with the smallest words, column = place in the caption
    block     a window whose start is uniform over all places, column 0
    syntax    those with the lowest part-of-speech priority, leftmost first
"""

from functools import cache
from numbers import Real

import torch
from torch import Tensor

from .. import check
from ..check import describe
from .philox import IMAGE_STREAM, LOW, TEXT_STREAM, draw_bits, draw_words

_KERNEL_PATCHES = 1024  # of an image, at most, for the kernel

Grid = tuple[int, int]
Device = torch.device | str | None
Scalar = int | Tensor


def keep_count(num_patches: int, drop: float) -> int:
    """Patches that stay: max(1, int(num_patches * (1 - drop))), in exactly this float expression.

    So 100 at 0.9 keeps 9, not 10, as open_clip's PatchDropout and both CLIPA codes do.
    Args, Raises: num_patches, in [1, 2**31), and drop as in random_patches.

    >>> keep_count(100, 0.9), keep_count(256, 0.3)
    (9, 179)
    """
    return _keep_count("keep_count", num_patches, drop)


def all_patches(batch: int, grid: Grid, *, device: Device = None) -> Tensor:
    """Every patch of every image: int64 [B, L]. Args, Raises: as random_patches."""
    batch, grid, device = _images("all_patches", batch, grid, device)
    return torch.arange(grid[0] * grid[1], device=device).repeat(batch, 1)


def random_patches(
    batch: int,
    grid: Grid,
    drop: float,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_sample: int | Tensor = 0,
    device: Device = None,
    impl: str = "auto",
) -> Tensor:
    """A uniformly random subset of each image's patches.

    Args:
        batch: images, B; 0 gives an empty result.
        grid: (rows, columns) of patches; patch (y, x) has index y * columns + x.
        drop: share of the patches to drop, in [0, 1); 0 keeps all.
        seed: key of the run, in [0, 2**64).
        step: training step, in [0, 2**32).
        first_sample: global index of image 0, in [0, 2**48); image b has first_sample + b.
            seed, step and first_sample may each be an int64 scalar tensor on the device instead,
            the seed's 64 bits as a signed number: a CUDA graph that holds the call draws new masks
            as they are changed in place.
        device: of the result.
        impl: "auto", "triton" (one launch, at most 1024 patches) or "torch"; the same bits.
    Returns: int64 [B, K], ascending in each row, K = keep_count(rows * columns, drop).
    Raises:
        TypeError: a size or a part of the key is not an integer, or drop is not a number.
        ValueError: a size, drop, or a part of the key is out of its range (that of a tensor is
            read on the CPU only).
    Source: FLIP (Li et al. 2023); the count is open_clip's. Equal words go to the lower index.

    >>> random_patches(2, (4, 4), 0.75, seed=0, step=0).shape
    torch.Size([2, 4])
    """
    batch, grid, device = _images("random_patches", batch, grid, device)
    patches = grid[0] * grid[1]
    kept = _keep_count("random_patches", patches, drop)
    key = seed, step, first = _image_key("random_patches", batch, seed, step, first_sample, device)
    if _kernel("random_patches", impl, grid, device):
        return _launched("random", batch, grid, kept, (0, 0), key, device)
    samples = first + torch.arange(batch, device=device)
    return lowest_columns(draw_bits(seed, step, samples, patches, IMAGE_STREAM), kept)


def lowest_columns(bits: Tensor, kept: int) -> Tensor:
    """The columns of the `kept` lowest 32-bit words of each row, ascending."""
    # With the index in the low bits all keys differ, so topk has no tie to break its own way.
    keys = (bits << 31) | torch.arange(bits.shape[1], device=bits.device)
    return keys.topk(kept, dim=1, largest=False, sorted=False).indices.sort(dim=1).values


def grid_patches(
    batch: int,
    grid: Grid,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_sample: int | Tensor = 0,
    device: Device = None,
    impl: str = "auto",
) -> Tensor:
    """One patch of each 2x2 window: a quarter of the image, evenly spread.

    Windows start at even rows and columns. At an odd side the last ones are cut to what is there
    and still keep one patch each, so K = ceil(rows / 2) * ceil(columns / 2).

    The patch is drawn uniformly in each window, so that every position is trained.

    Args, Raises: as random_patches.
    Returns: int64 [B, K], ascending in each row.
    Source: CLIPA's grid mask, whose figure shows the top left patches.
    """
    batch, grid, device = _images("grid_patches", batch, grid, device)
    key = seed, step, first = _image_key("grid_patches", batch, seed, step, first_sample, device)
    if _kernel("grid_patches", impl, grid, device):
        windows = (grid[0] + 1) // 2 * ((grid[1] + 1) // 2)
        return _launched("grid", batch, grid, windows, (0, 0), key, device)
    rows = torch.arange(0, grid[0], 2, device=device)[:, None]
    columns = torch.arange(0, grid[1], 2, device=device)
    samples = first + torch.arange(batch, device=device)
    bits = draw_bits(seed, step, samples, len(rows) * len(columns), IMAGE_STREAM)
    bits = bits.view(batch, len(rows), len(columns))
    # The two upper bits choose; a window cut to one row or column has no second one to choose.
    rows = rows + (bits >> 31) * (rows + 1 < grid[0])
    columns = columns + (bits >> 30 & 1) * (columns + 1 < grid[1])
    return (rows * grid[1] + columns).flatten(1).sort(dim=1).values


def block_patches(
    batch: int,
    grid: Grid,
    drop: float,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_sample: int | Tensor = 0,
    device: Device = None,
    impl: str = "auto",
) -> Tensor:
    """One rectangle of patches in each image, its place uniform over all where it fits.

    Every image keeps the same shape: the area closest to keep_count(L, drop) among rectangles whose
    sides differ by a factor of at most two, or the grid's own factor where that is more (without
    this a prime count gives a strip one patch high). Ties go to the squarer, then the wider one.

    Args, Raises: as random_patches.
    Returns: int64 [B, K], ascending in each row; K is the area.
    Source: CLIPA's block mask; the shape and the placement are our choice.
    """
    batch, grid, device = _images("block_patches", batch, grid, device)
    tall, wide = _block_shape(*grid, _keep_count("block_patches", grid[0] * grid[1], drop))
    key = seed, step, first = _image_key("block_patches", batch, seed, step, first_sample, device)
    if _kernel("block_patches", impl, grid, device):
        return _launched("block", batch, grid, tall * wide, (tall, wide), key, device)
    samples = first + torch.arange(batch, device=device)
    free_rows, free_columns = grid[0] - tall + 1, grid[1] - wide + 1
    place = draw_bits(seed, step, samples, 1, IMAGE_STREAM) * (free_rows * free_columns) >> 32
    corner = place // free_columns * grid[1] + place % free_columns
    rows = torch.arange(tall, device=device)[:, None]
    return corner + (rows * grid[1] + torch.arange(wide, device=device)).flatten()


def truncate_text(lengths: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The first `context` tokens of each caption.

    Args:
        lengths: int32 or int64 [B], content tokens of each caption; 0 is an empty caption.
        context: content tokens kept at most, at least 1.
    Returns:
        keep: int64 [T'], ascending indices into the flat ids.
        lengths: int64 [B], min(lengths, context).
    Raises:
        TypeError: lengths is not an integer tensor, or context is not an integer.
        ValueError: lengths is not [B] or (checked on the CPU only) negative, or context is below 1.

    >>> truncate_text(torch.tensor([3, 1]), 2)
    (tensor([0, 1, 3]), tensor([2, 1]))
    """
    lengths, context = _captions("truncate_text", lengths, context)
    kept = lengths.clamp(max=context)
    return _windows(lengths.cumsum(0) - lengths, kept), kept


def random_text(
    lengths: Tensor, context: int, *, seed: int, step: int, first_sample: int = 0
) -> tuple[Tensor, Tensor]:
    """A uniformly random subset of the tokens of each caption longer than `context`, in order.

    Args, Returns: as truncate_text; seed, step, first_sample as in random_patches, numbers all.
    Raises: as truncate_text, and for a part of the key that is out of its range.
    Source: open_clip's "random". CLIPA's JAX code loses the order (open_clip's "shuffle").
    """
    lengths, context = _captions("random_text", lengths, context)
    seed, step, first = _key("random_text", len(lengths), seed, step, first_sample)
    samples = torch.arange(first, first + len(lengths), device=lengths.device)
    # Words come in fours: caption b owns ceil(lengths[b] / 4) counter blocks of the flat words.
    blocks = (lengths + 3) // 4
    columns = _windows(torch.zeros_like(blocks), blocks)
    words = draw_words(
        seed, step, TEXT_STREAM, samples.repeat_interleave(blocks), columns
    ).flatten()
    starts = (blocks.cumsum(0) - blocks) * 4
    return _lowest(words[_windows(starts, lengths)], lengths, context)


def block_text(
    lengths: Tensor, context: int, *, seed: int, step: int, first_sample: int = 0
) -> tuple[Tensor, Tensor]:
    """A window of each caption longer than `context`, its start uniform over all where it fits.

    Args, Returns, Raises: as random_text.
    Source: open_clip's "simple". CLIPA's JAX code is off by one: it never keeps the last token.
    """
    lengths, context = _captions("block_text", lengths, context)
    seed, step, first = _key("block_text", len(lengths), seed, step, first_sample)
    samples = torch.arange(first, first + len(lengths), device=lengths.device)
    kept = lengths.clamp(max=context)
    bits = draw_bits(seed, step, samples, 1, TEXT_STREAM)[:, 0]
    starts = lengths.cumsum(0) - lengths + (bits * (lengths - kept + 1) >> 32)
    return _windows(starts, kept), kept


def syntax_text(
    ids: Tensor, lengths: Tensor, context: int, priority: Tensor
) -> tuple[Tensor, Tensor]:
    """The `context` tokens of lowest priority value, leftmost first on a tie, in original order.

    Args:
        ids: int32 or int64 [T], content tokens of all captions, end to end.
        lengths, context: as truncate_text; lengths sums to T.
        priority: uint8 [V], by token id; CLIPA's: 1 noun, 2 adjective, 3 verb, 4 the rest.
    Returns: as truncate_text.
    Raises: as truncate_text, and
        TypeError: ids does not hold integers, or priority is not uint8.
        ValueError: ids or priority is not one-dimensional, devices differ, or (checked on the CPU
            only) lengths do not sum to T or an id is outside the table.
    Source: CLIPA's JAX code, with ties made stable (numpy's default argsort is not).

    >>> priority = torch.tensor([1, 2, 4], dtype=torch.uint8)
    >>> syntax_text(torch.tensor([2, 0, 2, 1]), torch.tensor([4]), 2, priority)
    (tensor([1, 3]), tensor([2]))
    """
    lengths, context = _captions("syntax_text", lengths, context)
    _require_table("syntax_text", ids, lengths, priority)
    return _lowest(priority[ids.long()].long(), lengths, context)


def _key(f: str, batch: int, seed: int, step: int, first: int) -> tuple[int, int, int]:
    """Seed, step and first sample of function f, checked."""
    (seed,) = check.require_int(f, 0, 2**64, seed=seed)
    (step,) = check.require_int(f, 0, 2**32, step=step)
    return seed, step, *check.require_int(f, 0, 2**48 - batch + 1, first_sample=first)


def _image_key(
    f: str, batch: int, seed: Scalar, step: Scalar, first: Scalar, device: Device
) -> tuple[Scalar, Scalar, Scalar]:
    """As _key; a part may be an int64 scalar on the device."""
    parts = dict(seed=seed, step=step, first_sample=first)
    read = dict.fromkeys(parts, 0)  # of a tensor what can be read without waiting
    for name, part in parts.items():
        if not isinstance(part, Tensor):
            read[name] = part
            continue
        place = torch.empty(0, device=device).device
        if part.dim() or part.dtype != torch.int64 or part.device != place:
            came = describe(part)
            raise TypeError(f"{f}: {name} must be an int or an int64 scalar on {place}, got {came}")
        if check.readable(part):
            read[name] = int(part) % 2**64 if name == "seed" else int(part)
    whole = dict(zip(parts, _key(f, batch, *read.values()), strict=True))
    return tuple(p if isinstance(p, Tensor) else whole[name] for name, p in parts.items())


def _kernel(f: str, impl: str, grid: Grid, device: Device) -> bool:
    """Whether function f launches the kernel; checks impl."""
    chosen = (
        check.choose_impl(f, impl, ("triton", "torch"), torch.empty(0, device=device)) == "triton"
    )
    if chosen and impl == "triton" and grid[0] * grid[1] > _KERNEL_PATCHES:
        raise ValueError(
            f'{f}: impl "triton" takes at most {_KERNEL_PATCHES} patches, got {grid[0] * grid[1]}'
        )
    return chosen and grid[0] * grid[1] <= _KERNEL_PATCHES


def _launched(
    mask: str, batch: int, grid: Grid, kept: int, shape: Grid, key: tuple, device: Device
) -> Tensor:
    like, sizes = torch.empty(0, device=device), [*grid, kept, *shape]
    if any(isinstance(part, Tensor) for part in key):
        parts = [_scalar(part, like.device) for part in key]
        return torch.ops.clipa.choose_patches(like, mask, batch, sizes, [], torch.stack(parts))
    words = [_signed(word, 32) for word in (key[0] & LOW, key[0] >> 32, key[1])]
    return torch.ops.clipa.choose_patches(like, mask, batch, sizes, [*words, key[2]], None)


def _scalar(part: Scalar, device: torch.device) -> Tensor:
    if isinstance(part, Tensor):
        return part
    return torch.full((), _signed(part, 64), dtype=torch.int64, device=device)


def _signed(word: int, bits: int) -> int:
    """The number whose two's complement has these bits."""
    return word - (word >> (bits - 1) << bits)


@torch.library.custom_op("clipa::choose_patches", mutates_args=())
def _choose_patches(
    like: Tensor, mask: str, batch: int, sizes: list[int], words: list[int], key: Tensor | None
) -> Tensor:
    """On the device of `like`; sizes: grid, K, rectangle; words: the seed's halves, the step and
    the first sample, or none, and key, int64 [3], holds the three."""
    from .kernels import choose_patches

    return choose_patches(mask, batch, sizes, words, key, like.device)


@_choose_patches.register_fake
def _(like, mask, batch, sizes, words, key):
    return like.new_empty(batch, sizes[2], dtype=torch.int64)


def _keep_count(function: str, num_patches: int, drop: float) -> int:
    (num_patches,) = check.require_int(function, 1, 2**31, num_patches=num_patches)
    if isinstance(drop, bool) or not isinstance(drop, Real):
        raise TypeError(f"{function}: drop must be a number, got {drop!r}")
    if not 0 <= drop < 1:
        raise ValueError(f"{function}: drop must be in [0, 1), got {drop}")
    return max(1, int(num_patches * (1 - drop)))


@cache
def _block_shape(height: int, width: int, target: int) -> Grid:
    """The shape of area nearest to the target, then the squarest, then the flattest."""
    limit = max(2, height / width, width / height)
    shapes = []
    for tall in range(1, height + 1):
        # At one height only the widths beside target / tall can be best, or those beside the
        # bounds that the limit sets; neighbours too, as a float bound may round either way.
        beside = (target // tall, int(tall / limit), int(tall * limit), width)
        wides = {near + offset for near in beside for offset in (-1, 0, 1, 2)}
        shapes += [(tall, wide) for wide in wides if 1 <= wide <= width]
    shapes = [shape for shape in shapes if max(shape) <= limit * min(shape)]
    # Sorted, as Dynamo of torch 2.8 knows no min with a key.
    return sorted(shapes, key=lambda s: (abs(s[0] * s[1] - target), max(s) / min(s), s[0]))[0]


def _windows(starts: Tensor, lengths: Tensor) -> Tensor:
    """starts[b] to starts[b] + lengths[b] - 1 for every b, end to end."""
    offsets = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
    return offsets + torch.arange(len(offsets), device=lengths.device)


def _lowest(words: Tensor, lengths: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """The `context` lowest words of each caption, leftmost first on a tie."""
    captions = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    order = ((captions << 32) | words).argsort(stable=True)
    # Captions keep their places in the sorted order, so a place within its caption is a rank.
    keep = torch.empty(len(words), dtype=torch.bool, device=words.device)
    keep[order] = _windows(torch.zeros_like(lengths), lengths) < context
    return keep.nonzero()[:, 0], lengths.clamp(max=context)


def _images(
    function: str, batch: int, grid: Grid, device: Device
) -> tuple[int, Grid, torch.device | None]:
    """batch, grid and device, checked."""
    (batch,) = check.require_int(function, 0, 2**31, batch=batch)
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"{function}: grid must be (rows, columns), got {grid!r}")
    grid = check.require_int(function, 1, 2**15, grid_rows=grid[0], grid_columns=grid[1])
    return batch, grid, check.require_device(function, device)


def _captions(function: str, lengths: Tensor, context: int) -> tuple[Tensor, int]:
    """lengths in int64 and context, checked."""
    check.require_vectors(function, lengths=lengths)
    lengths = lengths.long()
    if check.readable(lengths) and len(lengths):
        for bound in lengths.aminmax():
            check.require_int(function, 0, 2**31, length=int(bound))
    return lengths, *check.require_int(function, 1, 2**31, context=context)


def _require_table(function: str, ids: Tensor, lengths: Tensor, priority: Tensor) -> None:
    check.require_vectors(function, ids=ids)
    check.require_tensor(function, priority=priority)
    if priority.dtype != torch.uint8:
        raise TypeError(f"{function}: priority must be uint8, got {describe(priority)}")
    if priority.dim() != 1:
        raise ValueError(f"{function}: priority must be one-dimensional, got {describe(priority)}")
    check.require_same_device(function, ids=ids, lengths=lengths, priority=priority)
    if check.readable(ids):
        if (total := int(lengths.sum())) != len(ids):
            raise ValueError(f"{function}: lengths must sum to the {len(ids)} ids, got {total}")
        for bound in ids.long().aminmax() if len(ids) else ():
            check.require_int(function, 0, len(priority), id=int(bound))
