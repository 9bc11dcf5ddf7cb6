"""Philox4x32-10 in plain torch, exact on any device; counter and key as in api.py."""

import torch
from torch import Tensor

from ..check import readable, require_int, require_vectors

LOW = 0xFFFFFFFF

# Every stream that this library and the program beside it draw from: no two uses share words.
IMAGE_STREAM, TEXT_STREAM = 0, 1  # which patches and which text tokens stay
AUGMENT_STREAM = 2  # crops and colours of images
ORDER_STREAM, CAPTION_STREAM = 3, 4  # order of samples in an epoch; caption of an image
WINDOW_STREAM = 5  # to 5 + 2**15 - 1: order of shards, and of samples in each window of shards
TURN_STREAM = 0xFF00  # order of the demo's batches within an epoch
BLEND_STREAM, SHAPE_STREAM = 0xFF01, 0xFF02  # drawings faded into others; images turned and bent
PART_STREAM = 0xFF03  # how a source's shards are dealt to parts of the batch


def philox_bits(seed: int, step: int, samples: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Random 32-bit words, a row for each sample, from (seed, step, stream, sample, column) alone.

    Args:
        seed: key of the run, in [0, 2**64).
        step: training step, in [0, 2**32).
        samples: int32 or int64 [B], global indices in [0, 2**48) (values checked on the CPU only).
        count: words for each sample; 0 gives an empty result.
        stream: what the words are for, in [0, 2**16); streams are independent.
    Returns: int64 [B, count] on the device of samples, values in [0, 2**32).
    Raises:
        TypeError: samples is not an integer tensor, or a number is not an integer.
        ValueError: samples is not one-dimensional, or a value is out of its range.
    Source: Philox4x32-10 of Salmon et al. 2011; counter and key as in api.py.

    >>> [hex(word) for word in philox_bits(0, 0, torch.tensor([0]), 4)[0].tolist()]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    return _checked_bits("philox_bits", seed, step, samples, count, stream)


def _checked_bits(
    function: str, seed: int, step: int, samples: Tensor, count: int, stream: int
) -> Tensor:
    require_vectors(function, samples=samples)
    (seed,) = require_int(function, 0, 2**64, seed=seed)
    step, count = require_int(function, 0, 2**32, step=step, count=count)
    (stream,) = require_int(function, 0, 2**16, stream=stream)
    samples = samples.long()
    if readable(samples) and len(samples):
        for bound in samples.aminmax():
            require_int(function, 0, 2**48, sample=int(bound))
    return draw_bits(seed, step, samples, count, stream)


def philox_uniform(seed: int, step: int, samples: Tensor, count: int, *, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1): the upper 24 bits of philox_bits, times 2**-24.

    Args, Raises: as philox_bits.
    Returns: float32 [B, count] on the device of samples, equal on all devices.
    """
    bits = _checked_bits("philox_uniform", seed, step, samples, count, stream)
    return (bits >> 8).float() * 2**-24


def draw_words(
    seed: int | Tensor, step: int | Tensor, stream: int, samples: Tensor, blocks: Tensor
) -> Tensor:
    """int64 [..., 4]: the four words of each counter, all but the seed broadcast to [...]."""
    # A step that changes from call to call is no constant to torch.compile: arithmetic on such a
    # number is not done in 64 bits in the code that it makes, on a tensor it is.
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=samples.device)
    counter = (blocks, samples & LOW, step, (samples >> 32 << 16) | stream)
    return _philox4x32(counter, (seed & LOW, seed >> 32 & LOW))


def _philox4x32(counter: tuple, key: tuple) -> Tensor:
    """Philox4x32-10 of four int64 tensors (or ints) of uint32 values: int64 [..., 4]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product wraps modulo 2**64 and the shift drags its sign along: the mask removes it.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & LOW) ^ c1 ^ k0, b & LOW
        c2, c3 = ((a >> 32) & LOW) ^ c3 ^ k1, a & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def draw_bits(
    seed: int | Tensor, step: int | Tensor, samples: Tensor, count: int, stream: int
) -> Tensor:
    """philox_bits without its checks; seed and step may be int64 scalars on the device."""
    blocks = torch.arange((count + 3) // 4, device=samples.device)
    return draw_words(seed, step, stream, samples[:, None], blocks).flatten(1)[:, :count]
