"""Token choice: the generator's known answers, what each mask keeps, and that ranks agree."""

import itertools
import operator
import random
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clipa_kernels import philox_bits, philox_uniform
from clipa_kernels.masking import (
    all_patches,
    block_patches,
    block_text,
    grid_patches,
    keep_count,
    philox,
    random_patches,
    random_text,
    syntax_text,
    truncate_text,
)
from clipa_kernels.masking import api as masking

KEY = {"seed": 7, "step": 3}
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN = {
    "zeros": ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}

IMAGE_MASKS = {
    "random": lambda batch, **key: random_patches(batch, (8, 8), 0.75, **key),
    "grid": lambda batch, **key: grid_patches(batch, (8, 8), **key),
    "block": lambda batch, **key: block_patches(batch, (8, 8), 0.75, **key),
}
TEXT_MASKS = {"random": random_text, "block": block_text}
image_masks = pytest.mark.parametrize("mask", IMAGE_MASKS.values(), ids=IMAGE_MASKS)
text_masks = pytest.mark.parametrize("mask", TEXT_MASKS.values(), ids=TEXT_MASKS)


def philox_oracle(counter: tuple, key: tuple) -> list[int]:
    """The ten rounds in Python's own integers, in the paper's order."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b % 2**32, a >> 32 ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def word(seed: int, step: int, stream: int, sample: int, column: int) -> int:
    """One word by the counter layout of the module docstring."""
    counter = (column // 4, sample % 2**32, step, (sample >> 32) << 16 | stream)
    return philox_oracle(counter, (seed % 2**32, seed >> 32))[column % 4]


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.double().mean()
    return float(((counts - expected) ** 2 / expected).sum())


# The generator


@pytest.mark.parametrize("name", KNOWN)
def test_philox_known_answers(name):
    counter, key, words = KNOWN[name]
    assert philox._philox4x32([torch.tensor(c) for c in counter], key).tolist() == list(words)
    assert philox_oracle(counter, key) == list(words)


@pytest.mark.parametrize(
    ("seed", "step", "stream", "sample"),
    [(0, 0, 0, 0), (2**64 - 1, 2**32 - 1, 2**16 - 1, 2**48 - 1), (2**63 + 5, 9, 2, 2**33 + 1)],
    ids=["zeros", "largest", "high-words"],
)
def test_philox_counter_layout(seed, step, stream, sample):
    bits = philox_bits(seed, step, torch.tensor([sample]), 9, stream=stream)
    assert bits.dtype == torch.int64
    assert bits.tolist() == [[word(seed, step, stream, sample, column) for column in range(9)]]


@pytest.mark.parametrize("samples", [torch.empty(0, dtype=torch.int64), torch.arange(3)])
@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_philox_shape(samples, count):
    assert philox_bits(0, 0, samples, count).shape == (len(samples), count)
    assert philox_uniform(0, 0, samples, count).dtype == torch.float32


def test_streams_are_apart():
    streams = {name: value for name, value in vars(philox).items() if name.endswith("_STREAM")}
    windows = range(streams.pop("WINDOW_STREAM"), philox.WINDOW_STREAM + 2**15)
    assert len(set(streams.values())) == len(streams) > 7
    assert not any(value in windows for value in streams.values())
    assert max(streams.values()) < 2**16


def test_philox_columns_do_not_depend_on_count_or_batch():
    samples = torch.tensor([5, 2, 11], dtype=torch.int32)
    few = philox_bits(1, 2, samples[1:], 3)
    assert torch.equal(few, philox_bits(1, 2, samples, 50)[1:, :3])


def test_philox_inputs_all_matter():
    samples = torch.arange(4)
    rows = [philox_bits(1, 2, samples, 8, stream=3)]
    rows += [
        philox_bits(0, 2, samples, 8, stream=3),
        philox_bits(1 + 2**32, 2, samples, 8, stream=3),
    ]
    rows += [philox_bits(1, 1, samples, 8, stream=3), philox_bits(1, 2, samples, 8, stream=0)]
    rows += [philox_bits(1, 2, samples + 4, 8, stream=3)]
    rows += [philox_bits(1, 2, samples + 2**32, 8, stream=3)]
    words = torch.cat(rows).flatten()
    assert len(words.unique()) == len(words)


def test_uniform_is_the_upper_24_bits_and_below_one():
    samples = torch.arange(1000)
    uniform = philox_uniform(3, 4, samples, 64, stream=2)
    bits = philox_bits(3, 4, samples, 64, stream=2)
    assert torch.equal((uniform.double() * 2**24).long(), bits >> 8)
    assert 0 <= uniform.min() < 1e-3 and 0.999 < uniform.max() < 1
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert chi_square(torch.bincount((uniform * 256).long().flatten(), minlength=256)) < 350
    # Neighbouring columns and neighbouring samples are not correlated; 4 / sqrt(64000) = 0.016.
    centred = uniform - 0.5
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(float(product.mean()) * 12) < 0.016


# Image masks


@pytest.mark.parametrize(
    ("patches", "drop", "kept"),
    [(100, 0.9, 9), (256, 0.3, 179), (576, 0.4, 345), (256, 0.4, 153), (196, 0.5, 98), (4, 0.9, 1),
     (1, 0.99, 1), (64, 0, 64), (64, 0.75, 16)],
)  # fmt: skip
def test_keep_count(patches, drop, kept):
    assert keep_count(patches, drop) == kept


@pytest.mark.parametrize("grid", [(10, 10), (1, 7), (7, 1), (1, 1), (3, 5), (24, 24)])
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_random_patches_are_those_with_the_smallest_words(grid, drop):
    patches = grid[0] * grid[1]
    keep = random_patches(5, grid, drop, **KEY, first_sample=100)
    assert keep.shape == (5, keep_count(patches, drop)) and keep.dtype == torch.int64
    bits = philox_bits(7, 3, torch.arange(100, 105), patches)
    smallest = bits.argsort(dim=1, stable=True)[:, : keep.shape[1]]
    assert torch.equal(keep, smallest.sort(dim=1).values)


def test_random_patches_ties_go_to_the_lowest_index(monkeypatch):
    monkeypatch.setattr(
        masking, "draw_bits", lambda *_: torch.tensor([[5, 1, 2**32 - 1, 1, 5, 1, 5]])
    )
    assert random_patches(1, (1, 7), 0.4, **KEY).tolist() == [[0, 1, 3, 5]]


def test_random_patches_keep_every_patch_and_pair_equally_often():
    keep = random_patches(20_000, (4, 4), 0.75, **KEY)
    chosen = torch.zeros(20_000, 16).scatter_(1, keep, 1)
    assert (chosen.mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 20_000) ** 0.5
    pairs = (chosen.T @ chosen / 20_000)[~torch.eye(16, dtype=torch.bool)]
    assert (pairs - 4 * 3 / (16 * 15)).abs().max() < 5 * (0.05 * 0.95 / 20_000) ** 0.5


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (1, 6), (7, 1), (1, 1), (14, 14)])
def test_grid_patches_take_one_of_each_window(grid):
    keep = grid_patches(50, grid, **KEY)
    row, column = keep // grid[1], keep % grid[1]
    assert row.max() < grid[0] and (keep.diff(dim=1) > 0).all()
    across = (grid[1] + 1) // 2
    windows = (row // 2 * across + column // 2).sort(dim=1).values
    assert torch.equal(windows, torch.arange((grid[0] + 1) // 2 * across).repeat(50, 1))


def test_grid_patches_take_all_four_corners_equally_often():
    keep = grid_patches(5000, (5, 4), **KEY)
    counts = torch.bincount(keep.flatten(), minlength=20).view(5, 4)
    # Three degrees of freedom a window, four whole windows: mean 12, standard deviation 4.9.
    assert ((counts[:4] - 1250.0) ** 2 / 1250).sum() < 32
    assert (counts[4] - 2500).abs().max() < 150  # windows cut to one row choose between two


@pytest.mark.parametrize(
    "grid", [(14, 14), (16, 16), (8, 8), (4, 4), (5, 7), (1, 16), (16, 1), (4, 16)]
)
@pytest.mark.parametrize("drop", [0.0, 0.3, 0.75, 0.9])
def test_block_patches_are_one_rectangle_of_about_the_right_area(grid, drop):
    keep = block_patches(200, grid, drop, **KEY)
    row, column = keep // grid[1], keep % grid[1]
    tall = (row.amax(1) - row.amin(1) + 1).unique()
    wide = (column.amax(1) - column.amin(1) + 1).unique()
    assert len(tall) == len(wide) == 1 and row.max() < grid[0]
    assert keep.shape == (200, int(tall * wide)) and (keep.diff(dim=1) > 0).all()
    sides = sorted((int(tall), int(wide)))
    assert sides[1] <= sides[0] * max(2, grid[0] / grid[1], grid[1] / grid[0])
    target = keep_count(grid[0] * grid[1], drop)
    assert abs(keep.shape[1] - target) <= max(1, 0.06 * target)


@pytest.mark.parametrize(
    ("grid", "drop", "shape"),
    [((16, 16), 0.75, (8, 8)), ((14, 14), 0.5, (7, 14)), ((16, 16), 0.3, (12, 15)),
     ((14, 14), 0.933, (3, 4)), ((8, 4), 0.5, (4, 4)), ((6, 6), 0, (6, 6))],
)  # fmt: skip
def test_block_shape(grid, drop, shape):
    keep = block_patches(1, grid, drop, **KEY)[0]
    rows, columns = (keep // grid[1]).unique(), (keep % grid[1]).unique()
    assert (len(rows), len(columns)) == shape


def test_block_patches_lie_everywhere_equally_often():
    keep = block_patches(9000, (5, 4), 0.7, **KEY)  # 6 patches, 2 x 3: 4 x 2 places
    assert keep.shape[1] == 6
    counts = torch.bincount(keep[:, 0], minlength=20).view(5, 4)
    assert (counts > 0).nonzero().tolist() == [[y, x] for y in range(4) for x in range(2)]
    # 7 degrees of freedom: mean 7, standard deviation 3.7.
    assert chi_square(counts[counts > 0]) < 25


def test_block_shapes_are_found_without_trying_all():
    def by_trying(rows, columns, target):
        limit = max(2, rows / columns, columns / rows)
        shapes = itertools.product(range(1, rows + 1), range(1, columns + 1))
        shapes = [s for s in shapes if max(s) <= limit * min(s)]
        return min(shapes, key=lambda s: (abs(s[0] * s[1] - target), max(s) / min(s), s[0]))

    for rows, columns in [*itertools.product(range(1, 8), repeat=2), (3, 37), (24, 24)]:
        for target in range(1, rows * columns + 1):
            shape = masking._block_shape(rows, columns, target)
            assert shape == by_trying(rows, columns, target), (rows, columns, target)
    keep = block_patches(1, (2**15 - 1, 2**15 - 1), 0.9999999, **KEY)  # 10**9 shapes in all
    assert keep.shape[1] == 108  # 107 is prime


@image_masks
def test_numpys_integers_give_the_same_masks(mask):
    """They wrap, or overflow, where they are added: none may reach the arithmetic."""
    key = dict(seed=2**63 + 5, step=2**31, first_sample=100)
    kinds = dict(seed=np.uint64, step=np.uint32, first_sample=np.int8)
    numpys = {name: kinds[name](value) for name, value in key.items()}
    assert torch.equal(mask(np.int16(5), **numpys), mask(5, **key))
    side = np.int8(100)
    few = random_patches(1, (side, side), 0.99, seed=np.int32(1), step=np.int8(1))
    assert torch.equal(few, random_patches(1, (100, 100), 0.99, seed=1, step=1))


@image_masks
def test_a_compiled_step_is_never_a_number_in_the_arithmetic(mask):
    """Inductor writes 64-bit arithmetic on a number that changes as floats: words would differ."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda step: mask(3, seed=7, step=step), backend=backend, dynamic=True, fullgraph=True
    )
    for step in (3, 5, 2**32 - 1):
        assert torch.equal(compiled(step), mask(3, seed=7, step=step))
    assert len(graphs) == 1
    arithmetic = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    kinds = {type(node.meta["example_value"]) for node in arithmetic if node.target is operator.mul}
    assert kinds and all(issubclass(kind, torch.Tensor) for kind in kinds)


