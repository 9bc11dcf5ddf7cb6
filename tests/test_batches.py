"""The order of samples is a pure function of seed and step; a batch shows one vendor."""

import pytest
import torch

from data.batches import global_rows, local_slice, order, uniform_rows
from data.emoji import EmojiPairs, load_emoji


@pytest.fixture(scope="module")
def pairs() -> EmojiPairs:
    return load_emoji()


def test_order_is_a_pure_permutation():
    first = order(1, 0, 1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert torch.equal(first, order(1, 0, 1000))
    for other in (order(1, 1, 1000), order(2, 0, 1000)):
        assert (other == first).float().mean() < 0.02
    assert first[:4].tolist() == order(1, 0, 1000)[:4].tolist()
    assert len(order(0, 0, 0)) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 10, 33])
def test_global_rows_leave_nothing_out(batch_size):
    steps = 10 * batch_size
    stream = torch.cat([global_rows(3, step, batch_size, 10) for step in range(steps)])
    epochs = stream[: len(stream) // 10 * 10].view(-1, 10)
    assert torch.equal(epochs.sort(1).values, torch.arange(10).expand_as(epochs))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > len(epochs) // 2


@pytest.mark.parametrize("batch_size", [64, 256])
def test_a_batch_shows_one_vendor_and_no_concept_twice(pairs, batch_size):
    owners, vendors = pairs.concept[pairs.train], pairs.vendor[pairs.train]
    seen = set()
    for step in range(24):
        rows = uniform_rows(0, step, batch_size, vendors)
        assert len(rows) == len(owners[rows].unique()) == batch_size
        assert len(vendors[rows].unique()) == 1
        seen.add(int(vendors[rows[0]]))
    assert seen == {0, 1}


def test_an_epoch_shows_nearly_every_drawing_once(pairs):
    vendors = pairs.vendor[pairs.train]
    per_epoch = sum(int(count) // 64 for count in vendors.bincount())
    seen = torch.cat([uniform_rows(0, step, 64, vendors) for step in range(per_epoch)])
    assert len(seen.unique()) == len(seen)
    assert len(seen) > 0.95 * len(vendors)
    following = uniform_rows(0, per_epoch, 64, vendors)
    assert not torch.equal(following, seen[:64])


def test_batches_larger_than_a_vendor_straddle_epochs(pairs):
    vendors = pairs.vendor[pairs.train]
    rows = torch.cat([uniform_rows(0, step, 4000, vendors) for step in range(3)])
    assert rows.bincount(minlength=len(vendors)).aminmax() == (3, 4)


def test_slices_cover_the_batch():
    rows = [list(range(12))[local_slice(12, rank, 4)] for rank in range(4)]
    assert [row for share in rows for row in share] == list(range(12))


def same(one, other) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


def joined(batches: list) -> tuple:
    ids = torch.cat([batch.ids for batch in batches])
    lengths = torch.cat([batch.cu_seqlens.diff() for batch in batches])
    return torch.cat([batch.images for batch in batches]), ids, lengths
