"""The order of samples: sources by weight, parts of a batch, windows; without any file."""

from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
import torch

from data.sources import Mix, Order, weights_of


def simulated(sizes, weights, repeat):
    """The same by counting: each round holds the sources left, spread evenly."""
    state = [[0, 0] for _ in sizes]  # epoch and next number
    left = set(range(len(sizes)))

    def pattern():
        # The least whole numbers in proportion to the weights of those that are left.
        lcm = np.lcm.reduce([weights[s].denominator for s in left])
        counts = {s: int(weights[s] * lcm) for s in left}
        divisor = np.gcd.reduce(list(counts.values()))
        counts = {s: n // divisor for s, n in counts.items()}
        return sorted(
            (Fraction(2 * i + 1, 2 * n), s) for s, n in counts.items() for i in range(int(n))
        )

    while True:
        for _, source in pattern():
            epoch, number = state[source]
            yield source, epoch, number
            state[source] = [epoch, number + 1]
            if number + 1 == sizes[source]:
                state[source] = [epoch + 1, 0]
                if not repeat:
                    left.discard(source)
                    left = left or set(range(len(sizes)))
                    break


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize(
    ("sizes", "mix"),
    [([6, 1], "2::1"), ([30, 7], "3::1"), ([5, 40, 9], "1::0.25::2"), ([8], "5"), ([1, 1], "1::9")],
)
def test_places_are_those_of_counting(sizes, mix, repeat):
    weights = weights_of(mix, len(sizes))
    places = Mix(sizes, weights, repeat=repeat)
    expected = list(islice(simulated(sizes, weights, repeat), 3 * sum(sizes)))
    assert [places.at(place) for place in range(3 * sum(sizes))] == expected


def test_any_stretch_holds_the_sources_in_proportion():
    places = Mix([10**6, 10**6, 10**6], weights_of("3::1::0.5", 3))
    for start in (0, 5, 1234, 99_999):
        for length in (1, 9, 32, 100):
            found = Counter(places.at(start + i)[0] for i in range(length))
            for source, share in enumerate((6 / 9, 2 / 9, 1 / 9)):
                assert abs(found[source] - share * length) <= 1.0


def test_without_repeat_each_sample_once_a_cycle():
    places = Mix([6, 5, 1], weights_of("1::2::1", 3))
    for cycle in range(3):
        found = [places.at(place) for place in range(12 * cycle, 12 * cycle + 12)]
        assert {epoch for _, epoch, _ in found} == {cycle}
        assert sorted((s, n) for s, _, n in found) == [
            (s, n) for s, size in enumerate([6, 5, 1]) for n in range(size)
        ]
    assert places.first_end() == (2, 3)  # 1, 0, 2, 1


def test_weights_too_fine_for_a_round_are_rounded():
    places = Mix([10**9, 10**9], weights_of("0.123456789::1", 2))
    assert len(places.phases[0].pattern) <= 4097
    shares = Counter(places.phases[0].pattern)
    assert shares[0] / shares[1] == pytest.approx(0.123456789, rel=0.01)


@pytest.mark.parametrize("mix", ["1", "1::2::3", "1::0", "1::-1", "a::b", "1::inf", "::"])
def test_weights_that_are_none(mix):
    with pytest.raises(ValueError, match=r"sources: mix must hold a weight above 0 for each"):
        weights_of(mix, 2)
    assert weights_of("", 2) is None


def sizes_of(count, seed=3, most=7):
    return torch.randint(most, (count,), generator=torch.manual_seed(seed)).numpy()


def order_of(sizes, ends, **change):
    how = {"batch_size": 12, "seed": 5, "window": 2} | change
    return Order(sizes, ends, **how)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("mix", ["", "3::1"])
def test_parts_read_shards_of_their_own(parts, mix):
    """All epochs of a part show the same samples, each once; all parts together show all."""
    sizes = sizes_of(40)
    order = order_of(sizes, [25, 40], parts=parts, weights=weights_of(mix, 2), repeat=True)
    everything = {(s, r) for s in range(40) for r in range(sizes[s])}
    streams = [[] for _ in range(parts)]
    for place in range(12 * 60):
        part = place % 12 * parts // 12
        found = order.at(place)
        assert found.window.part == part
        streams[part].append(found)
    shown = [{(at.shard, at.row) for at in stream} for stream in streams]
    assert set().union(*shown) == everything and sum(map(len, shown)) == len(everything)
    for stream in streams:
        counts = Counter((at.window.source, at.window.epoch, at.shard, at.row) for at in stream)
        assert set(counts.values()) == {1}  # no sample twice in an epoch
        for key in {(at.window.source, at.window.epoch) for at in stream}:
            windows = [at.window.number for at in stream if at.window[1:3] == key]
            assert windows == sorted(windows)
    touched = [{shard for shard, _ in pairs} for pairs in shown]
    for one in range(parts):
        for other in range(one):
            # A shard that lies across the border of two parts, in each source.
            assert len(touched[one] & touched[other]) <= (2 if mix else 1)


def test_the_windows_of_places_and_those_that_follow():
    order = order_of(np.full(10, 4), [10], batch_size=4)  # a window: two shards, two steps
    steps = [[order.at(place) for place in range(4 * step, 4 * step + 4)] for step in range(20)]
    windows = [{at.shard for at in steps[i] + steps[i + 1]} for i in range(0, 20, 2)]
    assert all(len(window) == 2 for window in windows)
    for step, places in enumerate(steps[:18]):
        now, later = order.near(places)
        assert set(now) == windows[step // 2]
        assert set(later) == windows[step // 2 + 1] - windows[step // 2]
    now, later = order.near(steps[1] + steps[2])
    assert set(now) == windows[0] | windows[1] and set(later) == windows[2]


def test_what_parts_ask_of_a_batch_and_of_sources():
    with pytest.raises(ValueError, match=r"parts must be at least 1 and divide a batch of 12"):
        order_of(sizes_of(9), [9], parts=5)
    with pytest.raises(ValueError, match=r"source 2 must hold a sample for each of 3 parts, got 2"):
        order_of(np.array([9, 2]), [1, 2], parts=3, weights=weights_of("1::1", 2))
    with pytest.raises(ValueError, match=r"the shards must hold a sample for each of 3 parts"):
        order_of(np.array([1, 1]), [2], parts=3)