def test_all_patches():
    assert torch.equal(all_patches(3, (2, 5)), torch.arange(10).repeat(3, 1))
    assert torch.equal(all_patches(3, (2, 5)), random_patches(3, (2, 5), 0, **KEY))


@image_masks
@pytest.mark.parametrize("ranks", [2, 3, 12])
def test_image_masks_do_not_depend_on_the_number_of_ranks(mask, ranks):
    whole = mask(12, **KEY, first_sample=2**32 - 6)
    share = 12 // ranks
    parts = [mask(share, **KEY, first_sample=2**32 - 6 + r * share) for r in range(ranks)]
    assert torch.equal(whole, torch.cat(parts))


@image_masks
def test_image_masks_change_with_seed_step_and_sample(mask):
    first = mask(64, **KEY)
    assert not torch.equal(first, mask(64, seed=8, step=3))
    assert not torch.equal(first, mask(64, seed=7, step=4))
    assert not torch.equal(first, mask(64, **KEY, first_sample=64))
    assert torch.equal(first, mask(64, **KEY))


@image_masks
def test_image_masks_leave_the_global_generator_alone(mask):
    before = torch.get_rng_state()
    mask(4, **KEY)
    assert torch.equal(before, torch.get_rng_state())


@image_masks
def test_image_masks_of_an_empty_batch(mask):
    assert mask(0, **KEY).shape == (0, mask(1, **KEY).shape[1])


@image_masks
def test_image_masks_ask_the_device_for_nothing(mask):
    # A fake tensor has no values, so any read of one, which would be a synchronisation, raises.
    with FakeTensorMode():
        keep = mask(16, **KEY, device="cuda")
    assert keep.shape == mask(16, **KEY).shape and keep.device.type == "cuda"


@image_masks
@needs_cuda
def test_image_masks_on_cuda_are_equal_and_do_not_synchronise(mask):
    mask(2, **KEY, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        keep = mask(16, **KEY, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(keep.cpu(), mask(16, **KEY))


# Text masks


def ragged(lengths: list[int]) -> list[range]:
    starts = [0, *accumulate(lengths)]
    return [range(start, start + n) for start, n in zip(starts, lengths, strict=False)]


def truncate_oracle(lengths, context, **_):
    return [list(caption)[:context] for caption in ragged(lengths)]


def random_oracle(lengths, context, *, seed, step, first):
    kept = []
    for b, caption in enumerate(ragged(lengths)):
        words = [word(seed, step, 1, first + b, place) for place in range(len(caption))]
        order = sorted(range(len(caption)), key=lambda place, words=words: (words[place], place))
        kept.append([caption[place] for place in sorted(order[:context])])
    return kept


def block_oracle(lengths, context, *, seed, step, first):
    kept = []
    for b, caption in enumerate(ragged(lengths)):
        places = max(len(caption) - context, 0) + 1
        start = word(seed, step, 1, first + b, 0) * places // 2**32
        kept.append(list(caption)[start : start + context])
    return kept


LENGTHS = {
    "mixed": [3, 0, 9, 1, 4, 5, 17, 0],
    "one": [6],
    "empty-batch": [],
    "empty-captions": [0, 0],
    "first-empty": [0, 7, 2],
}
all_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
contexts = pytest.mark.parametrize("context", [1, 4, 100])


def assert_kept(actual: tuple, expected: list[list[int]]) -> None:
    keep, lengths = actual
    assert keep.dtype == lengths.dtype == torch.int64
    assert keep.tolist() == [index for caption in expected for index in caption]
    assert lengths.tolist() == [len(caption) for caption in expected]


@all_lengths
@contexts
def test_truncate_text(lengths, context):
    actual = truncate_text(torch.tensor(lengths, dtype=torch.int32), context)
    assert_kept(actual, truncate_oracle(lengths, context))


@all_lengths
@contexts
@pytest.mark.parametrize("name", TEXT_MASKS)
def test_drawn_text_masks_equal_the_oracle(lengths, context, name):
    oracle = {"random": random_oracle, "block": block_oracle}[name]
    tensor = torch.tensor(lengths, dtype=torch.int64)
    actual = TEXT_MASKS[name](tensor, context, seed=2**40 + 1, step=5, first_sample=2**32 - 2)
    expected = oracle(lengths, context, seed=2**40 + 1, step=5, first=2**32 - 2)
    assert_kept(actual, expected)


@all_lengths
@contexts
def test_syntax_text_equals_the_oracle(lengths, context):
    ids = random.Random(0).choices(range(10), k=sum(lengths))
    priority = [4, 4, 1, 2, 3, 1, 255, 0, 4, 2]
    expected = []
    for caption in ragged(lengths):
        order = sorted(caption, key=lambda index: (priority[ids[index]], index))
        expected.append(sorted(order[:context]))
    flat, tensor, table = (
        torch.tensor(values, dtype=dtype)
        for values, dtype in ((ids, torch.int32), (lengths, torch.int64), (priority, torch.uint8))
    )
    assert_kept(syntax_text(flat, tensor, context, table), expected)


def test_syntax_text_keeps_nouns_then_adjectives_then_verbs():
    words = ["the", "small", "dog", "jumps", "over", "the", "very", "old", "wall"]
    tags = {"dog": 1, "wall": 1, "small": 2, "old": 2, "jumps": 3}
    vocabulary = sorted(set(words))
    priority = torch.tensor([tags.get(w, 4) for w in vocabulary], dtype=torch.uint8)
    ids = torch.tensor([vocabulary.index(w) for w in words])
    kept = {n: [words[i] for i in syntax_text(ids, torch.tensor([9]), n, priority)[0]]
            for n in (2, 4, 5, 6)}  # fmt: skip
    assert kept[2] == ["dog", "wall"]
    assert kept[4] == ["small", "dog", "old", "wall"]
    assert kept[5] == ["small", "dog", "jumps", "old", "wall"]
    assert kept[6] == ["the", "small", "dog", "jumps", "old", "wall"]  # the leftmost of the rest


def test_block_text_starts_everywhere_the_last_place_too():
    keep, _ = block_text(torch.full((6000,), 8), 5, **KEY)
    starts = keep.view(6000, 5)[:, 0] - torch.arange(6000) * 8
    counts = torch.bincount(starts, minlength=4)
    assert len(counts) == 4 and chi_square(counts) < 16  # 3 degrees of freedom: mean 3, sd 2.4


def test_random_text_keeps_every_place_equally_often():
    keep, _ = random_text(torch.full((6000,), 10), 3, **KEY)
    counts = torch.bincount(keep % 10, minlength=10)
    assert (counts - 1800).abs().max() < 4 * (6000 * 0.3 * 0.7) ** 0.5


@text_masks
def test_text_masks_do_not_depend_on_the_split(mask):
    lengths = torch.tensor([9, 3, 0, 20, 11, 5, 8, 8])
    whole, kept = mask(lengths, 4, **KEY, first_sample=40)
    left, left_kept = mask(lengths[:3], 4, **KEY, first_sample=40)
    right, right_kept = mask(lengths[3:], 4, **KEY, first_sample=43)
    assert torch.equal(whole, torch.cat([left, right + lengths[:3].sum()]))
    assert torch.equal(kept, torch.cat([left_kept, right_kept]))


@text_masks
def test_text_masks_change_with_seed_and_step(mask):
    lengths = torch.full((50,), 20)
    first = mask(lengths, 5, **KEY)[0]
    assert not torch.equal(first, mask(lengths, 5, seed=8, step=3)[0])
    assert not torch.equal(first, mask(lengths, 5, seed=7, step=4)[0])


def test_text_and_image_streams_differ():
    text = random_text(torch.full((50,), 16), 4, **KEY)[0].view(50, 4) % 16
    assert not torch.equal(text, random_patches(50, (4, 4), 0.75, **KEY))


@pytest.mark.parametrize("context", [1, 30, 9999, 10_000])
def test_captions_of_ten_thousand_tokens(context):
    lengths = torch.tensor([10_000, 2, 10_000])
    ids = torch.arange(20_002) % 7
    priority = torch.tensor([4, 3, 2, 1, 4, 3, 2], dtype=torch.uint8)
    results = [truncate_text(lengths, context), syntax_text(ids, lengths, context, priority)]
    results += [mask(lengths, context, **KEY) for mask in TEXT_MASKS.values()]
    for keep, kept in results:
        assert kept.tolist() == [context, min(2, context), context]
        assert len(keep) == kept.sum() and (keep.diff() > 0).all() and keep.max() < 20_002
        assert ((keep >= 10_002).sum(), (keep < 10_000).sum()) == (context, context)


@needs_cuda
def test_text_masks_on_cuda_equal_those_on_the_cpu():
    lengths = torch.tensor(LENGTHS["mixed"])
    ids = torch.arange(int(lengths.sum())) % 5
    priority = torch.tensor([4, 1, 2, 1, 3], dtype=torch.uint8)
    calls = [
        lambda device: truncate_text(lengths.to(device), 4),
        lambda device: random_text(lengths.to(device), 4, **KEY),
        lambda device: block_text(lengths.to(device), 4, **KEY),
        lambda device: syntax_text(ids.to(device), lengths.to(device), 4, priority.to(device)),
    ]
    for call in calls:
        for actual, expected in zip(call("cuda"), call("cpu"), strict=True):
            assert actual.device.type == "cuda" and torch.equal(actual.cpu(), expected)


# Bad input


def image_calls(**change):
    given = {"batch": 2, "grid": (4, 4), "drop": 0.5, "seed": 0, "step": 0, "first_sample": 0}
    given |= change
    grid_only = {name: value for name, value in given.items() if name != "drop"}
    calls = [lambda: random_patches(**given), lambda: block_patches(**given)]
    return calls if "drop" in change else [*calls, lambda: grid_patches(**grid_only)]


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"drop": 1.0}, ValueError, r"drop must be in \[0, 1\), got 1.0"),
        ({"drop": -0.1}, ValueError, r"drop must be in \[0, 1\), got -0.1"),
        ({"drop": float("nan")}, ValueError, r"drop must be in \[0, 1\), got nan"),
        ({"drop": "half"}, TypeError, "drop must be a number, got 'half'"),
        ({"grid": 16}, ValueError, r"grid must be \(rows, columns\), got 16"),
        ({"grid": (4, 4, 4)}, ValueError, r"grid must be \(rows, columns\), got \(4, 4, 4\)"),
        ({"grid": (0, 4)}, ValueError, r"grid_rows must be in \[1, 32768\), got 0"),
        ({"grid": (4, -1)}, ValueError, r"grid_columns must be in \[1, 32768\), got -1"),
        ({"grid": (4, 2.0)}, TypeError, "grid_columns must be an integer, got 2.0"),
        ({"batch": -1}, ValueError, r"batch must be in \[0, 2147483648\), got -1"),
        ({"batch": 2.0}, TypeError, "batch must be an integer, got 2.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 18446744073709551616\), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be in .*, got 18446744073709551616"),
        ({"step": 2**32}, ValueError, r"step must be in \[0, 4294967296\), got 4294967296"),
        ({"step": -1}, ValueError, r"step must be in \[0, 4294967296\), got -1"),
        ({"step": 1.5}, TypeError, "step must be an integer, got 1.5"),
        ({"first_sample": -1}, ValueError, r"first_sample must be in \[0, .*\), got -1"),
        ({"first_sample": 2**48 - 1}, ValueError, "first_sample must be in .*, got 28147497671065"),
        ({"drop": False}, TypeError, "drop must be a number, got False"),
        ({"batch": True}, TypeError, "batch must be an integer, got True"),
        ({"grid": (True, 4)}, TypeError, "grid_rows must be an integer, got True"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"step": torch.tensor(1.0)}, TypeError, "step must be an int or .* cpu, got scalar float"),
        ({"step": torch.tensor([1])}, TypeError, "step must be an int or .*, got 1 int64 on cpu"),
        (
            {"seed": torch.tensor(1, device="meta")},
            TypeError,
            "seed must be an int or an int64 scalar on cpu, got scalar int64 on meta",
        ),
        ({"step": torch.tensor(-1)}, ValueError, r"step must be in \[0, 4294967296\), got -1"),
        ({"device": "nope"}, ValueError, "device must be one of torch's, got 'nope'"),
        ({"device": 1.5}, TypeError, "device must be one of torch's, got 1.5"),
        ({"impl": "cuda"}, ValueError, "impl must be one of .*, got 'cuda'"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_image_masks_refuse(change, error, sentence):
    for call in image_calls(**change):
        with pytest.raises(error, match=rf"^(random|grid|block)_patches: {sentence}"):
            call()


def test_other_image_functions_refuse():
    with pytest.raises(ValueError, match="all_patches: batch must be in .*, got -3"):
        all_patches(-3, (4, 4))
    with pytest.raises(TypeError, match="all_patches: batch must be an integer, got True"):
        all_patches(True, (4, 4))
    with pytest.raises(ValueError, match="all_patches: device must be one of torch's, got 'nope'"):
        all_patches(1, (4, 4), device="nope")
    with pytest.raises(ValueError, match="keep_count: num_patches must be in .*, got 0"):
        keep_count(0, 0.5)
    with pytest.raises(ValueError, match=r"keep_count: drop must be in \[0, 1\), got 1"):
        keep_count(5, 1)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"samples": [0, 1]}, TypeError, "samples must be a tensor, got list"),
        ({"samples": torch.zeros(2)}, TypeError, "samples must hold int32 or int64, got 2 float32"),
        ({"samples": torch.arange(4).view(2, 2)}, ValueError, "samples must be one-dim.*got 2x2"),
        ({"samples": torch.tensor([3, -1])}, ValueError, r"sample must be in \[0, .*\), got -1"),
        (
            {"samples": torch.tensor([2**48])},
            ValueError,
            "sample must be in .*, got 281474976710656",
        ),
        ({"count": -1}, ValueError, r"count must be in \[0, 4294967296\), got -1"),
        ({"stream": 2**16}, ValueError, r"stream must be in \[0, 65536\), got 65536"),
        ({"seed": -5}, ValueError, "seed must be in .*, got -5"),
        ({"step": 2**40}, ValueError, "step must be in .*, got 1099511627776"),
    ],
    ids=lambda value: next(iter(value)) if type(value) is dict else "",
)
def test_philox_refuses(change, error, sentence):
    given = {"seed": 0, "step": 0, "samples": torch.arange(2), "count": 4, "stream": 0} | change
    for function in (philox_bits, philox_uniform):
        with pytest.raises(error, match=f"^{function.__name__}: {sentence}"):
            function(**given)


@pytest.mark.parametrize(
    ("lengths", "context", "error", "sentence"),
    [
        ([3, 4], 2, TypeError, "lengths must be a tensor, got list"),
        (torch.tensor([3.0]), 2, TypeError, "lengths must hold int32 or int64, got 1 float32"),
        (torch.tensor([[3]]), 2, ValueError, "lengths must be one-dimensional, got 1x1"),
        (torch.tensor([3, -2]), 2, ValueError, r"length must be in \[0, .*\), got -2"),
        (torch.tensor([3]), 0, ValueError, r"context must be in \[1, .*\), got 0"),
        (torch.tensor([3]), -1, ValueError, r"context must be in \[1, .*\), got -1"),
        (torch.tensor([3]), 2.0, TypeError, "context must be an integer, got 2.0"),
        (torch.tensor([3]), True, TypeError, "context must be an integer, got True"),
        (torch.tensor([2**40]), 2, ValueError, "length must be in .*, got 1099511627776"),
    ],
    ids=[
        "list",
        "float",
        "matrix",
        "negative",
        "context-0",
        "context-negative",
        "context-float",
        "context-bool",
        "huge",
    ],
)
def test_text_masks_refuse(lengths, context, error, sentence):
    priority = torch.ones(9, dtype=torch.uint8)
    calls = {
        "truncate_text": lambda: truncate_text(lengths, context),
        "random_text": lambda: random_text(lengths, context, **KEY),
        "block_text": lambda: block_text(lengths, context, **KEY),
        "syntax_text": lambda: syntax_text(torch.arange(3), lengths, context, priority),
    }
    for name, call in calls.items():
        with pytest.raises(error, match=f"^{name}: {sentence}"):
            call()


@text_masks
def test_drawn_text_masks_refuse_a_bad_key(mask):
    for bad in ({"seed": -1, "step": 0}, {"seed": 0, "step": 2**32}):
        with pytest.raises(ValueError, match="_text: (seed|step) must be in"):
            mask(torch.tensor([3]), 2, **bad)
    with pytest.raises(ValueError, match="_text: first_sample must be in .*, got -1"):
        mask(torch.tensor([3]), 2, **KEY, first_sample=-1)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"ids": torch.tensor([0, 1])}, ValueError, "lengths must sum to the 2 ids, got 3"),
        ({"ids": torch.tensor([0, 5, 1])}, ValueError, r"id must be in \[0, 5\), got 5"),
        ({"ids": torch.tensor([0, -1, 1])}, ValueError, r"id must be in \[0, 5\), got -1"),
        ({"ids": torch.zeros(3)}, TypeError, "ids must hold int32 or int64, got 3 float32"),
        ({"ids": torch.zeros(1, 3).long()}, ValueError, "ids must be one-dimensional, got 1x3"),
        ({"ids": [0, 1, 2]}, TypeError, "ids must be a tensor, got list"),
        ({"priority": torch.ones(5)}, TypeError, "priority must be uint8, got 5 float32"),
        ({"priority": torch.ones(5, 1).byte()}, ValueError, "priority must be one-dim.*got 5x1"),
        ({"priority": [1, 2]}, TypeError, "priority must be a tensor, got list"),
        ({"priority": torch.ones(5).byte().to("meta")}, ValueError, "all tensors must be on one"),
    ],
    ids=["sum", "id-high", "id-negative", "ids-float", "ids-matrix", "ids-list", "priority-float",
         "priority-matrix", "priority-list", "devices"],
)  # fmt: skip
def test_syntax_text_refuses(change, error, sentence):
    given = {"ids": torch.tensor([0, 1, 4]), "lengths": torch.tensor([1, 2]), "context": 1}
    given |= {"priority": torch.ones(5, dtype=torch.uint8)} | change
    with pytest.raises(error, match=f"^syntax_text: {sentence}"):
        syntax_text(**given)
